"""Checkpoints run blocks a second time, in the backward pass, when the call's context has been closed.

Then another call may have begun, and the hidden states are new tensors. So the context travels with the function that a
checkpoint is given: what makes the checkpoint, an attribute of a module in both libraries that do so, is wrapped. It is
`_gradient_checkpointing_func` of transformers' modules and `checkpoint_fn` of torch's CheckpointWrapper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from peft_reft.context.forward import ForwardContext
from peft_reft.context.state import Running

FUNCTIONS = ("_gradient_checkpointing_func", "checkpoint_fn")


class Replay:
    """Stands in for the function by which a module checkpoints: what it is given runs in the context of its call."""

    def __init__(self, checkpoint: Callable[..., Any], running: Running):
        self.checkpoint = checkpoint
        self.running = running

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        context = self.running.context
        if context is None or context.idle or torch.compiler.is_compiling():
            return self.checkpoint(run, *args, **kwargs)
        return self.checkpoint(InContext(run, context, self.running), *args, **kwargs)


class InContext:
    """A function that runs in the context in which it was made, whenever it is run."""

    def __init__(self, run: Callable[..., Any], context: ForwardContext, running: Running):
        self.run = run
        self.context = context
        self.running = running
        self.recorded: bool | None = None  # whether autograd recorded the first run: a reentrant checkpoint's does not

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.recorded is None:
            self.recorded = torch.is_grad_enabled()
            return self.run(*args, **kwargs)
        outer = self.running.context
        self.running.context = self.context if self.recorded else self.context.anew()
        try:
            return self.run(*args, **kwargs)
        finally:
            self.running.context = outer


class Path:
    """The modules from an entry to the edited blocks, any of which may be checkpointed.

    transformers before 5.22 checkpoints a block's whole call, the edit of its output included.

    Args:
        root: the entry's module.
        blocks: names of the blocks below it.
    """

    def __init__(self, root: nn.Module, blocks: Iterable[str]):
        self.root = root
        self.links: dict[tuple[int, str], tuple[nn.Module, str, nn.Module]] = {}
        self.blocks: list[tuple[nn.Module, str, nn.Module]] = []  # of the blocks themselves
        for block in blocks:
            parent = root
            for name in block.split("."):
                child = parent._modules[name]
                assert child is not None
                place = self.links[id(parent), name] = (parent, name, child)
                parent = child
            self.blocks.append(place)

    def displaced(self) -> tuple[str, nn.Module, nn.Module | None] | None:
        """A block whose place something else has taken: its name, itself, and what is there.

        What only wraps it, for sharding or compiling, has not.
        """
        for parent, name, child in self.blocks:
            found = parent._modules.get(name)
            if found is not child and (found is None or _replaces(found, child)):
                return name, child, found
        return None

    def wrap_checkpoints(self, running: Running) -> None:
        """Wrap the functions that make checkpoints, as far as they are not."""
        _wrap(self.root, running)
        for parent, name, child in self.links.values():
            _wrap(child, running)
            found = parent._modules.get(name)
            if found is not child and found is not None:  # a wrapper was put around the module since
                for module in found.modules():
                    if module is child:
                        break
                    _wrap(module, running)


def _replaces(found: nn.Module, child: nn.Module) -> bool:
    """Whether a module is another tuner's layer around a child, or does not hold it at all."""
    held = (getattr(found, name, None) for name in ("base_layer", "original_module"))
    return any(part is child for part in held) or all(module is not child for module in found.modules())


def _wrap(module: nn.Module, running: Running) -> None:
    own = module.__dict__
    for name in FUNCTIONS:
        if name in own and not isinstance(own[name], Replay):
            own[name] = Replay(own[name], running)


def unwrap_checkpoints(model: nn.Module) -> None:
    """Give all modules their own functions back."""
    for module in model.modules():
        for name in FUNCTIONS:
            function = module.__dict__.get(name)
            if isinstance(function, Replay):
                module.__dict__[name] = function.checkpoint
