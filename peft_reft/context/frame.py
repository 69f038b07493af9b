"""What one forward call knows about its positions, and how the edited blocks get to know it.

Blocks see hidden states only. The modules around them see tokens, masks, labels and caches: a `Host` (host.py) works
out where the prompts lie when a call enters, and lends the result, a `Frame`, to the blocks until the call ends.
State is per call and per thread: nested calls, calls from other threads and other models do not see each other's.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from peft_reft.context.root import Root
from peft_reft.interventions.batched import FactorTable
from peft_reft.positions.notation import PositionSpec
from peft_reft.positions.places import Sites, overlay, sites_at, sites_of
from peft_reft.positions.prompts import Prompts, find_prompts

if TYPE_CHECKING:
    from peft_reft.context.generation import Generation
    from peft_reft.context.host import Host


class ThreadState(threading.local):
    """What runs in this thread: calls, `generate` calls, scopes with adapter names; innermost last."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.generations: list[Generation] = []
        self.adapter_names: list[tuple[Root, list[str]]] = []
        self.labelled: tuple[Root, weakref.ref[Tensor], Tensor] | None = None  # the last forward's, if it had labels


state = ThreadState()


@contextmanager
def generation_scope(generation: Generation) -> Iterator[None]:
    """Make the forwards of this thread part of a `generate` call, for as long as it runs."""
    state.generations.append(generation)
    try:
        yield
    finally:
        state.generations.pop()


def innermost_generation(root: Root) -> Generation | None:
    """The `generate` call of a model that runs in this thread, if any."""
    return next((generation for generation in reversed(state.generations) if generation.root is root), None)


@contextmanager
def adapter_names_scope(root: Root, names: list[str]) -> Iterator[None]:
    """Give each row of this thread's forwards an adapter of its own, for as long as the scope is open."""
    entry = (root, root.check_adapter_names(names))
    state.adapter_names.append(entry)
    try:
        yield
    finally:
        state.adapter_names.pop()


def current_frame() -> Frame | None:
    """The innermost running call that knows about tokens, in this thread."""
    return state.frames[-1] if state.frames else None


# Frames by the hidden state that a block was given, for as long as that tensor lives.
_frames_by_input: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def frame_of_block(inputs: tuple[Any, ...]) -> Frame | None:
    """The frame of the call that a block runs in, given the block's inputs.

    torch's CheckpointWrapper runs a block, hooks included, once more in the backward pass, when its call has ended and
    another may have begun. So the frame is tied to the block's input, which the checkpoint keeps: to the tensor
    object, and to its memory, since a reentrant checkpoint recomputes from a detached alias.
    """
    frame = current_frame()
    if torch.compiler.is_compiling() or (frame is not None and not (frame.edits and frame.call.backward)):
        return frame
    h = next((value for value in inputs if isinstance(value, Tensor) and value.is_floating_point()), None)
    if h is None or h.is_meta:
        return frame
    if frame is not None and torch._C._current_graph_task_id() == -1:  # not within a backward pass
        _frames_by_input[h] = frame
        return frame
    if h in _frames_by_input:
        return cast("Frame", _frames_by_input[h])
    bound = next((bound for other, bound in _frames_by_input.items() if other.data_ptr() == h.data_ptr()), None)
    if bound is None:
        return frame
    return cast("Frame", bound).without_factors()


@dataclass(eq=False)
class Call:
    """One call of the outermost host.

    Attributes:
        host: that host.
        labels, shift_labels: what it was given of these.
        locations: `intervention_locations` as [B, G, P], or None.
        adapter_names: the adapter of each row, or None for the active ones in every row.
        generation: the `generate` this call is part of, if any.
        backward: a backward pass may follow, so that blocks may be run again in it.
        factors: what the interventions multiply with, by layer and adapter; None until a stack with edits is entered.
        edited: a token was edited (looked at in the first training forwards only).
    """

    host: Host
    labels: Tensor | None
    shift_labels: Tensor | None
    locations: Tensor | None
    adapter_names: list[str] | None
    generation: Generation | None
    backward: bool = True
    factors: FactorTable | None = None
    edited: bool = False


@dataclass(eq=False)
class Frame:
    """One sequence of tokens on its way through a stack of blocks.

    Attributes:
        rows, columns: the shape of the batch of tokens; None if the call has no tokens (images, plain tensors).
        edits: False if nothing in this forward is to be edited.
        find: where the prompts lie, by what a spec takes for a prompt; None if the hidden state's shape has to tell.
        locations: columns to edit, [B, G, P]; they win.
        answers_only: there are generated tokens only.
        pool: for how many tokens a column stands, see `of_vectors`.
    """

    host: Host
    call: Call
    rows: int | None = None
    columns: int | None = None
    edits: bool = True
    find: Callable[[PositionSpec], Prompts] | None = None
    locations: Tensor | None = None
    answers_only: bool = False
    pool: int = 0
    _sites: dict[tuple[Any, ...], Sites | None] = field(default_factory=dict)
    _found: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def alone(cls) -> Frame:
        """The frame of a block that runs outside of a call and whose vectors tell all there is to know."""
        nobody = cast("Host", None)
        return cls(nobody, Call(nobody, None, None, None, None, None))

    def without_factors(self) -> Frame:
        """This frame for a reentrant checkpoint's second run of the blocks: it has a backward pass of its own, which
        must not run into the graph that made the factors.
        """
        return replace(self, call=replace(self.call, factors=FactorTable()))

    def of_vectors(self, pool: int, columns: int) -> Frame:
        """This frame for blocks whose vectors are not those of single tokens.

        Args:
            pool: how many tokens a vector stands for, from the left; below 0 if the vectors are no tokens' at all.
            columns: how many vectors there are in a row.

        Raises:
            ValueError: if columns of tokens are given, which these blocks have not.
        """
        if self.columns is None:
            return self
        if self.locations is not None:
            raise ValueError(
                "intervention_locations name columns of tokens, but this model has blocks that put out fewer vectors "
                f"than tokens ({columns} for {self.columns}). Leave them out, or target other modules."
            )
        find = self.find

        def find_pooled(spec: PositionSpec) -> Prompts:
            inside = find(spec).inside.float().unsqueeze(1)  # type: ignore[misc]
            inside = F.pad(inside, (0, max(0, pool * columns - inside.shape[2])))
            return find_prompts(F.max_pool1d(inside, pool)[:, 0, :columns] > 0)

        return replace(self, columns=columns, pool=pool, find=None if find is None or pool < 0 else find_pooled)

    def once(self, key: Any, find: Callable[[], Any]) -> Any:
        """What `find` returns: called once per call and key, for all blocks."""
        if key not in self._found:
            self._found[key] = find()
        return self._found[key]

    def sites(self, spec: PositionSpec, share_weights: bool | str, h: Tensor) -> Sites | None:
        """Where to edit the hidden state `h` [B, S, d]; None for nowhere.

        Worked out once per call for all blocks and adapters that share a spec.
        """
        if not self.edits or (self.answers_only and not spec.edits_answers):
            return None
        if self.columns is not None and h.shape[:2] != (self.rows, self.columns):
            raise ValueError(
                f"A block put out hidden states of shape {tuple(h.shape)} for a batch of {self.rows} rows and "
                f"{self.columns} columns of tokens, so that positions={str(spec)!r} cannot be placed in them. Exclude "
                "that block (exclude_modules=...), or target modules that keep one vector per token."
            )
        key = (spec, share_weights, h.device, h.shape[0], h.shape[1], self.pool)
        if key not in self._sites:
            self._sites[key] = self._find_sites(spec, share_weights, h)
        return self._sites[key]

    def edits_something(self) -> bool:
        """Whether some block was told to edit a token. Waits for the device."""
        keeps = [sites.keep for sites in self._sites.values() if sites is not None]
        return any(keep.is_meta or bool(keep.any()) for keep in keeps)

    def adapters_by_row(self, rows: int) -> list[str] | None:
        """The adapter of each of `rows` rows, which may be the given ones each several times; None if not by row."""
        names = self.call.adapter_names
        if names is None or len(names) == rows:
            return names
        times, rest = divmod(rows, len(names))
        if rest or self.call.generation is None:
            raise ValueError(
                f"Length of `adapter_names` should be the same as the number of inputs, but got {len(names)} and "
                f"{rows} respectively. Pass one name per row of the batch."
            )
        return [name for name in names for _ in range(times)]

    def sites_by_row(self, wanted: Sequence[tuple[PositionSpec, bool | str, float] | None], h: Tensor) -> Sites | None:
        """Where to edit the rows of `h` [B, S, d], by the spec and strength of each row's adapter; None for nowhere.

        Either all specs are bounded in their number of places, or none is.
        """
        parts = []
        for spec, share in dict.fromkeys(entry[:2] for entry in wanted if entry is not None):
            sites = self.sites(spec, share, h)
            strength = [entry[2] if entry is not None and entry[:2] == (spec, share) else 0.0 for entry in wanted]
            if sites is not None:
                parts.append((sites, torch.tensor(strength, device=h.device)))
        return overlay(parts, h.shape[1]) if parts else None

    def factors(self, layer: Any, name: str) -> Any:
        """What the interventions of an adapter beside one block multiply with; None if only they themselves know."""
        return None if self.call.factors is None else self.call.factors.get((id(layer), name))

    def batch_of(self, layer: Any, name: str) -> int | None:
        """A number that adapters with factors of the same kind and shape share."""
        return None if self.call.factors is None else self.call.factors.batch_of((id(layer), name))

    def factors_by_row(self, layer: Any, names: Sequence[str | None]) -> Any:
        """The same for a batch whose rows have adapters of their own."""
        keys = [None if name is None else (id(layer), name) for name in names]
        return None if self.call.factors is None else self.call.factors.rows(keys)

    def _find_sites(self, spec: PositionSpec, share_weights: bool | str, h: Tensor) -> Sites | None:
        if self.locations is not None:
            locations = self.locations.to(h.device)
            if share_weights is True:
                return sites_at(locations.flatten(1).unsqueeze(1), h.shape[1])
            groups = spec.num_interventions(share_weights)
            if locations.shape[1] != groups:
                raise ValueError(
                    f"intervention_locations of shape {tuple(locations.shape)} cannot be split over the {groups} "
                    f"groups of positions={str(spec)!r} with share_weights={share_weights!r}; pass [B, {groups}, P]."
                )
            return sites_at(locations, h.shape[1])
        if self.find is None:
            prompts = find_prompts(torch.ones(h.shape[:2], dtype=torch.bool, device=h.device))
        else:
            prompts = self.find(spec)
        sites = sites_of(spec, prompts, share_weights)
        if sites is None:
            return None
        moved: Any = [None if tensor is None else tensor.to(h.device) for tensor in sites]
        return Sites(*moved)
