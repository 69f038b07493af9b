"""LoReFT and its relatives: modules that edit hidden states.

Every built-in edit has the same form: a learned r-dimensional value, from which the hidden state's own coordinates
may be subtracted, written back along r directions:

    h + Rᵀ (act(Wh + b) - Rh)

They differ in three choices: is the learned value a function of h or a constant, are the coordinates subtracted (the
subspace is replaced, otherwise it is shifted), and are the directions orthonormal (R) or free (W2). `Factors` are what
remains to multiply with when all that does not depend on h is worked out; `low_rank_edit` is the equation, for one
intervention or for many at once.

Shape letters: d hidden size, r rank, n interventions, m vectors for each.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from peft_reft.interventions.orthonormal import draw_rows, fresh_dtype, without_autocast
from peft_reft.interventions.parts import PartedRows


class Factors(NamedTuple):
    """What an edit multiplies with: edit(h) = (act(h down + bias) - h projection) up.

    Attributes:
        down: [..., d, r], or None if the edit is the same for every h.
        bias: [..., r].
        up: [..., r, d].
        projection: [..., d, r], or None if it is already part of `down`.
        act: elementwise function, or None.
    """

    down: Tensor | None
    bias: Tensor
    up: Tensor
    projection: Tensor | None = None
    act: Callable[[Tensor], Tensor] | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Factors:
        """The same function applied to every tensor."""
        down, bias, up, projection, act = self
        return Factors(
            None if down is None else function(down),
            function(bias),
            function(up),
            None if projection is None else function(projection),
            act,
        )


def low_rank_edit(h: Tensor, factors: Factors, keep: Tensor | None = None) -> Tensor:
    """What `factors` add to the vectors `h`, in at least single precision.

    Args:
        h: [m, d] for the factors of one intervention, [n, m, d] for those of n.
        factors: of one intervention, or of n with n as the leading dimension.
        keep: [m, 1] or [n, m, 1], a factor for each vector's edit (0 drops it); or with r in the place of 1, one for
            each direction of it.

    Returns:
        As `h`; one vector ([1, d] or [n, 1, d]) where it is the same for every h and there is no `keep`.
    """
    if h.dtype != factors.up.dtype:
        dtype = torch.promote_types(h.dtype, factors.up.dtype)
        h = h.to(dtype)
        if factors.up.dtype != dtype:
            factors = factors.map(lambda tensor: tensor.to(dtype))
    down, bias, up, projection, act = factors
    if bias.dim() > 1 or down is None:
        bias = bias.unsqueeze(-2)
    value = bias
    if down is not None:
        value = torch.addmm(bias, h, down) if h.dim() == 2 else torch.baddbmm(bias, h, down)
    if act is not None:
        value = act(value)
    if projection is not None:
        value = value - h @ projection
    if keep is not None:
        value = value * keep
    return value @ up


class Intervention(PartedRows):
    """h + Rᵀ (act(Wh + b) - Rh), with the choices made by a subclass.

    Args:
        d: width of the edited hidden states.
        r: number of edited directions, 1 <= r <= d.
        dropout: probability with which an entry of the edit (never of h) is dropped in training.
        act_fn: name of an activation in `transformers.activations.ACT2FN` for the learned value, or None.
        init_weights: True: the fresh edit is zero wherever the equation allows it; False: random, as pyreft does.
        train_bias: False: b keeps its value. It gets no gradient, whatever requires one.
        parts: sizes of the parts of R, r together (see parts.py); () for R as a whole.

    Attributes:
        weight: W [r, d]; b itself [r] if the learned value does not depend on h.
        bias: b [r], or None with such a constant.
        basis: [r, d], rows that span the edited directions. Where the equation has R, `directions` makes them
            orthonormal, so they are orthonormal whatever an optimizer, a cast or a reload does to `basis`.

    Calling it maps [..., d] to [..., d], every vector edited, and returns the dtype of its input.
    """

    has_source: bool = True  # a function of h (Wh + b), or only a constant
    replaces: bool = True  # subtract Rh: the subspace's content is replaced instead of shifted

    # A module without children that holds a `weight` is what a wrapper such as FSDP's looks for. It also takes little
    # memory next to the parameters where thousands of adapters are resident; so do attributes of the class.
    dropout: float = 0.0
    act_fn: str | None = None
    train_bias: bool = True

    def __init__(
        self,
        d: int,
        r: int,
        *,
        dropout: float = 0.0,
        act_fn: str | None = None,
        init_weights: bool = True,
        train_bias: bool = True,
        parts: Sequence[int] = (),
    ):
        super().__init__(d, r, parts)
        dtype = fresh_dtype()
        self.weight = nn.Parameter(torch.empty((r, d) if self.has_source else (r,), dtype=dtype))
        self.bias = nn.Parameter(torch.empty(r, dtype=dtype)) if self.has_source else None
        self.basis = nn.Parameter(torch.empty(r, d, dtype=dtype))
        if dropout:
            self.dropout = dropout
        if act_fn is not None:
            self.act_fn = act_fn
            self.activation = ACT2FN[act_fn]
        if not train_bias:
            self.train_bias = False
            self.hold()
        self.reset_parameters(init_weights)

    @classmethod
    def changed_methods(cls) -> list[str]:
        """The methods of the edit that a subclass has changed: it is then called as a module, not worked out."""
        names = ("forward", "edit", "combine", "directions")
        return [name for name in names if getattr(cls, name) is not getattr(Intervention, name)]

    @property
    def constant(self) -> nn.Parameter:
        """b, the part of the learned value that does not depend on h: [r]."""
        return self.weight if self.bias is None else self.bias

    def hold(self) -> None:
        """Make a bias, or rows, that keep their values untrainable again."""
        super().hold()
        if not self.train_bias:
            self.constant.requires_grad_(False)

    def reset_parameters(self, identity: bool) -> None:
        """Draw fresh weights; with `identity` so that the edit is zero wherever the equation allows it."""
        if self.basis.is_meta:  # low_cpu_mem_usage: the values come from a checkpoint
            return
        with torch.no_grad():
            if self.bias is None:
                nn.init.uniform_(self.weight)
            else:  # as in nn.Linear
                nn.init.kaiming_uniform_(self.weight, a=5**0.5)
                nn.init.uniform_(self.bias, -(self.weight.shape[1] ** -0.5), self.weight.shape[1] ** -0.5)
            if self.orthonormal:
                draw_rows(self.basis)
            else:
                nn.init.kaiming_uniform_(self.basis, a=5**0.5)
            if identity:
                self.start_from_zero()

    def start_from_zero(self) -> None:
        """Make the edit zero, with the directions as they are, wherever the equation allows it."""
        if self.bias is not None and self.replaces and self.act is None:
            self.weight.copy_(self.subspace)  # Wh - Rh = 0, and both W and R get gradients
            self.bias.zero_()
        elif not self.orthonormal:
            self.basis.zero_()
        elif not self.replaces and _passes_through_zero(self.act):
            self.weight.zero_()
            if self.bias is not None:
                self.bias.zero_()
        elif self.has_source or not self.replaces:
            warnings.warn(
                f"{type(self).__name__} with an activation has no weights for which the edit is zero and can be "
                "trained; it starts from random ones. Use act_fn=None for a fresh adapter that changes nothing.",
                stacklevel=2,
            )

    def erase(self) -> None:
        """Set all weights to zero: there are no directions, so nothing is edited until weights are loaded."""
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()

    @property
    def act(self) -> Callable[[Tensor], Tensor] | None:
        """The activation of the learned value."""
        return None if self.act_fn is None else self.activation

    def combine(self, basis: Tensor, weight: Tensor, bias: Tensor | None = None) -> Factors:
        """Work out what does not depend on h, for this intervention or for many alike at once, from the `operands`.

        Args:
            basis: [..., r, d].
            weight: [..., r, d]; b itself [..., r] if the learned value is a constant.
            bias: [..., r], b; None for such a constant.

        Returns:
            Factors with the same leading dimensions, in at least single precision.
        """
        up = self.directions(basis)
        up = up.to(torch.promote_types(up.dtype, torch.float32))
        constant = weight if bias is None else bias
        constant = (constant if self.train_bias else constant.detach()).to(up.dtype)
        if bias is None:
            down = -up.mT if self.replaces else None
            return Factors(down, constant if self.act is None else self.act(constant), up)
        weight = weight.to(up.dtype)
        if self.act is not None:
            return Factors(weight.mT, constant, up, up.mT if self.replaces else None, self.act)
        return Factors((weight - up if self.replaces else weight).mT, constant, up)  # (Wh + b) - Rh = (W - R)h + b

    @property
    def operands(self) -> tuple[str, ...]:
        """The names of the parameters that `combine` takes, in this order."""
        return ("basis", "weight") if self.bias is None else ("basis", "weight", "bias")

    def factors(self) -> Factors:
        """What this intervention multiplies with, all rows together."""
        return self.combine(*(self.rows(name) for name in self.operands))

    def edit(self, h: Tensor, keep: Tensor | None = None) -> Tensor:
        """What is added to `h` [..., d], in at least single precision; `keep` [..., r] is a factor per direction."""
        with without_autocast(h.device):
            of_rows = None if keep is None else keep.reshape(-1, keep.shape[-1])
            edit = low_rank_edit(h.reshape(-1, h.shape[-1]), self.factors(), of_rows)
            return F.dropout(edit.expand(h.numel() // h.shape[-1], -1).view(h.shape), self.dropout, self.training)

    def forward(self, h: Tensor, keep: Tensor | None = None) -> Tensor:
        return h + (self.edit(h) if keep is None else self.edit(h, keep)).to(h.dtype)


def _passes_through_zero(act: Callable[[Tensor], Tensor] | None) -> bool:
    """Whether a learned value of zero stays zero under an activation, and can still be trained from there."""
    if act is None:
        return True
    with torch.enable_grad():
        zero = torch.zeros(1, requires_grad=True)
        value = act(zero)
        (slope,) = torch.autograd.grad(value.sum(), zero)
    return value.item() == 0 and slope.item() != 0


class LoreftIntervention(Intervention):
    """LoReFT(h) = h + Rᵀ(Wh + b - Rh): paper eq. 2."""


class NoreftIntervention(Intervention):
    """NoReFT(h) = h + W2ᵀ(W1h + b - W2h): LoReFT without orthonormal rows, the paper's ablation."""

    orthonormal = False


class DireftIntervention(Intervention):
    """DiReFT(h) = h + W2ᵀ(W1h + b): paper eq. 3. pyreft calls it NodireftIntervention."""

    orthonormal = False
    replaces = False


class OdireftIntervention(Intervention):
    """ODiReFT(h) = h + Rᵀ(Wh + b): what pyreft calls DireftIntervention."""

    replaces = False


class ConsreftIntervention(Intervention):
    """ConsReFT(h) = h + Rᵀ(b - Rh): the subspace is set to a constant, as in pyreft."""

    has_source = False


class LobireftIntervention(Intervention):
    """LobiReFT(h) = h + Rᵀb: a low-rank bias, as in pyreft."""

    has_source = False
    replaces = False
