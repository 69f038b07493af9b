"""Chats as SmolLM2 reads and answers them: token ids of its template, batches, a training, the loss, greedy answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.real_llm.instructions import chat_prompt, chat_row
from benchmarks.real_llm.rows import Row, answer_columns, collate
from benchmarks.smollm2 import record
from benchmarks.smollm2.texts import Chat
from benchmarks.study.methods import parameter_groups
from benchmarks.study.training import fit


class Chats:
    """The frozen model, and chats as ids of its template.

    Args:
        folder: of the model.
    """

    def __init__(self, folder: Path):
        self.base, self.tokenizer = record.load(folder)

    def prompt(self, question: str) -> list[int]:
        return chat_prompt(self.tokenizer, question)

    def encoded(self, chats: list[Chat]) -> list[Row]:
        """Prompts, and answers with the token that ends them."""
        return [chat_row(self.tokenizer, question, answer) for question, answer in chats]

    def collate(self, rows: list[Row]) -> dict[str, Any]:
        """Padded on the left, so that the last columns have all answers; labels of -100 on prompts and padding."""
        batch = collate(rows, self.tokenizer.pad_token_id)
        return {**batch, "logits_to_keep": answer_columns(rows) + 1, "use_cache": False}

    def train(self, model: nn.Module, rows: list[Row], size: int, lr: float, steps: int) -> list[float]:
        """Train on the rows in their order, so many in a step; returns the loss of each step."""

        def epoch() -> Iterator[dict[str, Any]]:
            for start in range(0, len(rows), size):
                yield self.collate(rows[start : start + size])

        return [round(loss, 4) for loss in fit(model, parameter_groups(model, lr, lr), epoch, steps)]

    @torch.no_grad()
    def loss(self, model: nn.Module, rows: list[Row]) -> float:
        """Nats per token of the answers."""
        return round(model.eval()(**self.collate(rows)).loss.item(), 4)

    @torch.no_grad()
    def answers(self, model: nn.Module, questions: list[str], longest: int, shortest: int = 0) -> list[list[int]]:
        """Greedy answers as ids, with the token that ends them if it was said."""
        prompts = [Row(self.prompt(question), []) for question in questions]
        pad = self.tokenizer.pad_token_id
        batch = collate(prompts, pad, answers=False)
        settings = {"max_new_tokens": longest, "min_new_tokens": shortest, "do_sample": False, "pad_token_id": pad}
        said = model.eval().generate(**batch, **settings)[:, batch["input_ids"].shape[1] :].tolist()
        end = self.tokenizer.eos_token_id
        return [row[: row.index(end) + 1] if end in row else row for row in said]
