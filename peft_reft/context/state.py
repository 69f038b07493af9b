"""What the entries of one model share: its kind, its layers, its warnings, and what runs in each thread.

A block refers to it, so a copy of a block gets one of its own. It must not bring the whole model along: what is copied
joins the copied state by itself.
"""

from __future__ import annotations

import threading
import warnings
from bisect import insort
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from peft_reft.blocks import ModelBlocks
from peft_reft.context.subspaces import BASE, Choices, read_choices


class Running(threading.local):
    """What runs in this thread.

    Attributes:
        context: the `ForwardContext` of the innermost call that knows about tokens; None outside of any.
        generation: the `Generation` of the innermost call of `generate`.
        adapter_names: the adapter of each row, by the innermost scope that names them: PEFT's around its `forward` and
            `generate`, or the `generate` that they were passed to.
        replica: the replica of a module that nn.DataParallel is about to run.
    """

    def __init__(self) -> None:  # which is called in every thread
        self.context: Any = None
        self.generation: Any = None
        self.adapter_names: list[str] | None = None
        self.replica: nn.Module | None = None

    def forget_interrupted_scope(self) -> None:
        """Forget names of rows that hold for no call: Ctrl-C may come before a scope is entered, or left, in full."""
        if self.context is None and self.generation is None:
            self.adapter_names = None

    def __reduce__(self) -> Any:
        return Running, ()  # a copied or pickled model runs nothing


class ModelState:
    """What the entries of one model share.

    Attributes:
        causal: a causal language model, whose labels tell where the prompt ends.
        layers: the layers next to its blocks.
        entries: the `ForwardEntry` of each module around the blocks, from the outside in.
        takes_ids: the model runs on tokens, among which there may be padding.
        running: what runs in this thread.
        plans: how adapters are put together, the latest first (see kept.py).
        paged: reads where prompts lie in a forward of continuous batching; set by that integration.
        unlabelled: nothing showed the prompts of the last forward: neither labels nor locations, nor `generate`.
        warned: the warnings given so far; each is given once.
        training_forwards: so far, while they are looked at; None once they no longer are.
        has_edited: one of those edited a token.
    """

    def __init__(self, blocks: ModelBlocks):
        self._blocks: ModelBlocks | None = blocks  # which know the model: None in a copy, until it is asked for
        self._ids_per_row = 1
        self.causal = False
        self.layers: list[Any] = []
        self.entries: list[Any] = []
        self.takes_ids = False
        self.running = Running()
        self.plans: list[Any] = []
        self.paged: Callable[[int, torch.device], Any] | None = None
        self.unlabelled = False
        self.warned: set[str] = set()
        self.training_forwards: int | None = 0
        self.has_edited = False

    def __getstate__(self) -> dict[str, Any]:
        # Plans are found by the identity of modules, which a copied or pickled model does not share.
        parts: dict[str, Any] = {
            "layers": [],
            "entries": [],
            "paged": None,
            "_blocks": None,
            "_ids_per_row": self.ids_per_row,
        }
        return {**self.__dict__, **parts, "plans": []}

    def add_layer(self, layer: Any) -> None:
        """Take in the layer next to a block."""
        insort(self.layers, layer, key=attrgetter("number"))

    def add_entry(self, entry: Any) -> None:
        """Take in the entry of a module around the blocks."""
        insort(self.entries, entry, key=attrgetter("depth"))
        self.takes_ids = self.takes_ids or "input_ids" in entry.names

    def blocks_of(self, model: nn.Module) -> ModelBlocks:
        """What was found out about the blocks of a model: of this one, or of one around it."""
        if self._blocks is None:
            self._blocks = ModelBlocks(model)
            self._blocks.ids_per_row = self._ids_per_row
        return self._blocks if self._blocks.model is model else ModelBlocks(model)

    @property
    def ids_per_row(self) -> int:
        """How many rows of ids make one row of the hidden state."""
        return self._ids_per_row if self._blocks is None else self._blocks.ids_per_row

    def adapters(self) -> list[str]:
        """Names of the model's ReFT adapters."""
        return sorted({name for layer in self.layers for name in layer.reft_interventions})

    def check_adapter_names(self, names: Sequence[Any]) -> list[str]:
        """The adapters of a batch's rows, "__base__" for none.

        Raises:
            ValueError: for a name that is no ReFT adapter of this model, or a text in place of a list.
        """
        if isinstance(names, str):
            raise ValueError(
                f"adapter_names={names!r} is one name. Pass a list with a name for each row of the batch, or call "
                f"model.set_adapter({names!r}) for all rows."
            )
        wanted = {str(name) for name in names} - {BASE}
        unknown = sorted(n for n in wanted if not any(n in layer.reft_interventions for layer in self.layers))
        if unknown:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. The ReFT adapters of this model "
                f"are {self.adapters()}; `adapter_names` holds one per row of the batch, {BASE!r} for rows without an "
                "edit."
            )
        return list(names)

    def check_subspaces(self, given: Any, rows: int | None, names: Sequence[str] | None) -> Choices:
        """The `subspaces` of a call.

        Args:
            given: as passed.
            rows: how many rows the call has; None if that is not known yet.
            names: the adapter of each row; None for the active ones in every row.

        Raises:
            ValueError: if no adapter of the call has what they name, or they are not one entry per row.
        """
        known = {name: parts for layer in self.layers for name, parts in layer.subspaces.items()}
        active = {name for layer in self.layers for name in layer.active_adapters}
        return read_choices(given, rows, known, names, active)

    def specs(self) -> set[Any]:
        """The position specs of the adapters that can be active: all of a model's, since rows choose among them."""
        return {spec for layer in self.layers if not layer.disable_adapters for spec in layer.position_specs.values()}

    def active_specs(self) -> set[Any]:
        """The position specs of the active adapters."""
        return {spec for layer in self.layers if not layer.disable_adapters for spec in layer.active_specs()}

    def has_markers(self) -> bool:
        """Whether all active adapters find the prompt's end by a marker in the ids."""
        return all(spec.prompt_end for spec in self.active_specs())

    def edits_answers(self) -> bool:
        """Whether some adapter edits generated tokens."""
        return any(spec.edits_answers for spec in self.specs())

    def warn_once(self, message: str, key: str | None = None) -> None:
        """Give a warning, unless one with this key (the message itself, if there is none) was given before."""
        if (key or message) not in self.warned and not torch.compiler.is_compiling():
            self.warned.add(key or message)
            warnings.warn(message, stacklevel=2)


def names_of_rows(names: int, rows: int | None) -> str:
    """The message of the error for adapter names that are not one per row; it begins as PEFT's own does."""
    return (
        f"Length of `adapter_names` should be the same as the number of inputs, but got {names} and {rows} "
        "respectively. Pass one name per row of the batch."
    )
