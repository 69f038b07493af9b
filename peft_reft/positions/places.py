"""The places of a hidden state that are edited: gather the vectors, put the edits back.

Shape letters: B rows, S columns, G position groups, P places per group, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_reft.positions.notation import PositionSpec, locate, mark
from peft_reft.positions.prompts import Prompts


class Sites(NamedTuple):
    """Where a forward edits one hidden state [B, S, d].

    Attributes:
        columns: long [B, G * P], every entry a column that exists; None if all S columns are looked at (P = S).
        keep: [B, G, P, 1], 1 where the place is edited and 0 where it only fills up the shape.
        places: long [B * G * P], the same places in the hidden state as [B * S, d]; None without `columns`.
    """

    columns: Tensor | None
    keep: Tensor
    places: Tensor | None = None


def sites_at(locations: Tensor, columns: int) -> Sites | None:
    """Sites from locations [B, G, P], -1 = unused; None if there is no place at all (P = 0).

    Args:
        columns: S, how many columns the hidden state has.

    An unused place looks at the row's last used column instead: at a token that is edited anyway, not at
    padding, whose vector may hold anything, NaN included.
    """
    if not locations.numel():
        return None
    used = locations >= 0
    spare = locations.flatten(1).amax(1).clamp(min=0)
    chosen = torch.where(used, locations, spare[:, None, None]).flatten(1)
    return Sites(chosen, used.unsqueeze(-1).to(torch.float32), (chosen + first_of_rows(chosen, columns)).flatten())


def first_of_rows(chosen: Tensor, columns: int) -> Tensor:
    """Where each of B rows begins in a hidden state as [B * S, d]: long [B, 1]."""
    return torch.arange(chosen.shape[0], device=chosen.device).unsqueeze(1) * columns


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
        locations = locations.flatten(1).unsqueeze(1) if share_weights is True else locations
        return sites_at(locations, prompts.inside.shape[1])
    # No bound on the number of places that could be known without looking at the data: mark them among all columns.
    marks = mark(spec, prompts, share_weights)
    if share_weights is True:
        marks = marks.any(1, keepdim=True)
    return Sites(None, marks.unsqueeze(-1).to(torch.float32))


def overlay(parts: Sequence[tuple[Sites, Tensor]], columns: int) -> Sites:
    """Sites of a batch in which each row takes part in one of several.

    Args:
        parts: sites for all rows, and the strength [B] with which each row takes part in them (0: not at all).
            Either all have columns, or none.
        columns: S, how many columns the hidden state has.
    """
    groups, places = (max(sites.keep.shape[dim] for sites, _ in parts) for dim in (1, 2))
    chosen: Tensor | None = None
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
            chosen = own if chosen is None else torch.where(strength[:, None] != 0, own, chosen)
    assert keep is not None
    return Sites(chosen, keep, None if chosen is None else (chosen + first_of_rows(chosen, columns)).flatten())


def add_edit(
    out: Tensor, h: Tensor, sites: Sites, edit: Callable[[Tensor, Tensor], Tensor], owned: bool = False
) -> Tensor:
    """Add the edits of `h` at `sites` to `out`; every other vector of `out` is returned bit for bit.

    Args:
        out: [B, S, d], `h` or `h` with the edits of other adapters.
        h: [B, S, d], what the edit is computed from.
        sites: where.
        edit: maps vectors [B, G, P, d] and `sites.keep` to their edits [B, G, P, d], zero where not kept.
        owned: `out` may be written to, which saves a copy of the whole hidden state: autograd saved nothing of it, and
            nobody else holds it.
    """
    rows, _, d = h.shape
    groups = sites.keep.shape[1]
    if sites.places is None:
        delta = edit(h.unsqueeze(1).expand(-1, groups, -1, -1), sites.keep)
        delta = (delta.squeeze(1) if groups == 1 else delta.sum(1)).to(h.dtype)
        return out.add_(delta) if owned else out + delta
    # Whole rows of [B * S, d]: faster than along the columns, and autograd keeps the index, not h.
    selected = h.reshape(-1, d).index_select(0, sites.places)
    delta = edit(selected.view(rows, groups, -1, d), sites.keep).view(-1, d).to(h.dtype)
    if owned:
        out.view(-1, d).index_add_(0, sites.places, delta)
        return out
    return out.reshape(-1, d).index_add(0, sites.places, delta).view(out.shape)
