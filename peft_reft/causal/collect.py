"""Hidden states of a model at the places of a notation, block by block: what an interchange would take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_reft.causal.accuracy import evaluating
from peft_reft.causal.probe import on_device, probing


@torch.no_grad()
def collect(
    model: nn.Module,
    inputs: Mapping[str, Any],
    positions: str = "l1",
    layers: Sequence[int] | int | None = None,
    target_modules: list[str] | str | None = None,
) -> dict[str, Tensor]:
    """The hidden states that blocks return at some places, without any edit of a ReFT adapter.

    Args:
        model: with or without adapters; those of other methods stay as they are.
        inputs: of a call of the model. `intervention_locations` among them name the places in the place of `positions`.
        positions: the notation of `ReftConfig(positions=...)`.
        layers: numbers of the blocks; None for all.
        target_modules: names of other modules whose output is wanted, as in `ReftConfig`.

    Returns:
        By the name of the block, [B, P, d], the places of a row from left to right; zeros where a row has fewer.

    Raises:
        ValueError: if there are no such blocks.
    """
    with evaluating(model), probing(model, positions, layers, target_modules) as probe:
        found = probe.read(on_device(dict(inputs), model))
    return {block: states.masked_fill(~keep.unsqueeze(-1), 0.0) for block, (states, keep) in found.items()}
