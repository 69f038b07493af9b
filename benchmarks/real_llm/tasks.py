"""The tasks: questions in the format of the paper's commonsense experiments, as LLM-Adapters' files have them.

A row is `{"instruction": "... Answer1: ... Answer2: ...", "output": "the correct answer is answer2", "answer":
"answer2"}`, or, of BoolQ, one whose answer is "true" or "false" (https://github.com/AGI-Edgerunners/LLM-Adapters,
folder `dataset` and `ft-training_set`). The prompt is the instruction and a line break, as in pyreft's recipe; the
answer is the output and the end-of-text token.
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

TASKS = ("openbookqa", "ARC-Easy")
FOUR = ("answer1", "answer2", "answer3", "answer4")
TRUE_FALSE = ("true", "false")

Batch = dict[str, Tensor]


class Row(NamedTuple):
    """One question.

    Attributes:
        prompt, answer: token ids.
        words: the choices, as an answer names them.
        tokens: by choice, the last token of the answer before the end of the text, which tells them apart.
        choice: the number of the right one, from 0.
    """

    prompt: list[int]
    answer: list[int]
    words: tuple[str, ...]
    tokens: tuple[int, ...]
    choice: int


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
        """How many columns at the end of a batch hold answers."""
        return max(len(row.answer) for row in self.train)


def words_of(entry: dict[str, str]) -> tuple[str, ...] | None:
    """The choices of a question; None if they are neither four answers nor true and false."""
    if entry["answer"] in TRUE_FALSE:
        return TRUE_FALSE
    has_four = len(re.findall(r"Answer\d:", entry["instruction"])) == len(FOUR)
    return FOUR if has_four and entry["answer"] in FOUR else None


def read(path: Path, tokenizer: Any, longest: int) -> list[Row]:
    """The questions with four choices, or true and false, and at most `longest` tokens, answer included.

    Raises:
        ValueError: if there is none, or the tokenizer makes several tokens of what tells their choices apart.
    """

    def ids(texts: list[str]) -> list[list[int]]:
        found: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return found

    pairs = [(entry, words) for entry in json.loads(path.read_text()) if (words := words_of(entry)) is not None]
    if not pairs:
        raise ValueError(f"{path} has no question with the choices {FOUR} or {TRUE_FALSE}; take another file.")
    tokens: dict[tuple[str, ...], tuple[int, ...]] = {}
    for words in {words for _, words in pairs}:
        answers = ids([f"the correct answer is {word}" for word in words])
        if len({tuple(answer[:-1]) for answer in answers}) > 1:
            raise ValueError(f"The tokenizer's answers {words} differ in more than their last token: {answers}.")
        tokens[words] = tuple(answer[-1] for answer in answers)
    prompts = ids([entry["instruction"] + "\n" for entry, _ in pairs])
    outputs = ids([entry["output"] for entry, _ in pairs])
    rows = [
        Row(prompt, [*output, tokenizer.eos_token_id], words, tokens[words], words.index(entry["answer"]))
        for (entry, words), prompt, output in zip(pairs, prompts, outputs)
    ]
    return [row for row in rows if len(row.prompt) + len(row.answer) <= longest]


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
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return Data(train[validation:], train[:validation], tests, pad, tokenizer)


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
