"""What the last forward was not told, kept for those who run it and can say what to change: trainers in evaluation."""

from __future__ import annotations

from torch import nn

UNLABELLED = "_reft_last_forward_unlabelled"


def note_forward(module: nn.Module, unlabelled: bool) -> None:
    """Keep of a forward of `module` whether nothing told where its prompts end.

    Args:
        unlabelled: a causal language model was run without labels and locations, outside `generate` and training.
    """
    if unlabelled:
        module.__dict__[UNLABELLED] = True
    else:
        module.__dict__.pop(UNLABELLED, None)


def unlabelled_forward(model: nn.Module) -> bool:
    """Whether the last forward of a model, since this was last asked, was not told where its prompts end."""
    noted = [module for module in model.modules() if UNLABELLED in module.__dict__]
    for module in noted:
        del module.__dict__[UNLABELLED]
    return bool(noted)
