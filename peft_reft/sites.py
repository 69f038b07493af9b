"""The places of a hidden state that are edited: gather the vectors, put the edits back.

Shape letters: B rows, S columns, G position groups, P places per group, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_reft.positions import PositionSpec, locate, mark
from peft_reft.prompt import Prompts


class Sites(NamedTuple):
    """Where a forward edits one hidden state [B, S, d].

    Attributes:
        columns: long [B, G * P], every entry a column that exists; None if all S columns are looked at (P = S).
        keep: [B, G, P, 1], 1 where the place is edited and 0 where it only fills up the shape.
    """

    columns: Tensor | None
    keep: Tensor


def sites_at(locations: Tensor) -> Sites | None:
    """Sites from columns [B, G, P], -1 = unused; None if there is no place at all (P = 0).

    An unused place looks at the row's last used column instead: at a token that is edited anyway, not at
    padding, whose vector may hold anything, NaN included.
    """
    if not locations.numel():
        return None
    used = locations >= 0
    spare = locations.flatten(1).amax(1).clamp(min=0)
    columns = torch.where(used, locations, spare[:, None, None])
    return Sites(columns.flatten(1), used.unsqueeze(-1).to(torch.float32))


def sites_of(spec: PositionSpec, prompts: Prompts, share_weights: bool | str) -> Sites | None:
    """Sites that a spec names in a batch.

    Args:
        spec: parsed notation.
        prompts: where the prompts lie.
        share_weights: True puts all places into one group; False gives a group per term, "position" one per position.
    """
    bounded = share_weights == "position" or spec.widths(prompts.answer is not None) is not None
    if bounded and (prompts.document is None or prompts.num_documents is not None):
        locations = locate(spec, prompts, share_weights)
        return sites_at(locations.flatten(1).unsqueeze(1) if share_weights is True else locations)
    # No bound on the number of places that could be known without looking at the data: mark them among all columns.
    marks = mark(spec, prompts, share_weights)
    if share_weights is True:
        marks = marks.any(1, keepdim=True)
    return Sites(None, marks.unsqueeze(-1).to(torch.float32))


def overlay(parts: Sequence[tuple[Sites, Tensor]]) -> Sites:
    """Sites of a batch in which each row takes part in one of several.

    Args:
        parts: sites for all rows, and the strength [B] with which each row takes part in them (0: not at all).
            Either all have columns, or none.
    """
    groups, places = (max(sites.keep.shape[dim] for sites, _ in parts) for dim in (1, 2))
    columns: Tensor | None = None
    keep: Tensor | None = None
    for sites, strength in parts:
        size = sites.keep.shape[1:3]
        more = (0, 0, 0, places - size[1], 0, groups - size[0])
        kept = F.pad(sites.keep, more) * strength[:, None, None, None]
        keep = kept if keep is None else keep + kept
        if sites.columns is not None:
            # Filled up by repeating a column that is looked at anyway.
            own = sites.columns.unflatten(1, size)
            own = own[:, :, torch.arange(places, device=own.device).clamp(max=size[1] - 1)]
            own = own[:, torch.arange(groups, device=own.device).clamp(max=size[0] - 1)].flatten(1)
            columns = own if columns is None else torch.where(strength[:, None] != 0, own, columns)
    assert keep is not None
    return Sites(columns, keep)


def add_edit(out: Tensor, h: Tensor, sites: Sites, edit: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Add the edits of `h` at `sites` to `out`; every other vector of `out` is returned bit for bit.

    Args:
        out: [B, S, d], `h` or `h` with the edits of other adapters; not changed in place, since autograd may have
            saved it and a caller may hold it too.
        h: [B, S, d], what the edit is computed from.
        sites: where.
        edit: maps vectors [B, G, P, d] and `sites.keep` to their edits [B, G, P, d], zero where not kept.
    """
    rows, _, d = h.shape
    groups = sites.keep.shape[1]
    if sites.columns is None:
        delta = edit(h.unsqueeze(1).expand(-1, groups, -1, -1), sites.keep)
        delta = delta.squeeze(1) if groups == 1 else delta.sum(1)
        return out + delta.to(h.dtype)
    index = sites.columns.unsqueeze(-1).expand(-1, -1, d)
    delta = edit(h.gather(1, index).view(rows, groups, -1, d), sites.keep)
    return out.scatter_add(1, index, delta.view(rows, -1, d).to(h.dtype))
