"""The neighbours: trainers, lm-eval, model cards, hotswap, continuous batching. One file each; the tuner imports none.

What the tuner offers them is in tuner/neighbours.py; `register` takes it up when the package is imported.
"""

from __future__ import annotations

import os

from peft_reft.integrations import continuous_batching, hotswap
from peft_reft.tuner.neighbours import AFTER_SAVING


def register() -> None:
    """Make the integrations known to the tuner. Each does its own imports when it is needed."""
    hotswap.register()
    continuous_batching.register()
    AFTER_SAVING[:] = [describe_saved]


def describe_saved(directory: str | os.PathLike[str]) -> None:
    """Write ReFT's section into the README.md of an adapter that was just saved."""
    from peft_reft.integrations.model_card import describe_saved

    describe_saved(directory)
