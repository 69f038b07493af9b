"""LoReFT and its relatives: modules that edit hidden states, and the registry of their names.

Every built-in edit has the same shape: a learned r-dimensional value, from which the hidden state's own
coordinates may be subtracted, written back along r directions:

    h + Rᵀ (act(Wh + b) - Rh)

They differ in three choices: is the learned value a function of h or only a constant, are the coordinates subtracted
(the subspace is then replaced, otherwise shifted), and are the directions orthonormal (R) or free (W2).

Shape letters: d hidden size, r rank. Positions, adapters and models are known elsewhere.
"""

from __future__ import annotations

import difflib
import inspect
import re
import warnings
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from peft_reft.interventions.orthonormal import orthonormal_rows, without_autocast


class Factors(NamedTuple):
    """What an edit multiplies with, after all that does not depend on h is worked out.

    edit(h) = (act(h downᵀ + bias) - h projectionᵀ) up. A leading dimension, if any, counts position groups.

    Attributes:
        down: [..., r, d], or None if the edit is the same for every h.
        bias: [..., r]
        up: [..., r, d]
        projection: [..., r, d], or None if it is already part of `down`.
        act: elementwise function, or None.
    """

    down: Tensor | None
    bias: Tensor
    up: Tensor
    projection: Tensor | None = None
    act: Callable[[Tensor], Tensor] | None = None


class Intervention(nn.Module):
    """h + Rᵀ (act(Wh + b) - Rh), with the choices made by a subclass.

    Args:
        d: width of the edited hidden states.
        r: number of edited directions, 1 <= r <= d.
        dropout: probability with which an entry of the edit (never of h) is dropped in training.
        act_fn: name of an activation in `transformers.activations.ACT2FN` for the learned value, or None.
        init_weights: True: the fresh edit is zero wherever the equation allows it; False: random, as pyreft does.

    Attributes:
        weight: W [r, d], or the learned value [r] itself if it does not look at h.
        bias: b [r], or None with such a constant.
        basis: [r, d], rows that span the edited directions. Where the equation has R, `directions` makes them
            orthonormal, which they therefore are whatever an optimizer, a cast or a reload does to `basis`.

    Calling it maps [..., d] to [..., d], every vector edited, and returns the dtype it was given.
    """

    has_source: bool = True  # a function of h (Wh + b), or only a constant
    replaces: bool = True  # subtract Rh: the subspace's content is replaced instead of shifted
    orthonormal: bool = True  # R or W2

    # One module without children, which holds a `weight`, is what a wrapper such as FSDP's looks for. And it takes
    # little memory beside the parameters where thousands of adapters are resident; so do attributes of the class.
    dropout: float = 0.0
    act_fn: str | None = None

    def __init__(
        self,
        d: int,
        r: int,
        *,
        dropout: float = 0.0,
        act_fn: str | None = None,
        init_weights: bool = True,
    ):
        super().__init__()
        if not 1 <= r <= d:
            raise ValueError(f"r={r} is not a rank for hidden states of width {d}: it must be between 1 and {d}.")
        self.weight = nn.Parameter(torch.empty(r, d) if self.has_source else torch.empty(r))
        self.bias = nn.Parameter(torch.empty(r)) if self.has_source else None
        self.basis = nn.Parameter(torch.empty(r, d))
        if dropout:
            self.dropout = dropout
        if act_fn is not None:
            self.act_fn = act_fn
            self.activation = ACT2FN[act_fn]
        self.reset_parameters(init_weights)

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
                # Rows of length 1/2: an optimizer's step then turns R as far as it does in the Householder
                # parametrisation of the paper's code. R itself does not depend on their length.
                nn.init.orthogonal_(self.basis, gain=0.5)
            else:
                nn.init.kaiming_uniform_(self.basis, a=5**0.5)
            if identity:
                self._start_from_zero()

    def _start_from_zero(self) -> None:
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
                "trained; it starts from "
                "random ones. Use act_fn=None for a fresh adapter that changes nothing.",
                stacklevel=2,
            )

    @property
    def act(self) -> Callable[[Tensor], Tensor] | None:
        """The activation of the learned value."""
        return None if self.act_fn is None else self.activation

    @property
    def subspace(self) -> Tensor:
        """The edited directions [r, d]: R (orthonormal rows) or W2."""
        return self.directions(self.basis)

    def directions(self, basis: Tensor) -> Tensor:
        """The edited directions from `basis` [..., r, d]: this intervention's own, or those of many alike."""
        return orthonormal_rows(basis) if self.orthonormal else basis

    def learned(self, h: Tensor) -> Tensor:
        """act(Wh + b) [..., r], or a constant [r], in the precision of `h`."""
        weight = self.weight.to(h.dtype)
        value = weight if self.bias is None else F.linear(h, weight, self.bias.to(h.dtype))
        return value if self.act is None else self.act(value)

    def edit(self, h: Tensor) -> Tensor:
        """What is added to `h` [..., d], in at least single precision.

        The equation as it stands; `combine` and `low_rank_edit` are its fast form.
        """
        with without_autocast(h.device):
            directions = self.subspace
            h = h.to(torch.promote_types(torch.promote_types(h.dtype, directions.dtype), torch.float32))
            directions = directions.to(h.dtype)
            value = self.learned(h)
            if self.replaces:
                value = value - h @ directions.mT
            return F.dropout((value @ directions).expand(h.shape), self.dropout, self.training)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.edit(h).to(h.dtype)

    def combine(self, up: Tensor, weight: Tensor | None, bias: Tensor) -> Factors:
        """Work out what does not depend on h, for this intervention or for many alike at once.

        Args:
            up: [..., r, d], the basis.
            weight: [..., r, d] of the source, None if it is a constant.
            bias: [..., r] of the source, or the constant.
        """
        bias = bias.to(up.dtype)
        if weight is None:
            return Factors(-up if self.replaces else None, bias if self.act is None else self.act(bias), up)
        weight = weight.to(up.dtype)
        if self.act is not None:
            return Factors(weight, bias, up, up if self.replaces else None, self.act)
        return Factors(weight - up if self.replaces else weight, bias, up)  # (Wh + b) - Rh = (W - R)h + b

    def extra_repr(self) -> str:
        r, d = self.basis.shape
        return f"d={d}, r={r}"


def edit_of(intervention: nn.Module, h: Tensor) -> Tensor:
    """What an intervention, built-in or of the user's own, adds to `h` [..., d]."""
    is_own = isinstance(intervention, Intervention) and type(intervention).forward is Intervention.forward
    if is_own and "forward" not in vars(intervention):  # accelerate puts one there that fetches offloaded weights
        return intervention.edit(h)  # type: ignore[operator]
    dtype = next((p.dtype for p in intervention.parameters() if p.is_floating_point()), h.dtype)
    h = h.to(dtype)  # a module with weights in float32 need not know of models in half precision
    edited: Tensor = intervention(h)
    return edited - h


def low_rank_edit(h: Tensor, factors: Factors, keep: Tensor | None = None) -> Tensor:
    """The edit that `factors` make of `h`, without `h` itself, in at least single precision.

    Args:
        h: [..., P, d]; [B, G, P, d] for factors with leading dimensions.
        factors: of one intervention [r, d], of G of them [G, r, d], or by row as well [B, G, r, d].
        keep: [..., P, 1], a factor for each vector's edit (0 drops it).
    """
    down, bias, up, projection, act = factors
    h = h.to(torch.promote_types(torch.promote_types(h.dtype, up.dtype), torch.float32))
    up = up.to(h.dtype)
    if bias.dim() > 1:
        bias = bias.unsqueeze(-2)  # one row for all P vectors of a group
    if down is None:
        value = bias.to(h.dtype).expand(*h.shape[:-1], bias.shape[-1])
    elif down.dim() == 2 or down.shape[:-2] == (1,):
        value = F.linear(h, down.to(h.dtype).flatten(0, -2), bias.to(h.dtype).flatten())
    else:
        value = h @ down.mT.to(h.dtype) + bias.to(h.dtype)
    if act is not None:
        value = act(value)
    if projection is not None:
        value = value - h @ projection.mT.to(h.dtype)
    if keep is not None:
        value = value * keep
    return value @ (up[0] if up.shape[:-2] == (1,) else up)  # one matrix for all: a single product, not a batched one


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


# Classes by name; `register_intervention` adds to it.
REGISTRY: dict[str, type[nn.Module]] = {
    "loreft": LoreftIntervention,
    "noreft": NoreftIntervention,
    "direft": DireftIntervention,
    "odireft": OdireftIntervention,
    "consreft": ConsreftIntervention,
    "lobireft": LobireftIntervention,
}
BUILT_IN = frozenset(REGISTRY)


def nearest_name(name: object) -> str | None:
    """The registered name that a misspelt one probably means; None without a good guess.

    >>> nearest_name("lorefft"), nearest_name("LoReFT"), nearest_name("lora")
    ('loreft', 'loreft', None)
    """
    if not isinstance(name, str):
        return None
    close = difflib.get_close_matches(re.sub(r"[\W_]", "", name.lower()), intervention_names(), n=1, cutoff=0.7)
    return close[0] if close else None


def intervention_names() -> list[str]:
    """Names that `ReftConfig(intervention=...)` accepts at the moment."""
    return sorted(REGISTRY)


def register_intervention(name: str, cls: type[nn.Module]) -> None:
    """Make a module of your own available as `ReftConfig(intervention=name)`.

    Args:
        name: lower-case identifier that no built-in intervention has. Registering a name again replaces the class.
        cls: `nn.Module` whose constructor takes `(d, r)` and, if it names them (or takes `**kwargs`), the keywords
            `dropout`, `act_fn` and `init_weights`; its forward maps [..., d] to [..., d]. Its parameters are
            what is trained and saved. A subclass of `Intervention` gets the batched fast path, and any module
            may offer `subspace` [r, d].

    Raises:
        ValueError: if the name is taken by a built-in or is no lower-case identifier.
        TypeError: if `cls` is not a class of modules.

    An adapter's config only names its intervention: register the class before loading such an adapter.
    """
    if not (isinstance(name, str) and name.isidentifier() and name == name.lower()):
        raise ValueError(f"{name!r} cannot name an intervention: use a lower-case identifier such as 'my_reft'.")
    if name in BUILT_IN:
        raise ValueError(f"{name!r} is a built-in intervention; register {cls!r} under another name.")
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"{cls!r} is not a subclass of torch.nn.Module; pass the class itself, not an instance.")
    REGISTRY[name] = cls


def build_intervention(
    name: str, d: int, r: int, *, dropout: float = 0.0, act_fn: str | None = None, init_weights: bool = True
) -> nn.Module:
    """A fresh intervention by its name; the keywords go to the constructors that name them."""
    cls = REGISTRY[name]
    keywords = {"dropout": dropout, "act_fn": act_fn, "init_weights": init_weights}
    return cls(d, r, **{key: keywords[key] for key in _keywords_of(cls)})  # type: ignore[arg-type]


@cache
def _keywords_of(cls: type[nn.Module]) -> tuple[str, ...]:
    """Which of the optional keywords the constructor of an intervention takes."""
    parameters = inspect.signature(cls).parameters
    any_of_them = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return tuple(key for key in ("dropout", "act_fn", "init_weights") if any_of_them or key in parameters)
