"""What parts have in common: the shape, its base model and batches, and how long may be measured."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import common
from benchmarks.gpu import models
from benchmarks.gpu.deadline import Deadline, interleaved
from benchmarks.gpu.models import Shape
from benchmarks.gpu.record import Figure

Run = Callable[[], Any]


class Work:
    """The settings of one run.

    Args:
        rounds, seconds: the most that one timing takes; three rounds at least.
        tokens: generated ones.
        adapters: that are resident at once.
    """

    def __init__(self, device: str, deadline: Deadline, rounds: int, seconds: float, tokens: int, adapters: int):
        self.device = device
        self.deadline = deadline
        self.rounds = rounds
        self.seconds = seconds
        self.tokens = tokens
        self.adapters = adapters
        self.on_gpu = device == "cuda"
        self.shape: Shape = models.SHAPES["tiny"]
        self._base: nn.Module | None = None

    def use(self, shape: Shape) -> None:
        """Measure this shape from now on."""
        if shape != self.shape:
            self._base = None
            self.shape = shape
        self.free()

    def free(self) -> None:
        """Give the memory of models back that are used no more."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    @property
    def base(self) -> nn.Module:
        if self._base is None:
            self._base = models.build(self.shape, self.device)
        return self._base

    def batch(self, labelled: bool = False, rows: int | None = None, columns: int | None = None) -> dict[str, Tensor]:
        shape = self.shape
        return common.batch(
            rows or shape.rows, columns or shape.columns, shape.vocab, device=self.device, labelled=labelled
        )

    def time(self, functions: dict[str, Run], warmup: int = 2) -> common.Times:
        """Interleaved times of functions."""
        return interleaved(functions, self.deadline, self.rounds, self.seconds, warmup)

    def memory(self) -> int:
        """Bytes that tensors take on the device; on a CPU, of those that Python knows."""
        if self.on_gpu:
            common.synchronize()
            return torch.cuda.memory_allocated()
        return sum(common.tensors_alive().values())

    def peak_memory(self, functions: dict[str, Run], reference: str) -> Figure | None:
        """The most memory that a call takes beyond what was there before; None on a CPU, which does not count it."""
        if not self.on_gpu:
            return None
        found = {}
        for name, function in functions.items():
            before = self.memory()
            torch.cuda.reset_peak_memory_stats()
            function()
            common.synchronize()
            found[name] = torch.cuda.max_memory_allocated() - before
        ratios = {name: value / found[reference] for name, value in found.items()}
        return Figure(f"peak memory / {reference}", ratios, note=f"{reference} {found[reference] / 2**20:.0f} MiB")


def ratios(name: str, times: common.Times, reference: str, note: str = "") -> Figure:
    """The figure of interleaved times: of each method the ratio to the reference."""
    names = [name for name in times.wall if name != reference]
    milliseconds = {name: times.milliseconds(name) for name in [reference, *names]}
    values = {name: times.ratio(name, reference) for name in names}
    return Figure(f"{name} / {reference}", values, milliseconds, note)


def forward(model: nn.Module, inputs: dict[str, Tensor], **settings: Any) -> Run:
    """A forward without gradients."""
    model.eval()

    @torch.no_grad()
    def run() -> Any:
        return model(**inputs, **settings)

    return run


def training_step(model: nn.Module, inputs: dict[str, Tensor]) -> Run:
    """Forward, backward, and AdamW on what is trained."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def run() -> None:
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def gradients(model: nn.Module, inputs: dict[str, Tensor]) -> Run:
    """Forward and backward."""
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def run() -> None:
        model(**inputs).loss.backward()
        for parameter in trained:
            parameter.grad = None

    return run
