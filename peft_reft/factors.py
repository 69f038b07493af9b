"""What interventions multiply with, worked out for many of them together.

Orthonormalising one block's R after the other costs more than the edits themselves. Here the interventions of all
blocks, position groups and adapters are stacked by kind and shape, once per forward; and the factors of adapters
that differ from row to row are put together for a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_reft.interventions import Basis, Constant, Factors, Intervention, Source

Named = tuple[Any, Sequence[nn.Module]]  # a key, and the interventions of one block and adapter, one per group


def batch_factors(entries: Iterable[Named]) -> dict[Any, Factors]:
    """The factors [G, r, d] of each entry: one orthonormalisation per kind and shape.

    Interventions of the user's own, and those whose parameters are not there to be read before their module runs
    (sharded, offloaded), are left out: they have to be called as modules.
    """
    batches: dict[Any, list[Named]] = {}
    for key, interventions in entries:
        kind = _kind(interventions)
        if kind is not None:
            batches.setdefault(kind, []).append((key, interventions))
    factors = {}
    for (groups, *_), members in batches.items():
        flat: list[Any] = [intervention for _, interventions in members for intervention in interventions]
        first = flat[0]
        linear = isinstance(first.source, Source)
        batch = first.combine(
            first.basis.combine(torch.stack([i.basis.weight for i in flat])),
            torch.stack([i.source.weight for i in flat]) if linear else None,
            torch.stack([i.source.bias if linear else i.source.weight for i in flat]),
        )
        split = [part.unflatten(0, (-1, groups)).unbind(0) if isinstance(part, Tensor) else part for part in batch]
        for number, (key, _) in enumerate(members):
            factors[key] = Factors(*(part[number] if isinstance(part, tuple) else part for part in split))
    return factors


def _kind(interventions: Sequence[nn.Module]) -> tuple[Any, ...] | None:
    """What interventions must have in common to be worked out together; None if they cannot be."""
    first = interventions[0]
    for intervention in interventions:
        if not isinstance(intervention, Intervention) or _own_equation(intervention):
            return None
        for parameter in intervention.parameters():
            if type(parameter) is not nn.Parameter or parameter.is_meta or not parameter.numel():
                return None
    assert isinstance(first, Intervention)
    weight = first.basis.weight
    choices = (first.has_source, first.replaces, first.orthonormal, first.act_fn)
    return (len(interventions), *choices, *first.shape, weight.dtype, weight.device)


def _own_equation(intervention: Intervention) -> bool:
    """Whether an intervention does more than choose among the built-in equations."""
    methods = ("forward", "edit", "combine")
    parts = type(intervention.basis), type(intervention.source), type(intervention.dropout)
    return (
        any(getattr(type(intervention), name) is not getattr(Intervention, name) for name in methods)
        or parts[0] is not Basis
        or parts[1] not in (Source, Constant)
        or parts[2] is not nn.Dropout
    )


def fingerprint(entries: Iterable[Named]) -> tuple[Any, ...] | None:
    """Changes whenever factors worked out earlier are out of date; None if they must not be kept.

    Only parameters that are frozen and at rest are trusted: what trains may be written to behind autograd's back.
    """
    marks: list[Any] = [torch.is_inference_mode_enabled()]
    for key, interventions in entries:
        for intervention in interventions:
            if intervention.training:
                return None
            for parameter in _parameters_of(intervention):
                if parameter.requires_grad or parameter.is_inference():
                    return None
                marks.append((key, id(parameter), parameter.data_ptr(), parameter._version))
    return tuple(marks)


def _parameters_of(module: nn.Module) -> list[nn.Parameter]:
    """`list(module.parameters())`, but faster: it counts where hundreds of adapters are looked through."""
    found = [parameter for parameter in module._parameters.values() if parameter is not None]
    for part in module._modules.values():
        if part is not None:
            found += _parameters_of(part)
    return found


def values_on_cpu(entries: Iterable[Named]) -> Tensor | None:
    """All parameters of interventions in a row, to see writes that leave no trace (through `.data`); None if none is
    on the CPU.
    """
    parameters = (p for _, interventions in entries for i in interventions for p in _parameters_of(i))
    flat = [parameter.detach().flatten() for parameter in parameters if parameter.device.type == "cpu"]
    return torch.cat(flat) if flat else None


def stack_factors(rows: Sequence[Factors | None]) -> Factors:
    """Factors [B, G, r, d] for rows of a batch that have factors of their own, None for rows without an edit.

    Smaller ranks and numbers of groups are filled up with zeros, which edit nothing. All rows must have the same
    activation, and either all or none a projection of their own.
    """
    present = [factors for factors in rows if factors is not None]
    groups, r = (max(factors.up.shape[dim] for factors in present) for dim in (0, 1))
    filled = {id(factors): _fill(factors, groups, r, any(f.down is not None for f in present)) for factors in present}
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
