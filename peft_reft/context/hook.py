"""The hook of a block, through which its output passes.

It gets the call's context, leaves if nothing is edited, and hands the hidden state to the block's layer, which gathers
the vectors to edit, multiplies twice, and puts the edits back into a copy (see `Edit.add`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from peft_reft.blocks import OWN, edit_hidden_state
from peft_reft.context.forward import ForwardContext, Given
from peft_reft.context.state import ModelState

CHILD = "reft"  # the layer's name below its block; must not hold the prefix "reft_", by which PEFT skips modules


class BlockHook:
    """Forward hook of a block with a layer: the block's output becomes the edited one."""

    def __init__(self, state: ModelState):
        self.state = state
        self.running = state.running

    def __call__(self, block: nn.Module, args: Any, output: Any) -> Any:
        context = self.running.context
        if context is not None and context.idle:
            return None
        layer: Any = block._modules[CHILD]
        if layer._disable_adapters:
            return None
        if context is None:
            return self._outside(layer, output)
        if layer.is_plain and isinstance(output, Tensor) and output.dim() == 3:
            return layer.edit(output, context)
        layout = layer.layout
        if layout.pool:
            return edit_hidden_state(output, lambda h: layout.edit(h, None, lambda part: pooled(layer, part, context)))
        return edit_hidden_state(
            output, lambda h: layout.edit(h, context.columns, lambda part: layer.edit(part, context))
        )

    def _outside(self, layer: Any, output: Any) -> Any:
        """The output of a block that runs outside of a call of its model, where there are no tokens to count."""

        def edit(h: Tensor) -> Tensor:
            specs = sorted({str(spec) for spec in layer.active_specs()} - {"all"})
            if specs and layer.layout.pool != OWN:
                raise ValueError(
                    f"positions={specs[0]!r} counts tokens, but the block of a ReFT adapter ran outside of its model's "
                    "forward, where there are none. Call the model as a whole, or use positions='all'."
                )
            return layer.edit(h, ForwardContext(self.state, [layer], Given()))

        return edit_hidden_state(output, lambda h: layer.layout.edit(h, None, edit))


def pooled(layer: Any, h: Tensor, context: ForwardContext) -> Tensor:
    """`h` [B, T, d] with its edits, where its T vectors are not those of the call's tokens."""
    return layer.edit(h, context.of_vectors(layer.layout.pool, h.shape[1]))
