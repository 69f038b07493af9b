"""Which cells there are, in which order, and how some are run side by side.

A cell is a dictionary that says all about one training: `{"part", "name", "method", "lr", "seed", "steps"}`. The order
is such that a run that is cut has the most telling ones: the base model; every method of the core at two learning
rates, then at four, then more seeds at the best; then the other methods, and what is varied of LoReFT.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from benchmarks.real_llm import evaluate, grid, instructions, rows, tasks
from benchmarks.real_llm.sizes import INSTRUCTIONS
from benchmarks.real_llm.training import EAGER_STEPS, Training
from benchmarks.study.methods import Method, count
from benchmarks.study.store import Store
from benchmarks.study.training import tenths

Cell = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all cells of a run have in common.

    Args:
        model, data: folders.
        tasks: names of the data's files: questions, or `INSTRUCTIONS` alone.
        steps, rows: of a training, and rows in a batch.
        longest: tokens of a row at most, answer included; longer questions are left out, longer answers cut.
        validation: rows that choose the learning rate.
        test: test rows of each task at most.
        size: rows in a batch of the evaluation.
        seeds: of each method at its best rate; the first tries all rates, the others may change which is best.
        device: "cuda" or "cpu".
    """

    model: str
    data: str
    tasks: tuple[str, ...] = tasks.TASKS
    steps: int = 300
    rows: int = 32
    longest: int = 96
    validation: int = 400
    test: int = 1000
    size: int = 256
    seeds: tuple[int, ...] = (0, 1, 2)
    device: str = "cuda"

    @property
    def asks(self) -> bool:
        """Whether rows are questions with choices."""
        return self.tasks != (INSTRUCTIONS,)

    def of_results(self) -> str:
        """What results depend on, as one string: cells with another one are not mixed in."""
        kept = (
            ",".join(self.tasks),
            f"{self.steps} x {self.rows} rows of {self.longest}",
            f"test {self.test}, {self.validation}",
        )
        return "; ".join((*kept, "bfloat16" if self.device == "cuda" else "float32"))


BASE: Cell = {"part": "base", "name": "base model", "method": None, "lr": 0.0, "seed": 0, "steps": 0}


def cell_of(part: str, name: str, lr: float, seed: int, steps: int) -> Cell:
    method = dataclasses.asdict(grid.EVERYTHING[name])
    return {"part": part, "name": name, "method": method, "lr": lr, "seed": seed, "steps": steps}


def plan(store: Store, setup: Setup, names: Iterable[str] = grid.EVERYTHING) -> Iterator[Cell]:
    """All cells that can be run by now, finished ones included; a method's later seeds when its rates are known."""
    yield BASE
    wanted = set(names)
    core = [name for name in grid.CORE if name in wanted]
    main = [name for name in grid.MAIN if name in wanted and name not in core]
    more = [name for name in grid.MORE if name in wanted]
    for some in (core, main, more):
        for slot in (range(grid.FIRST), range(grid.FIRST, 4)):
            for number in slot:
                for name in some:
                    yield cell_of("main", name, rates(name, setup)[number], setup.seeds[0], setup.steps)
        for seed in setup.seeds[1:]:
            for name in some:
                lr = best_rate(store, name, setup)
                if lr is not None:
                    yield cell_of("main", name, lr, seed, setup.steps)
    lr = best_rate(store, grid.BASIS, setup) if grid.BASIS in wanted and setup.asks else None
    if lr is not None:
        for rate in (lr, lr / 3):
            yield cell_of("longer", grid.BASIS, rate, setup.seeds[0], grid.LONGER * setup.steps)


def rates(name: str, setup: Setup) -> tuple[float, ...]:
    """The learning rates that are tried for a method."""
    return (grid.RATES if setup.asks else grid.CHAT_RATES)[grid.EVERYTHING[name].kind]


def best_rate(store: Store, name: str, setup: Setup) -> float | None:
    """The rate that is best on the validation rows so far; None until all four are known, or if all diverged."""
    found: dict[float, list[dict[str, Any]]] = {lr: [] for lr in rates(name, setup)}
    for cell in store.of("main"):
        if cell["name"] == name and cell["lr"] in found:
            found[cell["lr"]].append(cell["result"])
    if not all(found.values()):
        return None
    best = evaluate.best_rate(found)
    return best if math.isfinite(evaluate.criterion(found[best][0])) else None


class Bench:
    """What a process keeps between cells: the base model, the data, and where they are.

    Args:
        graph: replay trainings as CUDA graphs.
    """

    def __init__(self, setup: Setup, graph: bool):
        from benchmarks.real_llm import model

        self.setup, self.graph = setup, graph
        self.dtype = torch.bfloat16 if setup.device == "cuda" else torch.float32
        self.base, tokenizer = model.load(setup.model, setup.device, self.dtype)
        load = tasks.load if setup.asks else instructions.load
        self.data = load(Path(setup.data), tokenizer, setup.tasks, setup.longest, setup.validation, setup.test)

    def subject(self, method: Method, seed: int) -> torch.nn.Module:
        """The base model with a method on it; full finetuning has weights of its own, in float32."""
        base = copy.deepcopy(self.base).float() if method.kind == "full" else common.with_same_weights(self.base)
        return method.apply(base, "CAUSAL_LM", seed)

    def training(self, cell: Cell) -> Training:
        """A cell's training, before its first step."""
        setup = self.setup
        method = Method(**cell["method"])
        model = self.subject(method, cell["seed"])
        chosen = rows.training_rows(self.data.train, setup.rows, cell["steps"], cell["seed"])
        width = setup.longest if self.graph else 0  # a graph has one shape
        batches = [
            {name: tensor.to(setup.device) for name, tensor in rows.collate(some, self.data.pad, width).items()}
            for some in chosen
        ]
        autocast = method.kind == "full" and self.dtype != torch.float32
        keep = self.data.answer_columns + 1
        return Training(model, batches, cell["lr"], keep, self.graph and cell["steps"] > EAGER_STEPS, autocast)

    def run(self, gang: list[Cell]) -> Iterator[Cell]:
        """The cells with their results, trained in turns, a step of each, then measured one after the other.

        What has no method is the base model, which is only measured. Results hold what evaluate.py measures, and of a
        training "seconds", wall-clock time of the whole gang's, and "gang", how many went side by side.
        """
        gc.collect()  # the models of the gang before
        if self.setup.device == "cuda":
            torch.cuda.empty_cache()  # and the pools of its graphs
        for cell in gang:
            if cell["method"] is None:
                result = evaluate.everything(self.base, self.data, self.setup.size)
                yield {**cell, "result": {"parameters": 0, **result}}
        gang = [cell for cell in gang if cell["method"] is not None]
        begin = time.time()
        trainings = [self.training(cell) for cell in gang]
        for number in range(max((cell["steps"] for cell in gang), default=0)):
            for cell, training in zip(gang, trainings):
                if number < cell["steps"]:
                    training.step()
        losses = [training.finish() for training in trainings]
        seconds = round(time.time() - begin, 1)
        for cell, training, loss in zip(gang, trainings, losses):
            with training.context():
                result = evaluate.everything(training.model, self.data, self.setup.size)
            run = {"seconds": seconds, "gang": len(gang), "graph": self.graph, "loss": tenths(loss)}
            yield {**cell, "result": {"parameters": count(training.model)["parameters"], **result, **run}}
