"""How the adapters of a call are put together: which interventions are worked out at once, and for which rows.

Interventions that differ in their numbers only are a `Family`: their factors are worked out together. What depends on
the adapters alone is worked out when they change, and kept; what depends on a call is filled in by `Family.edit`.

Shape letters: B rows, S columns, G position groups, P places per group, L layers, A adapters, d hidden size, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_reft.context.arguments import values_can_be_read
from peft_reft.context.edit import Edit
from peft_reft.context.subspaces import Choices, strengths
from peft_reft.interventions import FactorMemo, Factors, Kind, kind_of
from peft_reft.positions import Places, PositionSpec


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


@dataclass(eq=False)
class Family:
    """Interventions that are worked out together: those of one or several adapters, next to several layers.

    Args:
        names: the adapters, A of them; several only for rows with adapters of their own.
        settings: of each of them.
        layers: numbers of L layers.
        groups: [L][A], a block's interventions of an adapter, one per position group.

    Attributes:
        spec, share_weights: of the adapters.
        kind: what the interventions have in common; None if they are to be called as modules.
        scales: [A], the strength of each adapter.
        parts: [A], ranks of the named parts of R, by name; {} for adapters without.
        chosen: [A], the strengths of the parts that act where a call says nothing; None for all.
    """

    names: Sequence[str]
    settings: Sequence[Alike]
    layers: Sequence[int]
    groups: Sequence[Sequence[nn.ModuleList]]

    def __post_init__(self) -> None:
        first = self.settings[0]
        self.spec, self.share_weights, self.kind = first.spec, first.share_weights, first.kind
        self.scales = [own.scale for own in self.settings]
        self.parts = [dict(own.parts) for own in self.settings]
        self.chosen = [None if own.chosen is None else dict(own.chosen) for own in self.settings]
        places: dict[int, int] = {}
        self.distinct: list[Any] = []  # the interventions, those that layers share once
        for row in self.groups:
            for groups in row:
                if id(groups) not in places:
                    places[id(groups)] = len(places)
                    self.distinct.extend(groups)
        # [L][A]: which of the distinct lists of groups
        self.which = [[places[id(groups)] for groups in row] for row in self.groups]
        self.count = len(self.groups[0][0])  # G
        self.dtype = None if self.kind is None else torch.promote_types(self.kind.dtype, torch.float32)  # of factors
        self.takes_source = self.kind is None and getattr(self.distinct[0], "takes_source", False)
        self.memo = FactorMemo()
        self._split: tuple[Factors, Any, Mapping[int, Any]] | None = None

    def rows_in(self, names: Sequence[str] | None) -> list[int] | None:
        """The rows that have one of the family's adapters, of rows with adapters of their own; else None for all."""
        return None if names is None else [row for row, name in enumerate(names) if name in self.names]

    def edit(
        self,
        places: Places,
        shape: tuple[int, int],
        names: Sequence[str] | None,
        rows: list[int] | None,
        training: bool,
        choices: Choices | None,
    ) -> Edit:
        """The family's edit in a call.

        Args:
            places: of all rows.
            shape: B and S of the hidden state.
            names: the adapter of each row; None if all have the same.
            rows: numbers of the rows that take part; None for all.
            training: whether entries are dropped.
            choices: which named parts of R act in each row; None if the call says nothing.
        """
        adapters = None  # which of several adapters each row has
        if names is not None and rows is not None and len(self.names) > 1:
            adapters = [self.names.index(names[row]) for row in rows]
        kind = self.kind
        if kind is not None and places.keep.device != kind.device:
            places = places.to(kind.device)
        index, keep = self._flat(places, shape, rows, adapters)
        n = len(keep) if keep.dim() == 3 else None
        blocks = self.blocks(adapters, n is not None)
        if kind is None:
            return Edit(index, self._parted(keep, shape, rows, adapters, choices), blocks, n, called=True)
        factor: Tensor | None = None
        depends_on_h = kind.has_source or kind.replaces  # else the factor gives the edit its shape
        if self.parts[0] or not depends_on_h or not _are_all(keep):
            factor = self._parted(keep.to(self.dtype), shape, rows, adapters, choices)
        dropout = kind.dropout if training else 0.0
        return Edit(index, factor, blocks, n, False, dropout, torch.is_autocast_enabled(kind.device.type))

    def _flat(
        self, places: Places, shape: tuple[int, int], rows: list[int] | None, adapters: list[int] | None
    ) -> tuple[Tensor | None, Tensor]:
        """The places as `Edit.indices` and `Edit.keep`."""
        chosen = None if rows is None or len(rows) == shape[0] else _numbers(rows, places.keep.device)
        columns, keep = places if chosen is None else places.rows(chosen)  # [B, G, P]
        if adapters is not None and len(set(self.scales)) > 1:
            scales = torch.tensor([self.scales[adapter] for adapter in adapters], device=keep.device)
            keep = keep * scales[:, None, None]
        elif self.scales[0] != 1:
            keep = keep * self.scales[0]
        index = None
        if columns is not None or adapters is not None or chosen is not None:
            if columns is None:
                columns = torch.arange(shape[1], device=keep.device).expand(keep.shape)
            # Not an arange in steps: to a graph of rows of any length, how many steps there are would be a question.
            row = torch.arange(shape[0], device=keep.device) if chosen is None else chosen
            index = torch.add(columns, row.view(-1, 1, 1), alpha=shape[1])
        if adapters is not None:  # an intervention for each row and group
            return None if index is None else index.flatten(), keep.flatten(0, 1).unsqueeze(-1)
        # One for each group, or one for all.
        if keep.shape[1] == 1:
            return None if index is None else index.flatten(), keep.reshape(-1, 1)
        index = None if index is None else index.transpose(0, 1).flatten()
        return index, keep.transpose(0, 1).flatten(1).unsqueeze(-1)

    def _parted(
        self,
        keep: Tensor,
        shape: tuple[int, int],
        rows: list[int] | None,
        adapters: list[int] | None,
        choices: Choices | None,
    ) -> Tensor:
        """`Edit.keep` of interventions with named parts: a factor for each direction where not all parts act alike."""
        if not self.parts[0]:
            return keep
        numbers = range(shape[0]) if rows is None else rows
        like = keep if keep.is_floating_point() else keep.float()
        of_rows = strengths(self.parts, self.chosen, choices, numbers, adapters, like)
        if of_rows is None:
            return keep
        if adapters is not None:  # an intervention for each row and group
            return keep * of_rows.repeat_interleave(self.count, 0).unsqueeze(1)
        # The places of a group lie row after row.
        return keep * of_rows.repeat_interleave(keep.shape[-2] // len(of_rows), 0)

    def blocks(self, adapters: Sequence[int] | None, split: bool) -> Mapping[int, Any]:
        """What each layer multiplies with, or calls: see `Edit.blocks`.

        Args:
            adapters: which of the family's adapters each row has, if there are several.
            split: whether there are several interventions, so that the factors have a leading dimension.
        """
        if self.kind is None:
            return {number: list(row[0]) for number, row in zip(self.layers, self.groups)}
        factors = self.memo(self.distinct)
        key = None if adapters is None else tuple(adapters)
        known = self._split  # read once: another thread may replace it
        if known is not None and known[0] is factors and known[1] == key:
            return known[2]
        whole, count, chosen = factors, self.count, [row[0] for row in self.which]
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
        self._split = (factors, key, found) if self.memo.holds(factors) else None
        return found

    def _of_rows(self, factors: Factors, adapters: Sequence[int]) -> Factors:
        """The factors [L * B * G, ...] of rows with adapters of their own."""
        groups = range(self.count)
        wanted = [row[adapter] * self.count + group for row in self.which for adapter in adapters for group in groups]
        if wanted == list(range(factors.up.shape[0])):  # as they lie
            return factors
        chosen = _numbers(wanted, factors.up.device)
        return factors.map(lambda part: part.index_select(0, chosen))


def _are_all(keep: Tensor) -> bool:
    """Whether every place is edited, where a look at the values costs nothing."""
    return keep.dtype == torch.bool and values_can_be_read(keep) and False not in keep.flatten().tolist()


def _numbers(numbers: Sequence[int], device: torch.device) -> Tensor:
    """The numbers on a device that need not wait for them."""
    return torch.tensor(numbers).to(device, non_blocking=True)


def alike(layer: Any, name: str, groups: nn.ModuleList) -> Alike:
    """What an adapter's interventions next to one layer have in common with others."""
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


def families_of(layers: Sequence[Any], names: Sequence[str] | None) -> list[Family]:
    """The families of the adapters of a call.

    Args:
        layers: the model's layers.
        names: the adapters that take part, in rows of their own; None for each layer's active ones in all rows.
    """
    members: dict[tuple[str, Alike], tuple[list[int], list[nn.ModuleList]]] = {}
    for layer in layers:
        if layer.disable_adapters:
            continue
        for name in layer.active_adapters if names is None else names:
            groups = layer.reft_interventions._modules.get(name)
            if groups is not None and layer.scaling[name]:
                numbers, lists = members.setdefault((name, alike(layer, name, groups)), ([], []))
                numbers.append(layer.number)
                lists.append(groups)
    # Adapters of rows of their own are put together if they differ in their numbers only.
    together: dict[Any, list[tuple[str, Alike, list[nn.ModuleList]]]] = {}
    for (name, own), (numbers, lists) in members.items():
        fits = names is not None and own.kind is not None
        key = own._replace(scale=1.0, parts=(), chosen=None) if fits else (name, own)
        together.setdefault((key, tuple(numbers)), []).append((name, own, lists))
    families = []
    for (_, layer_numbers), found in together.items():
        adapters, settings, by_adapter = zip(*found)
        families.append(Family(adapters, settings, layer_numbers, [*zip(*by_adapter)]))
    return families
