"""The neighbours, one file each: collators, trainers, lm-eval, model cards, hotswap, continuous batching.

Each imports the tuner, which imports none of them: what they do when an adapter is made or saved is registered here
with the tuner's lists. A library that is not loaded is not imported for it. Two files are shared by the tools:
arguments.py has what their command lines have in common, loading.py puts saved adapters on their base model.
"""

from __future__ import annotations

import os
import sys

from torch import nn

from peft_reft.integrations import continuous_batching, hotswap
from peft_reft.tuner.neighbours import AFTER_SAVING, ON_INJECTION


def register() -> None:
    """Enter the functions below into the tuner's lists, once."""
    hotswap.register()
    continuous_batching.register()
    for watch in (watch_trainers, watch_lm_eval):
        if watch not in ON_INJECTION:
            ON_INJECTION.append(watch)
    if add_card not in AFTER_SAVING:
        AFTER_SAVING.append(add_card)


def watch_trainers(model: nn.Module) -> None:
    """Let transformers' trainers give the notices of trainer.py."""
    from peft_reft.integrations.trainer import add_to_trainers

    add_to_trainers()


def watch_lm_eval(model: nn.Module) -> None:
    """Let lm-eval's own model class give the notice of lm_eval_notice.py, if the program uses it."""
    if "lm_eval.models.huggingface" in sys.modules:
        from peft_reft.integrations.lm_eval_notice import watch_scoring

        watch_scoring()


def add_card(directory: str | os.PathLike[str]) -> None:
    """Write ReFT's section into the model card of a saved adapter."""
    from peft_reft.integrations.model_card import describe_saved

    describe_saved(directory)
