"""From prompts to places: the columns that a spec names in each row of a batch.

Shape letters: B rows, S columns, G position groups, P places per group.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_reft.positions.notation import PositionSpec
from peft_reft.positions.prompts import Prompts


class Places(NamedTuple):
    """Where the rows of one hidden state are edited.

    Attributes:
        columns: long [B, G, P], each of them a column that exists (-1 may stand where `keep` is False in places of a
            whole row, of which a forward runs a `window`); None if all S columns are looked at (P = S).
        keep: bool [B, G, P], True where the place is edited, False where it only fills up the shape.
    """

    columns: Tensor | None
    keep: Tensor

    def window(self, start: int | Tensor, columns: int) -> Places:
        """The places in a forward that runs only the columns `start ... start + columns - 1` of these rows.

        Where `columns` is None, `start` is an int.
        """
        if self.columns is None:
            marks = self.keep[..., start : start + columns]
            return Places(None, F.pad(marks, (0, columns - marks.shape[-1])))
        column = self.columns - start
        return places_at(torch.where(self.keep & (column >= 0) & (column < columns), column, -1))

    def listed(self) -> Places:
        """The same places with their columns, where they are marks on all S of them."""
        return Places(*columns_of(self.keep, self.keep.shape[-1])) if self.columns is None else self

    def rows(self, index: Tensor) -> Places:
        """The places of some rows."""
        columns, keep = self
        return Places(None if columns is None else columns.index_select(0, index), keep.index_select(0, index))

    def to(self, device: torch.device) -> Places:
        columns, keep = self
        return Places(None if columns is None else columns.to(device), keep.to(device))


def select(spec: PositionSpec, prompts: Prompts) -> list[Tensor]:
    """For each term, a mask [B, S] of the tokens that belong to it.

    The rule for prompts shorter than N + M: every prompt token belongs to exactly one group; the prefix
    gets p = min(N, max(n - M, ceil(n / 2))) tokens, the suffix the other n - p.
    """
    first, last, length = spec.count("f"), spec.count("l"), prompts.length
    prefix: Tensor | int = 0
    if first and last:
        prefix = (length + 1) // 2
        if last < first:  # else n - M is the larger one only where both are at least N
            prefix = torch.maximum(prefix, length - last)
        prefix = prefix.clamp(max=first)
    elif first:
        prefix = first
    masks: list[Tensor] = []
    overlap = any(term.overlaps for term in spec.terms)
    for term in spec.terms:
        mask = term.mask(prompts, prefix)
        if overlap:
            for earlier in masks:
                mask = mask & ~earlier
        masks.append(mask)
    return masks


def select_any(spec: PositionSpec, prompts: Prompts) -> Tensor:
    """A mask [B, S] of the tokens that any term names, for which it makes no difference which term they belong to."""
    masks = [term.mask(prompts, spec.count("f")) for term in spec.terms]
    together = masks[0]
    for mask in masks[1:]:
        together = together | mask
    return together


def mark(spec: PositionSpec, prompts: Prompts, share_weights: bool | str = False) -> Tensor:
    """The tokens of each group, as marks.

    Args:
        spec: parsed notation.
        prompts: where each document's prompt lies.
        share_weights: "position" for a group per position; otherwise a group per term.

    Returns:
        Bool [B, G, S], True for the columns of each group.
    """
    masks = select(spec, prompts)
    if share_weights == "position":
        split = []
        for term, mask in zip(spec.terms, masks):
            slot = term.slot(prompts)
            split += [mask & (slot == number) for number in range(term.count)]
        masks = split
    return torch.stack(masks, dim=1)


def columns_of(marks: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The first `width` marked columns of each row.

    Args:
        marks: bool [..., S].

    Returns:
        Long [..., width], left to right; entries without a mark of their own repeat the last marked column (or are 0).
        Bool [..., width], True for entries with a mark of their own.
    """
    count = marks.cumsum(-1)
    number = torch.arange(1, width + 1, device=marks.device)
    total = count[..., -1:]
    return torch.searchsorted(count, torch.minimum(number, total)), number <= total


def locate(spec: PositionSpec, prompts: Prompts, share_weights: bool | str = False) -> Tensor:
    """Columns of the tokens to edit, per row and group.

    Args:
        spec: parsed notation.
        prompts: where each document's prompt lies; packed documents must be numbered and counted.
        share_weights: "position" for a group per position; otherwise a group per term.

    Returns:
        Long tensor [B, G, P], left to right within a group, unused entries -1. P does not depend on the prompts'
        lengths: it is the largest width of the groups (times the number of documents in a row that packs several),
        or S where a group has no bound.

    >>> from peft_reft.positions.notation import parse_positions
    >>> from peft_reft.positions.prompts import find_prompts
    >>> locate(parse_positions("f2+l1"), find_prompts(torch.tensor([[0, 0, 1, 1, 1, 1]]).bool()))
    tensor([[[ 2,  3],
             [ 5, -1]]])
    """
    marks = mark(spec, prompts, share_weights)
    widths = _widths(spec, prompts, share_weights)
    if widths is not None and prompts.document is not None and prompts.num_documents is None:
        raise ValueError("locate needs the number of documents in a packed row.")
    columns, used = columns_of(marks, marks.shape[-1] if widths is None else max(widths))
    return torch.where(used, columns, -1)


def _widths(spec: PositionSpec, prompts: Prompts, share_weights: bool | str) -> list[int] | None:
    """The most places that each group can have in a row, or None if there is no bound."""
    widths = (1,) if share_weights == "position" else spec.widths(prompts.answer is not None)
    return None if widths is None else [width * (prompts.num_documents or 1) for width in widths]


def places_of(spec: PositionSpec, prompts: Prompts, share_weights: bool | str) -> Places:
    """Places that a spec names in a batch.

    Args:
        spec: parsed notation.
        prompts: where the prompts lie.
        share_weights: True puts all places into one group; False gives a group per term, "position" one per position.
    """
    marks = select_any(spec, prompts).unsqueeze(1) if share_weights is True else mark(spec, prompts, share_weights)
    widths = _widths(spec, prompts, share_weights)
    if widths is None or (prompts.document is not None and prompts.num_documents is None):
        return Places(None, marks)  # their number has no bound that could be known without looking at the data
    width = sum(widths) if share_weights is True else max(widths)
    if not torch.compiler.is_compiling():  # one graph for rows of any length: some of its places only fill up
        width = min(width, marks.shape[-1])
    return Places(*columns_of(marks, width))


def places_at(locations: Tensor) -> Places:
    """Places from locations [B, G, P], -1 = unused.

    An unused place looks at the row's last used column instead: at a token that is edited anyway, not at padding,
    whose vector may hold anything, NaN included.
    """
    used = locations >= 0
    spare = locations.flatten(1).amax(1).clamp(min=0)
    return Places(torch.where(used, locations, spare[:, None, None]), used)
