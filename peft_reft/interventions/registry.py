"""The names by which `ReftConfig(intervention=...)` finds a class, and interventions made by name."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import nn

from peft_reft.interventions.boundless import BoundlessIntervention
from peft_reft.interventions.equations import (
    ConsreftIntervention,
    DireftIntervention,
    Intervention,
    LobireftIntervention,
    LoreftIntervention,
    NoreftIntervention,
    OdireftIntervention,
)
from peft_reft.interventions.interchange import InterchangeIntervention, VanillaIntervention
from peft_reft.interventions.parts import PartedRows

# Classes by name; `register_intervention` adds to it.
REGISTRY: dict[str, type[nn.Module]] = {
    "loreft": LoreftIntervention,
    "noreft": NoreftIntervention,
    "direft": DireftIntervention,
    "odireft": OdireftIntervention,
    "consreft": ConsreftIntervention,
    "lobireft": LobireftIntervention,
    "interchange": InterchangeIntervention,
    "vanilla": VanillaIntervention,
    "boundless": BoundlessIntervention,
}
BUILT_IN = frozenset(REGISTRY)
KEYWORDS = ("dropout", "act_fn", "init_weights", "train_bias", "parts")  # what a constructor may take besides d and r


def intervention_names() -> list[str]:
    """Names that `ReftConfig(intervention=...)` accepts at the moment."""
    return sorted(REGISTRY)


def nearest_name(name: object) -> str | None:
    """The registered name that a misspelt one probably means; None without a good guess.

    >>> nearest_name("lorefft"), nearest_name("LoReFT"), nearest_name("lora")
    ('loreft', 'loreft', None)
    """
    if not isinstance(name, str) or len(name) > 100:
        return None
    close = difflib.get_close_matches(re.sub(r"[\W_]", "", name.lower()), intervention_names(), n=1, cutoff=0.7)
    return close[0] if close else None


def register_intervention(name: str, cls: type[nn.Module]) -> None:
    """Make a module of your own available as `ReftConfig(intervention=name)`.

    Args:
        name: lower-case identifier that no built-in intervention has. Registering a name again replaces the class.
        cls: `nn.Module` whose constructor takes `(d, r)` and, if it names them (or takes `**kwargs`), the keywords
            `dropout`, `act_fn`, `init_weights`, `train_bias` and `parts`; its forward maps [..., d] to [..., d]. Its
            parameters are what is trained and saved. A subclass of `Intervention` that changes no method is worked out
            for all blocks at once, and any module may offer `subspace` [r, d]. A class with `takes_source = True` takes
            a source in its forward, (h, source), as "interchange" does.

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
    name: str,
    d: int,
    r: int,
    *,
    dropout: float = 0.0,
    act_fn: str | None = None,
    init_weights: bool = True,
    train_bias: bool = True,
    parts: Sequence[int] = (),
) -> nn.Module:
    """A fresh intervention by its name; the keywords go to the constructors that name them.

    Args:
        parts: for an intervention that `check_parts` lets pass.

    Raises:
        ValueError: if b is to keep its value, and the class has no say in that.
    """
    cls = REGISTRY[name]
    taken = _keywords_of(cls)  # type: ignore[arg-type]
    if not train_bias and "train_bias" not in taken:
        raise ValueError(
            f"train_bias=False has no meaning for the intervention {name!r}: the constructor of {cls.__name__} takes "
            "no `train_bias`. Leave it out, or let the class take it."
        )
    values: dict[str, Any] = dict(zip(KEYWORDS, (dropout, act_fn, init_weights, train_bias, tuple(parts))))
    return cls(d, r, **{key: values[key] for key in taken if key != "parts" or parts})


def takes_source(name: str) -> bool:
    """Whether an intervention takes a source, another input's hidden state, instead of learning a value."""
    return bool(getattr(REGISTRY[name], "takes_source", False))


def check_parts(name: str) -> None:
    """Refuse named parts of R for an intervention that has none, or whose directions cannot be switched one by one.

    Raises:
        ValueError: naming the intervention.
    """
    cls = REGISTRY[name]
    if not issubclass(cls, PartedRows) or "parts" not in _keywords_of(cls):  # type: ignore[arg-type]
        reason = (
            f"{cls.__name__} has no R whose rows could be switched one by one. Use a built-in intervention with R, or "
            "a subclass of one."
        )
    elif not cls.orthonormal:
        reason = (
            "its directions are free, so that parts of them cannot be kept at right angles to each other. Use one "
            "with R, such as 'loreft' or 'odireft'."
        )
    elif issubclass(cls, Intervention) and (changed := cls.changed_methods()):
        reason = (
            f"{cls.__name__} changes {', '.join(changed)}, so that its directions cannot be switched one by one. Use "
            "a built-in intervention with R."
        )
    else:
        return
    raise ValueError(f"subspaces have no meaning for the intervention {name!r}: {reason}")


@cache
def _keywords_of(cls: type[nn.Module]) -> tuple[str, ...]:
    """Which of the optional keywords the constructor of an intervention takes."""
    parameters = inspect.signature(cls).parameters
    any_of_them = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return tuple(key for key in KEYWORDS if any_of_them or key in parameters)
