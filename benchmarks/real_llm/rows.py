"""What is trained and measured: prompts with their answers, as token ids, and batches of them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """Token ids of a prompt and of its answer."""

    prompt: list[int]
    answer: list[int]


@dataclass
class Data:
    """Rows for training, for the choice of the learning rate, and for the test, by task.

    Args:
        pad: the token id that fills up.
    """

    train: list[Row]
    validation: list[Row]
    test: dict[str, list[Row]]
    pad: int
    tokenizer: Any

    @property
    def answer_columns(self) -> int:
        """How many columns at the end of a batch of training rows hold answers."""
        return answer_columns(self.train)


def answer_columns(rows: list[Row]) -> int:
    """How many columns at the end of a batch of these rows hold answers."""
    return max(len(row.answer) for row in rows)


def pad_of(tokenizer: Any) -> int:
    """The token id that fills up: the one that ends texts, where a tokenizer has none for it."""
    pad: int = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return pad


def collate(rows: list[Row], pad: int, width: int = 0, answers: bool = True) -> Batch:
    """Rows padded on the left, so that all answers end in the last column.

    Args:
        width: columns; 0 for as many as the longest row needs.
        answers: False leaves prompts, to generate from.
    """
    texts = [row.prompt + (row.answer if answers else []) for row in rows]
    width = width or max(map(len, texts))
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for i, (row, text) in enumerate(zip(rows, texts)):
        ids[i, width - len(text) :] = torch.tensor(text)
        mask[i, width - len(text) :] = 1
        if answers:
            labels[i, width - len(row.answer) :] = torch.tensor(row.answer)
    return {"input_ids": ids, "attention_mask": mask, **({"labels": labels} if answers else {})}


def training_rows(rows: list[Row], size: int, steps: int, seed: int) -> Iterator[list[Row]]:
    """The rows of each step's batch: all of them in an order of the seed's, then again in another."""
    rng = random.Random(f"order {seed}")
    order: list[Row] = []
    for _ in range(steps):
        while len(order) < size:
            order += rng.sample(rows, len(rows))
        yield order[:size]
        order = order[size:]
