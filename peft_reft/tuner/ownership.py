"""Whether a block's output is nobody else's, so that it may be edited in place.

Without autograd a copy of the hidden state would be most of what an edit of a few tokens costs. But a block may hand
out what others hold: its input, a module's parameter, a tensor that a user's hook has kept. Python counts the
references to a tensor and torch those to its memory; a fresh output has as many as one that nobody has kept.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


def nobody_elses(output: Tensor, references: int) -> bool:
    """Whether a block's output may be written to in a forward hook of the block, where autograd is off.

    Args:
        output: what the block returned.
        references: `sys.getrefcount(output)`, as counted in the hook itself.
    """
    if type(output) is not Tensor or not output.is_contiguous():
        return False
    if output.is_inference() is not torch.is_inference_mode_enabled():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:  # vmap: an edit may have dimensions that h lacks
        return False
    return (references, _holders(output)) == _of_a_fresh_output()


def _holders(tensor: Tensor) -> int | None:
    """How many tensors share the memory of this one, as torch counts them."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    return None if count is None else int(count(tensor.untyped_storage()._cdata))


@cache
def _of_a_fresh_output() -> tuple[int, int] | None:
    """The counts of an output that nobody has kept, with this Python and this torch; None if they cannot be told."""
    seen: list[tuple[int, int | None]] = []

    def hook(block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Any:
        seen.append((sys.getrefcount(output), _holders(output)))

    class Block(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return h + 1

    block = Block()
    block.register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad():
        block(torch.zeros(2))
    references, holders = seen[0]
    return None if holders is None else (references, holders)
