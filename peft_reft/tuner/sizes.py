"""How large the numbers of a config may be, whatever the model: compared when the config is built.

A config may come from a stranger. Its numbers become sizes of tensors and counts of modules; the limits of the model
that an adapter is made for are in fit.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from peft_reft.positions.notation import parse_positions

MOST_NAMES = 10_000  # of modules, layers or patterns in a field of a config, or characters
MOST_MARKER = 1_024  # token ids or characters of prompt_end
MOST_PER_BLOCK = 1_024  # interventions of a block, with share_weights="position"
MOST_TOKENS = 2**24  # that a term of positions may count, whatever the model


def shown(value: object, most: int = 200) -> str:
    """A value for an error's message, cut off if it is long.

    >>> shown([1, 2]), shown("x" * 500, most=5)
    ('[1, 2]', "'xxxx... (502 characters)")
    """
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def printable(text: str) -> str:
    """The text, in which names from a file can hold nothing by which a terminal could be steered."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)


def is_integer(value: object) -> bool:
    """Whether a value is an integer; True and False are none here."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_rank(name: str, rank: Any) -> None:
    """Raise ValueError for what is no rank."""
    if not is_integer(rank) or rank < 1:
        raise ValueError(f"{name}={shown(rank)} is not a rank; it must be an integer of at least 1.")


def check_config_sizes(config: Any) -> None:
    """Refuse what no model could use, before anything looks at it in full.

    Args:
        config: a `ReftConfig` that is being built.

    Raises:
        ValueError: naming the field.
    """
    marker = config.prompt_end
    if isinstance(marker, (str, list, tuple)) and len(marker) > MOST_MARKER:
        raise ValueError(
            f"prompt_end has a length of {len(marker)}, which is more than a marker has: at most "
            f"{MOST_MARKER}. Pass the few tokens that stand before every answer."
        )
    if isinstance(config.positions, str) and len(config.positions) > MOST_NAMES:
        raise ValueError(
            f"positions={shown(config.positions)} is not a position spec: it has {len(config.positions)} characters."
        )
    for name, value in vars(config).items():
        if hasattr(value, "__len__") and len(value) > MOST_NAMES:
            raise ValueError(f"{name} has {len(value)} entries; the most that it may have is {MOST_NAMES}.")
    spec = parse_positions(config.positions)
    for term in spec.terms:
        if term.count > MOST_TOKENS:
            raise ValueError(
                f"positions={shown(config.positions)} has the term {shown(str(term))}: a term counts at most "
                f"{MOST_TOKENS} tokens. Use 'all' for every token of the prompt."
            )
    if config.share_weights == "position" and spec.num_interventions("position") > MOST_PER_BLOCK:
        raise ValueError(
            f"share_weights='position' with positions={config.positions!r} makes {spec.num_interventions('position')} "
            f"interventions for each block, one per position; the most is {MOST_PER_BLOCK}. Name fewer positions, or "
            "use share_weights=False for one intervention per term."
        )


def check_ids(field: str, ids: Iterable[Any], vocabulary: int | None = None, owner: str = "") -> None:
    """Raise ValueError for what is no token id, or is not in a vocabulary, if there is one."""
    for token in ids:
        if not is_integer(token) or not 0 <= token < 2**31:
            raise ValueError(f"{field} holds {shown(token)}, which is not a token id: those are integers from 0.")
        if vocabulary is not None and token >= vocabulary:
            raise ValueError(
                f"{field} holds the token id {shown(token)}, but the vocabulary of {owner} has {vocabulary} ids, from "
                f"0 to {vocabulary - 1}. Was the adapter made for another tokenizer?"
            )
