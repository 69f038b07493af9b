"""Orthonormal rows from free ones, for many matrices at once.

R = L⁻¹X with L Lᵀ = X Xᵀ (Cholesky): the Gram-Schmidt orthonormalisation of the rows of X, which is smooth in X
(Householder QR flips a row's sign when an entry of X changes sign), runs batched, and never waits for the device.
The Gram matrix squares the condition number, so it is formed in double precision; it is only r by r.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

_TINY = torch.finfo(torch.float32).tiny


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
        # Apple's GPUs have no double precision.
        x = weight.to(torch.float32 if weight.device.type == "mps" else torch.float64)
        gram = x @ x.mT
        # A row that vanishes becomes a zero row of R instead of NaN.
        gram.diagonal(dim1=-2, dim2=-1).mul_(1 + 1e-15).add_(_TINY)
        lower, _ = torch.linalg.cholesky_ex(gram)
        rows = torch.linalg.solve_triangular(lower, x, upper=False)
        return rows.to(torch.promote_types(weight.dtype, torch.float32))


def fresh_dtype() -> torch.dtype:
    """The dtype of fresh parameters: torch's default, in at least single precision, in which a fresh edit is zero."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


def draw_rows(basis: Tensor) -> None:
    """Fill `basis` [r, d] with random rows at right angles, of length 1/2.

    An optimizer's step then turns R as far as it does in the Householder parametrisation of the paper's code. R itself
    does not depend on their length.
    """
    rows = torch.empty_like(basis, dtype=torch.promote_types(basis.dtype, torch.float32))  # torch has no QR of halves
    nn.init.orthogonal_(rows, gain=0.5)
    with torch.no_grad():
        basis.copy_(rows)
