"""Which tokens are edited: the "f7+l7" notation and its index arithmetic.

A spec names tokens relative to a prompt ("the first 7 and the last 7"); `locate` turns it into columns of
a batch. Where the prompt of each row lies is the work of prompt.py, editing is that of layer.py.

    f2+l1, prompt of five tokens:     A B C D E
                                      f f     l

Shape letters: B rows, S columns, G position groups (the terms of a spec), P positions per group.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from peft_reft.positions.prompts import Prompts

_GRAMMAR = (
    "Write how many tokens to edit at each end of the prompt, prefix first: 'f7+l7', 'f7' or 'l7'; or 'all' for the "
    "whole prompt. Further terms: 'm3' (three tokens in its middle), 'e4' (every 4th token), and 'd' or 'd8' (every, "
    "or every 8th, generated token)."
)
KINDS = ("f", "l", "m", "e", "d", "all")


@dataclass(frozen=True)
class Term:
    """One term of a spec.

    Attributes:
        kind: "f" first, "l" last, "m" middle, "e" every count-th token of the prompt, "all" of them, "d" every
            count-th generated token.
        count: how many tokens, or the step of "e" and "d"; 1 for "all".
    """

    kind: str
    count: int

    def __str__(self) -> str:
        return self.kind + (str(self.count) if (self.kind, self.count) not in (("all", 1), ("d", 1)) else "")

    @property
    def width(self) -> int | None:
        """The most tokens the term can name in a document; None if only the document's length bounds it."""
        return self.count if self.kind in "flm" else None


@dataclass(frozen=True)
class PositionSpec:
    """Which tokens are edited: the terms of a spec in their order, each a position group, and what counts as a prompt.

    Attributes:
        terms: a token that two of them name belongs to the first.
        turns: whose prompts, where a document shows several answers: of the "first", the "last" or "all" of them;
            None for the first by labels and the last by a marker.
        prompt_end: token ids that end a prompt, for callers that pass neither labels nor locations; () for none.
    """

    terms: tuple[Term, ...]
    turns: str | None = None
    prompt_end: tuple[int, ...] = ()

    def __str__(self) -> str:
        return "+".join(str(term) for term in self.terms)

    def count(self, kind: str) -> int:
        """The number in the term of this kind, 0 if the spec has no such term."""
        return sum(term.count for term in self.terms if term.kind == kind)

    @property
    def edits_answers(self) -> bool:
        """Whether generated tokens are edited too."""
        return self.count("d") > 0

    def widths(self, answers: bool = True) -> tuple[int, ...] | None:
        """Each group's largest number of tokens in a document, or None if there is no bound.

        Args:
            answers: whether there are answer tokens at all; without them "d" names nothing.

        >>> parse_positions("f7+l2").widths(), parse_positions("f7+d").widths(answers=False)
        ((7, 2), (7, 0))
        """
        widths = [0 if term.kind == "d" and not answers else term.width for term in self.terms]
        return None if None in widths else tuple(width for width in widths if width is not None)

    def num_interventions(self, share_weights: bool | str) -> int:
        """How many interventions a block needs: one, one per group, or one per position."""
        if share_weights == "position":
            return sum(term.count for term in self.terms)
        return 1 if share_weights else len(self.terms)


def parse_positions(spec: str, turns: str | None = None, prompt_end: Sequence[int] = ()) -> PositionSpec:
    """Parse "f7+l7" and the like.

    Raises:
        ValueError: for what is no spec or can touch no token, with the way out in the message.

    >>> str(parse_positions("f3+l1"))
    'f3+l1'
    """
    if not isinstance(spec, str):
        raise ValueError(f"positions={spec!r} is not a position spec: it must be a string. {_GRAMMAR}")
    terms = []
    for text in spec.split("+"):
        match = re.fullmatch(r"(all)|(d)|([flmed])([0-9]+)", text)
        if match is None:
            guess = suggestion(spec)
            raise ValueError(
                f"positions={spec!r} is not a position spec: {text!r} is no term. "
                f"{f'Did you mean {guess!r}? ' if guess else ''}{_GRAMMAR}"
            )
        terms.append(Term(match[1] or match[2] or match[3], int(match[4] or 1)))
        if terms[-1].count < 1:
            raise ValueError(
                f"positions={spec!r} has the term {text!r}, which can touch no token. "
                "Leave that term out, or give it at least 1."
            )
    kinds = [term.kind for term in terms]
    parsed = PositionSpec(tuple(terms), turns, tuple(prompt_end))
    if len(set(kinds)) < len(kinds):
        raise ValueError(f"positions={spec!r} has two terms of the same kind; add them up. {_GRAMMAR}")
    if "all" in kinds and set(kinds) - {"all", "d"}:
        raise ValueError(f"positions={spec!r}: 'all' names every prompt token already; leave the other terms out.")
    if "l" in kinds and "f" in kinds[kinds.index("l") :]:
        swapped = "+".join(str(term) for term in sorted(terms, key=lambda term: KINDS.index(term.kind)))
        raise ValueError(f"positions={spec!r} names the suffix before the prefix. Did you mean {swapped!r}? {_GRAMMAR}")
    return parsed


def suggestion(spec: str) -> str | None:
    """The spec that a misspelt one probably means; None without a good guess.

    Repairs what is often mistaken: a 1 or a capital I for the letter l, capital letters, spaces, other separators, two
    ends without a plus between them, and a number without a letter, which names the first tokens.

    >>> suggestion("f7+17"), suggestion("F7 + L7"), suggestion("f7l7"), suggestion("first")
    ('f7+l7', 'f7+l7', 'f7+l7', None)
    """
    text = re.sub(r"\bI(?=[0-9])", "l", spec.strip(" +,;"))
    text = re.sub(r"[\s,;+&]+", "+", text.lower())
    text = re.sub(r"(?<=[0-9])(?=[flmed])", "+", text)
    terms = text.split("+")
    if len(terms) > 1:  # a 1 after a first term is the letter l: "17" is "l7"
        terms = [terms[0], *(re.sub(r"^1(?=[1-9])|^(?=1$)", "l", term) for term in terms[1:])]
    terms = [re.sub(r"^(?=[0-9])", "f", term) if number == 0 else term for number, term in enumerate(terms)]
    guess = "+".join(terms)
    try:
        return str(parse_positions(guess)) if guess != spec else None
    except ValueError:
        return None


def select(spec: PositionSpec, prompts: Prompts) -> list[tuple[Tensor, Tensor]]:
    """For each group, which columns it names and each named column's place within the group.

    The rule for prompts shorter than N + M: every prompt token belongs to exactly one group; the prefix
    gets p = min(N, max(n - M, ceil(n / 2))) tokens, the suffix the other n - p.

    Returns:
        One pair per term: a bool tensor [B, S] and a long tensor [B, S] that is meaningful where the first is True.
    """
    order, length, inside = prompts.order, prompts.length, prompts.inside
    first, last = spec.count("f"), spec.count("l")
    overlap = spec.count("m") or spec.count("e")  # prefix and suffix never meet, and "d" names other tokens
    groups: list[tuple[Tensor, Tensor]] = []
    prefix = torch.zeros_like(length)  # tokens taken by the prefix, [B, S] or [B, 1]
    for kind, count in ((term.kind, term.count) for term in spec.terms):
        if kind == "f":
            prefix = torch.maximum(length - last, (length + 1) // 2) if last else length
            prefix = prefix.clamp(max=first)
            member, slot = inside & (order < prefix), order
        elif kind == "l":
            start = (length - last).clamp(min=0).maximum(prefix)
            member, slot = inside & (order >= start), order - start
        elif kind == "m":
            slot = order - ((length - count) // 2).clamp(min=0)
            member = inside & (slot >= 0) & (slot < count)
        elif kind == "e":
            member, slot = inside & (order % count == count - 1), order
        elif kind == "d":
            member, slot = torch.zeros_like(inside), order
            if prompts.answer is not None and prompts.answer_order is not None:
                member = prompts.answer & (prompts.answer_order % count == count - 1)
        else:
            member, slot = inside, order
        if overlap:
            for earlier, _ in groups:
                member = member & ~earlier
        groups.append((member, slot))
    return groups


def split_positions(
    spec: PositionSpec, prompts: Prompts, groups: list[tuple[Tensor, Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    """One group per position of terms that count from an end or the middle.

    The k-th last token is the same position in a prompt of any length, so the suffix is counted from the end.
    """
    split = []
    for term, (member, slot) in zip(spec.terms, groups):
        if term.kind == "l":
            slot = prompts.order - prompts.length + term.count
        split += [(member & (slot == number), torch.zeros_like(slot)) for number in range(term.count)]
    return split


def locate(spec: PositionSpec, prompts: Prompts, share_weights: bool | str = False) -> Tensor:
    """Columns of the tokens to edit, per row and group.

    Args:
        spec: parsed notation.
        prompts: where each document's prompt lies; packed documents must be numbered and counted.
        share_weights: "position" for a group per position; otherwise a group per term.

    Returns:
        Long tensor [B, G, P], left to right within a group, unused entries -1. P does not depend on the prompts'
        lengths: it is the largest width of the groups (times the number of documents in a row that packs several),
        or S where a group has no bound.

    >>> from peft_reft.positions.prompts import find_prompts
    >>> locate(parse_positions("f2+l1"), find_prompts(torch.tensor([[0, 0, 1, 1, 1, 1]]).bool()))
    tensor([[[ 2,  3],
             [ 5, -1]]])
    """
    rows, columns = prompts.inside.shape
    groups = select(spec, prompts)
    widths = spec.widths(prompts.answer is not None)
    if share_weights == "position":
        groups, widths = split_positions(spec, prompts, groups), (1,)
    column = torch.arange(columns, device=prompts.inside.device).expand(rows, columns)
    located = []
    for member, slot in groups:
        if widths is None:
            slot, width = member.long().cumsum(1) - 1, columns
        else:
            width = max(widths)
            if prompts.document is not None:
                if prompts.num_documents is None:
                    raise ValueError("locate needs the number of documents in a packed row.")
                slot, width = slot + prompts.document * width, width * prompts.num_documents
        # Columns that are not named go to one spare slot, which is cut off again.
        index = torch.full((rows, width + 1), -1, dtype=torch.long, device=column.device)
        index = index.scatter(1, torch.where(member, slot, width), column)
        located.append(index[:, :width])
    return torch.stack(located, dim=1)


def mark(spec: PositionSpec, prompts: Prompts, share_weights: bool | str = False) -> Tensor:
    """Like `locate`, as marks: bool [B, G, S], True for the columns of each group."""
    groups = select(spec, prompts)
    if share_weights == "position":
        groups = split_positions(spec, prompts, groups)
    return torch.stack([member for member, _ in groups], dim=1)
