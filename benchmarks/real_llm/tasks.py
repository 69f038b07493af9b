"""The tasks: multiple choice in the format of the paper's commonsense experiments, as LLM-Adapters' files have them.

A row is `{"instruction": "... Answer1: ... Answer2: ...", "output": "the correct answer is answer2", "answer":
"answer2"}` (https://github.com/AGI-Edgerunners/LLM-Adapters, folder `dataset` and `ft-training_set`). The prompt is
the instruction and a line break, as in pyreft's recipe; the answer is the output and the end-of-text token.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

CHOICES = 4
TASKS = ("openbookqa", "ARC-Easy")

Batch = dict[str, Tensor]


class Row(NamedTuple):
    """One question: token ids of prompt and answer, and the number of the right choice, from 0."""

    prompt: list[int]
    answer: list[int]
    choice: int


@dataclass
class Data:
    """Rows for training, for the choice of the learning rate, and for the test, by task.

    Args:
        digits: the token ids that tell the choices apart: "1" to "4".
        pad: the token id that fills up.
    """

    train: list[Row]
    validation: list[Row]
    test: dict[str, list[Row]]
    digits: list[int]
    pad: int
    tokenizer: Any

    @property
    def answer_columns(self) -> int:
        """How many columns at the end of a batch hold answers."""
        return max(len(row.answer) for row in self.train)


def read(path: Path, tokenizer: Any, longest: int) -> list[Row]:
    """The questions with four choices and at most `longest` tokens, answer included.

    Raises:
        ValueError: if there is none.
    """
    entries = [
        entry
        for entry in json.loads(path.read_text())
        if len(re.findall(r"Answer\d:", entry["instruction"])) == CHOICES
    ]
    if not entries:
        raise ValueError(f"{path} has no question with {CHOICES} choices (Answer1: to Answer{CHOICES}:); take another.")
    prompts = tokenizer([entry["instruction"] + "\n" for entry in entries], add_special_tokens=False)["input_ids"]
    answers = tokenizer([entry["output"] for entry in entries], add_special_tokens=False)["input_ids"]
    rows = [
        Row(prompt, [*answer, tokenizer.eos_token_id], int(entry["answer"].removeprefix("answer")) - 1)
        for entry, prompt, answer in zip(entries, prompts, answers)
    ]
    return [row for row in rows if len(row.prompt) + len(row.answer) <= longest and row.choice < CHOICES]


def load(
    folder: Path, tokenizer: Any, names: tuple[str, ...], longest: int = 96, validation: int = 400, test: int = 1000
) -> Data:
    """Read the files `<name>-train.json` and `<name>-test.json`.

    Args:
        validation: so many of all training rows are kept apart, to choose the learning rate.
        test: at most so many test rows of each task.
    """
    rng = random.Random("rows")
    train = [row for name in names for row in read(folder / f"{name}-train.json", tokenizer, longest)]
    rng.shuffle(train)
    tests = {name: read(folder / f"{name}-test.json", tokenizer, longest)[:test] for name in names}
    digits = tokenizer("1234", add_special_tokens=False)["input_ids"]
    if len(digits) != CHOICES:
        raise ValueError(f"The tokenizer makes {len(digits)} tokens of '1234'; likelihood needs one for each digit.")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return Data(train[validation:], train[:validation], tests, digits, pad, tokenizer)


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
