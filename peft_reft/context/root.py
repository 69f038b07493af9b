"""What all hooks of one model share, and the warnings that it gives once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

BASE = "__base__"  # the adapter name of rows without an edit, as everywhere in PEFT
STEPS_BEFORE_WARNING = 3
NOTHING_EDITED = (
    f"In the first {STEPS_BEFORE_WARNING} training forwards a ReFT model edited no token at all, so that it trains "
    "nothing: the positions name no token of these prompts. Look at a batch's intervention_locations (-1 = unused), "
    "and at the lengths of its prompts."
)


@dataclass(eq=False)
class Root:
    """What all hosts of one model share: what kind of model it is, and what was already said about it.

    Attributes:
        causal: a causal language model, whose labels tell where the prompt ends.
        layers: the layers beside its blocks.
        factors: works out what the layers' interventions multiply with, for all of them together.
        survey: what was found out about its blocks.
        batching: asks the manager of continuous batching what the running forward holds.
        warned: the warnings given so far; each is given once.
        steps_without_edit: training forwards so far, none of which edited a token; None once one did.
    """

    causal: bool
    layers: list[Any]
    factors: Callable[[list[Any], list[str] | None], Any]
    survey: Any
    batching: Callable[[], list[tuple[int, int, int]] | None] | None = None
    warned: set[str] = field(default_factory=set)
    steps_without_edit: int | None = 0

    def note_training_forward(self, edited: bool) -> None:
        """Say so if the first training forwards edit nothing: such a run trains nothing, and raises no error."""
        if edited:
            self.steps_without_edit = None
        elif self.steps_without_edit is not None:
            self.steps_without_edit += 1
            if self.steps_without_edit == STEPS_BEFORE_WARNING:
                self.steps_without_edit = None
                self.warn_once(NOTHING_EDITED)

    def check_adapter_names(self, names: Any) -> list[str]:
        """The adapters of a batch's rows, "__base__" for none.

        Raises:
            ValueError: for a name that is no ReFT adapter of this model.
        """
        known = sorted({name for layer in self.layers for name in layer.reft_interventions})
        unknown = sorted({str(name) for name in names} - {*known, BASE})
        if unknown:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. The ReFT adapters of this model "
                f"are {known}; `adapter_names` holds one per row of the batch, {BASE!r} for rows without an edit."
            )
        return list(names)

    def specs(self) -> set[Any]:
        """The position specs of all adapters that are not disabled."""
        return {spec for layer in self.layers if not layer.disable_adapters for spec in layer.position_specs.values()}

    def edits_answers(self) -> bool:
        """Whether some adapter edits generated tokens."""
        return any(spec.edits_answers for spec in self.specs())

    def warn_once(self, message: str) -> None:
        if message not in self.warned and not torch.compiler.is_compiling():
            self.warned.add(message)
            warnings.warn(message, stacklevel=2)
