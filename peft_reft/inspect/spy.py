"""Watching the edits of a model's layers, and leaving some out, while it runs as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from peft_reft.context.forward import ForwardContext
from peft_reft.inspect.deltas import Deltas, deltas_of
from peft_reft.tuner.layer import ReftLayer


@dataclass
class Note:
    """What a block's adapters did in one call of the block.

    Attributes:
        block: its name.
        call: number of the call in this forward, from 0.
        deltas: by adapter.
    """

    block: str
    call: int
    deltas: list[Deltas]


class Spy:
    """Stands in for one layer's `edit`.

    Attributes:
        block: name of the block.
        together: the name for all active adapters together.
        notes: where to note down what it does, in all spies the same list; None for not at all.
        skipping: leave the edits out.
    """

    def __init__(self, block: str, layer: ReftLayer, together: str):
        self.block, self.layer, self.together = block, layer, together
        self.notes: list[Note] | None = None
        self.skipping = False

    def __call__(self, h: Tensor, context: ForwardContext) -> Tensor:
        if self.skipping:
            return h
        notes, self.notes = self.notes, None  # an edit of a tensor in another shape calls itself
        if notes is not None:
            call = sum(note.block == self.block for note in notes)
            notes.append(Note(self.block, call, deltas_of(self.layer, h, context, self.together)))
        out = type(self.layer).edit(self.layer, h, context)
        self.notes = notes
        return out


@contextmanager
def watched(model: nn.Module, layers: Mapping[str, ReftLayer], together: str) -> Iterator[list[Spy]]:
    """Put a spy into each layer and the model into eval mode, and take both back again."""
    modes = [(module, module.training) for module in model.modules()]
    spies = [Spy(block, layer, together) for block, layer in layers.items()]
    try:
        model.eval()
        for spy in spies:
            spy.layer.__dict__["edit"] = spy  # in front of the method, for this layer only
        yield spies
    finally:
        for spy in spies:
            spy.layer.__dict__.pop("edit", None)
        for module, mode in modes:
            module.training = mode
