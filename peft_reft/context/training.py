"""What a model says of its first training forwards: training that does not do what it seems to.

They are looked at after they have run, which waits for the device; after a few no more are.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from peft_reft.context.forward import ForwardContext
from peft_reft.context.state import ModelState
from peft_reft.context.tower import TOWER
from peft_reft.positions import IGNORED, Tokens

FORWARDS_LOOKED_AT = 3  # training forwards that are looked at, which waits for the device
NOTHING_EDITED = (
    f"In the first {FORWARDS_LOOKED_AT} training forwards a ReFT model edited no token at all, so that it trains "
    "nothing: the positions name no token of these prompts. Look at a batch's intervention_locations (-1 = unused), "
    "and at the lengths of its prompts."
)
PROMPTS_OF_LABELS = "prompts of labels"  # the key of all warnings of what labels make of prompts: the first says enough
LABELS_COVER_PROMPTS = (
    "The labels of row(s) {rows} begin with their second token, so that the prompt is one token long: the adapter is "
    "trained to edit that token, while `generate` will edit {positions} of the real prompt. Keep the prompt out of "
    "the labels: give the trainer `prompt` and `completion` columns; or set completion_only_loss=True or "
    "assistant_only_loss=True (where the chat template marks answers); or name the marker that ends every prompt, "
    "ReftConfig(prompt_end=chat_prompt_end(tokenizer)). Packing that cuts documents (TRL's packing_strategy `wrapped` "
    "and `bfd_split`) leaves pieces without a prompt: use packing_strategy='bfd'. A ReFT adapter works only at the "
    "places that it was trained for."
)
SEVERAL_ANSWERS = (
    "Labels of a training batch show several answers. With turns=None, positions={positions} are trained in the prompt "
    "of the first alone, while `generate` edits the end of all that it is given, earlier answers included. Say whose "
    'prompts are meant: ReftConfig(turns="all", prompt_end=chat_prompt_end(tokenizer)) trains every answer behind the '
    'edit that `generate` makes before it; turns="first" or turns="last" trains the edits of one.'
)
SUBSPACES_TOGETHER = (
    "A training forward of a ReFT model got no `subspaces`, so that every row trains all of {names}. To train them "
    "apart, give the data set a column `subspaces`, wrap the trainer's collator in peft_reft.ReftDataCollator("
    "collator, config), and pass remove_unused_columns=False; packing drops such a column. To train one of them, or "
    "all together on purpose, say so with peft_reft.set_subspaces(model, [...])."
)


def look_at_training(context: ForwardContext) -> None:
    """Look at one of the first training forwards of a model, after it has run."""
    state = context.state
    if state.training_forwards is None or context.idle or context.given.step is not None or context.role == "router":
        return
    state.has_edited = state.has_edited or context.edits_something()
    if context.role == TOWER:
        return
    state.training_forwards += 1
    if context.given.passed.subspaces is None:
        warn_of_subspaces_together(state)
    if not context.role and context.tokens is not None and context.tokens.labels is not None:
        warn_of_covered_prompts(context.tokens, context.tokens.labels, state)
        warn_of_several_answers(context.tokens, state)
    if state.training_forwards >= FORWARDS_LOOKED_AT:
        state.training_forwards = None
        if not state.has_edited:
            state.warn_once(NOTHING_EDITED)


def warn_of_covered_prompts(tokens: Tokens, labels: Tensor, state: ModelState) -> None:
    """Say so if labels leave rows a prompt of one token, and that changes what is edited."""
    for spec in state.active_specs():
        if not spec.depends_on_the_end and spec.count("f") <= 1:
            continue
        turns = None if spec.turns == "all" else spec.turns
        prompts = tokens.prompts(turns, spec.prompt_end, spec.edits_answers)
        # The first token has a label (which TRL takes away in packed documents), and no other is the prompt's.
        has_label = (labels != IGNORED) | (prompts.document is not None)
        starts = tokens.valid & (prompts.order == 0) & has_label
        alone = tokens.valid & (prompts.order == 1) & (prompts.length <= 1)
        covered = starts.any(1) & alone.any(1)
        if covered.any():
            rows = ", ".join(map(str, covered.nonzero().flatten().tolist()[:8]))
            state.warn_once(LABELS_COVER_PROMPTS.format(rows=rows, positions=spec), PROMPTS_OF_LABELS)


def warn_of_several_answers(tokens: Tokens, state: ModelState) -> None:
    """Say so if labels show several answers in a document, and nothing says whose prompts are edited."""
    for spec in state.active_specs():
        if spec.turns is not None or not spec.depends_on_the_end:
            continue
        if tokens.labels_show_later_prompts(spec.prompt_end):
            state.warn_once(SEVERAL_ANSWERS.format(positions=spec), PROMPTS_OF_LABELS)


def warn_of_subspaces_together(state: ModelState) -> None:
    """Say so if the parts of an active adapter are trained together and nothing says that they are to be."""
    for layer in state.layers:
        for name in () if layer.disable_adapters else layer.active_adapters:
            parts = layer.subspaces.get(name, ())
            if len(parts) > 1 and name not in layer.chosen_subspaces and _is_trained(layer, name):
                state.warn_once(SUBSPACES_TOGETHER.format(names=list(parts)), "subspaces together")
                return


def _is_trained(layer: Any, name: str) -> bool:
    return any(parameter.requires_grad for parameter in layer.reft_interventions[name].parameters())
