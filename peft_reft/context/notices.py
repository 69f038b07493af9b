"""What a model says about its calls: what was given and cannot be used.

In training that is an error: a wrong position trains without one. Otherwise each notice is a warning, once per model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_reft.context.state import ModelState
from peft_reft.positions import PositionSpec, Tokens

WAYS_OUT = (
    "Pass intervention_locations (peft_reft.ReftDataCollator(collator, config) adds them to a trainer's batches), or "
    "give the config a marker that ends every prompt, as in ReftConfig(prompt_end=chat_prompt_end(tokenizer))."
)
UNLABELLED_TRAINING = (
    "A training forward of a ReFT model got neither `labels` nor `intervention_locations`, so the whole row counts as "
    "the prompt and the last prompt token is the end of the answer. That is right for a bare forward, but wrong for a "
    f"trainer that took the labels away (label smoothing, compute_loss_func). {WAYS_OUT}"
)
UNALIGNED_LABELS = (
    "The labels of shape {labels} cannot be aligned with {rows} rows and {columns} columns of tokens, so that they do "
    f"not show where the prompts end. Pass one label for each token, -100 where nothing is predicted. {WAYS_OUT}"
)
LABELS_AROUND = (
    "`labels` were passed to {outer}, a module around {inner} that does not pass them on: it is unknown whether they "
    f"show where prompts end. Pass them on to the language model, or {{instead}}. {WAYS_OUT}"
)
LABELS_OF_OTHER_COLUMNS = (
    "`labels` of {given} columns were passed to {outer}, a ReFT model that runs {inner} on {run} columns of tokens: it "
    "is unknown where the prompts end among those. Pass labels of the same columns on to the language model, -100 "
    "where nothing is predicted; or use positions that do not depend on a prompt's end, such as f1."
)
DECLARE_LABELS = 'say that they do with ReftConfig(task_type="CAUSAL_LM")'
NAME_TOKENS = "give the tokens the name input_ids in its forward, so that the labels can be aligned with them"
OTHERS_FIRST = (
    "A module around a ReFT model first ran ids that it made itself, then the ids that it was passed. The labels and "
    "the padding of the call were used for both. If the first are other rows, run the ids that were passed first; if "
    "they are the same rows, pass labels and attention_mask on with them."
)
UNREADABLE_MASK = (
    "attention_mask ({mask}) does not show which of {rows} rows and {columns} columns are padding, so that positions "
    "cannot be counted over the tokens. Pass a mask [B, S] of the whole row, or [B, 1, S, columns of the cache]. "
    f"{WAYS_OUT}"
)
DISPLACED = (
    "A module that a ReFT adapter edits is no longer in its place: {name!r} was a {kind} and is {found}. If another "
    "tuner's adapter was put on it, ReFT edits the output without that adapter's part, and its weights are saved under "
    "names that no other model has; if it was replaced, nothing is edited there. Add such an adapter first and "
    "ReFT then, or let ReFT edit whole blocks (leave target_modules out)."
)
MARKER_MISSING = (
    "A row without the marker prompt_end={marker} was given to a ReFT model, without labels or intervention_locations: "
    "the whole row counts as its prompt."
)
NO_STEPS = (
    "`generate` was passed {names}, but ran no forward that `prepare_inputs_for_generation` prepared, so that they had "
    "no effect. A custom_generate has its model prepare the inputs of each step, or passes them to each forward itself."
)


def raise_or_warn(state: ModelState, module: nn.Module, message: str, key: str) -> None:
    """Say that something was given and cannot be used.

    Raises:
        ValueError: in training.
    """
    if module.training and torch.is_grad_enabled():
        raise ValueError(message)
    state.warn_once(message, key)


def raise_or_warn_displaced(
    state: ModelState, module: nn.Module, displaced: tuple[str, nn.Module, nn.Module | None]
) -> None:
    """Say that an edited module is no longer in its place.

    Raises:
        ValueError: in training; always for a module that another adapter saves in full, of which a copy would run.
    """
    name, child, found = displaced
    kind = "gone" if found is None else f"a {type(found).__module__}.{type(found).__name__}"
    message = DISPLACED.format(name=name, kind=type(child).__name__, found=kind)
    if getattr(found, "original_module", None) is child:
        raise ValueError(message)
    raise_or_warn(state, module, message, "displaced")


def raise_or_warn_of_no_steps(state: ModelState, module: nn.Module, own: Mapping[str, Any]) -> None:
    """Say that `generate` ran no step that its arguments `own`, other than adapter names, could be used in.

    Raises:
        ValueError: in training.
    """
    names = [name for name, value in own.items() if value is not None and name != "adapter_names"]
    if names:
        raise_or_warn(state, module, NO_STEPS.format(names=" and ".join(names)), "no steps")


def warn_of_unlabelled(state: ModelState, module: nn.Module) -> None:
    """Say so if nothing shows the prompts of a training forward of a language model."""
    if torch.compiler.is_compiling() or not (module.training and torch.is_grad_enabled()):
        return
    if UNLABELLED_TRAINING not in state.warned and not state.has_markers():
        state.warn_once(UNLABELLED_TRAINING)


def unlabelled_forward(state: ModelState) -> bool:
    """Whether nothing showed the prompts of the last forward, in a model whose positions depend on the prompt's end."""
    noted, state.unlabelled = state.unlabelled, False
    return noted and any(spec.depends_on_the_end and not spec.prompt_end for spec in state.active_specs())


def warn_of_missing_marker(state: ModelState, spec: PositionSpec, tokens: Tokens) -> None:
    """Say so if a row has no marker, or there are no ids to look for it in."""
    message = MARKER_MISSING.format(marker=list(spec.prompt_end))
    if torch.compiler.is_compiling() or message in state.warned:
        return
    ids = tokens.ids
    if ids is None or (ids.device.type == "cpu" and not tokens.marked(spec.prompt_end).any(1).all()):
        state.warn_once(message)


def describe(mask: Any) -> str:
    """What a mask is, in a few words."""
    if isinstance(mask, Tensor):
        return f"a {str(mask.dtype).removeprefix('torch.')} tensor of shape {list(mask.shape)}"
    return f"a {type(mask).__name__}"
