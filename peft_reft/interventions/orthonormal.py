"""Orthonormal rows from free ones, for many matrices at once.

R = L⁻¹X with L Lᵀ = X Xᵀ (Cholesky): the Gram-Schmidt orthonormalisation of the rows of X, which is smooth in X
(Householder QR flips a row's sign when an entry of X changes sign), runs batched, and never waits for the device.
The Gram matrix squares the condition number, so it is formed in double precision; it is only r by r.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def _factor(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The factor L [..., r, r] and the orthonormal rows [..., r, d]."""
    # Apple's GPUs have no double precision.
    x = weight.to(torch.float32 if weight.device.type == "mps" else torch.float64)
    gram = x @ x.mT
    # A vanishing row becomes a zero row of R instead of NaN.
    smallest = 1e-16 * gram.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True) + torch.finfo(torch.float32).tiny
    lower, _ = torch.linalg.cholesky_ex(gram + torch.diag_embed(smallest.expand(*x.shape[:-1])))
    return lower, torch.linalg.solve_triangular(lower, x, upper=False)


class _OrthonormalRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        lower, rows = _factor(weight)
        ctx.save_for_backward(lower, rows)
        return rows.to(torch.promote_types(weight.dtype, torch.float32))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # dR = L⁻¹dX - Φ(M + Mᵀ)R with M = L⁻¹dX Rᵀ and Φ = lower triangle, diagonal halved; this is its adjoint.
        lower, rows = ctx.saved_tensors
        grad_rows = grad.to(rows.dtype)
        below = (grad_rows @ rows.mT).tril()
        symmetric = below + below.tril(-1).mT
        return torch.linalg.solve_triangular(lower.mT, grad_rows - symmetric @ rows, upper=True)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Leave every dtype as it is; on the meta device, which autocast does not know, nothing has to be done for that."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def orthonormal_rows(weight: Tensor) -> Tensor:
    """The rows of `weight`, orthonormalised first to last.

    Args:
        weight: [..., r, d] with r <= d and linearly independent rows, in any floating dtype.

    Returns:
        [..., r, d] of the same row spaces, R Rᵀ = I; in float32, or float64 if `weight` is. Differentiable.
    """
    with without_autocast(weight.device):
        if torch.is_grad_enabled() and weight.requires_grad:
            return _OrthonormalRows.apply(weight)
        return _factor(weight)[1].to(torch.promote_types(weight.dtype, torch.float32))
