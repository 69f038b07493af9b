"""Which tokens of a request are edited, and by which of its adapter's interventions.

The terms and their arithmetic are those of positions/. Here the tokens of a request are counted from its first one, as
an engine does that runs a prompt in pieces and has cached parts of it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from peft_reft.positions import PositionSpec, Prompts, Tokens, mark

UNEDITED = -1  # in arrays of interventions' numbers


@dataclass(frozen=True)
class Rule:
    """The positions of an adapter.

    Attributes:
        spec: its terms; `turns` and `prompt_end` only if both are given, since otherwise all that a request gives is
            its prompt.
        share_weights: as in `ReftConfig`.
    """

    spec: PositionSpec
    share_weights: bool | str

    @property
    def edits_answers(self) -> bool:
        """Whether generated tokens are edited too."""
        return self.spec.edits_answers

    @property
    def reads_tokens(self) -> bool:
        """Whether the prompt's tokens have to be looked at: for the marker that ends each turn."""
        return bool(self.spec.turns and self.spec.prompt_end)

    def interventions(self, order: NDArray[np.int64], length: NDArray[np.int64]) -> NDArray[np.int64]:
        """The number of the intervention that edits each token, or `UNEDITED`.

        Args:
            order: [n], the token's number in its request, from 0; tokens of any number of requests.
            length: [n], how many tokens the prompt of its request has.
        """
        generated = order - length
        if (generated >= 0).all():  # most steps hold nothing else
            return self.of_answers[generated % len(self.of_answers)]
        return self._of_tokens(order, length)

    @functools.cached_property
    def of_answers(self) -> NDArray[np.int64]:
        """[period], the numbers for the first generated tokens of any request; those after them repeat these."""
        order = np.arange(math.lcm(*(term.count for term in self.spec.terms if term.generated)))
        return self._of_tokens(1 + order, np.ones_like(order))

    def _of_tokens(self, order: NDArray[np.int64], length: NDArray[np.int64]) -> NDArray[np.int64]:
        number, size = torch.from_numpy(order)[None], torch.from_numpy(length)[None]
        inside = number < size
        return self._numbers(Prompts(inside, number, size, answer=~inside, answer_order=number - size))

    def interventions_in_prompt(self, tokens: Sequence[int]) -> NDArray[np.int64]:
        """The same for all tokens of one prompt, whose turns are found in it."""
        ids = torch.tensor([list(tokens)])
        given = Tokens(torch.ones_like(ids, dtype=torch.bool), ids=ids, given=True)
        return self._numbers(given.prompts(self.spec.turns, self.spec.prompt_end))

    def _numbers(self, prompts: Prompts) -> NDArray[np.int64]:
        marks = mark(self.spec, prompts, self.share_weights)[0]  # a token is in one group, or in none
        numbers = torch.zeros_like(marks[0], dtype=torch.long) if self.share_weights is True else marks.byte().argmax(0)
        result: NDArray[np.int64] = numbers.masked_fill(~marks.any(0), UNEDITED).numpy()
        return result


class RequestEdits:
    """Which tokens of one request are edited.

    Args:
        rule: of its adapter.
        prompt_length: how many of its tokens are the prompt; all others count as generated.
        strength: a factor for its edits.
        tokens: its prompt's ids, needed only if `rule.reads_tokens`.
    """

    def __init__(self, rule: Rule, prompt_length: int, strength: float = 1.0, tokens: Sequence[int] | None = None):
        self.rule, self.prompt_length, self.strength = rule, prompt_length, strength
        self._tokens = tokens if rule.reads_tokens else None  # a long prompt need not be kept
        if rule.reads_tokens and tokens is None:
            raise ValueError(
                f"The adapter edits turns={rule.spec.turns!r}, which are found in the prompt's tokens; this prompt "
                "is given as embeddings. Pass tokens, or use an adapter without `turns`."
            )

    @functools.cached_property
    def in_prompt(self) -> NDArray[np.int16]:
        """[prompt_length], the number of the intervention that edits each token of the prompt, or `UNEDITED`."""
        if self._tokens is not None:
            numbers = self.rule.interventions_in_prompt(self._tokens[: self.prompt_length])
            self._tokens = None
        else:
            order = np.arange(self.prompt_length)
            numbers = self.rule.interventions(order, np.full_like(order, self.prompt_length))
        return numbers.astype(np.int16)

    def may_edit(self, start: int) -> bool:
        """Whether tokens from number `start` on can be edited at all."""
        return start < self.prompt_length or self.rule.edits_answers

    def interventions(self, start: int, stop: int) -> NDArray[np.int16]:
        """The numbers of the interventions that edit the tokens `start ... stop - 1`, or `UNEDITED`."""
        inside = self.in_prompt[start:stop]
        generated = np.arange(max(start, self.prompt_length), stop) - self.prompt_length
        if not len(generated):
            return inside
        answers = self.rule.of_answers[generated % len(self.rule.of_answers)]
        return np.concatenate([inside, answers], dtype=np.int16)
