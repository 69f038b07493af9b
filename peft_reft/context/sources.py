"""Sources of interchange interventions: other inputs, whose hidden states replace a call's own.

A source is run before the call, by the module that the call enters, without gradient and unedited, and its hidden
states are collected at its own places. The k-th place of a row takes what the source has at its k-th place.

Shape letters: B rows, S columns, G position groups, P places per group, d hidden size, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_reft.context.arguments import repeats
from peft_reft.context.plan import Family
from peft_reft.context.state import ModelState
from peft_reft.context.subspaces import Choices, strengths
from peft_reft.interventions import edit_of
from peft_reft.positions import Places

SOURCE_RULE = (
    "Pass the inputs of a call, source_inputs={'input_ids': ..., 'attention_mask': ...}, or such inputs by the name of "
    "a subspace."
)
COLLECTED = "reft_collected"  # the argument of the forward of a source: the `Collected` in which it notes its states
DECODED = ("decoder_input_ids", "decoder_inputs_embeds", "labels")
NOT_DECODED = (
    "source_inputs without decoder_input_ids could not be run. They are the inputs of a call of the model, which "
    "`generate` adds nothing to. Pass the source's decoder_input_ids among them: [B, 1] of "
    "model.generation_config.decoder_start_token_id are what a decoder generates from."
)
WITHIN = ("source_inputs", "subspaces", "adapter_names")  # which a source cannot have: its rows are the call's


@dataclass(eq=False)
class Collected:
    """The hidden states of a source at its places.

    Attributes:
        found: by number of the layer and adapter, of the rows that have the adapter: the states [B, G, P, d], and the
            places that there are, bool [B, G, P].
        rows: how many rows the source has; 0 if nothing was collected.
    """

    found: dict[tuple[int, str], tuple[Tensor, Tensor]] = field(default_factory=dict)
    rows: int = 0


Sources = Mapping[str | None, Collected]  # by name of the subspace that it is for; None for the whole


def run_sources(
    module: nn.Module, state: ModelState, given: Any, names: Sequence[str] | None, rows: int | None
) -> Sources | None:
    """Run the sources of a call.

    Args:
        module: what the call enters.
        given: `source_inputs` as passed, or what was collected already.
        names: the adapter of each row; None for the active ones in every row.
        rows: how many rows the call has; None if that is not known yet.

    Returns:
        None if the adapters that would take a source are disabled.

    Raises:
        ValueError: if no adapter of the call takes a source, or this is not the inputs of one with as many rows.
    """
    if isinstance(given, Collected):  # which was collected before
        return {None: given}
    if not isinstance(given, Mapping) or not given:
        raise ValueError(f"source_inputs is {type(given).__name__} and not inputs of the model. {SOURCE_RULE}")
    by_name = all(isinstance(value, Mapping) for value in given.values())
    if not _check_adapters(state, names, set(given) if by_name else None):
        return None
    named: Mapping[Any, Any] = given if by_name else {None: given}
    sources = {name: _run(module, state, inputs, names) for name, inputs in named.items()}
    for source in sources.values():
        if source.rows and rows is not None and source.rows != rows:
            raise ValueError(f"source_inputs have {source.rows} rows, but the call has {rows}. Pass one per row.")
    return sources


def _check_adapters(state: ModelState, names: Sequence[str] | None, parts: set[str] | None) -> bool:
    """Whether an adapter that takes a source is switched on."""
    known: set[str] = set()
    takes = enabled = False
    for layer in state.layers:
        for name in layer.active_adapters if names is None else names:
            groups = layer.reft_interventions._modules.get(name)
            if groups is not None and getattr(groups[0], "takes_source", False):
                takes, enabled = True, enabled or not layer.disable_adapters
                known |= layer.subspaces.get(name, {}).keys()
    if not takes:
        raise ValueError(
            "source_inputs were passed, but no ReFT adapter of this call takes a source. Make one with "
            "ReftConfig(intervention='interchange') or 'vanilla', and activate it."
        )
    if parts is not None and not parts <= known:
        raise ValueError(
            f"source_inputs are named {sorted(map(str, parts))}, but the subspaces are {sorted(known)}. {SOURCE_RULE}"
        )
    return enabled


def _run(module: nn.Module, state: ModelState, inputs: Mapping[str, Any], names: Sequence[str] | None) -> Collected:
    for name in WITHIN:
        if inputs.get(name) is not None:
            raise ValueError(f"source_inputs hold {name}, but a source is run unedited, for the rows of the call.")
    running, collected = state.running, Collected()
    arguments = {**inputs, "adapter_names": names, COLLECTED: collected}
    outer = running.context, running.generation
    running.context, running.generation = None, None
    has_decoder = getattr(getattr(module, "config", None), "is_encoder_decoder", False)
    try:
        with torch.no_grad():
            module(**arguments)
    except Exception as error:
        if has_decoder and all(inputs.get(name) is None for name in DECODED):
            raise ValueError(f"{NOT_DECODED} The model said: {error}") from error
        raise
    finally:
        running.context, running.generation = outer
    return collected


class Collector:
    """Stands where an edit would, and notes down the hidden states at its places instead of editing them.

    Args:
        family: of interventions that take a source.
        places: of all rows of the source, with columns.
        rows: numbers of the rows that take part.
        collected: where they are noted down.
    """

    def __init__(self, family: Family, places: Places, rows: Sequence[int], collected: Collected):
        assert places.columns is not None
        self.rows, self.collected = list(rows), collected
        collected.rows = len(places.keep)
        self.columns, self.keep = places.columns[self.rows], places.keep[self.rows]
        self.name = family.names[0]
        self.blocks = {number: number for number in family.layers}

    def add(self, out: Tensor, h: Tensor, block: int) -> Tensor:
        """`out` as it is."""
        key = (block, self.name)
        if key in self.collected.found:
            raise ValueError(
                "A block ran several times in the forward of a source, so that it is unknown which of its hidden "
                "states is meant. Target a module that runs once."
            )
        rows = torch.tensor(self.rows, device=h.device)[:, None, None]
        self.collected.found[key] = h.detach()[rows, self.columns.to(h.device)], self.keep.to(h.device)
        return out


class Exchange:
    """The edit of a family that takes a source, next to its layers.

    Args:
        family: of interventions that are called as modules.
        places: of all rows of the call, with columns of this forward.
        whole: bool [B, G, P], which of the places the whole row has, in the same order.
        rows: numbers of the rows that take part.
        sources: what was collected.
        choices: which named parts of R act in each row.
    """

    def __init__(
        self,
        family: Family,
        places: Places,
        whole: Tensor,
        rows: Sequence[int],
        sources: Sources,
        choices: Choices | None,
    ):
        assert places.columns is not None
        self.family, self.sources = family, sources
        self.rows = list(rows)
        self.columns, self.whole = places.columns[self.rows], whole[self.rows]
        self.keep = places.keep[self.rows].float().unsqueeze(-1) * family.scales[0]  # [B, G, P, 1]
        if family.parts[0]:
            acting = strengths(family.parts, family.chosen, choices, self.rows, None, self.keep)
            if acting is not None:
                self.keep = self.keep * acting[:, None, None, :]
        self.blocks = {number: (number, list(row[0])) for number, row in zip(family.layers, family.groups)}

    def add(self, out: Tensor, h: Tensor, block: tuple[int, Sequence[nn.Module]]) -> Tensor:
        """`out` with the edit of `h`, both [B, S, d]."""
        number, modules = block
        columns, keep = self.columns.to(h.device), self.keep.to(h.device)
        rows = torch.tensor(self.rows, device=h.device)[:, None, None]
        selected = h[rows, columns]  # [B, G, P, d]
        exact = torch.promote_types(h.dtype, torch.float32)
        delta = torch.zeros(selected.shape, dtype=exact, device=h.device)
        for part, collected in self.sources.items():
            source = self._source(collected, number, selected.shape)
            factor = keep if part is None else keep * self._mask(part, keep)
            groups = zip(modules, selected.unbind(1), source.unbind(1), factor.unbind(1))
            edits = [edit_of(module, own, other, keep=kept) for module, own, other, kept in groups]
            delta = delta + torch.stack(edits, dim=1).to(exact)
        delta = delta.masked_fill((keep == 0).all(-1, keepdim=True), 0.0)  # not 0 times what padding may hold
        index = (rows * h.shape[1] + columns).flatten()
        # In at least single precision, so that h + (s - h) is s where h is in half precision.
        flat = out.flatten(0, 1).to(exact).index_add(0, index, delta.flatten(0, 2))
        return flat.to(h.dtype).view_as(h)

    def _mask(self, part: str, keep: Tensor) -> Tensor:
        """Ones for the directions of a part [r]."""
        parts = self.family.parts[0]
        return torch.tensor([float(name == part) for name in parts for _ in range(parts[name])], device=keep.device)

    def _source(self, collected: Collected, number: int, shape: Sequence[int]) -> Tensor:
        """The source's states for the rows and places of the call [B, G, P, d].

        Raises:
            ValueError: if they do not pair with the call's places.
        """
        key = (number, self.family.names[0])
        if key not in collected.found:
            raise ValueError(
                f"Edited block number {number} (from 0) did not run in the forward of the source. Give it inputs of "
                "the same kind as the call's, or leave that block out with layers_to_transform."
            )
        states, keep = collected.found[key]
        times = repeats(len(states), shape[0])
        if times is None:
            raise ValueError(f"source_inputs have {len(states)} rows, but the call has {shape[0]}. Pass one per row.")
        states, keep = states.repeat_interleave(times, 0), keep.repeat_interleave(times, 0)
        width = max(shape[2], states.shape[2])
        whole = F.pad(self.whole.to(keep.device), (0, width - shape[2]))
        if not torch.compiler.is_compiling() and not torch.equal(whole, F.pad(keep, (0, width - keep.shape[2]))):
            raise ValueError(
                f"The source has {keep.sum(-1).tolist()} places by row and position group, the call "
                f"{whole.sum(-1).tolist()}: each place needs one to take its value from. Choose positions that both "
                "have, or pass intervention_locations with the call and within source_inputs."
            )
        return F.pad(states, (0, 0, 0, shape[2] - states.shape[2]))  # with places that are not used, or without
