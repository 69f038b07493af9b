"""A thousand instructions of UltraFeedback with their answers, in the model's own chat template.

A line is `{"instruction": "...", "input": "", "output": "..."}` (https://github.com/stanfordnlp/pyreft, file
`examples/composition/ultrafeedback_1k.json`). The prompt is what the template makes of a user's message, up to where
the assistant begins to speak; the answer ends in the token that ends it in a chat.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from benchmarks.real_llm.rows import Data, Row, pad_of

TEST, VALIDATION = 200, 150  # of the thousand; the same ones whatever the length of rows, and never trained


def chat_prompt(tokenizer: Any, message: str) -> list[int]:
    """Token ids of a chat in which it is the assistant's turn to answer the message."""
    messages = [{"role": "user", "content": message}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def chat_row(tokenizer: Any, message: str, answer: str) -> Row:
    """A message as a chat, and its answer with the token that ends it."""
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return Row(chat_prompt(tokenizer, message), [*ids, tokenizer.eos_token_id])


def read(path: Path, tokenizer: Any) -> list[Row]:
    """All instructions of a file, in its order."""
    with path.open() as file:  # a line of the file, where splitlines would break within a text
        entries = [json.loads(line) for line in file]
    texts = ("\n\n".join(filter(None, (entry["instruction"], entry["input"]))) for entry in entries)
    return [chat_row(tokenizer, text, entry["output"]) for text, entry in zip(texts, entries)]


def cut(rows: list[Row], longest: int) -> list[Row]:
    """Answers without what exceeds `longest` tokens of prompt and answer; prompts longer than half of it are left out.

    What is left of an answer is its beginning, without the token that ends it.
    """
    return [Row(row.prompt, row.answer[: longest - len(row.prompt)]) for row in rows if 2 * len(row.prompt) <= longest]


def load(folder: Path, tokenizer: Any, names: tuple[str, ...], longest: int, validation: int, test: int) -> Data:
    """Read the one file `<name>.json`, and split it.

    Args:
        longest: tokens of a row at most.
        validation, test: at most so many rows to choose the learning rate, and to test.

    Raises:
        ValueError: if too few rows are short enough for any of the three parts.
    """
    (name,) = names
    rows = read(folder / f"{name}.json", tokenizer)
    random.Random("instructions").shuffle(rows)
    held_out = TEST + VALIDATION
    tests, chosen, train = (cut(part, longest) for part in (rows[:TEST], rows[TEST:held_out], rows[held_out:]))
    if not (tests and chosen and train):
        raise ValueError(
            f"longest={longest} leaves {len(train)}, {len(chosen)} and {len(tests)} rows for training, validation "
            "and test: a prompt must fit in half of it; take a higher number."
        )
    return Data(train, chosen[:validation], {name: tests[:test]}, pad_of(tokenizer), tokenizer)
