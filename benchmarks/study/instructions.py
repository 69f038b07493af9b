"""Instruction-like behaviour: a sentence, then a request that the base model was never asked.

    prompt      Return the mailbox's message count.
                It is about
    completion   mail

Sentences are those of the standard library's docstrings in which words of exactly one subject occur, split by file as
the encoder task is: no file of the test was seen by the base or the adapter. An answer counts if it is exactly right.
"""

from __future__ import annotations

import random
import re
from typing import Any

from benchmarks.study import causal
from benchmarks.study.causal import Base, Pair
from benchmarks.study.methods import Method
from benchmarks.study.task import Task, library

SUBJECTS = {
    "files": "file files filename filenames directory directories path paths",
    "mail": "email mail mailbox message messages",
    "networks": "server host socket http url urls network",
    "errors": "error errors exception exceptions raise raised raises traceback",
    "tests": "test tests testing testcase assert fails failure",
    "threads": "thread threads process processes lock locks semaphore",
}
STEPS, PER_SUBJECT = 400, 150


def pairs(task: Task, part: str) -> list[Pair]:
    """Sentences of a split's files, at most so many for each subject, and what they are about."""
    subject_of = {word: subject for subject, words in SUBJECTS.items() for word in words.split()}
    files = sorted({example.file for example in getattr(task, part)})
    paragraphs = (
        " ".join(p.split()) for f in files for text in library().get(f, []) for p in re.split(r"\n\s*\n", text)
    )
    sentences = dict.fromkeys(sentence for p in paragraphs for sentence in re.split(r"(?<=[.!?])\s+", p))
    by_subject: dict[str, list[Pair]] = {subject: [] for subject in SUBJECTS}
    for sentence in sentences:
        if sentence[:1].isupper() and sentence.endswith(".") and 4 <= len(sentence.split()) <= 16:
            named = {subject_of[word] for word in re.findall("[a-z]+", sentence.lower()) if word in subject_of}
            if len(named) == 1:
                subject = named.pop()
                by_subject[subject].append(Pair(f"{sentence}\nIt is about", f" {subject}"))
    rng = random.Random(0)
    return [pair for found in by_subject.values() for pair in rng.sample(found, min(len(found), PER_SUBJECT))]


def run(task: Task, base: Base, method: Method, lr: float, seed: int, steps: int) -> dict[str, Any]:
    """One cell: the share of exactly right answers on test sentences."""
    model, result = causal.finetune(base, method, pairs(task, "train"), lr, seed, steps)
    test = pairs(task, "test")
    given = []
    for start in range(0, len(test), 64):
        prompts = [pair.prompt for pair in test[start : start + 64]]
        given += causal.answers(model, base.tokenizer, prompts, 6)
    form = [answer in {f" {subject}" for subject in SUBJECTS} for answer in given]
    right = [answer == pair.completion for answer, pair in zip(given, test)]
    return {**result, "exact": sum(right) / len(test), "form": sum(form) / len(test), "sample": given[0]}
