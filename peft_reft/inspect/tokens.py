"""Names of tokens: the text that each stands for, also where one character takes several tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LONGEST = 8  # tokens of one character; four bytes are the most, but some tokenizers put a mark in front
UNKNOWN = "\ufffd"  # what a tokenizer returns for a part of a character


def names_of(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """The text of each token in a row.

    Byte-level tokenizers spread an emoji or a rare character over several tokens. Each of them is named by the whole
    character and its place in it, "🐢 (2/3)"; a token that belongs to no whole character by its id, "#10813".

    Args:
        ids: a row of token ids.
        tokenizer: None for none; the names are then the ids.
    """
    if tokenizer is None:
        return [str(token) for token in ids]
    alone = {token: text_of(token, tokenizer) for token in set(ids)}
    names: list[str] = []
    while len(names) < len(ids):
        first = len(names)
        token = ids[first]
        if UNKNOWN not in alone[token]:
            names.append(alone[token])
            continue
        for last in range(first + 2, min(first + LONGEST, len(ids)) + 1):
            text: str = tokenizer.decode(ids[first:last])
            if UNKNOWN not in text:
                parts = last - first
                names += [f"{text} ({part}/{parts})" for part in range(1, parts + 1)]
                break
        else:
            names.append(f"#{token}")
    return names


def name_of(token: int, tokenizer: Any) -> str:
    """The text of one token; its id where it is a part of a character, or where there is no tokenizer."""
    return names_of([token], tokenizer)[0]


def text_of(token: int, tokenizer: Any) -> str:
    """What a token decodes to; its entry in the vocabulary where that is nothing."""
    text: str = tokenizer.decode([token])
    if text:
        return text
    entry = tokenizer.convert_ids_to_tokens(token)
    return str(token if entry is None else entry)
