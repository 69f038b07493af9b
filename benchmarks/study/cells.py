"""The plan of the study: which cells there are, in which order, and how one is run.

A cell is a dict: "part" of the study, "name" within it, "seed", and what its function is to be given. Cells that need
an earlier result (a learning rate) are planned when it is there, so `plan` is asked again until all it gives is done.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.study import encoder, grid, task
from benchmarks.study.methods import Method
from benchmarks.study.store import Store

TUNING_SEED = 100  # not among the seeds that are reported


@dataclass(frozen=True)
class Scale:
    """How much is run.

    Args:
        sizes: see `task.load`.
        epochs: of the encoder's training.
        methods: of `grid.MAIN`; the others are left out.
        tune: whether learning rates are searched for; else the middle ones are taken.
        ablations: whether the ablations are run, and for how many of the seeds.
        causal: whether the parts with a language model are run.
    """

    sizes: tuple[int, int, int] = task.SIZES
    epochs: float = encoder.EPOCHS
    methods: tuple[str, ...] = tuple(grid.MAIN)
    tune: bool = True
    ablations: int = 3


FULL = Scale()
QUICK = Scale((40, 20, 40), 1.5, grid.QUICK, tune=False, ablations=0)


def key(cell: dict[str, Any]) -> str:
    return f"{cell['part']}|{cell['name']}|lr={cell['lr']:g}|seed={cell['seed']}"


def encoder_cell(part: str, name: str, method: Method, lr: float, seed: int, **options: Any) -> dict[str, Any]:
    return {"part": part, "name": name, "seed": seed, "lr": lr, "method": asdict(method), "options": options}


def best_rate(store: Store, name: str, scale: Scale) -> float | None:
    """The rate with the best validation accuracy (of equals, with the lower training loss); None: not known yet."""
    rates = grid.RATES[grid.MAIN[name].kind]
    if not scale.tune:
        return rates[1]
    tried = [cell for cell in store.of("tuning") if cell["name"] == name]
    if len(tried) < len(rates):
        return None
    return max(tried, key=lambda cell: (cell["result"]["validation"], -cell["result"]["loss"][-1]))["lr"]


def plan(store: Store, seeds: list[int], scale: Scale) -> Iterator[dict[str, Any]]:
    """The cells that can be run now, finished ones included: first the tuning, then all of one seed after the other."""
    if scale.tune:
        for name in scale.methods:
            for lr in grid.RATES[grid.MAIN[name].kind]:
                yield encoder_cell("tuning", name, grid.MAIN[name], lr, TUNING_SEED, measure=("validation",))
    for number, seed in enumerate(seeds):
        for name in scale.methods:
            lr = best_rate(store, name, scale)
            if lr is not None:
                every = 15 if number == 0 and name in grid.WITH_CURVE else 0
                yield encoder_cell("main", name, grid.MAIN[name], lr, seed, every=every)
        if number < scale.ablations:
            yield from ablation_cells(store, seed, scale)


def ablation_cells(store: Store, seed: int, scale: Scale) -> Iterator[dict[str, Any]]:
    lr = best_rate(store, grid.BASIS, scale)
    if lr is None:
        return
    for group, variants in grid.ABLATIONS.items():
        for name, method in variants.items():
            yield encoder_cell("ablation", f"{group}: {name}", method, lr, seed)
    for other in grid.ABLATED_RATES:
        if other != lr:
            yield encoder_cell("ablation", f"learning rate: {other:g}", grid.MAIN[grid.BASIS], other, seed)


def run(cell: dict[str, Any], split: int, scale: Scale) -> dict[str, Any]:
    """The cell's result."""
    data = task.load(split, scale.sizes)
    options = {**cell["options"], "epochs": scale.epochs}
    return encoder.run(data, Method(**cell["method"]), cell["lr"], cell["seed"], **options)
