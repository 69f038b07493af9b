"""How a row of a data set becomes a prompt and its completion, in the formats that the paper trains on.

Positions count over the prompt alone, so where it ends is part of the recipe: behind the newline of the template. The
end-of-sequence token is added by the trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Row = Mapping[str, Any]

# The templates of Alpaca (Taori et al. 2023), which the paper uses for arithmetic (by Hu et al. 2023) and instructions.
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)

TRIGGER = "the correct answer is "  # what every completion of commonsense170k begins with


def commonsense(row: Row) -> tuple[str, str]:
    """The instruction and a newline; completed by "the correct answer is X" (pyreft 0.1.0, `task_config.py`)."""
    answer = row.get("answer")
    return row["instruction"].strip() + "\n", "" if answer is None else TRIGGER + str(answer).strip()


def arithmetic(row: Row) -> tuple[str, str]:
    """Alpaca's template without an input; completed by the worked solution."""
    return WITHOUT_INPUT.format(instruction=row["instruction"].strip()), (row.get("output") or "").strip()


def instruct(row: Row) -> tuple[str, str]:
    """Alpaca's template, with the input if the row has one; completed by the response.

    Raw UltraFeedback rows hold several `completions`; the one with the best mean of its four ratings is taken. Its
    `overall_score` is a 10 in many rows where the worst, a 1, was meant (UltraFeedback's issue 8).
    """
    template = WITH_INPUT if row.get("input") else WITHOUT_INPUT
    prompt = template.format(instruction=row["instruction"], input=row.get("input"))
    if "completions" in row:
        best = max(row["completions"] or [], key=_rating, default={})
        return prompt, best.get("response") or ""
    return prompt, row.get("output") or ""


def _rating(completion: Row) -> float:
    """`fine-grained_score` is that mean."""
    return float(completion.get("fine-grained_score") or completion.get("overall_score") or 0)


FORMATS: dict[str, Callable[[Row], tuple[str, str]]] = {
    "commonsense": commonsense,
    "arithmetic": arithmetic,
    "instruct": instruct,
}
