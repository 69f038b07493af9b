"""Where a block's output is edited: its `forward`, for which an entry stands in.

The entry runs the block, gets the context of the call, leaves if nothing is edited, and hands the hidden state to the
block's layer, which gathers the vectors to edit, multiplies twice, and puts the edits into a copy (see `Edit.add`).

It is no forward hook because one hook of any kind makes torch call a module on a slower way, in every step of
`generate` too: on 30 blocks that takes longer than all else that a step without an edit costs.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft_reft.blocks import NOT_TOKENS, edit_hidden_state
from peft_reft.context import notices
from peft_reft.context.forward import ForwardContext, Given
from peft_reft.context.method import MethodEntry
from peft_reft.context.state import ModelState

CHILD = "reft"  # the layer's name below its block; must not hold the prefix "reft_", by which PEFT skips modules


OUTSIDE = (
    "A block of a ReFT adapter ran outside of its model's forward, where neither padding nor the prompt is known, so "
    "that positions='all' edits every vector. In the backward pass of a torch.utils.checkpoint of your own, this "
    "gives the gradients of another edit: call model.gradient_checkpointing_enable(), or wrap the blocks with torch's "
    "apply_activation_checkpointing, whose second runs know the call. To run a block by itself, put it in evaluation "
    "mode."
)
COPY = "A copy of a block is outside of every model; without its child `{child}` (del block.{child}) it edits nothing."


class BlockEntry(MethodEntry):
    """Stands in for the `forward` of a block with a layer: what the block returns becomes the edited output."""

    name = "forward"

    def __init__(self, module: nn.Module, state: ModelState):
        super().__init__(module, state)
        self.running = state.running

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        block, context = self.module, self.running.context
        if self.replaced is None:
            output = type(block).forward(block, *args, **kwargs)
        else:
            output = self.replaced(*args, **kwargs)
        if context is not None and context.idle:
            return output
        layer: Any = block._modules.get(CHILD)
        if layer is None or layer._disable_adapters:
            return output
        outermost = block.__dict__["forward"]
        if outermost is not self and type(outermost) is BlockEntry:  # which edits it
            return output
        if context is None:
            return self._outside(layer, output)
        if layer.is_plain and isinstance(output, Tensor) and output.dim() == 3:
            return layer.edit(output, context)
        return edit_hidden_state(output, partial(_edit_laid_out, layer, context))

    def _outside(self, layer: Any, output: Any) -> Any:
        """The output of a block that runs outside of a call of its model, where there are no tokens to count."""

        def edit(h: Tensor) -> Tensor:
            specs = sorted({str(spec) for spec in layer.active_specs()} - {"all"})
            if specs and layer.layout.pool != NOT_TOKENS:
                copy = "" if self.state.entries else f" {COPY.format(child=CHILD)}"
                raise ValueError(
                    f"positions={specs[0]!r} counts tokens, but the block of a ReFT adapter ran outside of its model's "
                    f"forward, where there are none. Call the model as a whole, or use positions='all'.{copy}"
                )
            if not specs and torch.is_grad_enabled() and self.state.takes_ids:
                notices.raise_or_warn(self.state, self.module, OUTSIDE, "outside")
            return layer.edit(h, ForwardContext(self.state, [layer], Given()))

        return edit_hidden_state(output, lambda h: layer.layout.edit(h, None, edit))


def _edit_laid_out(layer: Any, context: ForwardContext, h: Tensor) -> Tensor:
    """The edit of a hidden state whose axes lie as the layer's layout says."""
    layout = layer.layout
    if layout.pool:  # its vectors are not those of the call's tokens
        return layout.edit(h, None, lambda rows: layer.edit(rows, context.of_vectors(layout.pool, rows.shape[1])))
    if context.columns is None and h.dim() > 3:
        layer.refuse_to_count("the vectors of a sequence [B, S, d]", h.shape)
    return layout.edit(h, context.columns, lambda rows: layer.edit(rows, context))


class KeepsCalled:
    """Forward pre-hook that does nothing but be there, on a module within a layer of torch's own transformer.

    At inference torch runs a whole nn.TransformerEncoderLayer as one operation, without calling the modules in it (so
    that there would be no edit), unless one of them has a hook.
    """

    def __call__(self, module: nn.Module, args: Any) -> None:
        return None


def keep_called(block: nn.Module) -> None:
    """Have a module called wherever it lies in an nn.TransformerEncoderLayer."""
    if not any(isinstance(hook, KeepsCalled) for hook in block._forward_pre_hooks.values()):
        block.register_forward_pre_hook(KeepsCalled())


def undo_keep_called(block: nn.Module) -> None:
    """Undo `keep_called`."""
    for key, hook in list(block._forward_pre_hooks.items()):
        if isinstance(hook, KeepsCalled):
            del block._forward_pre_hooks[key]


def attach_block_entry(block: nn.Module, state: ModelState) -> None:
    """Put an entry in place of a block's forward, in front of what else is there.

    Accelerate, too, puts something in that place, and forgets what was there before when it does so twice.
    """
    if type(block.__dict__.get("forward")) is not BlockEntry:
        BlockEntry(block, state).attach()
