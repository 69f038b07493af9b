"""Interchange interventions: a subspace of h gets the value that it has in another input, the source.

What is exchanged tells what a subspace stands for: if the model then answers as if only one thing about its input were
the source's, the subspace holds that thing (Geiger et al. 2024, distributed alignment search,
https://arxiv.org/abs/2303.02536). The source's hidden state comes from a run of the model; see context/sources.py.

Shape letters: d hidden size, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from peft_reft.interventions.orthonormal import draw_rows, fresh_dtype, without_autocast
from peft_reft.interventions.parts import PartedRows


class InterchangeIntervention(PartedRows):
    """Interchange(h, s) = h + Rᵀ(Rs - Rh): the part of h in the subspace is replaced by the source's.

    Args:
        d: width of the hidden states.
        r: number of directions, 1 <= r <= d.
        parts: sizes of the named parts of R, r together; () for R as a whole.

    Calling it with `h` and a source of the same shape [..., d] returns [..., d].
    """

    takes_source = True

    def __init__(self, d: int, r: int, *, parts: Sequence[int] = ()):
        super().__init__(d, r, parts)
        self.basis = nn.Parameter(torch.empty(r, d, dtype=fresh_dtype()))
        if not self.basis.is_meta:
            draw_rows(self.basis)

    def edit(self, h: Tensor, source: Tensor, keep: Tensor | None = None) -> Tensor:
        """What is added to `h` [..., d], in at least single precision; `keep` [..., r] is a factor per direction."""
        with without_autocast(h.device):
            R = self.subspace
            value = (source.to(R.dtype) - h.to(R.dtype)) @ R.mT
            return (value if keep is None else value * keep) @ R

    def forward(self, h: Tensor, source: Tensor, keep: Tensor | None = None) -> Tensor:
        return h + self.edit(h, source, keep).to(h.dtype)


class VanillaIntervention(nn.Module):
    """Vanilla(h, s) = s: the whole hidden state is replaced by the source's. It has no parameters, and no rank."""

    takes_source = True

    def __init__(self, d: int, r: int):
        super().__init__()
        self.d = d

    def edit(self, h: Tensor, source: Tensor) -> Tensor:
        """What is added to `h` [..., d], in at least single precision."""
        dtype = torch.promote_types(h.dtype, torch.float32)
        return source.to(dtype) - h.to(dtype)

    def forward(self, h: Tensor, source: Tensor) -> Tensor:
        return source.to(h.dtype)

    def extra_repr(self) -> str:
        return f"d={self.d}"
