"""Which tokens of a row an adapter edits, as text: the row with marks around them, for people to read."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch

from peft_reft.integrations.collator import KEY, ReftDataCollator
from peft_reft.tuner.config import ReftConfig


def edited_columns(config: ReftConfig, ids: Sequence[int], labels: Sequence[int] | None = None) -> set[int]:
    """The columns of one row that an adapter edits, by the rules of `ReftDataCollator`.

    Args:
        config: the adapter's.
        ids: token ids of the row, without padding.
        labels: as long as `ids`, -100 for tokens that are not predicted; None for a prompt.
    """
    batch = {"input_ids": torch.tensor([list(ids)]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    if labels is not None:
        batch["labels"] = torch.tensor([list(labels)])
    located = ReftDataCollator(lambda _: dict(batch), config)([])
    return columns_of(located[KEY][0])


def columns_of(locations: torch.Tensor) -> set[int]:
    """The columns in one row's `intervention_locations` [G, P]."""
    return {column for column in locations.flatten().tolist() if column >= 0}


def with_marks(tokenizer: Any, ids: Sequence[int], edited: set[int]) -> str:
    """The row as text, edited tokens between « and »; line ends are shown as ⏎.

    Args:
        tokenizer: decodes the ids.
        ids: token ids of the row.
        edited: the columns to mark.
    """
    text = ""
    for marked, run in groupby(range(len(ids)), key=edited.__contains__):
        piece = tokenizer.decode([ids[column] for column in run], skip_special_tokens=False)
        text += f"«{piece}»" if marked else piece
    return text.replace("\n", "⏎")
