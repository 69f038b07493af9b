"""Where a block keeps the vectors of the tokens in what it returns.

Most return [B, S, d]. Others put time or channels first, keep several streams per token, virtual tokens before the
first or padding after the last. Finding out which axis is which is left to `declared` and `tracing`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput


@dataclass(frozen=True)
class Layout:
    """The axes of a hidden state; the rest hold streams: several vectors for each token.

    Attributes:
        rows, columns, vector: the axes of the batch, the tokens and the vectors. Without `columns`: no token axis.
        streams: how many sequences of all tokens stand one after the other on the axis of the tokens.
        before: columns that may stand before the first token.
        padded: whether more columns than the tokens' may follow them.
        pool: for how many tokens each vector stands, 0 where each token has its own (or several); `NOT_TOKENS` where
            vectors are no tokens' (latents of a Perceiver, patches of an image) and are counted themselves.
    """

    rows: int = 0
    columns: int = 1
    vector: int = -1
    streams: int = 1
    before: int = 0
    padded: bool = False
    pool: int = 0

    def edit(self, h: Tensor, columns: int | None, edit: Callable[[Tensor], Tensor]) -> Tensor:
        """`h` with the vectors of its tokens edited.

        Args:
            h: the hidden state, as the block returned it.
            columns: how many tokens each row has, None if there are none to count.
            edit: maps [B, S, d] to the same; called for each stream.
        """
        if self == PLAIN and h.dim() <= 3:
            return edit(h)
        axes, back = (self.rows, self.columns, self.vector), (0, 1, -1)
        moved = h.movedim(axes, back)
        start, stop = self._tokens(moved.shape[1], columns)
        part = moved[:, start:stop]
        if self.streams > 1 and columns is not None:
            part = part.reshape(-1, self.streams, columns, part.shape[-1]).movedim(1, 2)
        edited = _each_stream(part, edit)
        if self.streams > 1 and columns is not None:
            edited = edited.movedim(2, 1).flatten(1, 2)
        if (start, stop) != (0, moved.shape[1]):
            edited = torch.cat([moved[:, :start], edited, moved[:, stop:]], dim=1)
        edited = edited.movedim(back, axes)
        return edited.contiguous() if h.is_contiguous() else edited

    def _tokens(self, size: int, columns: int | None) -> tuple[int, int]:
        """The range of the token axis that holds tokens."""
        if columns is None or size == columns or self.streams > 1:
            return 0, size
        if size == self.before + columns or (self.padded and size > self.before + columns):
            return self.before, self.before + columns
        return 0, size  # for the layer to refuse, which knows what to say


NOT_TOKENS = -1
PLAIN = Layout()
CHANNELS_FIRST = Layout(columns=2, vector=1)  # of a convolution: a vector for each place


def _each_stream(h: Tensor, edit: Callable[[Tensor], Tensor]) -> Tensor:
    """Edit [B, S, ..., d], stream by stream."""
    if h.dim() == 3:
        return edit(h)
    streams = h.flatten(2, -2)
    return torch.stack([edit(stream) for stream in streams.unbind(2)], dim=2).view(h.shape)


def layout_from(shapes: Sequence[tuple[int, ...]], rows: Sequence[int], columns: Sequence[int]) -> Layout | None:
    """The layout of a module's output, from its shapes in two traces with different numbers of rows and columns.

    Returns:
        None if the output does not hold one vector (or a fixed number of them) for each token. A layout with columns
        on top of the tokens' has `before` set to how many, or `padded` if their number is not fixed, as where tokens
        are padded to a multiple. Where the tokens stand among them is not known from shapes.
    """
    first, second = shapes
    if len(first) != len(second) or len(first) < 3:
        return None
    changed = [axis for axis in range(len(first)) if first[axis] != second[axis]]
    row_axes = [axis for axis in changed if (first[axis], second[axis]) == tuple(rows)]
    if not row_axes:
        return None
    row_axis = row_axes[0]
    others = [axis for axis in changed if axis != row_axis]
    if len(others) > 1:
        return None
    fixed = [axis for axis in range(len(first)) if axis != row_axis and axis not in others]
    if not others:  # as many columns in both runs: a window that tokens are padded to
        return Layout(row_axis, fixed[0], fixed[-1] - len(first), padded=True) if len(fixed) > 1 else None
    axis = others[0]
    times, rest = divmod(second[axis] - first[axis], columns[1] - columns[0])
    more = first[axis] - times * columns[0]
    if rest or times < 1 or more < 0 or (times > 1 and more):
        is_room = first[axis] >= columns[0] and second[axis] >= columns[1]
        return Layout(row_axis, axis, fixed[-1] - len(first), padded=True) if is_room else None
    return Layout(row_axis, axis, fixed[-1] - len(first), streams=times, before=more)


def hidden_state_of(output: Any) -> Tensor | None:
    """The hidden state in what a block returned: the tensor, or the first tensor of a tuple, list or mapping."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, (tuple, list)):
        return next((value for value in output if isinstance(value, Tensor)), None)
    return None


def edit_hidden_state(output: Any, edit: Callable[[Tensor], Tensor]) -> Any:
    """What a block returned, with its hidden state edited; of the same type as before."""
    if isinstance(output, Tensor):
        return edit(output)
    h = hidden_state_of(output)
    if h is None:
        raise TypeError(f"A block returned {type(output).__name__}, in which there is no hidden state.")
    if isinstance(output, Mapping):
        values = {name: edit(value) if value is h else value for name, value in output.items()}
        return type(output)(**values) if isinstance(output, ModelOutput) else values
    items = [edit(value) if value is h else value for value in output]
    return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
