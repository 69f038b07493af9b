"""Which columns of a block's output an adapter changes, seen from outside: with plain hooks and a model without it."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import Tensor, nn


def tensor_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


class EditSpy:
    """Gives the inputs of one block to the same block of a model without an adapter, and compares the outputs.

    Args:
        model: a `PeftModel`, or a model that adapters were injected into.
        clean: a model with the same weights and no adapter.
        name: the block's name in `clean`.

    `calls` lists, for each forward of the block, the changed columns of each row; `pasts` how many columns were in the
    key/value cache before it.
    """

    def __init__(self, model: nn.Module, clean: nn.Module, name: str = "model.layers.0"):
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.twin = clean.get_submodule(name)
        self.calls: list[list[list[int]]] = []
        self.pasts: list[int] = []
        self._inputs: list[tuple[tuple, dict[str, Any]]] = []
        block = base.get_submodule(name)
        self.handles = [
            block.register_forward_pre_hook(self._enter, with_kwargs=True),
            block.register_forward_hook(self._leave),
        ]

    def _enter(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        caches = {name: copy.deepcopy(value) for name, value in kwargs.items() if "cache" in name or "past" in name}
        self._inputs.append((args, {**kwargs, **caches}))
        lengths = [int(cache.get_seq_length()) for cache in caches.values() if hasattr(cache, "get_seq_length")]
        self.pasts.append(max(lengths, default=0))

    def _leave(self, block: nn.Module, args: tuple, output: Any) -> None:
        args, kwargs = self._inputs.pop()
        with torch.no_grad():
            plain = tensor_of(self.twin.train(block.training)(*args, **kwargs))
        changed = (tensor_of(output).detach() - plain).abs().amax(-1) > 1e-4
        self.calls.append([row.nonzero().flatten().tolist() for row in changed])

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


@contextmanager
def spied(model: nn.Module, clean: nn.Module, name: str = "model.layers.0") -> Iterator[list[list[list[int]]]]:
    """The `calls` of an `EditSpy` that is there for as long as the scope is open."""
    spy = EditSpy(model, clean, name)
    try:
        yield spy.calls
    finally:
        spy.close()


def edited_columns(model: nn.Module, clean: nn.Module, name: str = "model.layers.0", **inputs: Any) -> list[list[int]]:
    """The columns of each row that one call edits."""
    with spied(model, clean, name) as calls, torch.set_grad_enabled(model.training):
        model(**inputs)
    assert len(calls) == 1
    return calls[0]


def warnings_of(call: Callable[[], Any]) -> list[str]:
    """The package's warnings in a call: those that name ReFT."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught if "reft" in str(warning.message).lower()]


def assert_right(
    model: nn.Module, clean: nn.Module, expected: list[list[int]], name: str = "model.layers.0", **inputs: Any
) -> None:
    """In evaluation and in training the call edits the expected columns, in evaluation without a warning.

    (Forwards in training that have no labels get one, as inputs of a trainer that takes them away.)

    An input that is a function is called for each call of the model, as for a cache, which a call changes.
    """
    found, told = _found(model, clean, name, False, inputs)
    assert (found, told) == (expected, []), (found, told)
    found, _ = _found(model, clean, name, True, inputs)
    assert found == expected, found


def assert_told(model: nn.Module, clean: nn.Module, match: str, name: str = "model.layers.0", **inputs: Any) -> None:
    """In evaluation the call warns once, with a message that matches; in training it raises ValueError with one.

    Inputs that are functions are called, as by `assert_right`.
    """
    _, told = _found(model, clean, name, False, inputs)
    assert len(told) == 1 and re.search(match, told[0]), told
    with pytest.raises(ValueError, match=match):
        _found(model, clean, name, True, inputs)


def _found(
    model: nn.Module, clean: nn.Module, name: str, training: bool, inputs: dict[str, Any]
) -> tuple[list[list[int]], list[str]]:
    """The columns that a call edits, and its warnings."""
    given = {key: value() if isinstance(value, FunctionType) else value for key, value in inputs.items()}
    found: list[list[int]] = []
    model.train(training)
    try:
        told = warnings_of(lambda: found.extend(edited_columns(model, clean, name, **given)))
    finally:
        model.eval()
    return found, told
