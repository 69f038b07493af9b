"""Factors of many interventions, worked out together.

Orthonormalising one block's R after the other costs more than the edits themselves. Here interventions that differ in
their numbers only, those of all blocks, position groups and adapters, are stacked and worked out at once.

Shape letters: N interventions, d hidden size, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from peft_reft.interventions.called import has_hooks
from peft_reft.interventions.equations import Factors, Intervention
from peft_reft.interventions.orthonormal import without_autocast


class Kind(NamedTuple):
    """What interventions have in common that are worked out together."""

    has_source: bool
    replaces: bool
    orthonormal: bool
    act_fn: str | None
    train_bias: bool
    parts: tuple[int, ...]
    frozen: int
    dropout: float
    r: int
    d: int
    dtype: torch.dtype
    device: torch.device


def kind_of(intervention: nn.Module) -> Kind | None:
    """The kind of an intervention.

    Returns:
        None for an intervention that has to be called as a module: one of the user's own, one with hooks, one whose
        activation has parameters of its own (PReLU), or one whose parameters cannot be read before its module runs
        (sharded, offloaded), or are none (a replica of nn.DataParallel, plain tensors in their place).
    """
    if not isinstance(intervention, Intervention) or intervention.changed_methods() or has_hooks(intervention):
        return None
    if any(True for child in intervention.children() for _ in child.parameters()):  # an activation that is trained
        return None
    own, cls = intervention, type(intervention)
    parameters = own._parameters.values()
    if not all(name in own._parameters for name in own.operands) or any(
        p is not None and (type(p) not in (nn.Parameter, Tensor) or p.is_meta or not p.numel()) for p in parameters
    ):
        return None
    basis = own.basis
    frozen = own.frozen if own.is_split else 0
    choices = (cls.has_source, cls.replaces, cls.orthonormal, own.act_fn, own.train_bias, own.parts, frozen)
    r, d = basis.shape
    return Kind(*choices, own.dropout, frozen + r, d, basis.dtype, basis.device)


def stack_factors(interventions: Sequence[Intervention]) -> Factors:
    """The factors [N, ...] of interventions of one kind."""
    return _combine(interventions[0], _stack(interventions))


def _stack(interventions: Sequence[Intervention]) -> list[Tensor]:
    """The parameters of interventions of one kind, stacked: basis [N, r, d], weight, and bias if they have one.

    With a bias the weight is as large as the basis and lies behind it in one stack, which takes less time than two.
    """
    first = interventions[0]
    basis, weight, *bias = first.operands
    names = [(basis, weight), bias] if bias else [(basis,), (weight,)]
    if first.frozen and first.is_split:
        return [torch.stack([own.rows(name) for name in together for own in interventions]) for together in names]
    parameters = [own._parameters for own in interventions]
    return [torch.stack([own[name] for name in together for own in parameters]) for together in names]  # type: ignore[misc]


def _combine(first: Intervention, stacks: list[Tensor]) -> Factors:
    if first.bias is not None:
        stacks = [*stacks[0].chunk(2), stacks[1]]
    with without_autocast(first.basis.device):
        return first.combine(*stacks)


class FactorMemo:
    """Remembers the factors of a set of interventions for as long as their parameters hold the same values.

    The values themselves are compared, so no write to a parameter goes unnoticed, whoever makes it and however. On
    devices that a comparison would have to wait for, and wherever gradients are asked for, factors are worked out anew.
    """

    def __init__(self) -> None:
        self._known: tuple[list[Tensor], Factors] | None = None  # replaced as a whole: threads share it

    def __call__(self, interventions: Sequence[Intervention]) -> Factors:
        """As `stack_factors`, of the same interventions in every call."""
        stacks = _stack(interventions)
        may_keep, known = self._may_keep(stacks), self._known
        if may_keep and known is not None and all(map(_same, stacks, known[0])):
            return known[1]
        factors = _combine(interventions[0], stacks)
        if may_keep:
            self._known = stacks, factors
        return factors

    def holds(self, factors: Factors) -> bool:
        """Whether these are the remembered ones."""
        return self._known is not None and factors is self._known[1]

    @staticmethod
    def _may_keep(stacks: list[Tensor]) -> bool:
        if torch.compiler.is_compiling() or stacks[0].device.type != "cpu" or stacks[0].is_inference():
            return False
        if torch.is_grad_enabled() and any(stack.requires_grad for stack in stacks):
            return False
        for stack in stacks:
            # Within vmap or grad of torch.func, or with derivatives of the forward mode.
            if torch.func.debug_unwrap(stack) is not stack or unpack_dual(stack).tangent is not None:
                return False
        return True


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
