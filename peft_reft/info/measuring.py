"""Measuring the interventions of one block, by their stored parameters: lengths, and what the edits are as a map."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_reft.interventions import REGISTRY, Intervention, build_intervention


@dataclass(frozen=True)
class BlockInfo:
    """The interventions of one edited block.

    Attributes:
        name: of the block in the base model.
        width, rank: d and r; None if the equation is unknown here and says neither.
        interventions: how many it has, one or one per position group.
        parameters: trained numbers.
        norms: Frobenius norm of each parameter, over all interventions of the block.
        orthonormality: max |R Rᵀ − I| of the R that is used; None where the equation has none, or was not looked at.
        gain: the most by which the linear part of the edit moves h, as a part of h's length (the largest singular
            value of the map h -> Δh without its constant); 0 for a fresh adapter; None with an activation or for
            equations that are not built in.
        shift: length of the edit's constant part, in the units of h; None as for `gain`.
    """

    name: str
    width: int | None
    rank: int | None
    interventions: int
    parameters: int
    norms: dict[str, float]
    orthonormality: float | None = None
    gain: float | None = None
    shift: float | None = None


def block_info(name: str, groups: dict[int, dict[str, Tensor]], config: Mapping[str, Any], look: bool) -> BlockInfo:
    """What the stored parameters of one block are, by the number of the intervention and their names."""
    parameters = [tensor for group in groups.values() for tensor in group.values()]
    basis = groups[min(groups)].get("basis")
    rank, width = basis.shape if basis is not None and basis.dim() == 2 else (None, None)
    norms: dict[str, float] = {}
    measured: list[tuple[float | None, float | None, float | None]] = []
    if look:
        for key in dict.fromkeys(key for group in groups.values() for key in group):
            parts = [group[key].double().norm() for group in groups.values() if key in group]
            norms[key] = float(torch.stack(parts).norm())
        if rank is not None and width is not None:
            measured = [measure(built(config, width, rank, group)) for group in groups.values()]
    figures = [max((v for v in values if v is not None), default=None) for values in zip(*measured)] or [None] * 3
    return BlockInfo(name, width, rank, len(groups), sum(tensor.numel() for tensor in parameters), norms, *figures)


def built(config: Mapping[str, Any], width: int, rank: int, tensors: Mapping[str, Tensor]) -> Intervention | None:
    """The intervention that has these parameters; None if its equation is not one of the package's kind."""
    kind = str(config.get("intervention"))
    cls = REGISTRY.get(kind)
    if cls is None or not issubclass(cls, Intervention) or cls.combine is not Intervention.combine:
        return None
    try:
        with torch.device("meta"):
            module = build_intervention(kind, width, rank, act_fn=config.get("act_fn"))
    except (KeyError, TypeError, ValueError):  # no such activation, or no such rank: a config that no model takes
        return None
    assert isinstance(module, Intervention)
    module.to_empty(device="cpu")
    parameters = dict(module.named_parameters())
    if {key: p.shape for key, p in parameters.items()} != {key: t.shape for key, t in tensors.items()}:
        return None
    if not all(tensor.is_floating_point() for tensor in tensors.values()):
        return None
    for key, tensor in tensors.items():
        parameters[key].data = (
            tensor.float() if tensor.element_size() == 1 else tensor
        )  # torch cannot compute in float8
    return module


@torch.no_grad()
def measure(module: Intervention | None) -> tuple[float | None, float | None, float | None]:
    """Orthonormality, gain and shift: see `BlockInfo`."""
    if module is None or not all(p.isfinite().all() for p in module.parameters()):
        return None, None, None
    up = module.subspace.double()  # what the edits use, in the precision they use
    error = float((up @ up.mT - torch.eye(len(up)).double()).abs().max()) if module.orthonormal else None
    if module.act is not None:
        return error, None, None
    basis = up if module.orthonormal else module.basis  # whose rows are made orthonormal before they are rounded
    factors = module.combine(basis, module.weight, module.bias)
    gain = 0.0
    if factors.down is not None:
        # The squares of the singular values of down up [d, d] are eigenvalues of an r by r matrix.
        squares = torch.linalg.eigvals((factors.down.mT @ factors.down).double() @ (up @ up.mT)).real
        gain = max(float(squares.max()), 0.0) ** 0.5
    return error, gain, float((factors.bias.double() @ up).norm())
