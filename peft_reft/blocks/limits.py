"""What an adapter cannot work on, although it has blocks: edits would be computed but mean something else."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from peft_reft.blocks.compiled import own_modules, own_name
from peft_reft.blocks.numbering import block_number


def refuse_unsound(model: nn.Module, names: Sequence[str]) -> None:
    """Refuse blocks whose edits would be computed but mean something else.

    Raises:
        ValueError: with the reason.
    """
    modules, names = own_modules(model), [own_name(name) for name in names]
    model = modules[""]
    if any(hasattr(modules[name], "backward_pass") for name in names):
        raise ValueError(
            f"{type(model).__name__} has reversible blocks: their backward pass works out their inputs from their "
            "outputs, which an edit of the outputs would falsify without an error. ReFT cannot train it."
        )
    for name in names:
        if isinstance(modules.get(name.rpartition(".")[0]), nn.MultiheadAttention):
            raise ValueError(
                f"{name!r} is never called: nn.MultiheadAttention multiplies with its weights itself, so that there "
                f"would be no edit. Target {name.rpartition('.')[0]!r} instead, or leave it out with exclude_modules."
            )
    every = getattr(getattr(model, "config", None), "rescale_every", 0) or 0
    if every > 0 and any((block_number(name) or 0) >= every for name in names):  # those behind the first halving
        raise ValueError(
            f"{type(model).__name__} halves its hidden states every {every} blocks at inference but not in training, "
            "so that an edit would mean different things. Set model.config.rescale_every = 0 before you run the model."
        )
