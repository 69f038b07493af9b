"""The questions of benchmarks/real_llm: which rows are read, and what tells their choices apart."""

from __future__ import annotations

import json
import pathlib
import re
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from benchmarks.real_llm import tasks

FOUR = "Please choose the correct answer to the question: Who?\n\nAnswer1: a Answer2: b Answer3: c Answer4: d\n\nAnswer"
TRUE_FALSE = "Please answer the following question with true or false, question: is it?\n\nAnswer format: true/false"


class Words:
    """A tokenizer of words with the space before them, of digits, and of what is neither."""

    eos_token_id, pad_token_id = 0, None

    def __init__(self) -> None:
        self.known: dict[str, int] = {}

    def ids(self, text: str) -> list[int]:
        return [self.known.setdefault(word, len(self.known) + 1) for word in re.findall(r" ?[a-z]+|\d|\W|[A-Z]", text)]

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": [self.ids(text) for text in texts]}


def entry(instruction: str, answer: str) -> dict[str, str]:
    return {"instruction": instruction, "output": f"the correct answer is {answer}", "answer": answer}


def test_questions_with_four_choices_and_with_true_and_false_are_read(tmp_path):
    path = tmp_path / "some-train.json"
    entries = [
        entry(FOUR, "answer3"),
        entry(FOUR.replace(" Answer4: d", ""), "answer1"),  # three choices
        entry(TRUE_FALSE, "false"),
        entry(FOUR + " and more" * 99, "answer1"),  # too long
    ]
    path.write_text(json.dumps(entries))
    tokenizer = Words()
    first, second = tasks.read(path, tokenizer, longest=96)
    assert (first.words[first.choice], second.words[second.choice]) == ("answer3", "false")
    for row, texts in ((first, "1234"), (second, [" true", " false"])):
        assert list(row.tokens) == [tokenizer.known[text] for text in texts]
        assert row.answer[-1] == tokenizer.eos_token_id
        assert row.answer[-2] == row.tokens[row.choice]  # where the likelihood of the choices is read
    assert first.prompt == tokenizer.ids(FOUR + "\n")


def test_a_file_without_such_questions_is_refused(tmp_path):
    path = tmp_path / "none-train.json"
    path.write_text(json.dumps([entry("Which?", "solution1")]))
    with pytest.raises(ValueError, match="no question with the choices"):
        tasks.read(path, Words(), longest=96)
