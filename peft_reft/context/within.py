"""Calls within a call, as where a model runs a part twice: whether they run its rows, or others.

What is known for certain is which tensors are the same objects, and in which order calls come. A changed copy of the
rows (cast, say, or moved) cannot be told from other rows: ids that are not the outer call's own count as a copy, unless
something shows that they are other rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from peft_reft.context.forward import ForwardContext


def whole_numbers(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors of whole numbers among arguments, and in lists and dicts among those: other ids may be there."""
    for value in values:
        if isinstance(value, Tensor):
            if not value.is_floating_point():
                yield value
        elif isinstance(value, (Mapping, list, tuple)):
            yield from whole_numbers(value.values() if isinstance(value, Mapping) else value)


def runs_other_rows(outer: ForwardContext, depth: int, arguments: Mapping[str, Any]) -> bool:
    """Whether a call surely runs other rows than the call around it.

    They have labels of their own; or their ids or their mask were passed to the outer call beside its own; or they come
    after its own ids: at a depth at which those ran, another call is none within that one.

    Args:
        outer: the context of the call around it.
        depth: how deep in the model the module lies that is called.
        arguments: of the call.
    """
    ids, mask, own = arguments.get("input_ids"), arguments.get("attention_mask"), _own_ids(outer)
    if own is None or ids is own:
        return False
    labels = ((arguments.get(name), getattr(outer.given, name)) for name in ("labels", "shift_labels"))
    if any(found is not None and found is not given for found, given in labels):
        return True
    if any(ids is one for one in outer.passed) or (ids is not None and depth <= outer.own_ids_ran_at):
        return True
    return outer.mask is not None and mask is not outer.mask and any(mask is one for one in outer.passed)


def runs_more_or_fewer_tokens(
    outer: ForwardContext, shape: tuple[int, int] | None, arguments: Mapping[str, Any]
) -> bool:
    """Whether a call runs the outer one's rows with tokens added or left out, so that labels are aligned no longer.

    Fewer embeddings than tokens may be patches, each of several tokens: a model of bytes runs those beside the tokens.
    """
    if shape is None or outer.columns is None or shape[0] != outer.rows:
        return False
    return shape[1] > outer.columns or (shape[1] < outer.columns and arguments.get("input_ids") is not None)


def has_another_mask(outer: ForwardContext, arguments: Mapping[str, Any]) -> bool:
    """Whether a call within another has a mask [B, S] that the outer one has not, for these tokens."""
    mask = arguments.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask is outer.mask:
        return False
    return outer.mask is None or arguments.get("input_ids") is not _own_ids(outer)


def note_ids(outer: ForwardContext, depth: int, arguments: Mapping[str, Any]) -> bool:
    """Note down in the outer context which ids a call runs that counts as its rows.

    Returns:
        Whether they are the outer call's own, and come after others that counted as its rows in another form. Only if
        that matters: if those others had neither labels nor a mask but the outer call's.
    """
    ids, own = arguments.get("input_ids"), _own_ids(outer)
    if own is None or ids is None:
        return False
    if ids is own:
        outer.own_ids_ran_at = max(depth, outer.own_ids_ran_at)
        return any(depth <= ran_at for _, ran_at in outer.changed_ids)
    if all(ids is not one for one, _ in outer.changed_ids):
        assert outer.tokens is not None
        has_labels = any(arguments.get(name) is not None for name in ("labels", "shift_labels"))
        is_complete = (has_labels or outer.tokens.labels is None) and (
            arguments.get("attention_mask") is not None or outer.mask is None
        )
        outer.changed_ids.append((ids, -1 if is_complete else depth))
    return False


def _own_ids(outer: ForwardContext) -> Tensor | None:
    return None if outer.tokens is None else outer.tokens.ids
