"""A notice when lm-eval's own model class scores continuations with an adapter that must know where contexts end.

That class, `hf`, runs context and continuation as one padded row, without mask and labels, so that the whole row
counts as the prompt (rule 5 of docs/positions.md). The class `reft` of lm_eval.py says where contexts end. lm-eval has
no hook around a class's calls, so the method that runs rows is wrapped; other forwards of the model do not pass here.

The method is wrapped when an adapter is made (or loaded) and lm-eval's class is imported by then.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from typing import Any

from lm_eval.models.huggingface import HFLM

from peft_reft.integrations.active import positions_that_need_the_end

SCORED_BLINDLY = (
    "lm-eval scores continuations with a ReFT adapter of positions={!r}, but its own model class does not tell where a "
    "context ends: the whole row, continuation and padding included, counts as the prompt, and the scores depend on "
    "the batch. Use the model class `reft` instead of `hf`: `python -m peft_reft -m lm_eval --model reft ...`, or "
    "`import peft_reft.lm_eval` and model='reft'."
)
_told: weakref.WeakSet[Any] = weakref.WeakSet()  # models of which it was said


def watch_scoring() -> None:
    """Wrap `HFLM._model_call`, once."""
    run = HFLM._model_call
    if getattr(run, "gives_reft_notice", False):
        return

    @functools.wraps(run)
    def run_with_notice(self: Any, inps: Any, attn_mask: Any = None, labels: Any = None) -> Any:
        if attn_mask is None and self.model not in _told:  # an encoder-decoder model comes with its mask and labels
            positions = positions_that_need_the_end(self.model)
            if positions is not None:
                _told.add(self.model)
                warnings.warn(SCORED_BLINDLY.format(positions), stacklevel=2)
        return run(self, inps, attn_mask, labels)

    run_with_notice.gives_reft_notice = True  # type: ignore[attr-defined]
    HFLM._model_call = run_with_notice
