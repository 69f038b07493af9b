"""From the arguments of a call to its context: where the prompts are, and which of their columns this forward runs.

Shape letters: B rows, S columns, G position groups, P positions per group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_reft.context import notices
from peft_reft.context.arguments import (
    aligned_labels,
    documents,
    has_state,
    mask_of,
    of_moved_ids,
    past_length,
    repeats,
    token_device,
    token_shape,
    valid_columns,
    with_ids,
)
from peft_reft.context.forward import ForwardContext, Given
from peft_reft.context.generate import Step
from peft_reft.context.labels import look_at_labels
from peft_reft.context.method import MethodEntry
from peft_reft.context.passed import NOTHING, STEP, read_passed
from peft_reft.context.sources import COLLECTED, Collected
from peft_reft.context.state import ModelState
from peft_reft.context.tower import TOWER, tower_context
from peft_reft.context.within import (
    has_another_mask,
    note_ids,
    runs_more_or_fewer_tokens,
    runs_other_rows,
    whole_numbers,
)
from peft_reft.positions import PositionSpec, Prompts, Tokens, generated

OF_DECODER = ("decoder_input_ids", "decoder_inputs_embeds", "decoder_attention_mask")
Shape = tuple[int, int] | None  # rows and columns of a call's tokens; None if it has none


class Entrance(MethodEntry):
    """Where calls enter a module: what opening their context asks of it.

    Args:
        module: the module.
        state: shared by all entries of a model.
        role: "encoder" or "decoder" in an encoder-decoder model, "router" for the module above both, "tower" for a part
            that runs images or sounds beside the text, else "".
        depth: how many modules it lies in: a call of a module at the same or a smaller depth is another call.
        causal: it is a causal language model by itself, or within one, whatever the whole model is.
        layers: the layers next to the blocks below it, those in towers left out.
    """

    name = "forward"

    def __init__(
        self, module: nn.Module, state: ModelState, role: str, depth: int, causal: bool, layers: Sequence[Any]
    ):
        super().__init__(module, state)
        self.role = role
        self.depth = depth
        self.causal = causal
        self.layers = layers


def open_context(
    entry: Entrance, outer: ForwardContext | None, arguments: Mapping[str, Any], own: Mapping[str, Any]
) -> ForwardContext:
    """The context of a call.

    Args:
        entry: where the call enters.
        outer: the context that is open.
        arguments: of the module's forward, by name.
        own: those that are ours, which the module does not know.

    Returns:
        `outer` for the same tokens one level further in, where labels and masks may be gone or have changed.
    """
    if outer is not None and outer.depth >= entry.depth:
        outer = None  # another call, made while one runs
    if entry.role == TOWER:
        given = _given(entry, arguments, own, None) if outer is None else outer.given
        return tower_context(entry, given, arguments)
    if entry.role in ("encoder", "decoder"):
        arguments = with_ids(arguments, getattr(entry.module, "main_input_name", None))
    shape = token_shape(arguments, entry.state.ids_per_row, has_choices=entry.role != "decoder" and STEP not in own)
    given = _given(entry, arguments, own, shape) if outer is None else outer.given
    same_shape = outer is not None and shape in (None, (outer.rows, outer.columns))
    is_new = outer is None or outer.role != entry.role or not same_shape
    if outer is not None and outer.role == entry.role and outer.tokens is not None:
        if runs_other_rows(outer, entry.depth, arguments):
            given = given._replace(labels_show_prompts=False, labels=None, shift_labels=None)  # those have their own
            is_new = True
        elif not same_shape:
            shows = given.labels_show_prompts and not runs_more_or_fewer_tokens(outer, shape, arguments)
            given = given._replace(labels_show_prompts=shows)
        else:
            is_new = has_another_mask(outer, arguments)
            if note_ids(outer, entry.depth, arguments):
                notices.raise_or_warn(entry.state, entry.module, notices.OTHERS_FIRST, "others first")
    if _predicts(entry, given, arguments, shape, outer):
        labels, shift_labels = arguments.get("labels"), arguments.get("shift_labels")
        given = given._replace(labels_show_prompts=True, labels=labels, shift_labels=shift_labels)
        is_new = is_new or labels is not None or shift_labels is not None
    if not is_new:
        assert outer is not None
        return outer
    state, role = entry.state, entry.role
    context = ForwardContext(state, entry.layers, given, role, entry.depth, training=entry.module.training)
    if role == "router" or shape is None or not entry.layers:
        context.locations, context.start = given.passed.locations, 0
        return context
    context.rows, context.columns = shape
    context.passed = list(whole_numbers(arguments.values()))
    if _is_paged(state, arguments):
        return _paged(context, arguments)
    if given.step is not None and role != "encoder":
        return _step(context, given.step, *shape, arguments)
    return _plain(entry, context, *shape, arguments)


def _given(entry: Entrance, arguments: Mapping[str, Any], own: Mapping[str, Any], shape: Shape) -> Given:
    """What the outermost call was given: by its caller, or by that of the `generate` that makes it."""
    running = entry.state.running
    generation = running.generation
    step: Step | None = own.get(STEP)
    collecting: Collected | None = own.get(COLLECTED)
    inherited = NOTHING if generation is None else generation.passed
    if step is None and entry.role not in ("encoder", TOWER):  # which `generate` runs without making a step of it
        inherited = NOTHING  # a call of its own, made meanwhile
    elif entry.role not in ("encoder", "router"):
        inherited = inherited._replace(locations=None)  # those are cut to the step's columns
    is_located = own.get("intervention_locations") is not None
    past = past_length(arguments, shape[1] if shape else 0, 0) if is_located else 0
    passed = read_passed(entry.module, entry.state, own, shape, inherited, past)
    labels, shift_labels = arguments.get("labels"), arguments.get("shift_labels")
    makes_ids = entry.role == "router" and all(arguments.get(name) is None for name in OF_DECODER)
    moved_mask = arguments.get("attention_mask") if makes_ids else None
    in_generate = generation is not None
    return Given(labels, shift_labels, False, passed, collecting, step, in_generate, moved_mask)


def _predicts(
    entry: Entrance, given: Given, arguments: Mapping[str, Any], shape: Shape, outer: ForwardContext | None
) -> bool:
    """Whether this is the module whose labels show where prompts end; says so if it gets none that can be used.

    Raises:
        ValueError: in training, for labels that were given and cannot be used.
    """
    state = entry.state
    if given.labels_show_prompts or not entry.layers:
        return False
    has_labels = given.labels is not None or given.shift_labels is not None
    lengthened = outer is not None and outer.given.labels_show_prompts and has_labels  # by a causal model
    if not (entry.causal or lengthened or (outer is None and state.causal)):
        return False
    if shape is None:
        return False  # a module whose tokens, and labels if any, are in arguments of its own making
    state.unlabelled = False
    if given.step is None and given.passed.locations is None and not _is_paged(state, arguments):
        look_at_labels(state, entry.module, given, arguments, shape, outer)
    return True


# Continuous batching.


def _is_paged(state: ModelState, arguments: Mapping[str, Any]) -> bool:
    """Whether a forward is one of continuous batching, which packs pieces of requests into one row."""
    return state.paged is not None and arguments.get("cache") is not None and "logits_indices" in arguments


def _paged(context: ForwardContext, arguments: Mapping[str, Any]) -> ForwardContext:
    assert context.state.paged is not None and context.columns is not None
    prompts, context.answers_only = context.state.paged(context.columns, token_device(arguments))
    context.idle = context.answers_only and not context.state.edits_answers()
    context.prompts_of = lambda spec: prompts
    return context


# Steps of `generate`.


def _step(context: ForwardContext, step: Step, rows: int, columns: int, arguments: Mapping[str, Any]) -> ForwardContext:
    generation, past = step
    tokens = generation.tokens
    assert tokens is not None
    given, total = tokens.valid.shape
    locations = None if context.role == "decoder" else generation.passed.locations
    if past >= total:
        device = token_device(arguments)
        context.idle = step.edits_nothing(context.role)
        context.answers_only = True
        context.prompts_of = lambda spec: generated(rows, columns, past - total, device)
        return context
    if locations is not None:
        locations = locations.repeat_interleave(_repeats(locations.shape[0], rows), 0)
        context.locations, context.start = locations, past
        return context
    times, behind = _repeats(given, rows), max(0, past + columns - total)

    def prompts_of(spec: PositionSpec) -> Prompts:
        prompts = tokens.prompts(spec.turns, spec.prompt_end).repeat(times)
        return prompts.followed_by(behind) if behind and spec.edits_answers else prompts

    context.prompts_of, context.start = prompts_of, None if (past, columns) == (0, total) else past
    return context


def _repeats(given: int, rows: int) -> int:
    times = repeats(given, rows)
    if times is None:
        raise ValueError(
            f"generate was given {given} prompts but runs a batch of {rows} rows, which is no multiple of it; "
            "it is unknown which prompt each row has."
        )
    return times


# Forwards that are no step of `generate`.


def _plain(
    entry: Entrance, context: ForwardContext, rows: int, columns: int, arguments: Mapping[str, Any]
) -> ForwardContext:
    past: int | Tensor = 0 if entry.role == "encoder" else past_length(arguments, columns, 0)
    locations = None if entry.role == "decoder" else context.given.passed.locations
    if locations is not None:
        context.locations, context.start = locations, past
        return context
    labels = _labels(entry.role, context.given, rows, columns)
    continues = entry.role != "encoder" and (has_state(arguments) or (not isinstance(past, Tensor) and past > 0))
    if labels is None and continues:
        context.idle = True
        return context
    device, mask = token_device(arguments), mask_of(arguments, columns)
    read = valid_columns(mask, rows, columns, past, device)
    if read is None:
        message = notices.UNREADABLE_MASK.format(mask=notices.describe(mask), rows=rows, columns=columns)
        notices.raise_or_warn(entry.state, entry.module, message, "unreadable mask")
        read = torch.ones(rows, columns, dtype=torch.bool, device=device), None
    valid, shown = read
    moved_mask = context.given.moved_mask
    if entry.role == "decoder" and mask is None and labels is None and moved_mask is not None:
        of_encoder = valid_columns(moved_mask, rows, columns, 0, device)
        if of_encoder is not None and moved_mask.shape[-1] == columns:
            valid = of_moved_ids(of_encoder[0])
    if labels is None and isinstance(past, Tensor):  # a cache's length that one would have to wait for
        valid = valid & (past == 0)
    starts, num_documents = documents(arguments, valid, shown) if entry.role == "" else (None, None)
    ids = arguments.get("input_ids") if arguments.get("inputs_embeds") is None else None
    ids = ids if ids is None or ids.dim() == 2 else None
    tokens = Tokens(valid, labels, starts, num_documents, ids)
    context.prompts_of = lambda spec: prompts_in(tokens, spec, entry.role, entry.state)
    context.tokens, context.mask = tokens, arguments.get("attention_mask")
    return context


def _labels(role: str, given: Given, rows: int, columns: int) -> Tensor | None:
    """The labels, aligned with the tokens, where they show the ends of prompts."""
    if role == "encoder" or (role != "decoder" and not given.labels_show_prompts):
        return None
    return aligned_labels(given.labels, given.shift_labels, rows, columns, is_decoder=role == "decoder")[0]


def prompts_in(tokens: Tokens, spec: PositionSpec, role: str, state: ModelState) -> Prompts:
    """Where the prompts lie by a spec; says so where its marker is missing."""
    if spec.prompt_end and tokens.labels is None:
        notices.warn_of_missing_marker(state, spec, tokens)
    if role == "decoder" and tokens.labels is not None:  # which never cover more than the start token
        return tokens.prompts(spec.turns, answers=spec.edits_answers)
    return tokens.prompts(spec.turns, spec.prompt_end, spec.edits_answers)
