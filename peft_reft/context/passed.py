"""What a call or a `generate` is passed that is ours, and that the model does not know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from peft_reft.context.arguments import check_locations
from peft_reft.context.sources import COLLECTED, Sources, run_sources
from peft_reft.context.state import ModelState
from peft_reft.context.subspaces import Choices


class Passed(NamedTuple):
    """Our arguments of a call.

    Attributes:
        locations: `intervention_locations` as [B, G, P], or None.
        adapter_names: the adapter of each row, or None for the active ones in every row.
        subspaces: which named parts of R act in each row; None for those that are set for the model.
        sources: hidden states of other inputs, for interventions that take a source.
    """

    locations: Tensor | None = None
    adapter_names: list[str] | None = None
    subspaces: Choices | None = None
    sources: Sources | None = None


NOTHING = Passed()
STEP = "reft_generation_step"  # which step of a `generate` a forward is: a `Step`, added by our entry there
OWN_ARGUMENTS = ("intervention_locations", "adapter_names", "subspaces", "source_inputs", STEP, COLLECTED)


def take_own(arguments: dict[str, Any]) -> dict[str, Any]:
    """Take our arguments out of those of a call."""
    return {name: arguments.pop(name) for name in OWN_ARGUMENTS if name in arguments}


def read_passed(
    module: nn.Module,
    state: ModelState,
    own: Mapping[str, Any],
    shape: tuple[int, int] | None,
    inherited: Passed,
    past: int | Tensor = 0,
) -> Passed:
    """Our arguments of a call, checked; those that it was not passed are inherited.

    Args:
        module: what is called.
        own: our arguments by name, as they were passed.
        shape: rows and columns of the call's tokens, if it has tokens.
        inherited: what holds where nothing was passed; adapter names are those of the thread.
        past: columns before those.

    Raises:
        ValueError: for what does not fit the call or the model's adapters.
    """
    locations, _, subspaces, sources = inherited
    names = state.running.adapter_names  # of the innermost scope, be it PEFT's or a `generate`
    rows = None if shape is None else shape[0]
    if own.get("intervention_locations") is not None:
        locations = check_locations(own["intervention_locations"], shape, past, may_repeat=COLLECTED in own)
    if own.get("adapter_names") is not None:
        names = state.check_adapter_names(own["adapter_names"])
    if own.get("subspaces") is not None:
        subspaces = state.check_subspaces(own["subspaces"], rows, names)
    if own.get("source_inputs") is not None:
        sources = run_sources(module, state, own["source_inputs"], names, rows)
    return Passed(locations, names, subspaces, sources)
