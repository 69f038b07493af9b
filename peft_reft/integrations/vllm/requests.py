"""What a request says about its edits, in the `vllm_xargs` of the OpenAI API or `SamplingParams(extra_args=...)`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

PREFIX = "reft_"
STRENGTH = f"{PREFIX}strength"
PROMPT_LENGTH = f"{PREFIX}prompt_length"
NAMES = (STRENGTH, PROMPT_LENGTH)


class Wishes(NamedTuple):
    """What a request may say.

    Attributes:
        strength: a factor for the adapter's edits.
        prompt_length: how many of the given tokens are the prompt, the others being part of the answer; None for all.
    """

    strength: float = 1.0
    prompt_length: int | None = None


def wishes_of(extra: Mapping[str, Any] | None) -> Wishes:
    """What the extra arguments of a request say.

    Raises:
        ValueError: for a value that has no meaning, or a name with our prefix that is none of ours.
    """
    if not extra:
        return Wishes()
    unknown = sorted(name for name in extra if name.startswith(PREFIX) and name not in NAMES)
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no argument of a ReFT adapter. A request may pass {' and '.join(NAMES)}.")
    strength, length = extra.get(STRENGTH, 1.0), extra.get(PROMPT_LENGTH)
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not math.isfinite(strength):
        raise ValueError(
            f"{STRENGTH}={strength!r} is not a strength; pass a finite number: 1.0 for the adapter as trained, 0.5 for "
            "half of its edits."
        )
    if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
        raise ValueError(
            f"{PROMPT_LENGTH}={length!r} is not a number of tokens; pass how many of the given tokens are the prompt, "
            "at least 1, or leave it out if all of them are."
        )
    return Wishes(float(strength), length)


def says_anything(extra: Mapping[str, Any] | None) -> bool:
    """Whether a request says anything about edits."""
    return any(name.startswith(PREFIX) for name in extra or ())
