"""Boundless interchange: how many directions of a rotated hidden state are exchanged is trained, too.

Boundless DAS (Wu et al. 2023, https://arxiv.org/abs/2305.08809) rotates the whole hidden state, r = d, and learns where
the exchanged directions end. In training the boundary is soft: a sigmoid of the distance to it, divided by a
temperature. The lower the temperature, the harder the boundary; causal/boundary.py lowers it step by step.

Shape letters: d hidden size, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peft_reft.interventions.interchange import InterchangeIntervention


class BoundlessIntervention(InterchangeIntervention):
    """Boundless(h, s) = h + Rᵀ(m ∘ (Rs - Rh)): the first rows of R are exchanged, and how many is trained.

    In training mᵢ = sigmoid((boundary · r - i - 1/2) / temperature) for the rows i = 0 ... r - 1. In eval mode the
    boundary is hard: mᵢ is 1 for the first `size` rows and 0 for the others, and there is no temperature.

    Args:
        d: width of the hidden states.
        r: the most directions that may be exchanged; d for those of the paper.

    Attributes:
        boundary: [1], where the exchanged directions end, as a part of r. A fresh one is at 0.5.
        temperature: of the boundary in training, in directions; None until it is set. It is not saved.
    """

    def __init__(self, d: int, r: int):
        super().__init__(d, r)
        self.boundary = nn.Parameter(torch.full((1,), 0.5, dtype=self.basis.dtype))
        self.temperature: float | None = None

    @property
    def distances(self) -> Tensor:
        """How far inside the boundary each row of R lies [r], in directions; negative outside."""
        r = self.basis.shape[0]
        return self.boundary.float() * r - torch.arange(r, device=self.boundary.device) - 0.5

    @property
    def size(self) -> int:
        """How many directions are exchanged in eval mode: those of `subspace[:size]`."""
        return int((self.distances > 0).sum())

    @property
    def mask(self) -> Tensor:
        """m [r].

        Raises:
            ValueError: in training, without a temperature.
        """
        if not self.training:
            return (self.distances > 0).float()
        if self.temperature is None:
            raise ValueError(
                "A boundless intervention is in training mode without a temperature, which has no default. Give the "
                "trainer a callback, peft_reft.causal.BoundaryAnnealing(start=..., end=..., penalty=...), or call "
                "peft_reft.causal.set_temperature(model, ...) before each step. model.eval() has a hard boundary."
            )
        return torch.sigmoid(self.distances / self.temperature)

    def edit(self, h: Tensor, source: Tensor, keep: Tensor | None = None) -> Tensor:
        """What is added to `h` [..., d], in at least single precision; `keep` [..., r] is a factor per direction."""
        mask = self.mask
        return super().edit(h, source, mask if keep is None else mask * keep)
