"""Greedy answers of a backbone in any form: what an app's loop looks like, and the check that a file is the model.

prompt -> mask of the prompt -> forward -> token -> mask of the next generated token -> forward -> ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from peft_reft.export.masks import edit_mask

# A backbone that can be run, whatever its file: input_ids, attention_mask, edit_mask, down, bias, up, *past (those of
# the adapter are missing where it is baked in) -> logits, *present.
Run = Callable[..., Sequence[Tensor]]


@torch.no_grad()
def greedy_answer(
    run: Run,
    prompt: Sequence[int],
    adapter: Mapping[str, Tensor] | None,
    positions: str,
    share_weights: bool | str,
    past: Sequence[Tensor] | None,
    new_tokens: int = 16,
    strength: float = 1.0,
    given: Sequence[int] | None = None,
) -> list[int]:
    """The likeliest tokens behind a prompt, one after the other.

    Args:
        run: the backbone, as a function.
        prompt: token ids.
        adapter: its tensors for this backbone; None where one is baked in.
        positions: of the adapter.
        share_weights: of the adapter.
        past: the cache of a new row (`empty_past` of a backbone or its description); None for a backbone without one.
        new_tokens: how many.
        strength: 0 for the backbone alone.
        given: an answer of `new_tokens` tokens; each token is then the likeliest behind those of the given answer, so
            that one that differs does not change all that follow.
    """
    row, answer = list(prompt), list[int]()
    columns = row
    tensors = () if adapter is None else tuple(adapter[name] for name in ("down", "bias", "up"))
    while len(answer) < new_tokens:
        mask = edit_mask(positions, prompt_length=len(prompt), generated=len(answer), share_weights=share_weights)
        mask = strength * mask[:, -len(columns) :]
        ids, attention_mask = torch.tensor([columns]), torch.ones(1, len(row), dtype=torch.long)
        logits, *present = run(ids, attention_mask, mask, *tensors, *(past or ()))
        answer.append(int(logits[0, -1].argmax()))
        row = [*row, answer[-1] if given is None else given[len(answer) - 1]]
        if past is not None:
            past, columns = present, row[-1:]
        else:
            columns = row
    return answer
