"""Long answers in a style, with and without edits of generated tokens; and two styles trained apart and put together.

A prompt is the beginning of a docstring, the answer how it goes on, rewritten: "lines" puts every word on a line of its
own, "capitals" is upper case, "both" is both. Whether a style lasts is measured on free-running answers, by quarter of
the answer, and as the loss of the right answers to held-out prompts.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from benchmarks.study import causal
from benchmarks.study.causal import Base, Pair
from benchmarks.study.methods import Method
from benchmarks.study.task import Task, library

STYLES = {
    "lines": lambda text: text.replace(" ", "\n"),
    "capitals": str.upper,
    "both": lambda text: text.replace(" ", "\n").upper(),
}
PROMPT_WORDS, ANSWER_WORDS = 8, 24
STEPS, ANSWER_TOKENS, HELD_OUT = 100, 96, 48
ROWS = 24  # of a batch with several adapters


def passages(files: set[str]) -> list[tuple[str, str]]:
    """Beginnings of docstrings and how they go on, from these files, one blank between words."""
    need = PROMPT_WORDS + ANSWER_WORDS
    words = (text.split() for file in sorted(files) for text in library().get(file, []))
    long = {" ".join(text[:need]): text for text in words if len(text) >= need}
    return [(" ".join(t[:PROMPT_WORDS]), " " + " ".join(t[PROMPT_WORDS:need])) for t in long.values()]


def pairs(task: Task, part: str, style: str) -> list[Pair]:
    files = {example.file for example in getattr(task, part)}
    return [Pair(prompt, STYLES[style](answer)) for prompt, answer in passages(files)]


def in_style(text: str) -> dict[str, float | None]:
    """How far a text is in each style: the share of its blanks that end lines, and of its letters that are capitals."""
    blanks, letters = [c for c in text if c in " \n"], [c for c in text if c.isalpha()]
    return {
        "lines": sum(c == "\n" for c in blanks) / len(blanks) if blanks else None,
        "capitals": sum(c.isupper() for c in letters) / len(letters) if letters else None,
    }


def mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 4) if known else None


@torch.no_grad()
def measure(model: nn.Module, base: Base, held_out: list[Pair], **options: Any) -> dict[str, Any]:
    """Of free-running answers that do not end: each style by quarter of the answer, and over all of it."""
    prompts = [pair.prompt for pair in held_out[:HELD_OUT]]
    tokenizer = base.tokenizer
    given = causal.answers(model, tokenizer, prompts, ANSWER_TOKENS, min_new_tokens=ANSWER_TOKENS, **options)
    quarters: list[list[dict]] = [[], [], [], []]
    for answer in given:
        ids = tokenizer(answer)["input_ids"]
        for number in range(4):
            part = tokenizer.decode(ids[len(ids) * number // 4 : len(ids) * (number + 1) // 4])
            quarters[number].append(in_style(part))
    whole = [in_style(answer) for answer in given]
    return {
        "quarters": {name: [mean(q[name] for q in quarter) for quarter in quarters] for name in ("lines", "capitals")},
        **{name: mean(entry[name] for entry in whole) for name in ("lines", "capitals")},
        "sample": given[0][:160],
    }


def run(task: Task, base: Base, method: Method, lr: float, seed: int, steps: int) -> dict[str, Any]:
    """One cell of the long answers, in the style "lines"."""
    model, result = causal.finetune(base, method, pairs(task, "train", "lines"), lr, seed, steps)
    test = pairs(task, "test", "lines")
    held_out_loss = round(causal.loss_on(model, base.tokenizer, test[: 2 * HELD_OUT]), 4)
    return {**result, "test loss": held_out_loss, **measure(model, base, test)}


def run_composition(task: Task, base: Base, method: Method, lr: float, seed: int, steps: int) -> dict[str, Any]:
    """One cell of the composition: "lines" and "capitals" trained apart on one base model, "both" as what to hope for.

    Measures each alone, the two active at once, and a batch whose rows use one or the other.
    """
    model: Any = method.apply(base.model(), "CAUSAL_LM", seed)
    assert isinstance(model, PeftModel)
    model.add_adapter("lines", model.peft_config["default"])
    model.add_adapter("capitals", model.peft_config["default"])
    model.add_adapter("both", model.peft_config["default"])
    test = {style: pairs(task, "test", style)[: 2 * HELD_OUT] for style in STYLES}
    result: dict[str, Any] = {}
    for style in STYLES:
        model.set_adapter(style)
        causal.train_on(model, base.tokenizer, pairs(task, "train", style), lr, seed, steps)

    def outcome() -> dict[str, Any]:
        losses = {style: round(causal.loss_on(model, base.tokenizer, part), 4) for style, part in test.items()}
        return {"loss": losses, **measure(model, base, test["lines"])}

    for style in STYLES:
        model.set_adapter(style)
        result[style] = outcome()
    model.base_model.set_adapter(["lines", "capitals"])
    result["lines + capitals"] = outcome()
    with model.disable_adapter():
        result["base"] = outcome()
    return {**result, "rows": rows_of_one_batch(model, base, [pair.prompt for pair in test["lines"][:ROWS]])}


@torch.no_grad()
def rows_of_one_batch(model: Any, base: Base, prompts: list[str]) -> dict[str, Any]:
    """Rows with adapters of their own in one `generate`, against three calls with one adapter each."""
    model.eval()
    tokenizer, length = base.tokenizer, ANSWER_TOKENS // 2
    names = list(itertools.islice(itertools.cycle(["lines", "capitals", "__base__"]), len(prompts)))
    begin = time.process_time()
    together = causal.answers(model, tokenizer, prompts, length, min_new_tokens=length, adapter_names=names)
    seconds = {"together": round(time.process_time() - begin, 2)}
    apart: list[str] = [""] * len(prompts)
    begin = time.process_time()
    for name in dict.fromkeys(names):
        rows = [row for row, other in enumerate(names) if other == name]
        if name != "__base__":
            model.set_adapter(name)
        with model.disable_adapter() if name == "__base__" else contextlib.nullcontext():
            given = causal.answers(model, tokenizer, [prompts[row] for row in rows], length, min_new_tokens=length)
        for row, answer in zip(rows, given):
            apart[row] = answer
    seconds["apart"] = round(time.process_time() - begin, 2)
    equal = sum(one == other for one, other in zip(together, apart)) / len(prompts)
    return {"equal": equal, "different answers": len(set(together)), "seconds": seconds}
