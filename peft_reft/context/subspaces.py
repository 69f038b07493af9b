"""Which named parts of R act in which row: what `subspaces=` of a call says, and what it makes of an edit's strengths.

Shape letters: B rows, K parts of an adapter, r rank.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from peft_reft.context.arguments import repeats, values_can_be_read

BASE = "__base__"  # the adapter name of rows without an edit, as everywhere in PEFT
Choice = Mapping[str, float] | None  # strengths of the parts that act, by name; None for all
Choices = Tensor | Sequence[Choice]  # of the rows: a tensor [B, K] for adapters with the same parts
ENTRY = "a name, a list of names, {name: strength}, [] for none or None for all"
FINITE = "A strength is a finite number: 0 for none of a part's edit, 1 for the part as trained."
SUBSPACES_RULE = f"Pass one entry per row: {ENTRY}; or a tensor of strengths [B, number of subspaces]."


def choice_of(entry: Any) -> Choice:
    """One row's entry as strengths by name.

    Raises:
        ValueError: for anything but a name, names, or finite strengths by name.

    >>> choice_of("german"), choice_of({"german": 0.5}), choice_of([])
    ({'german': 1.0}, {'german': 0.5}, {})
    """
    if entry is None:
        return None
    if isinstance(entry, str):
        return {entry: 1.0}
    if isinstance(entry, Mapping) and all(isinstance(name, str) for name in entry):
        # A data set gives every row the same names, None where a row has none.
        strengths = {name: value for name, value in entry.items() if value is not None}
        if all(is_finite(value) for value in strengths.values()):
            return {name: float(value) for name, value in strengths.items()}
    elif isinstance(entry, (list, tuple, set)) and all(isinstance(name, str) for name in entry):
        return dict.fromkeys(entry, 1.0)
    raise ValueError(f"subspaces holds {entry!r}, which is not {ENTRY}. {FINITE}")


def is_finite(value: Any) -> bool:
    """Whether a value is a finite number; True and False are none here."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def read_choices(
    given: Any, rows: int | None, known: Mapping[str, Mapping[str, int]], names: Sequence[str] | None, active: set[str]
) -> Choices:
    """`subspaces` of a call, checked.

    Args:
        given: as passed.
        rows: how many rows the call has; None if that is not known yet.
        known: ranks by name of part, by adapter, of those that have parts.
        names: the adapter of each row, or None for the active ones in every row.
        active: those; {""} for a config whose adapter's name is not known.

    Raises:
        ValueError: if there are not as many entries as rows, or a row names what its adapters do not have.
    """
    if isinstance(given, (str, Mapping)) or not isinstance(given, (Tensor, Sequence)):
        raise ValueError(f"subspaces={given!r} is not one entry per row. {SUBSPACES_RULE}")
    if rows is not None and len(given) != rows:
        raise ValueError(f"subspaces has {len(given)} entries, but the batch has {rows} rows. {SUBSPACES_RULE}")
    used = active if names is None else {*names}
    if not used & known.keys():
        raise ValueError(
            f"subspaces were passed, but the ReFT adapters of this call ({sorted(used - {BASE})}) have none. Make one "
            "with ReftConfig(subspaces={...}), or leave the argument out."
        )
    if isinstance(given, Tensor):
        return _check_tensor(given, known, used)
    choices = [choice_of(entry) for entry in given]
    for row, choice in enumerate(choices):
        own = active if names is None else {names[row]} if row < len(names) else set()
        there = {part for name in own for part in known.get(name, ())}
        unknown = sorted({*choice} - there) if choice else []
        if unknown or (choice is not None and not there):
            whose = f"whose adapter {sorted(own - {BASE})} has" if own != {""} else "but the config has"
            raise ValueError(
                f"subspaces holds {given[row]!r} for row {row}, {whose} "
                f"{f'the subspaces {sorted(there)}' if there else 'no subspaces'}. {SUBSPACES_RULE}"
            )
    return choices


def _check_tensor(given: Tensor, known: Mapping[str, Mapping[str, int]], names: set[str]) -> Tensor:
    lists = {tuple(known[name]) for name in names if name in known}
    if len(lists) > 1:
        raise ValueError(
            f"subspaces is a tensor, but the adapters of this call have different ones: {sorted(lists)}. Pass names."
        )
    (parts,) = lists
    if given.dim() != 2 or given.shape[1] != len(parts):
        raise ValueError(
            f"subspaces is a tensor of shape {tuple(given.shape)}, but there are {len(parts)} subspaces: "
            f"{list(parts)}. {SUBSPACES_RULE}"
        )
    if given.dtype == torch.bool or given.is_complex():
        raise ValueError(f"subspaces is a tensor of {given.dtype}. {FINITE}")
    if values_can_be_read(given) and not given.isfinite().all():
        row, part = given.isfinite().logical_not().nonzero()[0].tolist()
        raise ValueError(f"subspaces holds {given[row, part].item()} for {parts[part]!r} in row {row}. {FINITE}")
    return given


def repeated(choices: Choices, rows: int, in_generate: bool) -> Choices:
    """The rows' choices, each several times where `generate` runs rows several times.

    Raises:
        ValueError: if there are not as many of them as rows.
    """
    times = repeats(len(choices), rows)
    if times == 1:
        return choices
    if times is None or not in_generate:
        raise ValueError(f"subspaces has {len(choices)} entries, but the batch has {rows} rows. {SUBSPACES_RULE}")
    if isinstance(choices, Tensor):
        return choices.repeat_interleave(times, 0)
    return [choice for choice in choices for _ in range(times)]


def strengths(
    parts: Sequence[Mapping[str, int]],
    chosen: Sequence[Choice],
    choices: Choices | None,
    rows: Sequence[int],
    adapters: Sequence[int] | None,
    like: Tensor,
) -> Tensor | None:
    """How strongly each direction of R acts in each row [rows, r]; None where all act as trained.

    Args:
        parts: for one or several adapters, their ranks by name.
        chosen: the parts that act in each of them where the call says nothing.
        choices: of all rows of the call; None if it says nothing.
        rows: the numbers of the rows that take part.
        adapters: which of the adapters each of them has; None if there is one.
        like: a tensor of the device and dtype to use.
    """
    if choices is None and all(choice is None for choice in chosen):
        return None
    if isinstance(choices, Tensor):
        columns = [number for number, size in enumerate(parts[0].values()) for _ in range(size)]
        return choices.to(like)[list(rows)][:, columns]
    found = []
    for number, row in enumerate(rows):
        adapter = 0 if adapters is None else adapters[number]
        own, choice = parts[adapter], chosen[adapter] if choices is None else choices[row]
        found.append([1.0 if choice is None else choice.get(name, 0.0) for name in own for _ in range(own[name])])
    return torch.tensor(found, device=like.device, dtype=like.dtype)
