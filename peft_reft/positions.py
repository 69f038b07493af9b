"""Which tokens are edited: the "f7+l7" notation and its index arithmetic.

A spec names tokens relative to a prompt ("the first 7 and the last 7"); `locate` turns it into columns of
a batch. Where the prompt of each row lies is the work of prompt.py, editing is that of layer.py.

    f2+l1, prompt of five tokens:     A B C D E
                                      f f     l

Shape letters: B rows, S columns, G position groups (the terms of a spec), P positions per group.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from peft_reft.prompt import Prompts

_GRAMMAR = (
    "Write how many tokens to edit at each end of the prompt, prefix first: 'f7+l7', 'f7' or 'l7'; "
    "or 'all' for the whole prompt."
)


@dataclass(frozen=True)
class Term:
    """One term of a spec: `kind` is "f" (first), "l" (last) or "all"; `count` is its number of tokens (0 for "all")."""

    kind: str
    count: int

    def __str__(self) -> str:
        return self.kind + (str(self.count) if self.count else "")


@dataclass(frozen=True)
class PositionSpec:
    """A parsed spec: its terms in their order, each a position group of its own.

    >>> parse_positions("f7+l2").widths
    (7, 2)
    """

    terms: tuple[Term, ...]

    def __str__(self) -> str:
        return "+".join(str(term) for term in self.terms)

    @property
    def widths(self) -> tuple[int, ...] | None:
        """The largest number of tokens each group can name, or None where only the prompt's length bounds it."""
        if any(term.kind == "all" for term in self.terms):
            return None
        return tuple(term.count for term in self.terms)

    def count(self, kind: str) -> int:
        """The number in the term of this kind, 0 if the spec has no such term."""
        return sum(term.count for term in self.terms if term.kind == kind)


def parse_positions(spec: str) -> PositionSpec:
    """Parse "fN", "lM", "fN+lM" or "all".

    Raises:
        ValueError: for anything else, with the way out in the message.

    >>> str(parse_positions("f3+l1"))
    'f3+l1'
    """
    if not isinstance(spec, str):
        raise ValueError(f"positions={spec!r} is not a position spec: it must be a string. {_GRAMMAR}")
    if spec == "all":
        return PositionSpec((Term("all", 0),))
    terms = []
    for text in spec.split("+"):
        match = re.fullmatch(r"([fl])([0-9]+)", text)
        if match is None:
            raise ValueError(f"positions={spec!r} is not a position spec: {text!r} is no term. {_GRAMMAR}")
        terms.append(Term(match[1], int(match[2])))
        if terms[-1].count < 1:
            raise ValueError(
                f"positions={spec!r} has the term {text!r}, which can touch no token. "
                "Leave that term out, or give it at least 1."
            )
    kinds = [term.kind for term in terms]
    if len(set(kinds)) < len(kinds):
        raise ValueError(f"positions={spec!r} names the same end of the prompt twice. {_GRAMMAR}")
    if kinds == ["l", "f"]:
        suggestion = PositionSpec((terms[1], terms[0]))
        raise ValueError(f"positions={spec!r} names the suffix before the prefix. Did you mean '{suggestion}'? {_GRAMMAR}")
    return PositionSpec(tuple(terms))


def select(spec: PositionSpec, prompts: Prompts) -> list[tuple[Tensor, Tensor]]:
    """For each group, which columns it names and each named column's place within the group.

    The rule for prompts shorter than N + M: every prompt token belongs to exactly one group; the prefix
    gets p = min(N, max(n - M, ceil(n / 2))) tokens, the suffix the other n - p.

    Returns:
        One pair per term: a bool tensor [B, S] and a long tensor [B, S] that is meaningful where the first is True.
    """
    order, length, inside = prompts.order, prompts.length, prompts.inside
    first, last = spec.count("f"), spec.count("l")
    groups = []
    prefix = torch.zeros_like(length)  # tokens taken by the prefix, [B, S] or [B, 1]
    for term in spec.terms:
        if term.kind == "all":
            groups.append((inside, order))
        elif term.kind == "f":
            prefix = length
            if last:
                prefix = torch.maximum(length - last, (length + 1) // 2)
            prefix = prefix.clamp(max=first)
            groups.append((inside & (order < prefix), order))
        else:
            start = (length - last).clamp(min=0).maximum(prefix)
            groups.append((inside & (order >= start), order - start))
    return groups


def locate(spec: PositionSpec, prompts: Prompts) -> Tensor:
    """Columns of the tokens to edit, per row and position group.

    Args:
        spec: parsed notation.
        prompts: where each document's prompt lies; packed documents must be numbered and counted.

    Returns:
        Long tensor [B, G, P], left to right within a group, unused entries -1. P does not depend on the
        prompts' lengths: it is the largest width of the groups, times the number of documents in a row
        that packs several; for "all" it is S.

    >>> from peft_reft.prompt import find_prompts
    >>> locate(parse_positions("f2+l1"), find_prompts(torch.tensor([[0, 0, 1, 1, 1, 1]]).bool()))
    tensor([[[ 2,  3],
             [ 5, -1]]])
    """
    rows, columns = prompts.inside.shape
    widths = spec.widths
    column = torch.arange(columns, device=prompts.inside.device).expand(rows, columns)
    located = []
    for member, slot in select(spec, prompts):
        if widths is None:
            slot, width = column, columns
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
