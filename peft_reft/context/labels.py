"""Labels that were passed and do not show where prompts end, because they cannot be aligned with the tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from peft_reft.context import notices
from peft_reft.context.arguments import aligned_labels
from peft_reft.context.forward import ForwardContext, Given
from peft_reft.context.state import ModelState


def look_at_labels(
    state: ModelState,
    module: nn.Module,
    given: Given,
    arguments: Mapping[str, Any],
    shape: tuple[int, int],
    outer: ForwardContext | None,
) -> None:
    """Look at the labels of a call whose labels show where prompts end; say so if it gets none that can be used.

    Args:
        module: what is called.
        given: to the call around it, or to this one.
        arguments: of the call.
        shape: rows and columns of its tokens.
        outer: the context of the call around it, if there is one.

    Raises:
        ValueError: in training, for labels that were given and cannot be used.
    """
    labels, shift_labels = arguments.get("labels"), arguments.get("shift_labels")
    found, unaligned = aligned_labels(labels, shift_labels, *shape)
    state.unlabelled = found is None and not state.running.generation
    if unaligned:
        some = labels if labels is not None else shift_labels
        what = list(some.shape) if isinstance(some, Tensor) else type(some).__name__
        message = notices.UNALIGNED_LABELS.format(labels=what, rows=shape[0], columns=shape[1])
        if not state.has_markers():
            notices.raise_or_warn(state, module, message, "unaligned labels")
    elif found is None and outer is not None and _labels_around(outer, given, shape) is not None:
        if not state.has_markers():
            _raise_or_warn_of_labels_around(state, module, shape, outer)
    elif state.unlabelled and not _are_classes(given.labels):
        notices.warn_of_unlabelled(state, module)


def _labels_around(outer: ForwardContext, given: Given, shape: tuple[int, int]) -> Tensor | None:
    """The labels of tokens that were passed to the call around this one, aligned with the tokens of that."""
    rows, columns = shape if outer.rows is None or outer.columns is None else (outer.rows, outer.columns)
    return aligned_labels(given.labels, given.shift_labels, rows, columns)[0]


def _raise_or_warn_of_labels_around(
    state: ModelState, module: nn.Module, shape: tuple[int, int], outer: ForwardContext
) -> None:
    names = {"outer": type(state.entries[0].module).__name__, "inner": type(module).__name__}
    if outer.columns in (None, shape[1]):
        instead = notices.NAME_TOKENS if state.causal else notices.DECLARE_LABELS
        message = notices.LABELS_AROUND.format(**names, instead=instead)
    elif not any(spec.depends_on_the_end for spec in state.active_specs()):
        return
    else:
        message = notices.LABELS_OF_OTHER_COLUMNS.format(**names, given=outer.columns, run=shape[1])
    notices.raise_or_warn(state, module, message, "labels around")


def _are_classes(labels: Any) -> bool:
    """Whether the outermost module got labels of whole rows [B]: it classifies, and no prompt ends in its rows."""
    return isinstance(labels, Tensor) and labels.dim() == 1
