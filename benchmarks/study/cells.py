"""The plan of the study: which cells there are, in which order, and how one is run.

A cell is a dict: "part" of the study, "name" within it, "seed", learning rate and method. Cells that need an earlier
result (a learning rate, the base model) are planned when it is there, so `plan` is asked again until all it gives is
done.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.study import causal, edits, encoder, grid, instructions, memory, styles, task
from benchmarks.study.methods import Method
from benchmarks.study.store import Store

TUNING_SEED = 100  # not among the seeds that are reported
CURVE_EVERY = 15  # steps


@dataclass(frozen=True)
class Scale:
    """How much is run.

    Args:
        sizes: see `task.load`.
        epochs: of the encoder's training.
        base_steps: of the language model's own training.
        steps: what the steps of its finetuning are multiplied with.
        tune: whether the encoder's learning rates are searched for; else the middle ones are taken.
        later: seeds, of those asked for, for which ablations and language model are run.
        encoder, edits, instructions, styles, composed, memory: methods, by their names in `grid`.
        ablations: groups of `grid.ABLATIONS`.
    """

    sizes: tuple[int, int, int] = task.SIZES
    epochs: float = encoder.EPOCHS
    base_steps: int = 1500
    steps: float = 1.0
    tune: bool = True
    later: int = 3
    encoder: tuple[str, ...] = tuple(grid.MAIN)
    ablations: tuple[str, ...] = tuple(grid.ABLATIONS)
    edits: tuple[str, ...] = ("LoReFT r4 all", "DiReFT r4 all")
    instructions: tuple[str, ...] = tuple(grid.INSTRUCTIONS)
    styles: tuple[str, ...] = tuple(grid.STYLES)
    composed: tuple[str, ...] = grid.COMPOSED
    memory: tuple[str, ...] = tuple(grid.MEMORY)


FULL = Scale()
QUICK = Scale(
    sizes=(40, 20, 40),
    epochs=1.5,
    base_steps=500,
    steps=0.5,
    tune=False,
    later=1,
    encoder=grid.QUICK,
    ablations=("equation",),
    edits=("DiReFT r4 all",),
    instructions=("LoReFT r4 all", "LoRA r8"),
    styles=("LoReFT r4 f1+l1", "LoReFT r4 f1+l1+d", "LoRA r8"),
    composed=("LoReFT r4 f1+l1+d",),
    memory=("l1, all blocks, r4",),
)


def key(cell: dict[str, Any]) -> str:
    return f"{cell['part']}|{cell['name']}|lr={cell['lr']:g}|seed={cell['seed']}"


def cell_of(part: str, name: str, method: Method, lr: float, seed: int, every: int = 0) -> dict[str, Any]:
    return {"part": part, "name": name, "seed": seed, "lr": lr, "method": asdict(method), "every": every}


# What can be asked for by itself -> the parts whose cells that takes.
TOPICS = {
    "encoder": ("encoder tuning", "encoder"),
    "ablation": ("encoder tuning", "encoder", "ablation"),
    "edits": ("encoder tuning", "edits"),
    "instructions": ("base", "instructions"),
    "styles": ("base", "styles"),
    "composition": ("base", "composition"),
    "memory": ("base", "memory"),
}


def plan(
    store: Store, seeds: list[int], scale: Scale, topics: Iterable[str] = tuple(TOPICS)
) -> Iterator[dict[str, Any]]:
    """The cells that can be run now, finished ones included: the tuning, then seed after seed.

    Args:
        topics: names in TOPICS.
    """
    parts = {part for topic in topics for part in TOPICS[topic]}
    yield from (cell for cell in all_cells(store, seeds, scale) if cell["part"] in parts)


def all_cells(store: Store, seeds: list[int], scale: Scale) -> Iterator[dict[str, Any]]:
    """See `plan`."""
    yield cell_of("base", "language model", Method("full"), causal.RATE, 0)
    if scale.tune:
        for name in scale.encoder:
            for lr in grid.RATES[grid.MAIN[name].kind]:
                yield cell_of("encoder tuning", name, grid.MAIN[name], lr, TUNING_SEED)
    for number, seed in enumerate(seeds):
        yield from at_best("encoder", scale.encoder, store, seed, scale, () if number else grid.WITH_CURVE)
        if number == 0:
            yield from at_best("edits", scale.edits, store, seed, scale)
        if number < scale.later:
            if store.of("base"):
                yield from causal_cells(seed, scale)
            yield from ablation_cells(store, seed, scale)


def best_rate(store: Store, name: str, scale: Scale) -> float | None:
    """The rate with the best validation accuracy (of equals, with the lower training loss); None: not known yet."""
    tried = grid.RATES[grid.MAIN[name].kind]
    if not scale.tune:
        return tried[1]
    found = [cell for cell in store.of("encoder tuning") if cell["name"] == name]
    if {cell["lr"] for cell in found} != set(tried):
        return None
    return max(found, key=lambda cell: (cell["result"]["validation"], -cell["result"]["loss"][-1]))["lr"]


def at_best(
    part: str, names: Iterable[str], store: Store, seed: int, scale: Scale, curves: Iterable[str] = ()
) -> Iterator[dict[str, Any]]:
    """Cells of the encoder's methods, at their best rates, as far as these are known.

    Args:
        curves: methods whose validation accuracy is measured during training.
    """
    for name in names:
        lr = best_rate(store, name, scale)
        if lr is not None:
            yield cell_of(part, name, grid.MAIN[name], lr, seed, CURVE_EVERY if name in curves else 0)


def ablation_cells(store: Store, seed: int, scale: Scale) -> Iterator[dict[str, Any]]:
    lr = best_rate(store, grid.BASIS, scale)
    if lr is None:
        return
    for group in scale.ablations:
        for name, method in grid.ABLATIONS[group].items():
            yield cell_of("ablation", f"{group}: {name}", method, lr, seed)
    if scale.tune:
        for other in grid.ABLATED_RATES:
            if other != lr:
                yield cell_of("ablation", f"learning rate: {other:g}", grid.MAIN[grid.BASIS], other, seed)


def causal_cells(seed: int, scale: Scale) -> Iterator[dict[str, Any]]:
    for part, methods, names in (
        ("styles", grid.STYLES, scale.styles),
        ("instructions", grid.INSTRUCTIONS, scale.instructions),
        ("composition", grid.STYLES, scale.composed),
        ("memory", grid.MEMORY, scale.memory),
    ):
        for name in names:
            yield cell_of(part, name, methods[name], grid.CAUSAL_RATES[methods[name].kind], seed)


def run(cell: dict[str, Any], split: int, scale: Scale) -> dict[str, Any]:
    """The cell with its result, and the CPU seconds that it took in all."""
    begin = time.process_time()
    result = result_of(cell, split, scale)
    return {**cell, "cpu_seconds": round(time.process_time() - begin, 1), "result": result}


def result_of(cell: dict[str, Any], split: int, scale: Scale) -> dict[str, Any]:
    """See `run`."""
    data = task.load(split, scale.sizes)
    method, lr, seed = Method(**cell["method"]), cell["lr"], cell["seed"]
    part, _, tuning = cell["part"].partition(" ")
    if part in ("encoder", "ablation"):
        measure = ("validation",) if tuning else ("test",)
        return encoder.run(data, method, lr, seed, measure, scale.epochs, cell["every"])
    if part == "edits":
        return edits.run(data, method, lr, seed, scale.epochs)
    base = causal.base(data, scale.base_steps)
    if part == "base":
        return base.record
    module = {"instructions": instructions, "styles": styles, "composition": styles, "memory": memory}[part]
    steps = max(1, round(module.STEPS * scale.steps))
    if part == "composition":
        return styles.run_composition(data, base, method, lr, seed, steps)
    if part == "memory":
        return memory.run(data, base, method, lr, seed, steps)
    return module.run(data, base, method, lr, seed, steps)
