"""How the adapters of a call are put together: which interventions are worked out at once, and for which rows.

What depends on the adapters alone is planned when they change and kept; what depends on a call is filled in by
`Plan.edits`.

Shape letters: B rows, S columns, G position groups, P places per group, L layers, A adapters, d hidden size, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_reft.context.state import BASE
from peft_reft.interventions import FactorMemo, Factors, Kind, edit_of, kind_of, low_rank_edit, stack_factors
from peft_reft.positions import Places, PositionSpec

KEPT = 8  # plans: a server, or a trainer with a reference, goes back and forth between a few sets of adapters


class Edit(NamedTuple):
    """What is added to the hidden states [B, S, d] after some blocks, the places in common and the factors of each.

    Attributes:
        index: long [n * m], the edited vectors of the state as [B * S, d], those of each of n interventions in a row;
            None: all of its vectors, for each intervention.
        keep: [m, 1], or [n, m, 1] for several interventions, a factor for each vector's edit: 0 for places that only
            fill up the shape.
        blocks: by the number of the layer, the factors of n interventions, without a leading dimension for n = 1; or
            the interventions themselves, which are then called.
        called: whether they are.
        dropout: probability with which an entry of the edit is dropped.
        autocast: whether autocast has to be kept out of the products.
    """

    index: Tensor | None
    keep: Tensor
    blocks: Mapping[int, Any]
    called: bool = False
    dropout: float = 0.0
    autocast: bool = False

    def add(self, out: Tensor, h: Tensor, block: Any) -> Tensor:
        """`out` with the edit of `h`, both [B, S, d]; every other vector is returned bit for bit.

        Args:
            block: one of `blocks`.
        """
        index, keep, _, called, dropout, autocast = self
        if called and keep.device != h.device:  # where such a module runs is known only now
            keep, index = keep.to(h.device), None if index is None else index.to(h.device)
        flat = h.flatten(0, 1)
        selected = flat if index is None else flat.index_select(0, index)
        if keep.dim() == 3:
            selected = selected.expand(len(keep), -1, -1) if index is None else selected.unflatten(0, keep.shape[:2])
        if called:
            delta = _call(block, selected) * keep
        elif autocast:
            with torch.autocast(h.device.type, enabled=False):
                delta = low_rank_edit(selected, block, keep)
        else:
            delta = low_rank_edit(selected, block, keep)
        if dropout:
            delta = F.dropout(delta, dropout)
        if delta.dtype != h.dtype:
            delta = delta.to(h.dtype)
        if index is None:
            return out + (delta.sum(0) if keep.dim() == 3 else delta).view_as(h)
        if keep.dim() == 3:
            delta = delta.flatten(0, 1)
        # Whole rows of [B * S, d]: faster than along the columns, and autograd keeps the index, not h.
        return (flat if out is h else out.flatten(0, 1)).index_add(0, index, delta).view_as(h)


def _call(modules: Sequence[nn.Module], selected: Tensor) -> Tensor:
    """The edits of interventions that are called as modules: of [m, d] for one, of [n, m, d] for several."""
    if selected.dim() == 2:
        return edit_of(modules[0], selected)
    return torch.stack([edit_of(module, h) for module, h in zip(modules, selected)])


@dataclass(eq=False)
class Family:
    """Interventions that are worked out together: those of one or several adapters, next to several layers.

    Attributes:
        spec, share_weights: of the adapters.
        names: the adapters, A of them; several only for rows with adapters of their own.
        scales: the strength of each.
        layers: numbers of L layers.
        groups: [L][A], a block's interventions of an adapter, one per position group.
        kind: what the interventions have in common; None if they are to be called as modules.
        memo: remembers their factors; None for a plan that is used once.
    """

    spec: PositionSpec
    share_weights: bool | str
    names: list[str]
    scales: list[float]
    layers: list[int]
    groups: list[list[nn.ModuleList]]
    kind: Kind | None
    memo: FactorMemo | None

    def __post_init__(self) -> None:
        places: dict[int, int] = {}
        self.distinct: list[Any] = []  # the interventions, those that layers share once
        for row in self.groups:
            for groups in row:
                if id(groups) not in places:
                    places[id(groups)] = len(places)
                    self.distinct += groups
        # [L][A]: which of the distinct lists of groups
        self.places = [[places[id(groups)] for groups in row] for row in self.groups]
        self.count = len(self.groups[0][0])  # G
        self._split: tuple[Factors, Any, Mapping[int, Any]] | None = None

    def blocks(self, adapters: Sequence[int] | None, split: bool) -> Mapping[int, Any]:
        """What each layer multiplies with, or calls: see `Edit.blocks`.

        Args:
            adapters: which of the family's adapters each row has, if there are several.
            split: whether there are several interventions, so that the factors have a leading dimension.
        """
        if self.kind is None:
            return {number: list(row[0]) for number, row in zip(self.layers, self.groups)}
        factors = stack_factors(self.distinct) if self.memo is None else self.memo(self.distinct)
        key = None if adapters is None else tuple(adapters)
        if self._split is not None and self._split[0] is factors and self._split[1] == key:
            return self._split[2]
        whole, count, chosen = factors, self.count, [row[0] for row in self.places]
        if adapters is not None:
            whole, count, chosen = self._of_rows(factors, adapters), count * len(adapters), list(range(len(self.layers)))
        parts: list[Any] = []
        for part in whole[:4]:
            if part is None:
                parts.append([None] * len(chosen))
            else:
                blocks = part.unflatten(0, (-1, count)).unbind(0) if split else part.unbind(0)
                parts.append([blocks[place] for place in chosen])
        found = {number: Factors(*own, whole.act) for number, *own in zip(self.layers, *parts)}
        self._split = None if self.memo is None else (factors, key, found)
        return found

    def plan_for(kept: dict[Any, Plan], layers: Sequence[Any], names: Sequence[str] | None) -> Plan:
    """The plan of the adapters that are active now, or of those named; made anew when something about them changed."""
    if names is not None:
        names = [name for name in dict.fromkeys(names) if name != BASE]
    key: list[Any] = [None if names is None else tuple(names)]
    for layer in layers:
        key.append(layer.number)
        if layer._disable_adapters:
            continue
        own = layer._modules["reft_interventions"]._modules
        active = layer._active_adapter if names is None else names
        for name in (active,) if isinstance(active, str) else active:
            groups = own.get(name)
            if groups is not None:
                first = groups._modules["0"]
                weight = next(iter(first._parameters.values()), None)
                # Wrappers for sharding and offloading replace parameters, or their contents.
                kind = None if weight is None else (type(weight), weight.device, weight.numel())
                key.append((id(first), layer.scaling[name], id(layer.position_specs[name]), kind))
    signature = tuple(key)
    plan = kept.get(signature)
    if plan is None:
        plan = Plan(layers, names)
        while len(kept) >= KEPT:
            kept.pop(next(iter(kept)))
        kept[signature] = plan
    return plan
