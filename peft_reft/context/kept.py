"""Plans that are kept from call to call: the families of a set of adapters, for as long as nothing about them changes.

Nobody has to say that something changed. In every call all is looked at that a plan was made from, in many short steps
without a call of our own: one plan has hundreds of such things, and their attributes take longer to read than the
mappings that hold them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

from torch import Tensor

from peft_reft.context.plan import Family, families_of
from peft_reft.context.subspaces import BASE
from peft_reft.interventions import HOOKS

DEVICE_AND_DTYPE = attrgetter("device", "dtype")
MOST_PLANS = 8  # a server, or a trainer with a reference, goes back and forth between a few sets of adapters


class Plan:
    """The families of the adapters of some layers, and what they were made from.

    Args:
        layers: the layers of a call.
        names: the adapters that take part, in rows of their own; None for each layer's active ones in all rows.
    """

    def __init__(self, layers: Sequence[Any], names: Sequence[str] | None):
        self.layers, self.names = list(layers), names
        self.entries: list[tuple[Mapping[str, Any], str]] = []  # mappings, and what in them counts
        self.hooks: list[Any] = []
        self.parameters: list[dict[str, Any]] = []
        for layer in layers:
            self._note(layer)
        self.seen = [list(found) if isinstance(found, list) else found for found in self._look()]
        self.families: list[Family] = families_of(layers, names)

    def _note(self, layer: Any) -> None:
        own, adapters = vars(layer), layer.reft_interventions._modules
        self.entries.append((own, "_disable_adapters"))
        if self.names is None:
            self.entries.append((own, "_active_adapter"))
        for name in layer.active_adapters if self.names is None else self.names:
            self.entries += (adapters, name), (own["scaling"], name), (own["position_specs"], name)
            groups = adapters.get(name)
            for number, one in () if groups is None else groups._modules.items():
                held = vars(one)
                self.entries += (groups._modules, number), (held, "dropout"), (held, "act_fn")
                self.hooks += map(held.get, HOOKS)
                self.parameters.append(held["_parameters"])

    def _look(self) -> list[Any]:
        # Wrappers for sharding and offloading replace parameters, or their contents; casts, their dtype.
        weights = [next(iter(own.values())) for own in self.parameters if own]
        found = [mapping.get(name) for mapping, name in self.entries]
        for kind, things in (
            (bool, self.hooks),
            (len, self.parameters),
            (type, weights),
            (DEVICE_AND_DTYPE, weights),
            (Tensor.numel, weights),
        ):
            found += map(kind, things)
        return found

    def holds(self) -> bool:
        """Whether all is as it was when the families were made."""
        return self._look() == self.seen


def kept_families(kept: list[Plan], layers: Sequence[Any], names: Sequence[str] | None) -> list[Family]:
    """The families of the adapters that are active, or of those named; made anew when something about them changed.

    Args:
        kept: the model's plans, the latest first.
        layers: the layers of a call.
        names: the adapter of each row; None if all have the active ones.
    """
    if names is not None:
        names = [name for name in dict.fromkeys(names) if name != BASE]
    for plan in tuple(kept):  # another thread may be here, too
        if plan.names == names and plan.layers == layers and plan.holds():
            return plan.families
    plan = Plan(layers, names)
    kept.insert(0, plan)
    del kept[MOST_PLANS:]
    return plan.families
