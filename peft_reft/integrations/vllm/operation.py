"""The edit of a block's output: one custom operation, so that a compiler sees one node and looks at no Python state.

`torch.compile` records the operation with the numbers of the table and the block; what it does is read from the table
in each call. On CPUs that is the step's list of passes. On GPUs a kernel reads the step's buffers (kernel.py), without
any decision on the host that a CUDA graph would freeze.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peft_reft.integrations.vllm.probe import Convention
from peft_reft.integrations.vllm.slots import TABLES, SlotTable
from peft_reft.interventions import low_rank_edit


def edit_passes(hidden: Tensor, residual: Tensor | None, slots: SlotTable, block: int) -> None:
    """Add the edits of a table's passes to a block's output, in place.

    Args:
        hidden, residual, block: as for `edit_tokens`.
    """
    for one in slots.passes:
        if block not in one.blocks:
            continue
        h = hidden.index_select(0, one.tokens).float()
        if residual is not None:
            h = h + residual.index_select(0, one.tokens)
        batched = one.strength is not None and one.strength.dim() == 3
        h = h.unflatten(0, one.strength.shape[:2]) if batched else h  # type: ignore[union-attr]
        delta = low_rank_edit(h, slots.factors(one, block), one.strength)
        hidden.index_add_(0, one.tokens, (delta.flatten(0, 1) if batched else delta).to(hidden.dtype))


@torch.library.custom_op("peft_reft::edit_tokens", mutates_args=("hidden",), device_types="cpu")
def edit_tokens(hidden: Tensor, residual: Tensor | None, table: int, block: int) -> None:
    """Add the running step's edits to a block's output, in place.

    Args:
        hidden: [tokens, d], in any floating dtype; edits are worked out in float32.
        residual: [tokens, d] if the residual stream is the sum of both; None if it is `hidden`.
        table: number of the table in `TABLES`.
        block: number of the block in it.
    """
    edit_passes(hidden, residual, TABLES[table], block)


@edit_tokens.register_fake
def _(hidden: Tensor, residual: Tensor | None, table: int, block: int) -> None:
    return None


@edit_tokens.register_kernel("cuda")
def _(hidden: Tensor, residual: Tensor | None, table: int, block: int) -> None:
    from peft_reft.integrations.vllm.kernel import launch

    with torch.cuda.device(hidden.device):
        launch(hidden, residual, TABLES[table], block)


class EditHook:
    """A forward hook of a block: edits what it returns, in place.

    Args:
        table, block: as for `edit_tokens`.
        convention: where the residual stream lies in what the block returns.
    """

    def __init__(self, table: int, block: int, convention: Convention):
        self.table, self.block, self.convention = table, block, convention

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        table = TABLES[self.table]
        # Without a compiler or a graph: nothing is called where nothing is edited, and no dispatcher is in between.
        plain = not torch.compiler.is_compiling() and table.device.type == "cpu"
        if plain and not table.passes:
            return
        hidden, residual = self.convention.parts(output)
        if hidden.dim() == 3:  # transformers' modules, in vLLM with a batch of one
            hidden, residual = hidden.flatten(0, 1), None if residual is None else residual.flatten(0, 1)
        if plain:
            edit_passes(hidden, residual, table, self.block)
        else:
            edit_tokens(hidden, residual, self.table, self.block)
