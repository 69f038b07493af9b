"""Memorisation: how much text one edited token can carry.

The last token of a short prompt is edited, in one block or in all, until the model recites a string: random tokens
(which cannot be guessed) or text of held-out files. How far the recital is right is counted in tokens from its start.
For one prompt the edited vector is the same every time, so that rank cannot matter to what it carries; so there is a
second question, how many prompts can each be given a string of their own. Edits of the whole prompt, and of generated
tokens, are there to compare.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.study import causal
from benchmarks.study.causal import Base
from benchmarks.study.methods import Method, count, parameter_groups
from benchmarks.study.task import Task
from benchmarks.study.training import Batch, fit

LENGTHS = (4, 16, 64)
NUMBERS = (4, 16)  # of prompts
SHORT = 8  # tokens of each of their strings
STEPS = 200


@torch.no_grad()
def recited(model: nn.Module, encoded: list[tuple[list[int], list[int]]]) -> list[int]:
    """Leading tokens of each answer that greedy decoding gives: up to the first error it sees what was asked for."""
    model.eval()
    batch = causal.collate(encoded)
    guesses = model(**batch).logits.argmax(-1)
    found = []
    for row, (prompt, answer) in enumerate(encoded):
        columns = guesses[row, len(prompt) - 1 : len(prompt) - 1 + len(answer)].tolist()
        wrong = [i for i, (guess, token) in enumerate(zip(columns, answer)) if guess != token]
        found.append(wrong[0] if wrong else len(answer))
    return found


def memorise(base: Base, method: Method, encoded: list, lr: float, seed: int, steps: int) -> tuple[list[int], int]:
    """Leading tokens that are right after training, and the trained numbers."""
    model = method.apply(base.model(), "CAUSAL_LM", seed)
    rng = random.Random(seed)

    def epoch() -> Iterator[Batch]:
        yield causal.collate(rng.sample(encoded, min(len(encoded), causal.BATCH)))

    fit(model, parameter_groups(model, lr, lr), epoch, steps)
    return recited(model, encoded), count(model)["parameters"]


def run(task: Task, base: Base, method: Method, lr: float, seed: int, steps: int) -> dict[str, Any]:
    """One cell: a setting, with strings of all lengths and all numbers of prompts."""
    rng = random.Random(f"strings {seed}")
    tokenizer = base.tokenizer
    ordinary = range(len(tokenizer.all_special_ids), len(tokenizer))
    text = tokenizer(" ".join(rng.sample(causal.texts(task)[1], 40)))["input_ids"]
    prompt = tokenizer("Recite 1:")["input_ids"]
    result: dict[str, Any] = {"random": {}, "text": {}, "prompts": {}}
    for length in LENGTHS:
        for kind, string in (("random", rng.choices(ordinary, k=length)), ("text", text[:length])):
            right, parameters = memorise(base, method, [(prompt, string)], lr, seed, steps)
            result[kind][str(length)] = right[0]
            result["parameters"] = parameters
    for number in NUMBERS:
        prompts = tokenizer([f"Recite {1 + i}:" for i in range(number)])["input_ids"]
        strings = [(ids, rng.choices(ordinary, k=SHORT)) for ids in prompts]
        right, _ = memorise(base, method, strings, lr, seed, 2 * steps)
        result["prompts"][str(number)] = sum(right) / (SHORT * number)
    return result
