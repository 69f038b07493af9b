"""How the adapters of a call are put together: which interventions are worked out at once, and for which rows.

What depends on the adapters alone is planned when they change and kept; what depends on a call is filled in by
`Plan.edits`.

Shape letters: B rows, S columns, G position groups, P places per group, L layers, A adapters, d hidden size, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
    """What is added to the hidden state [B, S, d] after one block.

    Attributes:
        index: long [n * m], the edited vectors of the state as [B * S, d], those of each of n interventions in a row;
            None: all of its vectors, for each intervention.
        keep: [m, 1] or [n, m, 1], a factor for each vector's edit: 0 for places that only fill up the shape.
        factors: of n interventions, without a leading dimension for n = 1; None: `modules` are to be called.
        modules: the n interventions.
        dropout: probability with which an entry of the edit is dropped.
    """

    index: Tensor | None
    keep: Tensor
    factors: Factors | None
    modules: Sequence[nn.Module]
    dropout: float

    def add(self, out: Tensor, h: Tensor) -> Tensor:
        """`out` with the edit of `h`, both [B, S, d]; every other vector is returned bit for bit."""
        flat = h.reshape(-1, h.shape[-1])
        index, keep = self.index, self.keep
        if keep.device != h.device:  # interventions that are called, whose device is known when they run
            keep, index = keep.to(h.device), None if index is None else index.to(h.device)
        selected = flat if index is None else flat.index_select(0, index)
        if keep.dim() == 3:
            selected = selected.expand(keep.shape[0], -1, -1) if index is None else selected.view(*keep.shape[:2], -1)
        delta = self._delta(selected, keep).to(h.dtype)
        if index is None:
            return out + (delta.sum(0) if delta.dim() == 3 else delta).view(h.shape)
        # Whole rows of [B * S, d]: faster than along the columns, and autograd keeps the index, not h.
        return out.reshape(flat.shape).index_add(0, index, delta.view(-1, flat.shape[1])).view(h.shape)

    def _delta(self, selected: Tensor, keep: Tensor) -> Tensor:
        if self.factors is None:
            if selected.dim() == 2:
                return edit_of(self.modules[0], selected) * keep
            return torch.stack([edit_of(*pair) for pair in zip(self.modules, selected.unbind(0))]) * keep
        device = selected.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                delta = low_rank_edit(selected, self.factors, keep)
        else:
            delta = low_rank_edit(selected, self.factors, keep)
        return F.dropout(delta, self.dropout) if self.dropout else delta


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

    def factors(self) -> tuple[Factors, dict[int, int]]:
        """The factors [N, ...] of the interventions, each once, and the place among them of each list of groups."""
        places: dict[int, int] = {}
        distinct: list[Any] = []
        for row in self.groups:
            for groups in row:
                if id(groups) not in places:  # layers may share theirs
                    places[id(groups)] = len(distinct) // len(groups)
                    distinct += groups
        return stack_factors(distinct) if self.memo is None else self.memo(distinct), places


class Plan:
    """The families of the adapters of a call.

    Args:
        layers: the model's layers.
        names: the adapters that take part; None for each layer's active ones.
        once: whether the plan is not kept, so that factors need not be remembered.
    """

    def __init__(self, layers: Sequence[Any], names: Sequence[str] | None, once: bool = False):
        families: dict[Any, Family] = {}
        by_row = names is not None
        members: dict[str, dict[Any, list[tuple[int, Any]]]] = {}
        for layer in layers:
            if layer.disable_adapters:
                continue
            for name in layer.active_adapters if names is None else names:
                groups = layer.reft_interventions._modules.get(name)
                if groups is None or not layer.scaling[name]:
                    continue
                kind = kind_of(groups[0])
                key = (
                    layer.position_specs[name],
                    layer.share_weights[name],
                    layer.scaling[name],
                    len(groups),
                    (kind, *{kind_of(one) for one in groups[1:]} - {kind}) if kind is not None else None,
                    layer.width,
                    None if kind is not None else id(layer),  # called one by one
                )
                members.setdefault(name, {}).setdefault(key, []).append((layer.number, groups))
        for name, by_key in members.items():
            for key, found in by_key.items():
                spec, share, scale, count, kind, _, _ = key
                numbers = [number for number, _ in found]
                together = by_row and kind is not None and not kind[0].dropout  # dropout is drawn per adapter
                alike = (spec, share, count, kind, *numbers) if together else (name, key)
                if alike not in families:
                    memo = None if once else FactorMemo()
                    families[alike] = Family(
                        spec, share, [], [], numbers, [[] for _ in numbers], kind and kind[0], memo
                    )
                family = families[alike]
                family.names.append(name)
                family.scales.append(scale)
                for row, (_, groups) in zip(family.groups, found):
                    row.append(groups)
        self.families = list(families.values())

    def edits(
        self,
        places_of: Callable[[PositionSpec, bool | str], Places | None],
        shape: tuple[int, int],
        rows: Sequence[str] | None,
        training: bool,
    ) -> dict[int, list[Edit]]:
        """The edits of a call, by the number of the layer.

        Args:
            places_of: the places of all rows by spec and `share_weights`; None for nowhere.
            shape: B and S of the hidden state.
            rows: the adapter of each row; None for the active ones in every row.
            training: whether entries are dropped.
        """
        edits: dict[int, list[Edit]] = {}
        for family in self.families:
            places = places_of(family.spec, family.share_weights)
            chosen = None
            if places is not None and rows is not None:
                chosen = [number for number, name in enumerate(rows) if name in family.names]
                places = None if not chosen else places
            if places is None:
                continue
            adapters = None if chosen is None or rows is None else [family.names.index(rows[row]) for row in chosen]
            for number, edit in _edits(family, places, shape, chosen, adapters, training):
                edits.setdefault(number, []).append(edit)
        return edits


def _edits(
    family: Family,
    places: Places,
    shape: tuple[int, int],
    rows: list[int] | None,
    adapters: list[int] | None,
    training: bool,
) -> Iterable[tuple[int, Edit]]:
    """The edits of a family, with the numbers of their layers.

    Args:
        rows: numbers of the rows that take part; None for all.
        adapters: which of the family's adapters each of them has.
    """
    factors, dropout = None, 0.0
    if family.kind is not None:
        factors, order = family.factors()
        dropout = family.kind.dropout if training else 0.0
        places = places.to(factors.up.device)
    every_row = rows is None or rows == list(range(shape[0]))
    scale: Tensor | float = family.scales[0]
    if len(set(family.scales)) > 1 and adapters is not None:
        scale = torch.tensor([family.scales[adapter] for adapter in adapters], device=places.keep.device)
        scale = scale[:, None, None]
    first = torch.arange(shape[0], device=places.keep.device)
    if not every_row:
        first = torch.tensor(rows, device=places.keep.device)
        places = places.rows(first)
    columns, keep = places  # [B, G, P]
    if isinstance(scale, Tensor) or scale != 1:
        keep = keep * scale
    index = None
    if columns is not None:
        index = columns + (first * shape[1])[:, None, None]
    elif not every_row or len(family.names) > 1:
        index = ((first * shape[1])[:, None, None] + torch.arange(shape[1], device=first.device)).expand(keep.shape)
    if len(family.names) > 1:  # an intervention for each row and group
        keep = keep.flatten(0, 1).unsqueeze(-1)
    else:  # one for each group, or one for all
        keep = keep.transpose(0, 1).flatten(1).unsqueeze(-1)
        index = None if index is None else index.transpose(0, 1)
        keep = keep[0] if keep.shape[0] == 1 else keep
    index = None if index is None else index.flatten()
    if factors is None:
        for number, row in zip(family.layers, family.groups):
            dropped = 0.0  # such interventions drop by themselves
            yield number, Edit(index, keep, None, list(row[0]), dropped)
        return
    count = len(family.groups[0][0])
    blocks = _split(factors, count)
    if len(family.names) == 1:
        for number, row in zip(family.layers, family.groups):
            yield number, Edit(index, keep, blocks(order[id(row[0])]), (), dropout)
        return
    assert adapters is not None
    yield from _edits_by_row(family, factors, order, adapters, index, keep)


def _split(factors: Factors, count: int) -> Callable[[int], Factors]:
    """The factors of each `count` interventions out of [N, ...]; without a leading dimension for one."""
    parts: list[Any] = []
    for part in factors[:4]:
        if isinstance(part, Tensor):
            parts.append(part.unbind(0) if count == 1 else part.unflatten(0, (-1, count)).unbind(0))
        else:
            parts.append(None)
    return lambda place: Factors(*[None if part is None else part[place] for part in parts], factors.act)


def _edits_by_row(
    family: Family, factors: Factors, order: dict[int, int], adapters: list[int], index: Tensor | None, keep: Tensor
) -> Iterable[tuple[int, Edit]]:
    """The edits of rows with adapters of their own: batched products, an intervention for each row and group."""
    count = len(family.groups[0][0])
    wanted = [[order[id(row[adapter])] for adapter in adapters] for row in family.groups]
    flat = [place * count + group for row in wanted for place in row for group in range(count)]
    if flat != list(range(factors.up.shape[0])):
        chosen = torch.tensor(flat, device=factors.up.device)
        factors = factors.map(lambda part: part.index_select(0, chosen))
    blocks = _split(factors, len(adapters) * count)
    for place, number in enumerate(family.layers):
        of_block = blocks(place)
        if len(adapters) * count == 1:
            of_block = of_block.map(lambda part: part.unsqueeze(0))
        yield number, Edit(index, keep, of_block, (), 0.0)


def plan_for(kept: dict[Any, Plan], layers: Sequence[Any], names: Sequence[str] | None) -> Plan:
    """The plan of the adapters that are active now, or of those named; made anew when something about them changed."""
    if names is not None:
        names = [name for name in dict.fromkeys(names) if name != BASE]
    key: list[Any] = [None if names is None else tuple(names)]
    for layer in layers:
        if layer._disable_adapters:
            key.append(None)
            continue
        own, scaling = layer.reft_interventions._modules, layer.scaling
        for name in layer.active_adapters if names is None else names:
            if name in own:
                first = own[name]._modules["0"]
                weight = next(iter(first._parameters.values()), None)
                # Wrappers for sharding and offloading replace parameters, or their contents.
                state = None if weight is None else (type(weight), weight.device, weight.numel())
                key.append((layer.number, id(first), scaling[name], layer.position_specs[name], state))
            else:
                key.append(None)
    signature = tuple(key)
    plan = kept.get(signature)
    if plan is None:
        plan = Plan(layers, names)
        while len(kept) >= KEPT:
            kept.pop(next(iter(kept)))
        kept[signature] = plan
    return plan
