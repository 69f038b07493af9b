"""The tables on the device: factors of the resident adapters, slot by slot, and where the running step is edited.

The tables have one size from the start, and are written in place: a compiled model, or a CUDA graph, that reads them
goes on as it is when an adapter comes or goes. A slot has `columns` rows in each table, in which the interventions of
its adapter lie next to each other, each with the adapter's largest rank (what a block has less is zero).

    edit(h) = (act(down h + bias) - [up h]) upᵀ

The bracket is there only where an activation keeps it from being a part of `down`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.activations import ACT2FN

from peft_reft.integrations.vllm.adapters import AdapterFactors
from peft_reft.integrations.vllm.step import EditedTokens
from peft_reft.interventions import Factors

# The numbers by which kernel.py knows activations; without a kernel any of transformers' will do.
KERNEL_ACTIVATIONS: dict[str | None, int] = {
    None: 0,
    "linear": 0,
    "relu": 1,
    "sigmoid": 2,
    "tanh": 3,
    "silu": 4,
    "swish": 4,
    "gelu": 5,
    "gelu_python": 5,
    "gelu_new": 6,
    "gelu_pytorch_tanh": 6,
    "leaky_relu": 7,
}

# The tables of this process by number: what a custom operation is given has to be a number or a tensor.
TABLES: list[SlotTable] = []


class Pass(NamedTuple):
    """Tokens of a step whose edits are worked out together.

    Attributes:
        tokens: long [m], where they lie in the step's row; [E * P] for those of E interventions.
        strength: [m, 1], or [E, P, 1] with 0 for entries that only fill up the shape; None for 1 everywhere.
        columns: which rows of the tables their factors have: a slice, or long [E, r].
        act: activation, or None.
        subtracts: whether `up h` is subtracted.
        blocks: the blocks that are edited.
        known: the factors of blocks that were asked for; steps with the same interventions share them.
    """

    tokens: Tensor
    strength: Tensor | None
    columns: slice | Tensor
    act: Callable[[Tensor], Tensor] | None
    subtracts: bool
    blocks: frozenset[int]
    known: dict[int, Factors]


@dataclass(frozen=True)
class Resident:
    """What a slot holds.

    Attributes:
        rank: of each intervention's part of the slot.
        act_fn: name of the activation, or None.
        subtracts: whether `up h` is subtracted behind it.
        blocks: the blocks that are edited.
    """

    rank: int
    act_fn: str | None
    subtracts: bool
    blocks: frozenset[int]


class SlotTable:
    """Factors of the adapters in all slots, for all blocks of a model.

    Args:
        slots: how many adapters can be resident at once.
        columns: rank times interventions that an adapter may have.
        width: of the hidden states, d.
        blocks: how many blocks the model has (here, if it is divided into stages).
        max_tokens: the most tokens of a step.
        device: where the model is.

    Attributes:
        number: this table's place in `TABLES`.
        down, up: per block, float32 [slots * columns + 1, d]; the last row is always zero.
        bias: per block, float32 [slots * columns + 1].
        first, rank, act: int32 [max_tokens], per token of the step: its intervention's first row in the tables, -1
            where nothing is edited; how many rows it has; 2 * its activation's number + whether `up h` is subtracted.
        strength: float32 [max_tokens].
        passes: the same step, for devices that are not driven by CUDA graphs.
    """

    def __init__(
        self, slots: int, columns: int, width: int, blocks: int, max_tokens: int, device: torch.device | str = "cpu"
    ):
        self.slots, self.columns, self.width, self.device = slots, columns, width, torch.device(device)
        rows = slots * columns + 1
        self.down, self.up = ([torch.zeros(rows, width, device=device) for _ in range(blocks)] for _ in range(2))
        self.bias = [torch.zeros(rows, device=device) for _ in range(blocks)]
        self.residents: list[Resident | None] = [None] * slots
        self.first, self.rank, self.act = (
            torch.full((max_tokens,), fill, dtype=torch.int32, device=device) for fill in (-1, 0, 0)
        )
        self.strength = torch.zeros(max_tokens, device=device)
        self.passes: list[Pass] = []
        self._known: dict[tuple[tuple[int, int], ...], dict[int, Factors]] = {}  # of the passes by their interventions
        self._edits_nothing = True
        self.number = len(TABLES)
        TABLES.append(self)

    def put(self, slot: int, adapter: AdapterFactors | None) -> None:
        """Fill a slot; None empties it.

        Raises:
            ValueError: if the adapter needs more columns than a slot has. The slot is then empty.
        """
        rows = slice(slot * self.columns, (slot + 1) * self.columns)
        for table in (*self.down, *self.up, *self.bias):
            table[rows].zero_()
        self.residents[slot], self._known = None, {}
        if adapter is None:
            return
        self.check(adapter)
        rank = adapter.rank
        for block, groups in adapter.blocks.items():
            for number, factors in enumerate(groups):
                start = rows.start + number * rank
                own = slice(start, start + factors.up.shape[0])
                if factors.down is not None:
                    self.down[block][own].copy_(factors.down.mT)
                self.up[block][own].copy_(factors.up)
                self.bias[block][own].copy_(factors.bias)
        every = [factors for groups in adapter.blocks.values() for factors in groups]  # alike, but for their numbers
        act_fn = adapter.served.config.act_fn if any(factors.act is not None for factors in every) else None
        subtracts = any(factors.projection is not None for factors in every)
        self.residents[slot] = Resident(rank, act_fn, subtracts, frozenset(adapter.blocks))

    def reset(self) -> None:
        """Empty all slots, and edit nothing: when the engine gave up its memory and got other memory for it."""
        for table in (*self.down, *self.up, *self.bias):
            table.zero_()
        self.first.fill_(-1)
        self.residents = [None] * self.slots
        self.passes, self._known, self._edits_nothing = [], {}, True

    def check(self, adapter: AdapterFactors) -> None:
        """Refuse an adapter that no slot has room for, or whose activation the device's kernel does not have.

        Raises:
            ValueError: with the size that is needed, or the activations that there are.
        """
        act_fn = adapter.served.config.act_fn
        if self.device.type != "cpu" and act_fn not in KERNEL_ACTIVATIONS:
            there = ", ".join(sorted(name for name in KERNEL_ACTIVATIONS if name is not None))
            raise ValueError(
                f"The ReFT adapter in {str(adapter.served.directory)!r} has act_fn={act_fn!r}, which vLLM's GPU "
                f"workers do not have; they have {there}. Serve it with transformers."
            )
        needed = adapter.rank * adapter.groups
        if needed > self.columns:
            raise ValueError(
                f"The ReFT adapter in {str(adapter.served.directory)!r} has {adapter.groups} intervention(s) of rank "
                f"{adapter.rank} in a block, {needed} directions in all, and a slot has room for {self.columns}. Start "
                f"vLLM with --max-lora-rank {needed} or the next larger one that it offers (LLM(max_lora_rank=...))."
            )

    def begin_step(self, edited: EditedTokens, slot_of: NDArray[np.int64], strength_of: NDArray[np.float32]) -> None:
        """Say which tokens the coming forward edits.

        Args:
            edited: its tokens.
            slot_of, strength_of: per request of the step, its adapter's slot and the strength of its edits.
        """
        if not len(edited.token) and self._edits_nothing:
            return
        self._edits_nothing = not len(edited.token)
        if self.device.type == "cpu":
            self.passes = list(self._passes(edited, slot_of, strength_of)) if len(edited.token) else []
        else:
            self.fill_buffers(edited, slot_of, strength_of)

    def factors(self, one: Pass, block: int) -> Factors:
        """The factors of a pass in a block."""
        found = one.known.get(block)
        if found is None:
            down, up, bias = self.down[block][one.columns], self.up[block][one.columns], self.bias[block][one.columns]
            found = one.known[block] = Factors(down.mT, bias, up, up.mT if one.subtracts else None, one.act)
        return found

    def fill_buffers(self, edited: EditedTokens, slot_of: NDArray[np.int64], strength_of: NDArray[np.float32]) -> None:
        """Write the step into the buffers that kernels read."""
        slot = slot_of[edited.request]
        rank_of, act_of = np.zeros(self.slots, np.int64), np.zeros(self.slots, np.int64)
        for number in set(slot.tolist()):
            resident = self._resident(number)
            rank_of[number] = resident.rank
            act_of[number] = 2 * KERNEL_ACTIVATIONS[resident.act_fn] + resident.subtracts
        # All of the buffer: a graph that was captured for more tokens than the step has reads the rest, too.
        step = np.zeros((3, len(self.first)), np.int32)
        step[0] = -1
        step[:, edited.token] = slot * self.columns + edited.intervention * rank_of[slot], rank_of[slot], act_of[slot]
        strength = np.zeros(len(self.strength), np.float32)
        strength[edited.token] = strength_of[edited.request]
        for buffer, values in zip((self.first, self.rank, self.act, self.strength), (*step, strength)):
            source = torch.from_numpy(values)
            if self.device.type == "cuda":
                # A fresh pinned tensor each time: the copy may still wait for the step before when the next is
                # prepared.
                source = source.pin_memory()
            buffer.copy_(source, non_blocking=True)

    def _passes(
        self, edited: EditedTokens, slot_of: NDArray[np.int64], strength_of: NDArray[np.float32]
    ) -> Sequence[Pass]:
        slot = slot_of[edited.request]
        strength = strength_of[edited.request]
        by_entry: dict[tuple[int, int], NDArray[np.int64]] = {}
        entry = slot * self.columns + edited.intervention
        order = np.argsort(entry, kind="stable")
        for part in np.split(order, np.flatnonzero(np.diff(entry[order])) + 1):
            by_entry[int(slot[part[0]]), int(edited.intervention[part[0]])] = part
        by_kind: dict[tuple[str | None, bool], list[tuple[int, int]]] = {}
        for key in by_entry:
            resident = self._resident(key[0])
            by_kind.setdefault((resident.act_fn, resident.subtracts), []).append(key)
        passes: list[Pass] = []
        known: dict[tuple[tuple[int, int], ...], dict[int, Factors]] = {}
        for (act_fn, subtracts), keys in by_kind.items():
            act = None if act_fn is None else ACT2FN[act_fn]
            largest = max(len(by_entry[key]) for key in keys)
            together = len(keys) > 2 and len(keys) * largest <= 2 * sum(len(by_entry[key]) for key in keys) + 32
            for group in [keys] if together else [[key] for key in keys]:
                parts = [by_entry[key] for key in group]
                tokens, factor = _filled(edited.token, strength, parts)
                blocks = frozenset[int]().union(*(self._resident(key[0]).blocks for key in group))
                known[tuple(group)] = own = self._known.get(tuple(group), {})
                passes.append(Pass(tokens, factor, self._columns(group), act, subtracts, blocks, own))
        self._known = known  # of this step only: gathered factors take as much memory as the slots
        return passes

    def _columns(self, group: list[tuple[int, int]]) -> slice | Tensor:
        """The rows in the tables of the interventions (slot, number)."""
        ranks = [self._resident(slot).rank for slot, _ in group]
        starts = [slot * self.columns + number * rank for (slot, number), rank in zip(group, ranks)]
        if len(group) == 1:
            return slice(starts[0], starts[0] + ranks[0])
        counted = torch.arange(max(ranks))
        columns = torch.tensor(starts)[:, None] + counted
        return columns.masked_fill(counted >= torch.tensor(ranks)[:, None], self.slots * self.columns)

    def _resident(self, slot: int) -> Resident:
        resident = self.residents[slot]
        assert resident is not None, f"slot {slot} is empty"
        return resident


def _filled(
    token: NDArray[np.int64], strength: NDArray[np.float32], parts: list[NDArray[np.int64]]
) -> tuple[Tensor, Tensor | None]:
    """Tokens and strengths of a pass; the parts of several interventions filled up to one length."""
    if len(parts) == 1:
        (part,) = parts
        plain = bool((strength[part] == 1).all())
        return torch.from_numpy(token[part]), None if plain else torch.from_numpy(strength[part])[:, None]
    most = max(map(len, parts))
    # Filled up with the part's own first token: its vector is edited anyway, whatever it holds.
    index = np.stack([np.concatenate([part, np.repeat(part[:1], most - len(part))]) for part in parts])
    used = np.arange(most) < np.array([len(part) for part in parts])[:, None]
    factor = np.where(used, strength[index], np.float32(0))
    return torch.from_numpy(token[index].reshape(-1)), torch.from_numpy(factor)[..., None]
