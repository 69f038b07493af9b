"""The terms of the position notation, one small class each, and the registry of their symbols.

To add a term, write its class here: which tokens it names, how many at most, and how to say it in words. Its oracle
is a loop in the tests, its documentation a row in docs/positions.md.

Shape letters: B rows, S columns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from peft_reft.positions.prompts import Prompts


@dataclass(frozen=True)
class Term(ABC):
    """One term of a spec.

    Attributes:
        count: how many tokens, or a step; 1 where the notation has no number.
        symbol: the letters of the notation.
        number: how a number follows them: "always", "never" or "optional".
        exclusive: it names every prompt token, so that only terms for generated tokens can stand with it.
        generated: it names generated tokens, none of the prompt.
        bounded: it names at most `count` tokens of a document, each of which is one of `count` positions.
        overlaps: a prompt token that it names may also be named by an earlier term, and then belongs to that one.
    """

    count: int = 1
    symbol: ClassVar[str]
    number: ClassVar[str] = "always"
    exclusive: ClassVar[bool] = False
    generated: ClassVar[bool] = False
    bounded: ClassVar[bool] = True
    overlaps: ClassVar[bool] = False

    def __str__(self) -> str:
        return self.symbol if self.number != "always" and self.count == 1 else f"{self.symbol}{self.count}"

    @property
    def width(self) -> int | None:
        """The most tokens that the term can name in a document; None if only the document's length bounds it."""
        return self.count if self.bounded else None

    @abstractmethod
    def mask(self, prompts: Prompts, prefix: Tensor | int) -> Tensor:
        """Bool [B, S]: the tokens that the term names.

        Args:
            prompts: where the prompts lie.
            prefix: [B, 1] or [B, S], how many tokens the term "f" of the same spec names; 0 without one.
        """

    def slot(self, prompts: Prompts) -> Tensor:
        """Long [B, S]: which of the term's `count` positions a token is, where `mask` is True; of bounded terms."""
        raise NotImplementedError(f"{str(self)!r} names any number of tokens: they have no positions to number.")

    @property
    @abstractmethod
    def words(self) -> str:
        """What the term names, as in "the first 2 tokens"."""


class First(Term):
    """fN: the first N tokens of the prompt."""

    symbol = "f"

    def mask(self, prompts: Prompts, prefix: Tensor | int) -> Tensor:
        return prompts.inside & (prompts.order < prefix)

    def slot(self, prompts: Prompts) -> Tensor:
        return prompts.order

    @property
    def words(self) -> str:
        return "the first token" if self.count == 1 else f"the first {self.count} tokens"


class Last(Term):
    """lM: the last M tokens of the prompt that the term "f" does not name."""

    symbol = "l"

    def mask(self, prompts: Prompts, prefix: Tensor | int) -> Tensor:
        start = prompts.length - self.count
        start = torch.maximum(start, prefix) if isinstance(prefix, Tensor) else start
        return prompts.inside & (prompts.order >= start)

    def slot(self, prompts: Prompts) -> Tensor:
        # The k-th last token is the same position in a prompt of any length, so it is counted from the end.
        return prompts.order - prompts.length + self.count

    @property
    def words(self) -> str:
        return "the last token" if self.count == 1 else f"the last {self.count} tokens"


class Middle(Term):
    """mK: K tokens in the middle of the prompt."""

    symbol = "m"
    overlaps = True

    def mask(self, prompts: Prompts, prefix: Tensor | int) -> Tensor:
        slot = self.slot(prompts)
        return prompts.inside & (slot >= 0) & (slot < self.count)

    def slot(self, prompts: Prompts) -> Tensor:
        return prompts.order - ((prompts.length - self.count) // 2).clamp(min=0)

    @property
    def words(self) -> str:
        return "the token in the middle" if self.count == 1 else f"{self.count} tokens in the middle"


class Every(Term):
    """eK: every K-th token of the prompt."""

    symbol = "e"
    bounded = False
    overlaps = True

    def mask(self, prompts: Prompts, prefix: Tensor | int) -> Tensor:
        return prompts.inside & (prompts.order % self.count == self.count - 1)

    @property
    def words(self) -> str:
        return "every token" if self.count == 1 else f"every {ordinal(self.count)} token"


class Generated(Term):
    """d, dK: every, or every K-th, generated token; in training the tokens of an answer."""

    symbol = "d"
    bounded = False
    number = "optional"
    generated = True

    def mask(self, prompts: Prompts, prefix: Tensor | int) -> Tensor:
        if prompts.answer is None or prompts.answer_order is None:
            return torch.zeros_like(prompts.inside)
        return prompts.answer & (prompts.answer_order % self.count == self.count - 1)

    @property
    def words(self) -> str:
        return "every generated token" if self.count == 1 else f"every {ordinal(self.count)} generated token"


class All(Term):
    """all: every token of the prompt."""

    symbol = "all"
    bounded = False
    number = "never"
    exclusive = True

    def mask(self, prompts: Prompts, prefix: Tensor | int) -> Tensor:
        return prompts.inside

    @property
    def words(self) -> str:
        return "every token"


def ordinal(number: int) -> str:
    """A number as an ordinal.

    >>> [ordinal(n) for n in (1, 2, 3, 4, 11, 22)]
    ['1st', '2nd', '3rd', '4th', '11th', '22nd']
    """
    suffix = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{suffix}"


# By symbol, in the order in which the terms of a spec are usually written.
TERMS: dict[str, type[Term]] = {cls.symbol: cls for cls in (First, Last, Middle, Every, Generated, All)}
