"""Named parts of R: rows that are trained separately and combined later, some of which may keep their values.

Parts follow one another. Each is orthonormal by itself and at right angles to those before it, which it never turns:
they are detached where it is worked out. So a part that is trained beside others comes out as if it were trained alone.

Shape letters: d hidden size, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_reft.interventions.orthonormal import orthonormal_rows

KEPT_PREFIX = "kept_"  # before the name of a parameter: its rows that keep their values


def ordered_rows(basis: Tensor, parts: Sequence[int]) -> Tensor:
    """Orthonormal rows, part by part: gradients reach the rows of a part from that part alone.

    Args:
        basis: [..., r, d] with linearly independent rows.
        parts: how many rows each part has, r together.

    Returns:
        [..., r, d], as `orthonormal_rows` gives them; the rows of a part do not depend on those behind it.
    """
    done = orthonormal_rows(basis[..., : parts[0], :])
    first = parts[0]
    for size in parts[1:]:
        together = torch.cat([done.detach(), basis[..., first : first + size, :].to(done.dtype)], dim=-2)
        done = torch.cat([done, orthonormal_rows(together)[..., first:, :]], dim=-2)
        first += size
    return done


class PartedRows(nn.Module):
    """A module whose parameters [r, ...] have a row for each direction of R, and whose R may have parts.

    Args:
        d: width of the hidden states.
        r: number of directions, 1 <= r <= d.

    Attributes:
        basis: [r, d], rows that span the directions; made by the subclass.
        orthonormal: whether the directions are R, with orthonormal rows, or free (W2).
        parts: how many rows each part has; () for one part without a name.
        frozen: how many rows, those of the first parts, keep their values. Set it before anything is trained.

    Rows that keep their values lie in parameters of their own, `kept_basis` and so on, from the moment on that
    something asks gradients of the others: an optimizer's weight decay does not reach them there. State dicts hold
    whole tensors either way.
    """

    basis: Tensor
    orthonormal: bool = True
    parts: tuple[int, ...] = ()
    frozen: int = 0

    def __init__(self, d: int, r: int, parts: Sequence[int] = ()):
        super().__init__()
        if not 1 <= r <= d:
            raise ValueError(f"r={r} is not a rank for hidden states of width {d}: it must be between 1 and {d}.")
        if parts:
            self.parts = tuple(parts)

    @property
    def subspace(self) -> Tensor:
        """The directions [r, d]: R (orthonormal rows) or W2."""
        return self.directions(self.rows("basis"))

    def directions(self, basis: Tensor) -> Tensor:
        """The directions from `basis` [..., r, d]: this module's own, or those of many alike."""
        if not self.orthonormal:
            return basis
        return ordered_rows(basis, self.parts) if self.parts else orthonormal_rows(basis)

    def extra_repr(self) -> str:
        r, d = self.rows("basis").shape
        return f"d={d}, r={r}" + (f", parts={self.parts}" if self.parts else "")

    def rows(self, name: str) -> Tensor:
        """A parameter [r, ...] with all of its rows."""
        own: Tensor = getattr(self, name)  # no parameter in a replica that nn.DataParallel made
        kept: Tensor | None = getattr(self, KEPT_PREFIX + name, None)
        return own if kept is None else torch.cat([kept, own])

    @property
    def is_split(self) -> bool:
        """Whether the rows that keep their values lie in parameters of their own."""
        return any(name.startswith(KEPT_PREFIX) for name in self._parameters)

    def hold(self) -> None:
        """Make rows that keep their values untrainable again.

        The first call with a trainable parameter splits each parameter in two, those rows and the rest: optimizers that
        were made before know the old ones.
        """
        if self.frozen and not self.is_split and any(own.requires_grad for own in self.parameters()):
            for name, parameter in list(self._parameters.items()):
                if parameter is not None:
                    whole = parameter.detach()
                    kept = nn.Parameter(whole[: self.frozen].clone(), requires_grad=False)
                    self.register_parameter(KEPT_PREFIX + name, kept)
                    rest = nn.Parameter(whole[self.frozen :].clone(), requires_grad=parameter.requires_grad)
                    self._parameters[name] = rest
        for name, parameter in self._parameters.items():
            if name.startswith(KEPT_PREFIX) and parameter is not None:
                parameter.requires_grad_(False)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in list(self._parameters):
            if name.startswith(KEPT_PREFIX):
                kept = destination.pop(prefix + name)
                whole = prefix + name.removeprefix(KEPT_PREFIX)
                destination[whole] = torch.cat([kept, destination[whole]])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in self._parameters:
            if name.startswith(KEPT_PREFIX):
                key = prefix + name.removeprefix(KEPT_PREFIX)
                if key in state_dict:
                    whole = state_dict[key]
                    state_dict[prefix + name], state_dict[key] = whole[: self.frozen], whole[self.frozen :]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
