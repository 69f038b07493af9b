"""What one forward call knows about its positions, and how the edited blocks get to know it.

Blocks see hidden states only. The modules around them see tokens, masks, labels and caches: a `Host` hooks each
ancestor of the blocks that takes tokens, works out where the prompts lie when the call enters, and lends the
result to the blocks until the call ends, however it ends. State is per call and per thread: nested calls,
calls from other threads and other models do not see each other's.

    model(...)  ->  Host.enter: Frame  ->  blocks ask frame.sites(spec)  ->  Host.leave
"""

from __future__ import annotations

import inspect
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from peft_reft.batching import paged_prompts
from peft_reft.positions import PositionSpec
from peft_reft.prompt import Prompts, Tokens, align_shift_labels, document_starts, find_prompts, generated
from peft_reft.sites import Sites, overlay, sites_at, sites_of

BASE = "__base__"  # the adapter name of rows without an edit, as everywhere in PEFT
OWN_ARGUMENTS = ("intervention_locations", "adapter_names")  # taken out of the call: the model does not know them


class _ThreadState(threading.local):
    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.generations: list[Generation] = []
        self.adapter_names: list[tuple[Root, list[str]]] = []
        self.labelled: tuple[Root, weakref.ref[Tensor], Tensor] | None = None  # the last forward's, if it had labels


_state = _ThreadState()


@contextmanager
def generation_scope(generation: Generation) -> Iterator[None]:
    """Make the forwards of this thread part of a `generate` call, for as long as it runs."""
    _state.generations.append(generation)
    try:
        yield
    finally:
        _state.generations.remove(generation)


@contextmanager
def adapter_names_scope(root: Root, names: list[str]) -> Iterator[None]:
    """Give each row of this thread's forwards an adapter of its own, for as long as the scope is open."""
    entry = (root, root.check_adapter_names(names))
    _state.adapter_names.append(entry)
    try:
        yield
    finally:
        _state.adapter_names.remove(entry)


def current_frame() -> Frame | None:
    """The innermost running call that knows about tokens, in this thread."""
    return _state.frames[-1] if _state.frames else None


# Frames by the hidden state that a block was given, for as long as that tensor lives.
_frames_by_input: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def frame_of_block(inputs: tuple[Any, ...]) -> Frame | None:
    """The frame of the call that a block runs in, given the block's inputs.

    torch's CheckpointWrapper runs a block, hooks included, once more in the backward pass, when its call has ended and
    another may have begun. So the frame is tied to the block's input, which the checkpoint keeps: to the tensor
    object, and to its memory, since a reentrant checkpoint recomputes from a detached alias.
    """
    frame = current_frame()
    if torch.compiler.is_compiling() or (frame is not None and not frame.edits):
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
    # A reentrant checkpoint runs a backward of its own, which must not run into the graph that made the factors.
    return replace(bound, call=replace(bound.call, factors={}))


@dataclass
class Root:
    """What all hosts of one model share: what kind of model it is, and what was already said about it.

    Attributes:
        causal: a causal language model, whose labels tell where the prompt ends.
        layers: the layers beside its blocks.
        batch_factors: works out what the layers' interventions multiply with, for all of them together.
        survey: what was found out about its blocks.
        batching: asks the manager of continuous batching what the running forward holds.
        warned: the warnings given so far; each is given once.
        steps_without_edit: training forwards so far, none of which edited a token; None once one did.
    """

    causal: bool
    layers: list[Any]
    batch_factors: Callable[[list[Any], list[str] | None], dict[tuple[int, str], Any]]
    survey: Any
    batching: Callable[[], list[tuple[int, int, int]] | None] | None = None
    warned: set[str] = field(default_factory=set)
    steps_without_edit: int | None = 0

    def note_training_forward(self, edited: bool) -> None:
        """Say so if the first training forwards edit nothing: such a run trains nothing, and raises no error."""
        if edited:
            self.steps_without_edit = None
        elif self.steps_without_edit is not None:
            self.steps_without_edit += 1
            if self.steps_without_edit == STEPS_BEFORE_WARNING:
                self.steps_without_edit = None
                self.warn_once(NOTHING_EDITED)

    def check_adapter_names(self, names: Any) -> list[str]:
        """The adapters of a batch's rows, "__base__" for none.

        Raises:
            ValueError: for a name that is no ReFT adapter of this model.
        """
        known = sorted({name for layer in self.layers for name in layer.reft_interventions})
        unknown = sorted({str(name) for name in names} - {*known, BASE})
        if unknown:
            raise ValueError(
                f"adapter_names holds {unknown}, but the ReFT adapters of this model are {known}. Pass one name per row of "
                f"the batch, {BASE!r} for rows without an edit."
            )
        return list(names)

    def edits_answers(self) -> bool:
        """Whether some adapter edits generated tokens."""
        return any(
            layer.position_specs[name].edits_answers
            for layer in self.layers
            for name in layer.position_specs
            if not layer.disable_adapters
        )

    def warn_once(self, message: str) -> None:
        if message not in self.warned and not torch.compiler.is_compiling():
            self.warned.add(message)
            warnings.warn(message, stacklevel=2)


@dataclass
class Generation:
    """One call of `generate`: its prompt, in columns of the whole row, however the prompt is then run.

    Attributes:
        tokens: the rows given to `generate`; None until an encoder-decoder's decoder has started.
        locations: what the caller passed as `intervention_locations`, [B, G, P], or None.
        adapter_names: the adapter of each row given, or None.
        decoder_columns: length of the decoder's prompt where its first forward may hold more than that (guessed tokens).
        edits_answers: some adapter edits generated tokens too.
        seen: columns that went through the model in the forwards that have ended.
        prefilled: the whole prompt is in a cache; of it, nothing is left to edit.
    """

    root: Root
    tokens: Tokens | None
    locations: Tensor | None = None
    adapter_names: list[str] | None = None
    decoder_columns: int | None = None
    edits_answers: bool = False
    seen: int = 0
    prefilled: bool = False
    _running: tuple[int, bool] = (0, False)  # what `seen` and `prefilled` will be when the running forward has ended
    _prompts: dict[Any, Prompts] = field(default_factory=dict)

    def frame(self, host: Host, call: Call, arguments: dict[str, Any], rows: int, columns: int) -> Frame:
        """The frame of one forward within this generation."""
        if self.prefilled:
            return self._answer_frame(host, call, arguments, rows, columns)
        past = past_length(arguments, columns, self.seen)
        past = self.seen if isinstance(past, Tensor) and self.seen else int(past)
        if self.tokens is None:
            valid = valid_columns(arguments.get("attention_mask"), rows, columns, token_device(arguments))
            self.tokens = Tokens(valid[:, : self.decoder_columns], given=True)
        given, total = self.tokens.valid.shape
        self._running = (max(self.seen, past + columns), past + columns >= total and keeps_a_cache(arguments))
        if past >= total:
            return self._answer_frame(host, call, arguments, rows, columns)
        times, rest = divmod(rows, given)
        if rest:
            raise ValueError(
                f"generate was given {given} prompts but runs a batch of {rows} rows, which is no multiple of it; "
                "the rows' prompts cannot be told."
            )
        locations = None if host.role == "decoder" else self.locations
        if locations is not None:
            return Frame(
                host, call, rows, columns, locations=window_of(locations.repeat_interleave(times, 0), past, columns)
            )
        return Frame(
            host, call, rows, columns, find=lambda spec: self._prompts_of(spec).repeat(times).window(past, columns)
        )

    def _prompts_of(self, spec: PositionSpec) -> Prompts:
        """The prompts in columns of the whole row, worked out once."""
        key = (spec.turns, spec.prompt_end)
        if key not in self._prompts:
            assert self.tokens is not None
            self._prompts[key] = self.tokens.prompts(*key)
        return self._prompts[key]

    def _answer_frame(self, host: Host, call: Call, arguments: dict[str, Any], rows: int, columns: int) -> Frame:
        """The frame of a forward that holds generated tokens only."""
        if not self.edits_answers or self.locations is not None or self.tokens is None:
            return Frame(host, call, rows, columns, edits=False)
        first = past_length(arguments, columns, self.seen) - self.tokens.valid.shape[1]
        device = token_device(arguments)
        return Frame(
            host, call, rows, columns, find=lambda spec: generated(rows, columns, first, device), answers_only=True
        )

    def forward_ended(self) -> None:
        if not self.prefilled:
            self.seen, self.prefilled = self._running


@dataclass
class Call:
    """One call of the outermost host.

    Attributes:
        host: that host.
        labels, shift_labels: what it was given of these.
        locations: `intervention_locations` as [B, G, P], or None.
        adapter_names: the adapter of each row, or None for the active ones in every row.
        generation: the `generate` this call is part of, if any.
        factors: what the interventions multiply with, by layer and adapter; None until a stack with edits is entered.
        edited: a token was edited (looked at in the first training forwards only).
    """

    host: Host
    labels: Tensor | None
    shift_labels: Tensor | None
    locations: Tensor | None
    adapter_names: list[str] | None
    generation: Generation | None
    factors: dict[tuple[int, str], Any] | None = None
    edited: bool = False


@dataclass
class Frame:
    """One sequence of tokens on its way through a stack of blocks.

    Attributes:
        rows, columns: the shape of the batch of tokens; None if the call has no tokens (images, plain tensors).
        edits: False if nothing in this forward is to be edited.
        find: where the prompts lie, by what a spec takes for a prompt; None if the hidden state's shape has to tell.
        locations: columns to edit, [B, G, P]; they win.
        answers_only: there are generated tokens only.
    """

    host: Host
    call: Call
    rows: int | None = None
    columns: int | None = None
    edits: bool = True
    find: Callable[[PositionSpec], Prompts] | None = None
    locations: Tensor | None = None
    answers_only: bool = False
    _sites: dict[tuple[Any, ...], Sites | None] = field(default_factory=dict)

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
        key = (spec, share_weights, h.device, h.shape[0], h.shape[1])
        if key not in self._sites:
            self._sites[key] = self._find_sites(spec, share_weights, h)
        return self._sites[key]

    def edits_something(self) -> bool:
        """Whether some block was told to edit a token. Waits for the device."""
        return any(sites is not None and bool(sites.keep.any()) for sites in self._sites.values())

    def adapters_by_row(self, rows: int) -> list[str] | None:
        """The adapter of each of `rows` rows, which may be the given ones each several times; None if not by row."""
        names = self.call.adapter_names
        if names is None or len(names) == rows:
            return names
        times, rest = divmod(rows, len(names))
        if rest or self.call.generation is None:
            raise ValueError(
                f"adapter_names has {len(names)} names, but the batch has {rows} rows; pass one name per row."
            )
        return [name for name in names for _ in range(times)]

    def sites_by_row(
        self, wanted: tuple[tuple[PositionSpec, bool | str, float] | None, ...], h: Tensor
    ) -> Sites | None:
        """Where to edit the rows of `h` [B, S, d], by the spec and strength of each row's adapter; None for nowhere.

        Either all specs are bounded in their number of places, or none is.
        """
        if wanted not in self._sites:
            self._sites[wanted] = self._find_sites_by_row(wanted, h)
        return self._sites[wanted]

    def _find_sites_by_row(self, wanted: tuple[Any, ...], h: Tensor) -> Sites | None:
        parts = []
        for spec, share in dict.fromkeys(entry[:2] for entry in wanted if entry is not None):
            sites = self.sites(spec, share, h)
            strength = [entry[2] if entry is not None and entry[:2] == (spec, share) else 0.0 for entry in wanted]
            if sites is not None:
                parts.append((sites, torch.tensor(strength, device=h.device)))
        return overlay(parts) if parts else None

    def factors(self, layer: Any, name: str) -> Any:
        """What the interventions of an adapter beside one block multiply with; None if only they themselves know."""
        return None if self.call.factors is None else self.call.factors.get((id(layer), name))

    def _find_sites(self, spec: PositionSpec, share_weights: bool | str, h: Tensor) -> Sites | None:
        if self.locations is not None:
            locations = self.locations.to(h.device)
            if share_weights is True:
                return sites_at(locations.flatten(1).unsqueeze(1))
            groups = spec.num_interventions(share_weights)
            if locations.shape[1] != groups:
                raise ValueError(
                    f"intervention_locations of shape {tuple(locations.shape)} cannot be split over the {groups} groups "
                    f"of positions={str(spec)!r} with share_weights={share_weights!r}; pass [B, {groups}, P]."
                )
            return sites_at(locations)
        if self.find is None:
            prompts = find_prompts(torch.ones(h.shape[:2], dtype=torch.bool, device=h.device))
        else:
            prompts = self.find(spec)
        sites = sites_of(spec, prompts, share_weights)
        if sites is None:
            return None
        return Sites(None if sites.columns is None else sites.columns.to(h.device), sites.keep.to(h.device))


class Host:
    """The hooks on a module that takes tokens and has blocks below it.

    Args:
        module: the module; its forward's parameter names are read once.
        root: shared by all hosts of a model.
        role: "encoder" or "decoder" in an encoder-decoder model, "router" for the module above both, else "".
    """

    def __init__(self, module: nn.Module, root: Root, role: str = ""):
        parameters = inspect.signature(type(module).forward).parameters.values()
        self.names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
        self.root = root
        self.role = role

    def attach(self, module: nn.Module) -> None:
        module.register_forward_pre_hook(self.enter, prepend=True, with_kwargs=True)
        module.register_forward_hook(self.leave, always_call=True)

    @classmethod
    def of(cls, module: nn.Module) -> Host | None:
        """The host attached to a module, if any."""
        for hook in module._forward_pre_hooks.values():
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, cls):
                return owner
        return None

    @classmethod
    def detach(cls, module: nn.Module) -> None:
        """Take the hooks off again."""
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), cls):
                    del hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
                    module._forward_hooks_always_called.pop(key, None)

    def enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Forward pre-hook: find the prompts of this call's tokens."""
        own = {name: kwargs[name] for name in OWN_ARGUMENTS if kwargs.get(name) is not None}
        kwargs = {name: value for name, value in kwargs.items() if name not in OWN_ARGUMENTS}
        arguments = {**dict(zip(self.names, args)), **kwargs}
        outer = current_frame()
        if outer is not None and outer.host.root is not self.root:
            outer = None
        frame = self._frame(module, outer, arguments, own)
        names = frame.call.adapter_names
        if frame.call.factors is None and frame.edits and self.role != "router":
            frame.call.factors = self.root.batch_factors(self._layers(module), names and sorted({*names} - {BASE}))
        _state.frames.append(frame)
        return args, kwargs

    def leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Forward hook, called even if the forward failed (or never began, when `enter` itself raised)."""
        if _state.frames and _state.frames[-1].host is self:
            frame = _state.frames.pop()
            call = frame.call
            if call.generation is not None:
                if call.host is self:
                    call.generation.forward_ended()
            elif self.root.steps_without_edit is not None and module.training and not torch.compiler.is_compiling():
                call.edited = call.edited or frame.edits_something()
                if call.host is self and torch.is_grad_enabled() and output is not None:
                    self.root.note_training_forward(call.edited)

    def _layers(self, module: nn.Module) -> list[Any]:
        if getattr(module, "_is_replica", False):  # nn.DataParallel: replicas have layers of their own
            kinds = tuple({type(layer) for layer in self.root.layers})
            return [part for part in module.modules() if isinstance(part, kinds)]
        return self.root.layers

    def _frame(self, module: nn.Module, outer: Frame | None, arguments: dict[str, Any], own: dict[str, Any]) -> Frame:
        shape = token_shape(arguments)
        if outer is not None and outer.host.role == self.role and shape in (None, (outer.rows, outer.columns)):
            # The same tokens one level further in, where labels and masks may be gone or have changed their form.
            return Frame(
                self,
                outer.call,
                outer.rows,
                outer.columns,
                outer.edits,
                outer.find,
                outer.locations,
                outer.answers_only,
                outer._sites,
            )
        call = outer.call if outer is not None else self._call(module, arguments, own, shape)
        if self.role == "router" or shape is None:
            return Frame(self, call, locations=call.locations)
        rows, columns = shape
        if arguments.get("cache") is not None and arguments.get("logits_indices") is not None:
            return self._paged_frame(call, arguments, rows, columns)
        if self.role == "encoder" or call.generation is None:
            return self._plain_frame(call, arguments, rows, columns)
        return call.generation.frame(self, call, arguments, rows, columns)

    def _call(
        self, module: nn.Module, arguments: dict[str, Any], own: dict[str, Any], shape: tuple[int, int] | None
    ) -> Call:
        generation = next((g for g in reversed(_state.generations) if g.root is self.root), None)
        locations = own.get("intervention_locations")
        if locations is None and generation is not None and self.role != "decoder":
            locations = generation.locations
        elif locations is not None:
            locations = check_locations(locations, shape, past_length(arguments, shape[1] if shape else 0, 0))
        names = own.get("adapter_names")
        if names is not None:
            names = self.root.check_adapter_names(names)
        elif generation is not None and generation.adapter_names is not None:
            names = generation.adapter_names
        else:
            names = next((names for root, names in reversed(_state.adapter_names) if root is self.root), None)
        labels = arguments.get("labels")
        if labels is None:
            labels = self._remembered_labels(module, arguments)
        ids = arguments.get("input_ids")
        known = isinstance(labels, Tensor) and isinstance(ids, Tensor) and not torch.compiler.is_compiling()
        _state.labelled = (self.root, weakref.ref(ids), labels) if known else None
        labelled = any(arguments.get(name) is not None for name in ("labels", "shift_labels"))
        if (
            self.root.causal
            and module.training
            and torch.is_grad_enabled()
            and generation is None
            and locations is None
            and not labelled
        ):
            self.root.warn_once(UNLABELLED_TRAINING)
        return Call(self, labels, arguments.get("shift_labels"), locations, names, generation)

    def _remembered_labels(self, module: nn.Module, arguments: dict[str, Any]) -> Tensor | None:
        """Labels of the forward just before, if a trainer runs the very same batch once more to get its logits.

        TRL's evaluation with metrics does: first for the loss, with labels, then without them and with use_cache=False.
        """
        if (
            module.training
            or torch.is_grad_enabled()
            or arguments.get("use_cache") is not False
            or _state.labelled is None
        ):
            return None
        root, ids, labels = _state.labelled
        return labels if root is self.root and ids() is arguments.get("input_ids") is not None else None

    def _plain_frame(self, call: Call, arguments: dict[str, Any], rows: int, columns: int) -> Frame:
        """The frame of a forward outside `generate` (or of an encoder, which `generate` runs like any other)."""
        past: int | Tensor = 0 if self.role == "encoder" else past_length(arguments, columns, 0)
        locations = None if self.role == "decoder" else call.locations
        if locations is not None:
            return Frame(self, call, rows, columns, locations=window_of(locations, past, columns))
        if not isinstance(past, Tensor) and past > 0:
            return Frame(self, call, rows, columns, edits=False)
        valid = valid_columns(arguments.get("attention_mask"), rows, columns, token_device(arguments))
        if isinstance(past, Tensor):  # a static cache's length, which to read would mean to wait for the device
            valid = valid & (past == 0)
        starts, num_documents = None, None
        if self.role == "":
            starts, num_documents = document_starts(
                valid, arguments.get("position_ids"), arguments.get("seq_idx"), arguments.get("cu_seq_lens_q")
            )
        ids = arguments.get("input_ids") if arguments.get("inputs_embeds") is None else None
        tokens = Tokens(valid, self._labels(call, rows, columns), starts, num_documents, ids)
        return Frame(self, call, rows, columns, find=lambda spec: self._prompts(tokens, spec))

    def _paged_frame(self, call: Call, arguments: dict[str, Any], rows: int, columns: int) -> Frame:
        """The frame of a forward of transformers' continuous batching."""
        requests = None if self.root.batching is None else self.root.batching()
        if requests is None:
            raise ValueError(
                "A ReFT model was run by a continuous batching manager that it does not know, so the prompts of the requests "
                "cannot be told. Start it with model.generate_batch or model.init_continuous_batching."
            )
        answers_only = all(past >= prompt for _, past, prompt in requests)
        if not answers_only and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "A CUDA graph of a forward with prompt tokens would edit the same places in every replay. Pass "
                "ContinuousBatchingConfig(use_cuda_graph=False)."
            )
        if answers_only and not self.root.edits_answers():
            return Frame(self, call, rows, columns, edits=False)
        device = token_device(arguments)
        prompts = paged_prompts(requests, columns, device)
        return Frame(self, call, rows, columns, find=lambda spec: prompts, answers_only=answers_only)

    def _prompts(self, tokens: Tokens, spec: PositionSpec) -> Prompts:
        if spec.prompt_end and tokens.labels is None and not torch.compiler.is_compiling():
            unmarked = MARKER_MISSING.format(list(spec.prompt_end))
            if unmarked not in self.root.warned and (
                tokens.ids is None or not tokens.marked(spec.prompt_end).any(1).all()
            ):
                self.root.warn_once(unmarked)
        return tokens.prompts(spec.turns, spec.prompt_end)

    def _labels(self, call: Call, rows: int, columns: int) -> Tensor | None:
        """The call's labels, aligned with the tokens, where they tell the end of a prompt."""
        labels, shift_labels = call.labels, call.shift_labels
        if self.role == "decoder":  # decoder inputs are the labels moved by one
            labels, shift_labels = shift_labels, labels
        elif self.role == "encoder" or not self.root.causal:
            return None
        if isinstance(labels, Tensor) and labels.shape == (rows, columns):
            return labels
        if isinstance(shift_labels, Tensor) and shift_labels.shape == (rows, columns):
            return align_shift_labels(shift_labels)
        return None


STEPS_BEFORE_WARNING = 3
NOTHING_EDITED = (
    f"In the first {STEPS_BEFORE_WARNING} training forwards a ReFT model edited no token at all, so that it trains "
    "nothing: the positions name no token of these prompts. Look at a batch's intervention_locations (-1 = unused), "
    "and at the lengths of its prompts."
)
UNLABELLED_TRAINING = (
    "A training forward of a ReFT model got neither `labels` nor `intervention_locations`, so the whole row counts as "
    "the prompt and the last prompt token is the end of the answer. That is right for a bare forward, but wrong for a "
    "trainer that took the labels away (label smoothing, compute_loss_func): wrap its collator, "
    "data_collator=peft_reft.ReftDataCollator(collator, config), and the positions travel with the batch."
)


MARKER_MISSING = (
    "A row without the marker prompt_end={} was given to a ReFT model, without labels or intervention_locations: the "
    "whole row counts as its prompt."
)


def window_of(locations: Tensor, past: int | Tensor, columns: int) -> Tensor:
    """Columns of the whole row as columns of a forward that starts behind `past` of them; -1 for those outside."""
    locations = locations - past
    return torch.where((locations >= 0) & (locations < columns), locations, -1)


def token_shape(arguments: dict[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a call's tokens; None if it has none, or not as one row per sequence."""
    for name, dims in (("inputs_embeds", 3), ("input_ids", 2)):
        value = arguments.get(name)
        if isinstance(value, Tensor) and value.dim() == dims:
            return value.shape[0], value.shape[1]
    return None


def token_device(arguments: dict[str, Any]) -> torch.device:
    """Where a call's tokens are."""
    value = arguments.get("inputs_embeds")
    return (arguments["input_ids"] if value is None else value).device


def is_mask(mask: Any, rows: int, columns: int) -> bool:
    """Whether this is a padding mask of at least these columns."""
    return isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[0] == rows and mask.shape[1] >= columns


def valid_columns(mask: Any, rows: int, columns: int, device: torch.device) -> Tensor:
    """Bool [B, S]: which columns of this forward are no padding, by a 2-D or 4-D attention mask or none."""
    if is_mask(mask, rows, columns):
        return mask[:, -columns:].to(device=device, dtype=torch.bool)
    if (
        isinstance(mask, Tensor)
        and mask.dim() == 4
        and mask.shape[0] == rows
        and mask.shape[-1] == mask.shape[-2] == columns
    ):
        # A token that may look at itself is no padding; additive masks hold 0 where one may look.
        diagonal = mask[:, 0].diagonal(dim1=-2, dim2=-1).to(device)
        return diagonal if diagonal.dtype == torch.bool else diagonal == 0
    return torch.ones(rows, columns, dtype=torch.bool, device=device)


def past_length(arguments: dict[str, Any], columns: int, seen: int) -> int | Tensor:
    """How many columns are in the call's cache already.

    Args:
        seen: what is known from earlier forwards, for caches that do not tell.

    Returns:
        An int, or a tensor on the device if the cache counts there.
    """
    cache = arguments.get("past_key_values")
    if hasattr(cache, "get_seq_length"):
        try:
            return cache.get_seq_length()  # type: ignore[union-attr,no-any-return]
        except ValueError:  # a cache of linear-attention layers only
            return seen
    if isinstance(cache, (tuple, list)) and cache:  # the old format: (key, value) [B, H, S, d] of each layer
        return int(cache[0][0].shape[-2])
    if any(arguments.get(name) is not None for name in ("cache_params", "state", "mems")):
        return seen
    return 0


def keeps_a_cache(arguments: dict[str, Any]) -> bool:
    """Whether the forward leaves its columns in a cache, so that they will not be run again."""
    if any(arguments.get(name) is not None for name in ("past_key_values", "cache_params", "state", "mems")):
        return True
    return bool(arguments.get("use_cache"))


def check_locations(locations: Any, shape: tuple[int, int] | None, past: int | Tensor) -> Tensor:
    """`intervention_locations` as a long tensor [B, G, P].

    Raises:
        ValueError: if they are no columns of this batch. (What the values are is looked at on the CPU only:
            elsewhere that would make the device wait.)
    """
    rule = "Pass a LongTensor [B, P] or [B, G, P] of columns of the padded row, -1 = unused."
    if not isinstance(locations, Tensor) or locations.dim() not in (2, 3) or locations.is_floating_point():
        what = (
            f"a {locations.dtype} tensor of shape {tuple(locations.shape)}"
            if isinstance(locations, Tensor)
            else f"{locations!r}"
        )
        raise ValueError(f"intervention_locations is {what}. {rule}")
    if shape is not None:
        rows, columns = shape
        if locations.shape[0] != rows:
            raise ValueError(
                f"intervention_locations has {locations.shape[0]} rows, but the batch has {rows}; it belongs to another batch. {rule}"
            )
        if locations.device.type == "cpu" and not torch.compiler.is_compiling() and locations.numel():
            least, most = int(locations.min()), int(locations.max())
            if least < -1 or most >= columns + int(past):
                wrong = least if least < -1 else most
                raise ValueError(
                    f"intervention_locations holds {wrong}, but the rows have the columns 0 to {columns + int(past) - 1}. {rule}"
                )
    locations = locations.long()
    locations = locations if locations.dim() == 3 else locations.unsqueeze(1)
    flat = locations.flatten(1)  # a column that is named twice is edited once, by the first
    repeated = (flat.unsqueeze(1) == flat.unsqueeze(2)).tril(-1).any(-1).view_as(locations)
    return torch.where(repeated, -1, locations)
