"""Orthonormal matrices as `torch.nn.utils.parametrizations.orthogonal` stores them, and back.

Both peers keep R this way: as `original`, a matrix of R's shape, and `base`, a square one. Plain torch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def orthogonal_weight(original: Tensor, base: Tensor) -> Tensor:
    """The weight that torch's parametrisation (with its defaults) makes of what it stores.

    Args:
        original: [n, k] of any shape: tall, wide or square.
        base: [m, m] with m = max(n, k).

    Returns:
        [n, k] in the dtype of `base`, with orthonormal columns (tall, square) or rows (wide). A column (row) is zero
        where the diagonal of `original` is less than 1 in size: the parametrisation cuts it to an integer.
    """
    n, k = original.shape
    if n < k:
        return orthogonal_weight(original.mT, base).mT
    x, basis = original.double(), base.double()
    if n == k:
        lower = x.tril()
        q = torch.matrix_exp(lower - lower.mT)
    else:
        lower = x.tril(-1)
        q = torch.linalg.householder_product(lower, 2 / (1 + lower.square().sum(0))) * x.diagonal().int()
    return (basis @ q).to(base.dtype)


def orthogonal_parameters(columns: Tensor) -> tuple[Tensor, Tensor]:
    """`original` and `base` for which `orthogonal_weight` gives `columns` [d, r], r <= d, whose columns are
    orthonormal or zero.
    """
    d, r = columns.shape
    kept = (columns != 0).any(0)
    if bool(kept.all()) or r < d:
        # A complete basis whose first columns are these; a zero column's place is taken by some other direction.
        full, _ = torch.linalg.qr(columns[:, kept].double(), mode="complete")
        others = iter(full[:, int(kept.sum()) : d].mT)
        base = torch.stack([columns[:, j].double() if j < r and kept[j] else next(others) for j in range(d)], 1)
    else:
        raise ValueError("A square R with zero columns cannot be stored: torch has no integers to cut there.")
    original = torch.zeros(d, r, dtype=columns.dtype)
    if r < d:
        original[torch.arange(r), torch.arange(r)] = -kept.to(columns.dtype)  # H_j = I - 2 e_j e_jᵀ, times -1
    return original, base.to(columns.dtype).contiguous()
