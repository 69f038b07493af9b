"""One training loop for all parts of the study: AdamW without decay, linear warm-up and decay, clipped gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

WARMUP = 0.1
CLIP = 1.0

Batch = dict[str, Tensor]


def fit(
    model: nn.Module,
    groups: list[dict[str, Any]],
    epoch: Callable[[], Iterator[Batch]],
    steps: int,
    before_step: Callable[[int], None] | None = None,
) -> list[float]:
    """Train for so many steps on the model's own loss.

    Args:
        groups: the optimizer's parameters and learning rates.
        epoch: gives the batches of one pass over the data; called as often as it takes.
        before_step: called with the step's number, to measure something.

    Returns:
        The loss of each step.
    """
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    warmup = max(1, int(WARMUP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    parameters = [parameter for group in groups for parameter in group["params"]]
    losses: list[float] = []
    while len(losses) < steps:
        for batch in epoch():
            if len(losses) == steps:
                break
            if before_step is not None:
                before_step(len(losses))
            model.train()
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


def tenths(losses: list[float]) -> list[float]:
    """The mean of each tenth of a run, for a curve."""
    parts = [losses[len(losses) * i // 10 : len(losses) * (i + 1) // 10] for i in range(10)]
    return [round(sum(part) / len(part), 4) for part in parts if part]
