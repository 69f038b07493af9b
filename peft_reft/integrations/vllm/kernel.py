"""The edit on GPUs: one program for each token of the step.

A program looks up its token in the step's buffers on the device, and ends there if nothing is edited. The host decides
nothing, so a captured CUDA graph does in each replay what the buffers say then. Tokens with an edit read the rows of
their own intervention alone: the cost does not grow with the number of adapters.

Shape letters in comments: C columns of a slot, D a part of the hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from peft_reft.integrations.vllm.slots import SlotTable

PART = 4096  # numbers of a factor that a program holds at once


@triton.jit
def _tanh(x):  # type: ignore[no-untyped-def]
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def _activated(x, act):  # type: ignore[no-untyped-def]
    """The activations of `KERNEL_ACTIVATIONS` by their numbers."""
    gelu_tanh = 0.5 * x * (1 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    result = x
    result = tl.where(act == 1, tl.maximum(x, 0.0), result)
    result = tl.where(act == 2, tl.sigmoid(x), result)
    result = tl.where(act == 3, _tanh(x), result)
    result = tl.where(act == 4, x * tl.sigmoid(x), result)
    result = tl.where(act == 5, 0.5 * x * (1 + tl.erf(x * 0.7071067811865476)), result)
    result = tl.where(act == 6, gelu_tanh, result)
    result = tl.where(act == 7, tl.where(x >= 0, x, 0.01 * x), result)
    return result


@triton.jit  # type: ignore[untyped-decorator]
def _edit(  # type: ignore[no-untyped-def]
    hidden,
    residual,
    down,
    up,
    bias,
    first,
    rank,
    act,
    strength,
    hidden_stride,
    residual_stride,
    width,
    has_residual: tl.constexpr,
    columns: tl.constexpr,
    part: tl.constexpr,
):
    token = tl.program_id(0)
    start = tl.load(first + token)
    if start < 0:
        return
    own = tl.arange(0, columns)
    used = own < tl.load(rank + token)
    kind = tl.load(act + token)
    row = hidden + token.to(tl.int64) * hidden_stride
    other = residual + token.to(tl.int64) * residual_stride
    rows = (start + own).to(tl.int64)[:, None] * width
    value = tl.load(bias + start + own, mask=used, other=0.0)  # [C]
    subtracted = tl.zeros([columns], dtype=tl.float32)
    for at in range(0, width, part):
        place = at + tl.arange(0, part)
        inside = place < width
        both = used[:, None] & inside[None, :]
        h = tl.load(row + place, mask=inside, other=0.0).to(tl.float32)  # [D]
        if has_residual:
            h += tl.load(other + place, mask=inside, other=0.0).to(tl.float32)
        factor = tl.load(down + rows + place[None, :], mask=both, other=0.0)  # [C, D]
        value += tl.sum(factor * h[None, :], axis=1)
        if kind % 2 == 1:
            factor = tl.load(up + rows + place[None, :], mask=both, other=0.0)
            subtracted += tl.sum(factor * h[None, :], axis=1)
    value = (_activated(value, kind // 2) - subtracted) * tl.load(strength + token)
    value = tl.where(used, value, 0.0)
    for at in range(0, width, part):
        place = at + tl.arange(0, part)
        inside = place < width
        factor = tl.load(up + rows + place[None, :], mask=used[:, None] & inside[None, :], other=0.0)
        delta = tl.sum(factor * value[:, None], axis=0)
        h = tl.load(row + place, mask=inside, other=0.0)
        # Rounded first, as `h + edit.to(h.dtype)` is; added in single precision, which every way of running this has.
        rounded = delta.to(h.dtype).to(tl.float32)
        tl.store(row + place, (h.to(tl.float32) + rounded).to(h.dtype), mask=inside)


def launch(hidden: Tensor, residual: Tensor | None, table: SlotTable, block: int) -> None:
    """As `edit_tokens`, on the current GPU."""
    if hidden.stride(-1) != 1 or (residual is not None and residual.stride(-1) != 1):
        raise ValueError(f"A block returns hidden states with the strides {hidden.stride()}, not vector after vector.")
    if hidden.shape[0] > len(table.first):
        raise ValueError(f"A forward has {hidden.shape[0]} tokens, and the tables are for at most {len(table.first)}.")
    columns = max(1, triton.next_power_of_2(table.columns))
    part = min(triton.next_power_of_2(table.width), max(16, PART // columns))
    second = hidden if residual is None else residual
    _edit[(hidden.shape[0],)](
        hidden,
        second,
        table.down[block],
        table.up[block],
        table.bias[block],
        table.first,
        table.rank,
        table.act,
        table.strength,
        hidden.stride(0),
        second.stride(0),
        table.width,
        has_residual=residual is not None,
        columns=columns,
        part=part,
    )
