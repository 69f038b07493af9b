"""Notices when lm-eval's own model class scores continuations, whose contexts' ends it does not tell the model.

It runs context and continuation as one padded row, without mask and labels, so that the whole row counts as the prompt
(rule 5 of docs/positions.md). The model class in lm_eval.py tells; here those who use another one are told of it.
"""

from __future__ import annotations

import sys
from typing import Any

from peft_reft.context.root import Root
from peft_reft.positions.notation import PositionSpec

SCORED_BLINDLY = (
    "lm-eval scores continuations with a ReFT adapter of positions={!r}, but its own model class does not tell where a "
    "context ends: the whole row, continuation and padding included, counts as the prompt, and the scores depend on "
    "the batch. Use the model class `reft` instead of `hf`: `python -m peft_reft -m lm_eval --model reft ...`, or "
    "`import peft_reft.integrations.lm_eval` and model='reft'."
)


def warn_if_scored_blindly(root: Root) -> None:
    """Warn once if the running forward, which does not tell where prompts end, was called by lm-eval to score."""
    if "lm_eval.models.huggingface" not in sys.modules:
        return
    wrong = [spec for spec in root.specs() if needs_the_end(spec)]
    if wrong and SCORED_BLINDLY.format(str(wrong[0])) not in root.warned and called_by_lm_eval():
        root.warn_once(SCORED_BLINDLY.format(str(wrong[0])))


def needs_the_end(spec: PositionSpec) -> bool:
    """Whether the tokens that a spec names depend on where the prompt ends, and nothing in the tokens says where."""
    return not spec.prompt_end and any(term.kind != "f" for term in spec.terms)


def called_by_lm_eval() -> bool:
    """Whether the `_model_call` of one of lm-eval's model classes is running in this thread."""
    frame: Any = sys._getframe()
    while frame is not None:
        code, module = frame.f_code, frame.f_globals.get("__name__", "")
        if code.co_name == "_model_call" and module.startswith("lm_eval.models."):
            return True
        frame = frame.f_back
    return False
