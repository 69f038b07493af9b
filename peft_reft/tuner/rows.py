"""Rows with adapters of their own: the names that PEFT hands over around a forward or a `generate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from peft_reft.context.state import ModelState
from peft_reft.tuner.layer import ReftLayer


class AdaptersOfRows:
    """A scope in which each row of this thread's forwards has an adapter of its own.

    A class, no generator: Ctrl-C right behind a generator's `yield` leaves the scope open until the traceback, which a
    notebook keeps, is gone.

    Args:
        model: whose modules that were trained in full need the names, too.
        state: of its ReFT adapters.
        names: of the rows' adapters.

    Raises:
        ValueError: for a name that is no adapter of the model.
    """

    def __init__(self, model: nn.Module, state: ModelState, names: Sequence[str]):
        self.running = state.running
        self.names = state.check_adapter_names(names)
        self.outer: list[str] | None = None
        self.wrappers = [part for part in modules_outside_layers(model) if isinstance(part, AuxiliaryTrainingWrapper)]
        self.handles: list[Any] = []

    def __enter__(self) -> None:
        hook = partial(pass_adapter_names, names=self.names)
        self.handles += [part.register_forward_pre_hook(hook, with_kwargs=True) for part in self.wrappers]
        self.outer, self.running.adapter_names = self.running.adapter_names, self.names

    def __exit__(self, *error: Any) -> None:
        self.running.adapter_names = self.outer
        for handle in self.handles:
            handle.remove()


def pass_adapter_names(module: nn.Module, args: tuple, kwargs: dict[str, Any], names: list[str]) -> tuple[tuple, dict]:
    """Forward pre-hook of a module that was trained in full: each row's own copy of it is to be used."""
    times = args[0].shape[0] // len(names) if args else 1
    return args, {**kwargs, "adapter_names": [name for name in names for _ in range(times)]}


def modules_outside_layers(module: nn.Module) -> Iterator[nn.Module]:
    """`module.modules()` without the interventions, of which there may be very many."""
    if not isinstance(module, ReftLayer):
        yield module
        for child in module.children():
            yield from modules_outside_layers(child)
