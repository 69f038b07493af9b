"""What interventions multiply with, worked out for many of them together.

Orthonormalising one block's R after the other costs more than the edits themselves. Here the interventions of all
blocks, position groups and adapters are stacked by kind and shape, once per forward; and the factors of adapters
that differ from row to row are put together for a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_reft.interventions.equations import Factors, Intervention

Named = tuple[Hashable, Sequence[nn.Module]]  # a key, and the interventions of one block and adapter, one per group


class FactorTable:
    """The factors of each entry: one orthonormalisation per kind and shape.

    Interventions of the user's own, and those whose parameters are not there to be read before their module runs
    (sharded, offloaded), are left out: they have to be called as modules.

    Args:
        entries: keys, and the interventions of each; several keys may share theirs.
    """

    def __init__(self, entries: Iterable[Named] = ()):
        self._batches: list[Factors] = []  # [N, G, r, d] each
        self._split: list[list[Factors]] = []  # the same as N times [G, r, d]
        self._places: dict[Hashable, tuple[int, int]] = {}  # key -> which batch, and where in it
        kinds: dict[Any, dict[int, Sequence[nn.Module]]] = {}
        keys: list[tuple[Hashable, Any, int]] = []
        for key, interventions in entries:
            kind = _kind(interventions)
            if kind is not None:
                kinds.setdefault(kind, {})[id(interventions)] = interventions
                keys.append((key, kind, id(interventions)))
        order = {}
        for number, (kind, members) in enumerate(kinds.items()):
            self._add_batch(list(members.values()))
            order[kind] = number, {shared: place for place, shared in enumerate(members)}
        for key, kind, shared in keys:
            number, places = order[kind]
            self._places[key] = number, places[shared]

    def _add_batch(self, members: list[Sequence[nn.Module]]) -> None:
        flat: list[Any] = [intervention for interventions in members for intervention in interventions]
        first = flat[0]
        weight = torch.stack([i.weight for i in flat])
        worked_out = first.combine(
            first.directions(torch.stack([i.basis for i in flat])),
            None if first.bias is None else weight,
            weight if first.bias is None else torch.stack([i.bias for i in flat]),
        )
        size = (len(members), len(members[0]))
        batch = _each_part(worked_out, lambda part: part.unflatten(0, size))
        split = zip(*(part.unbind(0) if isinstance(part, Tensor) else [part] * len(members) for part in batch))
        self._batches.append(batch)
        self._split.append([Factors(*parts) for parts in split])

    def get(self, key: Hashable) -> Factors | None:
        """The factors [G, r, d] of an entry; None if only its interventions themselves know."""
        place = self._places.get(key)
        return None if place is None else self._split[place[0]][place[1]]

    def batch_of(self, key: Hashable) -> int | None:
        """A number that entries of the same kind and shape share."""
        place = self._places.get(key)
        return None if place is None else place[0]

    def rows(self, keys: Sequence[Hashable | None]) -> Factors | None:
        """The factors [B, G, r, d] (or [1, G, r, d], if all are the same) of rows with entries of their own; None if
        there are none.

        Args:
            keys: one per row; None for a row without an edit, whose factors mean nothing. All entries must have the
                same activation, and either all or none a projection of their own.
        """
        places = [None if key is None else self._places.get(key) for key in keys]
        present = [place for place in places if place is not None]
        if not present:
            return None
        numbers = {number for number, _ in present}
        if len(numbers) > 1:
            return stack_factors([None if place is None else self._split[place[0]][place[1]] for place in places])
        batch = self._batches[numbers.pop()]
        chosen = [(place or present[0])[1] for place in places]
        first, last = chosen[0], chosen[-1]
        if len({*chosen}) == 1 or chosen == list(range(first, first + len(chosen))):  # the same for all, or as they lie
            return _each_part(batch, lambda part: part[first : last + 1])
        index = torch.tensor(chosen, device=batch.up.device)
        return _each_part(batch, lambda part: part.index_select(0, index))


def _each_part(factors: Factors, function: Callable[[Tensor], Tensor]) -> Factors:
    """The same function applied to every tensor of the factors."""
    parts: Any = [function(part) if isinstance(part, Tensor) else part for part in factors]
    return Factors(*parts)


def _kind(interventions: Sequence[nn.Module]) -> tuple[Any, ...] | None:
    """What interventions must have in common to be worked out together; None if they cannot be."""
    first = interventions[0]
    for intervention in interventions:
        if not isinstance(intervention, Intervention) or _own_equation(intervention):
            return None
        for parameter in intervention._parameters.values():
            if type(parameter) is not nn.Parameter or parameter.is_meta or not parameter.numel():
                return None
    assert isinstance(first, Intervention)
    choices = (first.has_source, first.replaces, first.orthonormal, first.act_fn)
    return (len(interventions), *choices, *first.basis.shape, first.basis.dtype, first.basis.device)


_EQUATION = ("forward", "edit", "learned", "combine", "directions")


def _own_equation(intervention: Intervention) -> bool:
    """Whether an intervention does more than choose among the built-in equations."""
    cls = type(intervention)
    return any(getattr(cls, name) is not getattr(Intervention, name) for name in _EQUATION)


def fingerprint(entries: Iterable[Named]) -> tuple[Any, ...] | None:
    """Changes whenever factors worked out earlier are out of date; None if they must not be kept.

    Only parameters that are frozen and at rest are trusted: what trains may be written to behind autograd's back.
    """
    marks: list[Any] = [torch.is_inference_mode_enabled()]
    for key, interventions in entries:
        marks.append(key)
        for intervention in interventions:
            if intervention.training:
                return None
            for parameter in _parameters_of(intervention):
                if parameter.requires_grad or parameter.is_inference():
                    return None
                marks += (id(parameter), parameter.data_ptr(), parameter._version)
    return tuple(marks)


def _parameters_of(module: nn.Module) -> Iterable[nn.Parameter]:
    """`module.parameters()`, but faster: it counts where hundreds of adapters are looked through."""
    if module._modules:
        return module.parameters()
    return [parameter for parameter in module._parameters.values() if parameter is not None]


def values_on_cpu(entries: Iterable[Named]) -> Tensor | None:
    """All parameters of interventions in a row, to see writes that leave no trace (through `.data`); None if none is
    on the CPU.
    """
    parameters = (p for _, interventions in entries for i in interventions for p in _parameters_of(i))
    flat = [parameter.flatten() for parameter in parameters if parameter.device.type == "cpu"]
    return torch.cat(flat) if flat else None


def stack_factors(rows: Sequence[Factors | None]) -> Factors:
    """Factors [B, G, r, d] for rows of a batch that have factors of their own, None for rows without an edit.

    Smaller ranks and numbers of groups are filled up with zeros, which edit nothing. All rows must have the same
    activation, and either all or none a projection of their own.
    """
    present = [factors for factors in rows if factors is not None]
    groups, r = (max(factors.up.shape[dim] for factors in present) for dim in (0, 1))
    with_down = any(factors.down is not None for factors in present)
    filled = {id(factors): _fill(factors, groups, r, with_down) for factors in present}
    filler = filled[id(present[0])]  # rows without an edit are masked out by their sites
    parts = zip(*(filler if factors is None else filled[id(factors)] for factors in rows))
    stacked: Any = [torch.stack(part) if isinstance(part[0], Tensor) else part[0] for part in parts]
    return Factors(*stacked)


def _fill(factors: Factors, groups: int, r: int, with_down: bool) -> Factors:
    more = (0, r - factors.up.shape[1], 0, groups - factors.up.shape[0])
    down = factors.down if factors.down is not None or not with_down else torch.zeros_like(factors.up)

    def fill(matrix: Tensor | None) -> Tensor | None:
        return matrix if matrix is None or not any(more) else F.pad(matrix, (0, 0, *more))

    bias = F.pad(factors.bias, more) if any(more) else factors.bias
    return Factors(fill(down), bias, fill(factors.up), fill(factors.projection), factors.act)  # type: ignore[arg-type]
