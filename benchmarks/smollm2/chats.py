"""Chats as SmolLM2 reads and answers them: token ids of its template, batches, a training, the loss, greedy answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.smollm2 import record
from benchmarks.smollm2.texts import Chat
from benchmarks.study.methods import parameter_groups
from benchmarks.study.training import fit

Pair = tuple[list[int], list[int]]  # the ids of a prompt and of its answer


class Chats:
    """The frozen model, and chats as ids of its template.

    Args:
        folder: of the model.
    """

    def __init__(self, folder: Path):
        self.base, self.tokenizer = record.load(folder)

    def prompt(self, question: str) -> list[int]:
        message = [{"role": "user", "content": question}]
        text = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def encoded(self, chats: list[Chat]) -> list[Pair]:
        """Prompts, and answers with the token that ends them."""
        end = self.tokenizer.eos_token_id
        return [(self.prompt(q), [*self.tokenizer(a, add_special_tokens=False)["input_ids"], end]) for q, a in chats]

    def collate(self, pairs: list[Pair]) -> dict[str, Any]:
        """Padded on the left, so that the last columns have all answers; labels of -100 on prompts and padding."""
        columns = max(len(prompt) + len(answer) for prompt, answer in pairs)
        ids = torch.full((len(pairs), columns), self.tokenizer.pad_token_id)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for row, (prompt, answer) in enumerate(pairs):
            start = columns - len(prompt) - len(answer)
            ids[row, start:] = torch.tensor(prompt + answer)
            labels[row, -len(answer) :] = torch.tensor(answer)
            mask[row, start:] = 1
        keep = max(len(answer) for _, answer in pairs) + 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, "logits_to_keep": keep, "use_cache": False}

    def train(self, model: nn.Module, pairs: list[Pair], rows: int, lr: float, steps: int) -> list[float]:
        """Train on the pairs in their order, so many in a step; returns the loss of each step."""

        def epoch() -> Iterator[dict[str, Any]]:
            for start in range(0, len(pairs), rows):
                yield self.collate(pairs[start : start + rows])

        return [round(loss, 4) for loss in fit(model, parameter_groups(model, lr, lr), epoch, steps)]

    @torch.no_grad()
    def loss(self, model: nn.Module, pairs: list[Pair]) -> float:
        """Nats per token of the answers."""
        return round(model.eval()(**self.collate(pairs)).loss.item(), 4)

    @torch.no_grad()
    def answers(self, model: nn.Module, questions: list[str], longest: int, shortest: int = 0) -> list[list[int]]:
        """Greedy answers as ids, with the token that ends them if it was said."""
        prompts = [self.prompt(question) for question in questions]
        columns, pad = max(map(len, prompts)), self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (columns - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (columns - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        settings = {"max_new_tokens": longest, "min_new_tokens": shortest, "do_sample": False, "pad_token_id": pad}
        said = model.eval().generate(input_ids=ids, attention_mask=mask, **settings)[:, columns:].tolist()
        end = self.tokenizer.eos_token_id
        return [row[: row.index(end) + 1] if end in row else row for row in said]
