"""Where a call enters a model: the forward of every module around the blocks that takes tokens.

model(...) or model.forward(...)  ->  ForwardEntry opens a ForwardContext  ->  blocks ask it  ->  closed

The entry stands in for the module's `forward`, as an attribute of the instance. That is seen by `model(...)` and
`model.forward(...)` alike, and `finally` closes the context after errors and interruptions, too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from peft_reft.context import notices
from peft_reft.context.arguments import (
    aligned_labels,
    check_locations,
    documents,
    has_state,
    past_length,
    token_device,
    token_shape,
    valid_columns,
    window_of,
)
from peft_reft.context.block import BlockEntry, stand_in
from peft_reft.context.forward import ForwardContext, Given
from peft_reft.context.generate import STEP, Step, step_context
from peft_reft.context.method import MethodEntry
from peft_reft.context.replay import Path
from peft_reft.context.sources import run_sources
from peft_reft.context.state import ModelState
from peft_reft.positions import PositionSpec, Prompts, Tokens

# Taken out of the call: the model does not know them.
OWN_ARGUMENTS = ("intervention_locations", "adapter_names", "subspaces", "source_inputs", STEP)


class ForwardEntry(MethodEntry):
    """Stands in for the `forward` of a module that takes tokens and has blocks below it.

    Args:
        module: the module.
        state: shared by all entries of a model.
        role: "encoder" or "decoder" in an encoder-decoder model, "router" for the module above both, else "".
        depth: how many modules it lies in: a call of a module at the same or a smaller depth is another call.
        causal: the module is a causal language model by itself, or within one, whatever the whole model is.
        blocks: names of the blocks below it.
        layers: the layers next to them.
    """

    name = "forward"

    def __init__(
        self,
        module: nn.Module,
        state: ModelState,
        role: str,
        depth: int,
        causal: bool,
        blocks: Sequence[str],
        layers: Sequence[Any],
    ):
        super().__init__(module, state)
        self.role = role
        self.depth = depth
        self.causal = causal
        self.layers = list(layers)
        self.path = Path(module, blocks)
        self.idle = ForwardContext(state, (), Given(), role, depth, idle=True)
        self.passive = False
        self.close: Callable[[], None] | None = None  # of a passive one, while its first call runs
        parameters = inspect.signature(type(module).forward).parameters.values()
        self.names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD][1:]

    @property
    def __code__(self) -> CodeType:  # torch.export names the function that it exports
        code: CodeType = self.__wrapped__.__code__
        return code

    def attach(self) -> None:
        super().attach()
        self.module.register_forward_pre_hook(StayOutermost(self), prepend=True, with_kwargs=True)
        self.state.entries.append(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        running = self.state.running
        if running.replica is not None:
            return self._of_replica()(*args, **kwargs)
        outer = running.context
        if self.passive:
            return self._below_what_replaced_it(*args, **kwargs)
        if outer is not None and outer.idle and outer.depth < self.depth:
            return self.__wrapped__(*args, **kwargs)
        if STEP in kwargs and kwargs[STEP].edits_nothing:
            del kwargs[STEP]
            context = self.idle
        else:
            own = {name: kwargs.pop(name) for name in OWN_ARGUMENTS if name in kwargs}
            context = self.context(outer, args, kwargs, own)
            if outer is None and not torch.compiler.is_compiling():
                self.stand_in_for_blocks()
        if context is outer:
            return self.__wrapped__(*args, **kwargs)
        is_recorded = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if is_recorded:
            self.path.wrap_checkpoints(running)
        running.context = context
        try:
            output = self.__wrapped__(*args, **kwargs)
        finally:
            running.context = outer
        if is_recorded and self.module.training and self.state.training_forwards is not None:
            self._look_at_training(context)
        return output

    def _below_what_replaced_it(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, called by what took the entry's place (see `StayOutermost`).

        torch calls no hook after an interruption, such as Ctrl-C: then a context that hooks opened is closed here.
        """
        close, self.close = self.close, None
        try:
            return self.__wrapped__(*args, **kwargs)
        except BaseException as error:
            if close is not None and not isinstance(error, Exception):
                close()
            raise

    def stand_in_for_blocks(self) -> None:
        """Put the blocks' entries back in place, should something else have taken it.

        Raises:
            ValueError: in training, if something took the place of a block itself.
        """
        displaced = self.path.displaced()
        if displaced is not None:
            notices.object_to_displaced(self.state, self.module, displaced)
        for layer in self.layers:
            stand_in(layer.block, self.state)

    def _of_replica(self) -> ForwardEntry:
        """The entry of the replica that nn.DataParallel calls in this thread, whose layers are its own."""
        module, self.state.running.replica = self.state.running.replica, None
        assert module is not None
        kinds = {type(layer) for layer in self.layers}
        entry = object.__new__(ForwardEntry)
        layers = [part for part in module.modules() if type(part) in kinds]
        for part in module.modules():
            block_entry = part.__dict__.get("forward")
            if type(block_entry) is BlockEntry:
                block_entry.of_replica(part).attach()
        entry.__dict__.update(self.__dict__, module=module, layers=layers, path=Path(module, ()))
        return entry

    # The context of a call.

    def context(
        self, outer: ForwardContext | None, args: Sequence[Any], kwargs: Mapping[str, Any], own: Mapping[str, Any]
    ) -> ForwardContext:
        """The context of a call, with its edits worked out; the outer one for the same tokens one level further in.

        Args:
            outer: the context that is open.
            args, kwargs: as the module's forward is given them.
            own: the arguments of ours among them.
        """
        context = self._context(outer, {**dict(zip(self.names, args)), **kwargs}, own)
        if context is not outer:
            context.prepare()
        return context

    def _context(
        self, outer: ForwardContext | None, arguments: Mapping[str, Any], own: Mapping[str, Any]
    ) -> ForwardContext:
        if outer is not None and outer.depth >= self.depth:
            outer = None  # another call, made while one runs
        shape = token_shape(arguments, self.state.ids_per_row)
        given = self._given(arguments, own, shape) if outer is None else outer.given
        is_new = outer is None or outer.role != self.role or shape not in (None, (outer.rows, outer.columns))
        if outer is not None and not is_new:
            is_new, is_another = _brings_others(outer, arguments)
            if is_another:  # a sequence of its own, and so are its labels, if it has any
                given = replace(given, used=False, labels=None, shift_labels=None)
        if self._shows_prompts(given, arguments, shape, is_outermost=outer is None):
            labels, shift_labels = arguments.get("labels"), arguments.get("shift_labels")
            given = replace(given, used=True, labels=labels, shift_labels=shift_labels)
            is_new = is_new or labels is not None or shift_labels is not None
        if not is_new:
            assert outer is not None
            return outer  # the same tokens one level further in, where labels and masks may be gone or have changed
        context = ForwardContext(self.state, self.layers, given, self.role, self.depth, training=self.module.training)
        if self.role == "router" or shape is None:
            context.locations = given.locations
            return context
        context.rows, context.columns = rows, columns = shape
        context.passed = frozenset(id(value) for value in arguments.values() if isinstance(value, Tensor))
        if self.state.paged is not None and arguments.get("cache") is not None and "logits_indices" in arguments:
            return self._paged(context, arguments)
        if given.step is not None and self.role != "encoder":
            return step_context(context, given.step, rows, columns, arguments)
        return self._plain(context, arguments)

    def _given(self, arguments: Mapping[str, Any], own: Mapping[str, Any], shape: tuple[int, int] | None) -> Given:
        """What the outermost call was given."""
        generation = self.state.running.generation
        collecting, self.state.running.collecting = self.state.running.collecting, None
        step: Step | None = own.get(STEP)
        locations = own.get("intervention_locations")
        if locations is not None:
            past = past_length(arguments, shape[1] if shape else 0, 0)
            locations = check_locations(locations, shape, past, may_repeat=collecting is not None)
        elif generation is not None and self.role == "encoder":  # which `generate` runs without making a step of it
            locations = generation.locations
        elif step is not None and self.role == "router":
            locations = step.generation.locations
        names = own.get("adapter_names")
        if names is not None:
            names = self.state.check_adapter_names(names)
        elif generation is not None and generation.adapter_names is not None:
            names = generation.adapter_names
        else:
            names = self.state.running.adapter_names
        subspaces = own.get("subspaces")
        if subspaces is not None:
            subspaces = self.state.check_subspaces(subspaces, shape[0] if shape else None, names)
        elif generation is not None and (step is not None or self.role == "encoder"):
            subspaces = generation.subspaces
        sources = own.get("source_inputs")
        if sources is not None:
            sources = run_sources(self.module, self.state, sources, names)
        elif generation is not None and (step is not None or self.role == "encoder"):
            sources = generation.sources
        labels, shift_labels = arguments.get("labels"), arguments.get("shift_labels")
        in_generate = generation is not None
        return Given(labels, shift_labels, False, locations, names, subspaces, sources, collecting, step, in_generate)

    def _shows_prompts(
        self, given: Given, arguments: Mapping[str, Any], shape: tuple[int, int] | None, is_outermost: bool
    ) -> bool:
        """Whether this is the module whose labels show where prompts end; says so if there are none to use."""
        if given.used or not (self.causal or (is_outermost and self.state.causal)):
            return False
        if shape is None:
            return False  # a module whose tokens, and labels if any, are in arguments of its own making
        self.state.unlabelled = False
        if given.step is not None or given.locations is not None:
            return True
        if arguments.get("cache") is not None and "logits_indices" in arguments:
            return True
        labels, shift_labels = arguments.get("labels"), arguments.get("shift_labels")
        found, unaligned = aligned_labels(labels, shift_labels, *shape)
        self.state.unlabelled = found is None and not self.state.running.generation
        if unaligned and not self._has_markers():
            some = labels if labels is not None else shift_labels
            what = list(some.shape) if isinstance(some, Tensor) else type(some).__name__
            message = notices.UNALIGNED_LABELS.format(labels=what, rows=shape[0], columns=shape[1])
            notices.object_to(self.state, self.module, message, "unaligned labels")
        elif found is None and not is_outermost and _aligned(given, shape) is not None:
            if not self._has_markers():
                outer, inner = (type(module).__name__ for module in (self.state.entries[0].module, self.module))
                instead = notices.NAME_TOKENS if self.state.causal else notices.DECLARE_LABELS
                message = notices.LABELS_AROUND.format(outer=outer, inner=inner, instead=instead)
                notices.object_to(self.state, self.module, message, "labels around")
        elif self.state.unlabelled and not _are_classes(given.labels):
            notices.warn_of_unlabelled(self.state, self.module)
        return True

    def _has_markers(self) -> bool:
        return all(spec.prompt_end for spec in self.state.active_specs())

    def _plain(self, context: ForwardContext, arguments: Mapping[str, Any]) -> ForwardContext:
        """The context of a forward that is no step of `generate`."""
        rows, columns = context.rows, context.columns
        assert rows is not None and columns is not None
        past: int | Tensor = 0 if self.role == "encoder" else past_length(arguments, columns, 0)
        locations = None if self.role == "decoder" else context.given.locations
        if locations is not None:
            context.locations, context.past = window_of(locations, past, columns), past
            return context
        labels = self._labels(context.given, rows, columns)
        continues = self.role != "encoder" and (has_state(arguments) or (not isinstance(past, Tensor) and past > 0))
        if labels is None and continues:
            context.idle = True
            return context
        device = token_device(arguments)
        mask = arguments.get("attention_mask")
        read = valid_columns(mask, rows, columns, past, device)
        if read is None:
            message = notices.UNREADABLE_MASK.format(mask=notices.describe(mask), rows=rows, columns=columns)
            notices.object_to(self.state, self.module, message, "unreadable mask")
            read = torch.ones(rows, columns, dtype=torch.bool, device=device), None
        valid, shown = read
        if labels is None and isinstance(past, Tensor):  # a cache's length that one would have to wait for
            valid = valid & (past == 0)
        starts, num_documents = documents(arguments, valid, shown) if self.role == "" else (None, None)
        ids = arguments.get("input_ids") if arguments.get("inputs_embeds") is None else None
        tokens = Tokens(valid, labels, starts, num_documents, ids)
        found: dict[Any, Prompts] = {}

        def find(spec: PositionSpec) -> Prompts:
            key = (spec.turns, spec.prompt_end, spec.edits_answers)
            if key not in found:
                found[key] = self._prompts(tokens, spec)
            return found[key]

        context.find, context.tokens, context.mask = find, tokens, mask
        return context

    def _labels(self, given: Given, rows: int, columns: int) -> Tensor | None:
        """The labels, aligned with the tokens, where they show the ends of prompts."""
        if self.role == "decoder":
            return aligned_labels(given.labels, given.shift_labels, rows, columns, is_decoder=True)[0]
        if self.role == "encoder" or not given.used:
            return None
        return aligned_labels(given.labels, given.shift_labels, rows, columns)[0]

    def _prompts(self, tokens: Tokens, spec: PositionSpec) -> Prompts:
        if spec.prompt_end and tokens.labels is None:
            notices.warn_of_missing_marker(
                self.state, spec, None if tokens.ids is None else tokens.marked(spec.prompt_end)
            )
        if self.role == "decoder" and tokens.labels is not None:  # which never cover more than the start token
            return tokens.prompts(spec.turns, answers=spec.edits_answers)
        return tokens.prompts(spec.turns, spec.prompt_end, spec.edits_answers)

    def _paged(self, context: ForwardContext, arguments: Mapping[str, Any]) -> ForwardContext:
        """The context of a forward of continuous batching."""
        assert self.state.paged is not None and context.columns is not None
        prompts, context.answers_only = self.state.paged(context.columns, token_device(arguments))
        context.idle = context.answers_only and not self.state.edits_answers()
        context.find = lambda spec: prompts
        return context

    def _look_at_training(self, context: ForwardContext) -> None:
        if context.idle or context.given.step is not None or self.role == "router":
            return
        covered: dict[PositionSpec, Tensor] = {}
        tokens = context.tokens
        if tokens is not None and tokens.labels is not None and self.role == "":
            for spec in self.state.active_specs():
                prompts = self._prompts(tokens, replace(spec, turns=None) if spec.turns == "all" else spec)
                covered[spec] = (tokens.valid & (prompts.order == 1) & (prompts.length <= 1)).any(1)
        notices.look_at_training(context, covered)


def _brings_others(outer: ForwardContext, arguments: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether a call within another has tokens of its own, as where a model runs one part twice.

    Returns:
        Whether it brings ids, and a mask [B, S], labels or tokens that differ from the outer call's; and whether it is
        surely another sequence, not the outer one in a changed form: it has labels of its own, or the outer call was
        passed these ids beside its own, or has run its own ids already.
    """
    ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
    if outer.tokens is None or outer.tokens.ids is None or not isinstance(ids, Tensor):
        return False, False
    if ids is outer.tokens.ids:
        outer.has_run = True
        return False, False
    has_mask = isinstance(mask, Tensor) and mask.dim() == 2 and mask is not outer.mask
    labels = [(arguments.get(name), getattr(outer.given, name)) for name in ("labels", "shift_labels")]
    if any(own is not None and own is not given for own, given in labels):
        return True, True
    is_another = (outer.has_run or id(ids) in outer.passed) and _differ(ids, outer.tokens.ids)
    return has_mask or is_another, is_another


def _differ(ids: Tensor, others: Tensor) -> bool:
    """Whether ids of the same shape are others; False where that cannot be known. Waits for the device."""
    if torch.compiler.is_compiling() or ids.device != others.device or torch.func.debug_unwrap(ids) is not ids:
        return False
    return not torch.equal(ids, others)


def _aligned(given: Given, shape: tuple[int, int]) -> Tensor | None:
    return aligned_labels(given.labels, given.shift_labels, *shape)[0]


def _are_classes(labels: Any) -> bool:
    """Whether the outermost module got labels of whole rows [B]: it classifies, and no prompt ends in its rows."""
    return isinstance(labels, Tensor) and labels.dim() == 1


class StayOutermost:
    """Forward pre-hook of an entry's module: keeps the entry in front of whatever else is put in place of `forward`.

    TRL and accelerate do so after an adapter was added, and may take arguments out of the call that the entry has to
    see. By the time a pre-hook runs, torch has looked `forward` up: so the context of the first such call is opened
    here, and the entry is in its place from then on. The replicas of nn.DataParallel have the attributes of the module
    that they copy, its entry too: which module is called is known here.
    """

    def __init__(self, entry: ForwardEntry):
        self.entry = entry

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        entry = self.entry
        found = module.__dict__.get("forward")
        if found is entry or torch.compiler.is_compiling():
            if entry.module is not module:
                entry.state.running.replica = module
            return None
        self.entry = successor = object.__new__(ForwardEntry)
        successor.__dict__.update(entry.__dict__, replaced=found)
        entries = entry.state.entries
        entries[entries.index(entry)] = successor
        entry.passive = True  # it is called by what replaced it, or no longer
        module.__dict__["forward"] = successor
        own = {name: kwargs.pop(name) for name in OWN_ARGUMENTS if name in kwargs}
        running = entry.state.running
        outer = running.context
        context = successor.context(outer, args, kwargs, own)
        if outer is None:
            successor.stand_in_for_blocks()
        if context is not outer:
            if torch.is_grad_enabled():
                successor.path.wrap_checkpoints(running)
            running.context = context

            def close(*_: Any) -> None:
                handle.remove()
                running.context, entry.close = outer, None

            entry.close = close
            handle = module.register_forward_hook(close, always_call=True)
        return args, kwargs


def detach_entries(state: ModelState, model: nn.Module) -> None:
    """Give all modules their own forward back."""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, StayOutermost) and hook.entry.state is state:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
    for entry in state.entries:
        entry.passive = True  # should something else hold it
        entry.detach()
    state.entries.clear()
