"""How well a model answers.

Questions: by what it generates, in the paper's format, and by the likelihood of each choice. Instructions: by how
likely it finds given answers, which needs no judge.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.real_llm.rows import Data, Row, answer_columns, collate
from benchmarks.real_llm.tasks import Question

NEW_TOKENS = 8  # "the correct answer is answer2" and the end of the text are 7
WORD = 2  # what tells the choices apart is the last but one token of a row


@torch.no_grad()
def by_likelihood(model: nn.Module, data: Data, rows: list[Question], size: int) -> dict[str, float]:
    """Choose the answer whose last token is the likeliest of the choices', after "the correct answer is answer".

    Returns:
        "choice", the accuracy; "cross_entropy" of the right choice among all, in nats (guessing among four has 1.386);
        "answer", the cross entropy of the whole answer in nats per token, which is the loss of the training. Who knows
        the format and guesses the choice has 1.386 over the 7 tokens of an answer, 0.198.
    """
    device = next(model.parameters()).device
    right, nats, answer = 0.0, 0.0, 0.0
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        batch = {name: tensor.to(device) for name, tensor in collate(some, data.pad).items()}
        # The labels tell where the prompt ends. The choice is read from the logits before the word that tells.
        output = model(**batch, use_cache=False, logits_to_keep=data.answer_columns + 1)
        for row, logits in zip(some, output.logits[:, -WORD - 1].float().cpu()):
            scores = logits[list(row.tokens)]
            right += int(scores.argmax() == row.choice)
            nats += cross_entropy(scores, torch.tensor(row.choice)).item()
        answer += output.loss.item() * sum(len(row.answer) for row in some)
    tokens = sum(len(row.answer) for row in rows)
    return {"choice": right / len(rows), "cross_entropy": nats / len(rows), "answer": answer / tokens}


@torch.no_grad()
def by_generation(model: nn.Module, data: Data, rows: list[Question], size: int) -> dict[str, float]:
    """Generate greedily, and take the first answer that the text names, as LLM-Adapters does.

    Returns:
        "accuracy"; "in_format", the share of answers that are the sentence of the training rows with some choice.
    """
    device = next(model.parameters()).device
    right, in_format = 0, 0
    rows = sorted(rows, key=lambda row: len(row.prompt))
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        batch = {name: tensor.to(device) for name, tensor in collate(some, data.pad, answers=False).items()}
        # The token that ends training rows ends answers, whatever the model's generation config says.
        ends = {"eos_token_id": data.tokenizer.eos_token_id, "pad_token_id": data.pad}
        output = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False, **ends)
        texts = data.tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for row, text in zip(some, texts):
            choices = "|".join(row.words)
            named = re.search(choices, text)
            right += named is not None and named[0] == row.words[row.choice]
            in_format += re.fullmatch(f"the correct answer is ({choices})", text.strip()) is not None
    return {"accuracy": right / len(rows), "in_format": in_format / len(rows)}


@torch.no_grad()
def of_answers(model: nn.Module, data: Data, rows: list[Row], size: int) -> dict[str, Any]:
    """The cross entropy of the rows' answers.

    Returns:
        "answer", in nats per token of all answers; "nats" of each row's answer, and its "tokens".
    """
    device = next(model.parameters()).device
    nats: list[float] = []
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        batch = {name: tensor.to(device) for name, tensor in collate(some, data.pad).items()}
        labels = batch["labels"][:, -answer_columns(some) :]
        # The labels tell where the prompt ends; the loss that the model makes of them is not read.
        logits = model(**batch, use_cache=False, logits_to_keep=answer_columns(some) + 1).logits[:, :-1]
        found = cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")
        nats += [round(value, 3) for value in found.sum(1).tolist()]
    tokens = [len(row.answer) for row in rows]
    return {"answer": sum(nats) / sum(tokens), "nats": nats, "tokens": tokens}


def everything(model: nn.Module, data: Data, size: int) -> dict[str, Any]:
    """What is measured on validation rows, and on each task's test rows.

    Of questions, validation by likelihood, and each test by likelihood and by generation; of other rows the cross
    entropy of their answers.
    """
    if isinstance(data.validation[0], Question):
        return {
            "validation": by_likelihood(model, data, data.validation, size),
            "test": {
                name: {**by_likelihood(model, data, rows, size), **by_generation(model, data, rows, 2 * size)}
                for name, rows in data.test.items()
            },
        }
    return {
        "validation": {"answer": of_answers(model, data, data.validation, size)["answer"]},
        "test": {name: of_answers(model, data, rows, size) for name, rows in data.test.items()},
    }


def criterion(result: dict[str, Any]) -> float:
    """What chooses the learning rate, the less the better: validation nats of the choice, or of whole answers.

    A training that diverged has infinity.
    """
    validation = result["validation"]
    nats: float = validation["cross_entropy"] if "cross_entropy" in validation else validation["answer"]
    return nats if math.isfinite(nats) else math.inf


def best_rate(rates: Mapping[float, Sequence[dict[str, Any]]]) -> float:
    """The learning rate whose results, one for each seed that it has, are best on validation rows; by their mean.

    A rate that looks best with one seed and fails with the next is given up for another. Test rows are not asked.
    """
    return min(rates, key=lambda rate: statistics.mean(criterion(result) for result in rates[rate]))
