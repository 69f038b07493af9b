"""The tables of effects and totals: what a prediction owes to each block, by leaving one block's edits out at a time.

Shape letters: B rows, S columns, n places that count, V classes (of the vocabulary, or of a classifier).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_reft.blocks.numbering import block_number
from peft_reft.inspect.batch import Batch, Columns, is_causal
from peft_reft.inspect.spy import Spy
from peft_reft.inspect.tokens import name_of

NAN = float("nan")
Row = dict[str, Any]


def effect_rows(
    model: nn.Module, base: Any, batch: Batch, logits: Any, spies: Sequence[Spy], tokenizer: Any
) -> tuple[list[Row], list[Row]]:
    """The rows of `Inspection.effects` and `Inspection.totals`; none if there are no logits of tokens or classes.

    Args:
        base: the model below PEFT's.
        logits: what the model returns with all edits.
    """
    if not isinstance(logits, Tensor) or logits.dim() not in (2, 3):
        return [], []
    where = predicted(batch, logits, is_causal(base), tokenizer).to(logits.device)
    row = where.nonzero()[:, 0].cpu()
    full = logits[where].float().cpu()

    def without(skipped: Sequence[Spy]) -> Tensor:
        for spy in skipped:
            spy.skipping = True
        some = model(**batch.inputs).logits[where].float().cpu()
        for spy in skipped:
            spy.skipping = False
        return some

    unedited = without(spies)
    whole = lost(full, unedited, row)
    effects = []
    for spy in spies:
        place = {"block": spy.block, "depth": block_number(spy.block)}
        for number, part in lost(full, without([spy]), row).items():
            most = whole[number]
            shares = {f"{key}_share": part[key] / most[key] if most[key] > 0 else NAN for key in ("tv", "kl")}
            effects.append({"prompt": batch.first + number, **place, **part, **shares})
    vocabulary = getattr(getattr(base, "config", None), "vocab_size", None)
    names = tokenizer if logits.dim() == 3 and logits.shape[-1] == vocabulary else None
    totals = []
    for number, part in whole.items():
        first = int((row == number).nonzero()[0])
        top, top_unedited = (name_of(int(some[first].argmax()), names) for some in (full, unedited))
        totals.append({"prompt": batch.first + number, **part, "top": top, "top_unedited": top_unedited})
    return effects, totals


def predicted(batch: Batch, logits: Tensor, causal: bool, tokenizer: Any) -> Tensor:
    """The places whose logits [B, V] or [B, S, V] are the prediction: bool [B] or [B, S].

    Raises:
        ValueError: if the model has tokens, and S logits are not theirs.
    """
    if logits.dim() == 2:
        return torch.ones(len(logits), dtype=torch.bool)
    stack = "decoder" if "decoder" in batch.stacks else ""
    columns = batch.stacks.get(stack, Columns.without_tokens(*logits.shape[:2]))
    ids, valid = columns.ids, columns.valid
    if valid.shape != logits.shape[:2]:
        raise ValueError(
            f"The model returned logits of shape {tuple(logits.shape)} for tokens of shape {tuple(valid.shape)}, so "
            "the prediction after the prompt cannot be located. Pass effects=False."
        )
    last = valid & (valid.long().flip(1).cumsum(1).flip(1) == 1)
    labels = batch.inputs.get("labels")
    if isinstance(labels, Tensor) and labels.shape == valid.shape:
        counted = labels.cpu() != -100
        if causal:  # the logits of a column predict the next one
            counted = F.pad(counted[:, 1:], (0, 1))
        return torch.where(counted.any(1, keepdim=True), counted & valid, last)
    if causal or stack == "decoder":
        return last
    mask = getattr(tokenizer, "mask_token_id", None)
    masked = valid & (ids == mask) if ids is not None and mask is not None else torch.zeros_like(valid)
    return torch.where(masked.any(1, keepdim=True), masked, valid)


def lost(full: Tensor, other: Tensor, row: Tensor) -> dict[int, Row]:
    """How far a prediction [n, V] is from another one, by `row` [n], as means over the places of each row."""
    log_p, log_q = full.double().log_softmax(-1), other.double().log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    values = {
        "tv": (p - q).abs().sum(-1) / 2,
        "kl": torch.where(p > 0, p * (log_p - log_q), 0).sum(-1).clamp(min=0),
        "logits": (full.double() - other.double()).square().mean(-1).sqrt(),
    }
    if full.shape[-1] == 1:  # a score: there are no probabilities
        values["tv"] = values["kl"] = torch.full_like(values["tv"], NAN)
    return {
        number: {key: float(value[row == number].mean()) for key, value in values.items()}
        for number in row.unique().tolist()
    }
