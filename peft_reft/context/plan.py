"""How the adapters of a call are put together: which interventions are worked out at once, and for which rows.

What depends on the adapters alone is planned when they change and kept; what depends on a call is filled in by
`Plan.edits`. Interventions that differ in their numbers only are a `Family`: their factors are worked out together.

Shape letters: B rows, S columns, G position groups, P places per group, L layers, A adapters, d hidden size, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_reft.context.edit import Edit
from peft_reft.context.subspaces import BASE, Choice, Choices, by_direction, strengths
from peft_reft.interventions import FactorMemo, Factors, Kind, kind_of, stack_factors
from peft_reft.positions import Places, PositionSpec

MOST_PLANS = 8  # plans: a server, or a trainer with a reference, goes back and forth between a few sets of adapters


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
        parts: [A], ranks of the named parts of R, by name; {} for adapters without.
        chosen: [A], the strengths of the parts that act where a call says nothing; None for all.
    """

    spec: PositionSpec
    share_weights: bool | str
    names: list[str]
    scales: list[float]
    layers: list[int]
    groups: list[list[nn.ModuleList]]
    kind: Kind | None
    memo: FactorMemo | None
    parts: list[Mapping[str, int]]
    chosen: list[Choice]

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
        self.dtype = None if self.kind is None else torch.promote_types(self.kind.dtype, torch.float32)  # of factors
        self.takes_source = self.kind is None and getattr(self.distinct[0], "takes_source", False)
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
        known = self._split  # read once: another thread may replace it
        if known is not None and known[0] is factors and known[1] == key:
            return known[2]
        whole, count, chosen = factors, self.count, [row[0] for row in self.places]
        if adapters is not None:
            whole, chosen = self._of_rows(factors, adapters), list(range(len(self.layers)))
            count *= len(adapters)
        parts: list[Any] = []
        for part in whole[:4]:
            if part is None:
                parts.append([None] * len(chosen))
            else:
                blocks = part.unflatten(0, (-1, count)).unbind(0) if split else part.unbind(0)
                parts.append([blocks[place] for place in chosen])
        found = {
            number: Factors(own[0], own[1], own[2], own[3], whole.act) for number, *own in zip(self.layers, *parts)
        }
        # Others belong to one call, and to its gradients, which must not outlive it.
        self._split = (factors, key, found) if self.memo is not None and self.memo.holds(factors) else None
        return found

    def _of_rows(self, factors: Factors, adapters: Sequence[int]) -> Factors:
        """The factors [L * B * G, ...] of rows with adapters of their own."""
        groups = range(self.count)
        wanted = [row[adapter] * self.count + group for row in self.places for adapter in adapters for group in groups]
        if wanted == list(range(factors.up.shape[0])):  # as they lie
            return factors
        chosen = _numbers(wanted, factors.up.device)
        return factors.map(lambda part: part.index_select(0, chosen))


class Alike(NamedTuple):
    """What the interventions of an adapter have in common next to some layers.

    `scale`, the names of parts and what is chosen among them may differ within a family.
    """

    spec: PositionSpec
    share_weights: bool | str
    scale: float
    groups: int
    kind: Kind | None  # None if they are to be called as modules, or are not alike
    place: int
    parts: tuple[tuple[str, int], ...]
    chosen: tuple[tuple[str, float], ...] | None


class Member(NamedTuple):
    """An adapter's part of a family: what its interventions have in common, and the groups next to each layer."""

    name: str
    alike: Alike
    layers: list[int]
    groups: list[nn.ModuleList]


class Plan:
    """The families of the adapters of a call.

    Args:
        layers: the model's layers.
        names: the adapters that take part; None for each layer's active ones.
        once: whether the plan is not kept, so that factors need not be remembered.
    """

    def __init__(self, layers: Sequence[Any], names: Sequence[str] | None, once: bool = False):
        members: dict[tuple[str, Alike], Member] = {}
        for layer in layers:
            if layer.disable_adapters:
                continue
            for name in layer.active_adapters if names is None else names:
                groups = layer.reft_interventions._modules.get(name)
                if groups is None or not layer.scaling[name]:
                    continue
                alike = _alike(layer, name, groups)
                member = members.setdefault((name, alike), Member(name, alike, [], []))
                member.layers.append(layer.number)
                member.groups.append(groups)
        self.families = _families(list(members.values()), by_row=names is not None, once=once)

    def edits(
        self,
        places_of: Callable[[PositionSpec, bool | str], Places | None],
        shape: tuple[int, int],
        rows: Sequence[str] | None,
        training: bool,
        choices: Choices | None = None,
        exchanged: Callable[[Family, Sequence[int]], Any] | None = None,
        collecting: bool = False,
    ) -> list[Edit]:
        """The edits of a call.

        Args:
            places_of: the places of all rows by spec and `share_weights`; None for nowhere.
            shape: B and S of the hidden state.
            rows: the adapter of each row; None for the active ones in every row.
            training: whether entries are dropped.
            choices: which named parts of R act in each row; None if the call says nothing.
            exchanged: what stands for the edit of a family that takes a source, for some rows; None in calls without.
            collecting: whether this is the forward of a source, which is not edited.
        """
        edits: list[Any] = []
        for family in self.families:
            if family.takes_source or collecting:
                if exchanged is not None and family.takes_source:
                    own = rows is None or [number for number, name in enumerate(rows) if name in family.names]
                    found = exchanged(family, range(shape[0]) if own is True else own)
                    edits += [] if found is None else [found]
                continue
            chosen = None if rows is None else [number for number, name in enumerate(rows) if name in family.names]
            places = None if chosen == [] else places_of(family.spec, family.share_weights)
            if places is not None:
                edits.append(_edit(family, places, shape, rows, chosen, training, choices))
        return edits


def _alike(layer: Any, name: str, groups: nn.ModuleList) -> Alike:
    kinds = {kind_of(one) for one in groups}
    kind = kinds.pop() if len(kinds) == 1 else None
    return Alike(
        layer.position_specs[name],
        layer.share_weights[name],
        layer.scaling[name],
        len(groups),
        kind,
        id(layer) if kind is None else layer.width,  # those that are called are called one by one
        tuple(layer.subspaces.get(name, {}).items()),
        tuple(layer.chosen_subspaces[name].items()) if name in layer.chosen_subspaces else None,
    )


def _families(members: Sequence[Member], by_row: bool, once: bool) -> list[Family]:
    """Put adapters together that differ in their numbers only."""
    together: dict[Any, list[Member]] = {}
    for member in members:
        name, alike, layers, _ = member
        fits = by_row and alike.kind is not None
        key = alike._replace(scale=1.0, parts=(), chosen=None) if fits else (name, alike)
        together.setdefault((key, tuple(layers)), []).append(member)
    families = []
    for parts in together.values():
        _, alike, layers, _ = parts[0]
        families.append(
            Family(
                alike.spec,
                alike.share_weights,
                names=[member.name for member in parts],
                scales=[member.alike.scale for member in parts],
                layers=layers,
                groups=[list(groups) for groups in zip(*(member.groups for member in parts))],
                kind=alike.kind,
                memo=None if once else FactorMemo(),
                parts=[dict(member.alike.parts) for member in parts],
                chosen=[
                    None if chosen is None else dict(chosen) for chosen in (member.alike.chosen for member in parts)
                ],
            )
        )
    return families


def _edit(
    family: Family,
    places: Places,
    shape: tuple[int, int],
    rows: Sequence[str] | None,
    chosen: list[int] | None,
    training: bool,
    choices: Choices | None,
) -> Edit:
    """The edit of a family.

    Args:
        rows: the adapter of each row; None if all rows have the family's one.
        chosen: numbers of the rows that take part.
        choices: which named parts of R act in each row.
    """
    adapters = None
    if rows is not None and chosen is not None and len(family.names) > 1:
        adapters = [family.names.index(rows[row]) for row in chosen]
    if family.kind is None:
        index, keep = _flat(family, places, shape, chosen, None)
        if family.parts[0]:
            keep = _parted(family, keep, shape, chosen, None, choices)
        return Edit(index, keep, family.blocks(None, keep.dim() == 3), called=True)
    device = family.kind.device
    if places.keep.device != device:
        places = places.to(device)
    index, keep = _flat(family, places, shape, chosen, adapters)
    blocks = family.blocks(adapters, keep.dim() == 3)
    keep = keep.to(family.dtype)
    if family.kind.parts:
        keep = _parted(family, keep, shape, chosen, adapters, choices)
    dropout = family.kind.dropout if training else 0.0
    return Edit(index, keep, blocks, False, dropout, torch.is_autocast_enabled(device.type))


def _numbers(numbers: Sequence[int], device: torch.device) -> Tensor:
    """The numbers on a device that need not wait for them."""
    return torch.tensor(numbers).to(device, non_blocking=True)


def _flat(
    family: Family, places: Places, shape: tuple[int, int], rows: list[int] | None, adapters: list[int] | None
) -> tuple[Tensor | None, Tensor]:
    """The places as `Edit.places` and `Edit.keep`."""
    several = len(family.names) > 1
    chosen = None if rows is None or len(rows) == shape[0] else _numbers(rows, places.keep.device)
    columns, keep = places if chosen is None else places.rows(chosen)  # [B, G, P]
    if several and adapters is not None and len(set(family.scales)) > 1:
        scales = torch.tensor([family.scales[adapter] for adapter in adapters], device=keep.device)
        keep = keep * scales[:, None, None]
    elif family.scales[0] != 1:
        keep = keep * family.scales[0]
    index = None
    if columns is not None or several or chosen is not None:
        if columns is None:
            columns = torch.arange(shape[1], device=keep.device).expand(keep.shape)
        # Not an arange in steps: to a graph of rows of any length, how many steps there are would be a question.
        row = torch.arange(shape[0], device=keep.device) if chosen is None else chosen
        index = torch.add(columns, row.view(-1, 1, 1), alpha=shape[1])
    if several:  # an intervention for each row and group
        return None if index is None else index.flatten(), keep.flatten(0, 1).unsqueeze(-1)
    # One for each group, or one for all.
    if keep.shape[1] == 1:
        return None if index is None else index.flatten(), keep.reshape(-1, 1)
    index = None if index is None else index.transpose(0, 1).flatten()
    return index, keep.transpose(0, 1).flatten(1).unsqueeze(-1)


def _parted(
    family: Family,
    keep: Tensor,
    shape: tuple[int, int],
    chosen: list[int] | None,
    adapters: list[int] | None,
    choices: Choices | None,
) -> Tensor:
    """`Edit.keep` of interventions with named parts, of which not all may act: by direction where that is so."""
    rows = list(range(shape[0])) if chosen is None else chosen
    like = keep if keep.is_floating_point() else keep.float()
    of_rows = strengths(family.parts, family.chosen, choices, rows, adapters, like)
    if of_rows is None:
        return keep
    return by_direction(keep, of_rows, family.count, by_row=len(family.names) > 1)


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
                # Wrappers for sharding and offloading replace parameters, or their contents; casts, their dtype.
                kind = None if weight is None else (type(weight), weight.device, weight.dtype, weight.numel())
                key.append((id(first), layer.scaling[name], id(layer.position_specs[name]), kind))
    signature = tuple(key)
    plan = kept.get(signature)
    if plan is None:
        plan = Plan(layers, names)
        while len(kept) >= MOST_PLANS:
            kept.pop(next(iter(tuple(kept))), None)  # another thread may be here, too
        kept[signature] = plan
    return plan
