"""The tokens that the peers edited where positions mean something else here, as `intervention_locations`.

Positions are counted as in pyreft 0.1.0's `get_intervention_locations` and AdapterHub 1.3.0's `ReftModule`. A forward
that is given locations does not look at an adapter's `positions`, so that these are exact.

Shape letters: B rows, S columns, G position groups, P positions per group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_reft.positions import parse_positions


def pyreft_locations(mask: Tensor, positions: str, *, skip_last: bool = False) -> Tensor:
    """The columns that pyreft edited: of a prompt of n tokens the first min(n // 2, N) and the last min(n // 2, M).

    Args:
        mask: [B, S], not 0 at the tokens of each row's prompt, which follow one another: the attention mask where a
            row is a prompt, and without the answer where it has one.
        positions: "fN", "lM" or "fN+lM".
        skip_last: count as if the prompt ended one token earlier, as pyreft's ReftClassificationDataset,
            ReftGenerationDataset, ReftSupervisedDataset and ReftRewardDataset do.

    Returns:
        Long tensor [B, G, P] for `model(..., intervention_locations=...)`, unused entries -1.

    Raises:
        ValueError: for other positions, or a mask whose tokens do not follow one another.

    >>> pyreft_locations(torch.tensor([[0, 1, 1, 1, 1, 1]]), "f1+l1", skip_last=True)
    tensor([[[1],
             [4]]])
    """
    first, last = _ends(positions)
    rows = []
    for start, stop in _spans(mask):
        stop -= bool(skip_last)
        half = max(stop - start, 0) // 2
        prefix = range(start, start + min(half, first))
        suffix = range(stop - min(half, last), stop)
        rows.append([prefix, suffix])
    return _padded(rows, first, last).to(mask.device)


def adapterhub_locations(mask: Tensor, positions: str) -> Tensor:
    """The columns that AdapterHub edited, where a token that is in both ends belongs to the suffix.

    Args:
        mask: [B, S], not 0 at the tokens of each row; in training AdapterHub counted over prompt and answer.
        positions: "fN", "lM" or "fN+lM".

    Returns:
        Long tensor [B, G, P] for `model(..., intervention_locations=...)`, unused entries -1.

    Raises:
        ValueError: for other positions, or a mask whose tokens do not follow one another.

    >>> adapterhub_locations(torch.tensor([[1, 1, 1, 0]]), "f2+l2")
    tensor([[[ 0, -1],
             [ 1,  2]]])
    """
    first, last = _ends(positions)
    rows = []
    for start, stop in _spans(mask):
        suffix = range(max(stop - last, start), stop)
        prefix = range(start, min(start + first, suffix.start if last else stop))
        rows.append([prefix, suffix])
    return _padded(rows, first, last).to(mask.device)


def _ends(positions: str) -> tuple[int, int]:
    spec = parse_positions(positions)
    first, last = spec.count("f"), spec.count("l")
    if len(spec.terms) != (first > 0) + (last > 0):
        raise ValueError(
            f"positions={positions!r} has terms that pyreft and AdapterHub do not know; they have fN and lM."
        )
    return first, last


def _spans(mask: Tensor) -> list[tuple[int, int]]:
    """First column and the column behind the last, of each row's tokens."""
    if mask.dim() != 2:
        raise ValueError(f"mask must be [rows, columns], but is {list(mask.shape)}.")
    spans = []
    for number, row in enumerate((mask != 0).tolist()):
        start = row.index(True) if True in row else 0
        stop = start + sum(row)
        if not all(row[start:stop]):
            raise ValueError(f"Row {number} of the mask has gaps between its tokens; a prompt has none.")
        spans.append((start, stop))
    return spans


def _padded(rows: list[list[range]], first: int, last: int) -> Tensor:
    """[B, G, P]: the groups that the positions have, filled up with -1."""
    wanted = [group for group, count in enumerate((first, last)) if count]
    located = torch.full((len(rows), len(wanted), max(first, last)), -1)
    for row, groups in zip(located, rows):
        for line, group in zip(row, wanted):
            columns = torch.tensor(list(groups[group]), dtype=torch.long)
            line[: len(columns)] = columns
    return located
