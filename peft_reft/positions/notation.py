"""The notation "f7+l7": a text becomes a `PositionSpec`, its terms in their order.

What a term names is in terms.py, where the prompt of each row lies in prompts.py.

    f2+l1, prompt of five tokens:     A B C D E
                                      f f     l
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from peft_reft.positions.terms import TERMS, All, First, Last, Term

_FURTHER = ", ".join(
    f"'{cls(count)}' ({cls(count).words})"
    for cls in TERMS.values()
    if cls not in (First, Last, All)
    for count in ((1, 3) if cls.number == "optional" else (3,))
)
GRAMMAR = (
    "Write how many tokens to edit at each end of the prompt, prefix first: 'f7+l7', 'f7' or 'l7'; or 'all' for the "
    f"whole prompt. Further terms: {_FURTHER}."
)
LONGEST = 100  # digits of a number; what is too large for a model is known with the model


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

    def count(self, symbol: str) -> int:
        """The number in the term of this symbol, 0 if the spec has no such term."""
        return sum(term.count for term in self.terms if term.symbol == symbol)

    @property
    def edits_answers(self) -> bool:
        """Whether generated tokens are edited too."""
        return any(term.generated for term in self.terms)

    @property
    def depends_on_the_end(self) -> bool:
        """Whether it makes a difference where the prompt ends (for prompts that are longer than its prefix)."""
        return any(term.symbol != "f" for term in self.terms)

    def widths(self, answers: bool = True) -> tuple[int, ...] | None:
        """Each group's largest number of tokens in a document, or None if there is no bound.

        Args:
            answers: whether there are answer tokens at all; without them "d" names nothing.

        >>> parse_positions("f7+l2").widths(), parse_positions("f7+d").widths(answers=False)
        ((7, 2), (7, 0))
        """
        widths = [0 if term.generated and not answers else term.width for term in self.terms]
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
        raise ValueError(f"positions={spec!r} is not a position spec: it must be a string. {GRAMMAR}")
    terms = [_term(text, spec) for text in spec.split("+")]
    symbols = [term.symbol for term in terms]
    if len(set(symbols)) < len(symbols):
        raise ValueError(f"positions={spec!r} has two terms of the same kind; add them up. {GRAMMAR}")
    if any(term.exclusive for term in terms) and any(not (term.exclusive or term.generated) for term in terms):
        raise ValueError(f"positions={spec!r}: 'all' names every prompt token already; leave the other terms out.")
    if "l" in symbols and "f" in symbols[symbols.index("l") :]:
        in_order = "+".join(str(term) for term in sorted(terms, key=lambda term: list(TERMS).index(term.symbol)))
        raise ValueError(f"positions={spec!r} names the suffix before the prefix. Did you mean {in_order!r}? {GRAMMAR}")
    return PositionSpec(tuple(terms), turns, tuple(prompt_end))


def _term(text: str, spec: str) -> Term:
    match = re.fullmatch(r"([a-z]+)([0-9]*)", text)
    cls = None if match is None else TERMS.get(match[1])
    numbers = {"always": True, "never": False}  # whether there must be one
    if match is None or cls is None or bool(match[2]) is not numbers.get(cls.number, bool(match[2])):
        guess = suggestion(spec)
        raise ValueError(
            f"positions={_short(spec)} is not a position spec: {_short(text)} is no term. "
            f"{f'Did you mean {guess!r}? ' if guess else ''}{GRAMMAR}"
        )
    if len(match[2]) > LONGEST:
        raise ValueError(f"positions={_short(spec)}: {_short(text)} names more tokens than any model takes.")
    if match[2] and int(match[2]) < 1:
        raise ValueError(
            f"positions={spec!r} has the term {text!r}, which can touch no token. Leave that term out, or give it at "
            "least 1."
        )
    return cls(int(match[2] or 1))


def suggestion(spec: str) -> str | None:
    """The spec that a misspelt one probably means; None without a good guess.

    Repairs what is often mistaken: a 1 or a capital I for the letter l, capital letters, spaces, other separators, two
    ends without a plus between them, and a number without a letter, which names the first tokens.

    >>> suggestion("f7+17"), suggestion("F7 + L7"), suggestion("f7l7"), suggestion("first")
    ('f7+l7', 'f7+l7', 'f7+l7', None)
    """
    text = re.sub(r"\bI(?=[0-9])", "l", spec.strip(" +,;"))
    text = re.sub(r"[\s,;+&]+", "+", text.lower())
    letters = "".join(symbol for symbol in TERMS if len(symbol) == 1)
    text = re.sub(rf"(?<=[0-9])(?=[{letters}])", "+", text)
    terms = text.split("+")
    if len(terms) > 1:  # a 1 after a first term is the letter l: "17" is "l7"
        terms = [terms[0], *(re.sub(r"^1(?=[1-9])|^(?=1$)", "l", term) for term in terms[1:])]
    terms = [re.sub(r"^(?=[0-9])", "f", term) if number == 0 else term for number, term in enumerate(terms)]
    guess = "+".join(terms)
    try:
        return str(parse_positions(guess)) if guess != spec else None
    except ValueError:
        return None


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")
