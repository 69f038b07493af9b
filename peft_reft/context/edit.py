"""The edit of a hidden state: gather the vectors, multiply twice, put the edits back into a copy.

Shape letters: B rows, S columns, n interventions, m places for each, d hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_reft.interventions import edit_of, low_rank_edit


class Edit(NamedTuple):
    """What is added to the hidden states [B, S, d] after some blocks, the places in common and the factors of each.

    Attributes:
        indices: long [n * m], the edited vectors of the state as [B * S, d], those of each of n interventions in a row;
            None: all of its vectors, for each intervention.
        keep: [m, 1], or [n, m, 1] for several interventions, a factor for each vector's edit: 0 for places that only
            fill up the shape. Where R has parts that do not all act alike, r in the place of 1. None for 1 everywhere.
        blocks: by the number of the layer, the factors of n interventions, without a leading dimension for one; or
            the interventions themselves, which are then called.
        n: how many interventions; None for one.
        called: whether they are.
        dropout: probability with which an entry of the edit is dropped.
        autocast: whether autocast has to be kept out of the products.
    """

    indices: Tensor | None
    keep: Tensor | None
    blocks: Mapping[int, Any]
    n: int | None = None
    called: bool = False
    dropout: float = 0.0
    autocast: bool = False

    def add(self, out: Tensor, h: Tensor, factors: Any) -> Tensor:
        """`out` with the edit of `h`, both [B, S, d]; every other vector is returned bit for bit.

        Args:
            factors: of the block, one of `blocks`.
        """
        indices, keep, _, n, called, dropout, autocast = self
        if called:  # where such a module runs is known only now
            indices, keep = (None if tensor is None else tensor.to(h.device) for tensor in (indices, keep))
        flat = h.flatten(0, 1)
        selected = flat if indices is None else flat.index_select(0, indices)
        if n is not None:
            selected = selected.expand(n, -1, -1) if indices is None else selected.unflatten(0, (n, -1))
        if called:
            delta = _call(factors, selected, keep)
        elif autocast:
            with torch.autocast(h.device.type, enabled=False):
                delta = low_rank_edit(selected, factors, keep)
        else:
            delta = low_rank_edit(selected, factors, keep)
        if dropout:
            delta = F.dropout(delta, dropout)
        if delta.dtype != h.dtype:
            delta = delta.to(h.dtype)
        if indices is None:
            return out + (delta.sum(0) if n is not None else delta).view_as(h)
        if n is not None:
            delta = delta.flatten(0, 1)
        # Whole rows of [B * S, d]: faster than along the columns, and autograd keeps the indices, not h.
        return (flat if out is h else out.flatten(0, 1)).index_add(0, indices, delta).view_as(h)


def _call(modules: Sequence[nn.Module], selected: Tensor, keep: Any) -> Tensor:
    """The edits of interventions that are called as modules: of [m, d] for one, of [n, m, d] for several."""
    if selected.dim() == 2:
        return edit_of(modules[0], selected, keep=keep)
    return torch.stack([edit_of(module, h, keep=own) for module, h, own in zip(modules, selected, keep)])
