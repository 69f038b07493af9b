"""Looking at what an adapter does to the tokens of some prompts, by running the model as it is: `inspect_adapter`.

- How far does each block's edit move each token? One forward, in which every block's own output h and its edit Δh
  are noted down at every token.
- Which blocks make the answer what it is? One more forward per block, in which that block alone does not edit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from peft_reft.inspect.batch import batches
from peft_reft.inspect.edits import edit_rows
from peft_reft.inspect.effects import effect_rows
from peft_reft.inspect.spy import Note, watched
from peft_reft.inspect.tables import Inspection
from peft_reft.tuner.injection import base_model_of, editing_layers, roles_of


@torch.no_grad()
def inspect_adapter(
    model: nn.Module,
    prompts: str | Sequence[Any] | Mapping[str, Any],
    tokenizer: Any = None,
    *,
    answers: str | Sequence[str] | None = None,
    effects: bool = True,
    batch_size: int = 8,
) -> Inspection:
    """How far the active adapters move each token of some prompts, and how much each block matters.

    Args:
        model: a `PeftModel`, or a model that adapters were injected into.
        prompts: one or several texts or conversations; or a batch as the model takes it, of tensors (with
            `intervention_locations`, for instance, or without any tokens). Texts are encoded as they are. A
            conversation, [{"role": "user", "content": "Hello"}], is encoded by the tokenizer's chat template.
        tokenizer: encodes texts, and gives the tokens their names; None with a batch shows ids.
        answers: for causal and encoder-decoder language models, an answer to each prompt. It follows the prompt as in
            training, so that the terms `d` and `dK` of `positions`, which edit generated tokens, are seen too.
        effects: also run the model once without each block's edits, and once without any.
        batch_size: how many prompts are run at once.

    The prediction whose change is measured is that of the token after the prompt (or the mean over the answer's
    tokens, if there are answers or labels); of a masked language model at its mask tokens, or at all tokens if there
    are none; of a classifier over its classes. A model whose output has no `logits` has no effects, and one with a
    single logit has no probabilities: there `tv` and `kl` are NaN and `logits` tells the change of the score.

    The model runs in eval mode without gradients. Its modes, hooks, strengths and active adapters are as they were when
    the function returns or fails. Norms and angles are worked out in double precision.

    Raises:
        ValueError: if no ReFT adapter is active, or the prompts are not what is described above.
    """
    base = base_model_of(model)
    layers = editing_layers(base)
    if not layers:
        raise ValueError(
            "No ReFT adapter is active in this model, so there is nothing to inspect. Call set_adapter first."
        )
    names = dict.fromkeys(name for layer in layers.values() for name in layer.active_adapters)
    for layer in layers.values():
        for name in layer.active_adapters:
            groups: Any = layer.reft_interventions._modules.get(name)
            if groups is not None and getattr(groups[0], "takes_source", False):
                raise ValueError(
                    f"The adapter {name!r} takes its values from a source, without which it edits nothing to inspect. "
                    "peft_reft.causal measures what such an adapter does."
                )
    adapters = [name for name in names if any(name in layer.reft_interventions for layer in layers.values())]
    result = Inspection(adapters=adapters)
    roles = roles_of(base)
    with watched(model, layers, result.together) as spies:
        for batch in batches(base, prompts, tokenizer, answers, batch_size):
            notes: list[Note] = []
            for spy in spies:
                spy.notes = notes
            output = model(**batch.inputs)
            for spy in spies:
                spy.notes = None
            for note in notes:
                stack = roles.get(base.get_submodule(note.block), "")
                result.edits += edit_rows(note, batch, stack)
            if effects:
                logits = getattr(output, "logits", None)
                lost, totals = effect_rows(model, base, batch, logits, spies, tokenizer)
                result.effects += lost
                result.totals += totals
    result.edits.sort(key=lambda row: row["prompt"])
    result.effects.sort(key=lambda row: row["prompt"])
    return result
