"""The edited tokens of one step of the engine.

A step runs pieces of many requests, their tokens next to each other in one row. Requests whose adapters have the same
positions are worked out together, in one pass over all of their tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from peft_reft.integrations.vllm.rule import UNEDITED, RequestEdits, Rule


class EditedTokens(NamedTuple):
    """The tokens of a step that are edited, in their order.

    Attributes:
        token: [m], where each lies in the step's row.
        request: [m], the number of its request among those of the step.
        intervention: [m], the number of its adapter's intervention.
    """

    token: NDArray[np.int64]
    request: NDArray[np.int64]
    intervention: NDArray[np.int64]


NOTHING = EditedTokens(*(np.empty(0, np.int64) for _ in range(3)))


def edited_tokens(
    requests: Sequence[RequestEdits | None], computed: NDArray[np.integer], scheduled: NDArray[np.integer]
) -> EditedTokens:
    """The tokens that a step edits.

    Args:
        requests: in the order in which their tokens lie in the step's row; None for those without a ReFT adapter.
        computed: [n], how many tokens of each request were run in earlier steps, or taken from a cache.
        scheduled: [n], how many follow in this step.
    """
    by_rule: dict[Rule, list[int]] = {}
    for number, (request, start) in enumerate(zip(requests, computed.tolist())):
        if request is not None and request.may_edit(start):
            by_rule.setdefault(request.rule, []).append(number)
    if not by_rule:
        return NOTHING
    first = np.cumsum(scheduled, dtype=np.int64) - scheduled
    parts = [_of_rule(rule, numbers, requests, computed, scheduled, first) for rule, numbers in by_rule.items()]
    if len(parts) == 1:
        return parts[0]
    token, request_of, intervention = map(np.concatenate, zip(*parts))
    order = np.argsort(token)
    return EditedTokens(token[order], request_of[order], intervention[order])


def _of_rule(
    rule: Rule,
    numbers: list[int],
    requests: Sequence[RequestEdits | None],
    computed: NDArray[np.integer],
    scheduled: NDArray[np.integer],
    first: NDArray[np.int64],
) -> EditedTokens:
    """The edited tokens of the requests with one rule; `first` is where each request's tokens begin."""
    chosen = np.array(numbers)
    count = scheduled[chosen].astype(np.int64)
    piece = np.repeat(np.arange(len(chosen)), count)
    within = np.arange(len(piece)) - np.repeat(np.cumsum(count) - count, count)
    order = computed[chosen].astype(np.int64)[piece] + within
    length = np.array([requests[number].prompt_length for number in numbers])[piece]  # type: ignore[union-attr]
    interventions = rule.interventions(order, length)
    if rule.reads_tokens:
        at = 0
        for number, size in zip(numbers, count.tolist()):
            interventions[at : at + size] = requests[number].interventions(  # type: ignore[union-attr]
                int(computed[number]), int(computed[number]) + size
            )
            at += size
    edited = np.flatnonzero(interventions != UNEDITED)
    return EditedTokens(first[chosen][piece[edited]] + within[edited], chosen[piece[edited]], interventions[edited])
