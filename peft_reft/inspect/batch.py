"""Batches to run: one that was given, or texts encoded and padded; and what the columns of a batch are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from peft_reft.inspect.tokens import names_of
from peft_reft.tuner.injection import state_of


@dataclass
class Columns:
    """The columns of a sequence.

    Attributes:
        ids: token ids [B, S], or None.
        valid: which are no padding [B, S].
        answer: which belong to an answer [B, S].
        names: texts of the tokens by row, empty where there are no ids.
    """

    ids: Tensor | None
    valid: Tensor
    answer: Tensor
    names: list[list[str]] = field(default_factory=list)

    @classmethod
    def without_tokens(cls, rows: int, columns: int) -> Columns:
        """Of images, or whatever else has no tokens."""
        ones = torch.ones(rows, columns, dtype=torch.bool)
        return cls(None, ones, ~ones)


@dataclass
class Batch:
    """Inputs of one forward.

    Attributes:
        inputs: as the model takes them.
        first: number of the first prompt in it.
        stacks: what the columns are, by stack: "", or "encoder" and "decoder"; none for inputs without tokens.
    """

    inputs: dict[str, Any]
    first: int
    stacks: dict[str, Columns]


def is_causal(base: Any) -> bool:
    """Whether a model that has adapters predicts each token from those before it."""
    state = state_of(base)
    return state is not None and state.causal


def batches(
    base: Any, prompts: Any, tokenizer: Any, answers: str | Sequence[str] | None, batch_size: int
) -> Iterator[Batch]:
    """The batches to run; arguments as in `inspect_adapter`.

    Raises:
        ValueError: if the prompts or answers are not what is described there.
    """
    if isinstance(prompts, Mapping):
        if answers is not None:
            raise ValueError("answers go with prompts that are texts; give a batch of tensors its labels instead.")
        yield batch_of(base, dict(prompts), 0, tokenizer)
        return
    texts = [prompts] if isinstance(prompts, str) or is_conversation(prompts) else list(prompts)
    replies = [answers] if isinstance(answers, str) else answers
    if not texts or not all(isinstance(text, str) or is_conversation(text) for text in texts):
        raise ValueError(
            f"prompts={prompts!r} must be a text or a conversation (a list of messages), a list of these, or a batch "
            "of tensors by name."
        )
    if tokenizer is None:
        raise ValueError("Prompts that are texts need a tokenizer: inspect_adapter(model, prompts, tokenizer).")
    if replies is not None and len(replies) != len(texts):
        raise ValueError(f"There are {len(replies)} answers for {len(texts)} prompts; give each prompt one.")
    seq2seq = bool(getattr(getattr(base, "config", None), "is_encoder_decoder", False))
    if replies is not None and not seq2seq and not is_causal(base):
        raise ValueError("answers are for language models; this model reads its whole input as the prompt.")
    size = max(1, batch_size)
    for first in range(0, len(texts), size):
        some = texts[first : first + size]
        rows = [encoded(text, tokenizer) for text in some]
        for text, row in zip(some, rows):
            if not row:
                raise ValueError(f"The prompt {text!r} has no tokens.")
        inputs: dict[str, Any] = {}
        if replies is not None:
            given = replies[first : first + size]
            if seq2seq:
                inputs["labels"] = padded([list(tokenizer(text_target=text)["input_ids"]) for text in given], -100)
            else:
                ends = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in given]
                inputs["labels"] = padded([[-100] * len(row) + end for row, end in zip(rows, ends)], -100)
                rows = [row + end for row, end in zip(rows, ends)]
        pad = getattr(tokenizer, "pad_token_id", None)
        inputs["input_ids"] = padded(rows, 0 if pad is None else pad)
        inputs["attention_mask"] = padded([[1] * len(row) for row in rows], 0)
        yield batch_of(base, inputs, first, tokenizer)


def is_conversation(prompt: Any) -> bool:
    """Whether a prompt is a list of messages, such as [{"role": "user", "content": "Hello"}]."""
    listed = isinstance(prompt, Sequence) and not isinstance(prompt, str) and len(prompt) > 0
    return listed and all(isinstance(message, Mapping) and "role" in message for message in prompt)


def encoded(prompt: str | Sequence[Mapping[str, Any]], tokenizer: Any) -> list[int]:
    """Token ids of a text as it is, or of a conversation by the chat template, up to where the answer begins."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("Conversations need a tokenizer with a chat template; give the prompts as texts.")
    return list(tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, return_dict=False))


def padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    """Rows of different lengths as one tensor, filled up on the right.

    >>> padded([[1, 2, 3], [4]], 0)
    tensor([[1, 2, 3],
            [4, 0, 0]])
    """
    return pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True, padding_value=fill)


def batch_of(base: Any, inputs: dict[str, Any], first: int, tokenizer: Any) -> Batch:
    """Inputs on the model's device, with what their columns are; encoder-decoder models get what they decode from."""
    if inputs.get("adapter_names") is not None:
        raise ValueError("adapter_names is not supported here: set_adapter one of them, and inspect it.")
    labels, config = inputs.get("labels"), getattr(base, "config", None)
    ids = inputs.get("input_ids")
    if getattr(config, "is_encoder_decoder", False) and ids is not None and "decoder_input_ids" not in inputs:
        if labels is not None and hasattr(base, "prepare_decoder_input_ids_from_labels"):
            inputs["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(labels=labels)
        elif getattr(config, "decoder_start_token_id", None) is not None and labels is None:
            inputs["decoder_input_ids"] = torch.full((len(ids), 1), config.decoder_start_token_id)  # type: ignore[union-attr]
    stacks = {}
    encoder = "encoder" if "decoder_input_ids" in inputs else ""
    for stack, prefix in ((encoder, ""), ("decoder", "decoder_")):
        tokens = inputs.get(f"{prefix}input_ids")
        given = inputs.get(f"{prefix}inputs_embeds") if tokens is None else tokens
        if not isinstance(given, Tensor):
            continue
        columns = Columns.without_tokens(*given.shape[:2])
        if tokens is not None:
            columns.ids = tokens.cpu()
            columns.names = [names_of(row, tokenizer) for row in tokens.tolist()]
        mask = inputs.get(f"{prefix}attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            columns.valid = mask.cpu().bool()
        if isinstance(labels, Tensor) and labels.shape == given.shape[:2] and stack != "encoder":
            counted = labels.cpu() != -100
            columns.answer = F.pad(counted[:, :-1], (1, 0)) if stack == "decoder" else counted
        stacks[stack] = columns
    device = next((parameter.device for parameter in base.parameters()), torch.device("cpu"))
    moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
    return Batch(moved, first, stacks)
