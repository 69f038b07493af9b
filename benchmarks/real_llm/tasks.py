"""Questions in the format of the paper's commonsense experiments, as LLM-Adapters' files have them.

A row is `{"instruction": "... Answer1: ... Answer2: ...", "output": "the correct answer is answer2", "answer":
"answer2"}`, or, of BoolQ, one whose answer is "true" or "false" (https://github.com/AGI-Edgerunners/LLM-Adapters,
folder `dataset` and `ft-training_set`). The prompt is the instruction and a line break, as in pyreft's recipe; the
answer is the output and the end-of-text token.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.real_llm.rows import Data, Row, pad_of

TASKS = ("openbookqa", "ARC-Easy")
FOUR = ("answer1", "answer2", "answer3", "answer4")
TRUE_FALSE = ("true", "false")


@dataclass(frozen=True)
class Question(Row):
    """A row that asks to choose.

    Attributes:
        words: the choices, as an answer names them.
        tokens: by choice, the last token of the answer before the end of the text, which tells them apart.
        choice: the number of the right one, from 0.
    """

    words: tuple[str, ...]
    tokens: tuple[int, ...]
    choice: int


def words_of(entry: dict[str, str]) -> tuple[str, ...] | None:
    """The choices of a question; None if they are neither four answers nor true and false."""
    if entry["answer"] in TRUE_FALSE:
        return TRUE_FALSE
    has_four = len(re.findall(r"Answer\d:", entry["instruction"])) == len(FOUR)
    return FOUR if has_four and entry["answer"] in FOUR else None


def read(path: Path, tokenizer: Any, longest: int) -> list[Question]:
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
        Question(prompt, [*output, tokenizer.eos_token_id], words, tokens[words], words.index(entry["answer"]))
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
    return Data(train[validation:], train[:validation], tests, pad_of(tokenizer), tokenizer)
