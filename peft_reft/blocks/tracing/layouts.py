"""The layout of a module's output, read off traces that differ in their numbers of rows and columns.

Nothing is concluded from a size alone: where columns stand before the tokens or after them, other tokens are put in and
followed to where they come out.
"""

from __future__ import annotations

from dataclasses import replace

from peft_reft.blocks.layout import NOT_TOKENS, PLAIN, Layout, layout_from
from peft_reft.blocks.structure import can_pad, modules_around
from peft_reft.blocks.tracing.trace import trace
from peft_reft.blocks.tracing.traced_model import TOKENS, TracedModel

MANY = 32  # tokens: enough to see by how much pooling divides their number


def traced_layout(model: TracedModel, name: str) -> Layout | None:
    """The layout of a module's output in the traces; None if it did not run or returns no vectors to count.

    Where an image's vectors may stand beside those of the tokens, it is the layout with an image, which tells where
    the tokens are without one, too.
    """
    layout = _layout(model, name)
    if layout != PLAIN:
        return layout
    if model.with_image is not None and (beside := traced_layout(model.with_image, name)) is not None:
        return beside
    return Layout(padded=True) if _may_pad(model, name) else PLAIN


def _layout(model: TracedModel, name: str) -> Layout | None:
    shapes = model.shapes(name)
    if len(shapes) < 2:
        return None
    rows = [one.rows for one in model.traces]
    columns = model.columns(name)
    if model.traces[0].is_image and columns[0] == model.traces[0].columns:  # not a decoder of text
        return Layout(pool=NOT_TOKENS) if len(shapes[0]) == 3 and [shape[0] for shape in shapes] == rows else None
    layout = layout_from(shapes, rows, columns)
    if layout is not None and (layout.before or layout.padded):
        start = _first_token(model, name, layout)
        if start is not None:
            return replace(layout, before=start, padded=layout.padded or start < layout.before)
        if not layout.padded:
            return None
        layout = None  # more vectors than tokens, and none of them a token's
    return layout or _pooled_layout(model, name)


def _pooled_layout(model: TracedModel, name: str) -> Layout | None:
    """The layout of an encoder's block that returns [B, T, d] with other vectors than the tokens'."""
    shapes, rows = model.shapes(name), [one.rows for one in model.traces]
    can_generate = getattr(model.model, "can_generate", bool)()
    if can_generate or any(len(s) != 3 or s[0] != n for s, n in zip(shapes, rows)) or shapes[0][2] != shapes[1][2]:
        return None
    if shapes[0][1] == shapes[1][1]:
        return Layout(pool=NOT_TOKENS)
    output = trace(model.model, model.entry, rows[0], MANY).by_name[name][0].output
    return None if output is None else Layout(pool=round(MANY / output.shape[1]))


def _first_token(model: TracedModel, name: str, layout: Layout) -> int | None:
    """The column of the first token, if the others follow it: the columns that change when another token takes the
    place of the first or of the last one.
    """
    before, *outputs = (
        trace(model.model, model.entry, *TOKENS[-1], other_at).by_name[name][0].output for other_at in (None, 0, -1)
    )
    found: list[int] = []
    for output in outputs:
        if output is None or before is None or output.shape != before.shape:
            return None
        changed = (output != before).movedim((layout.rows, layout.columns), (0, 1)).flatten(2).any(2).any(0)
        columns = changed.nonzero().flatten().tolist()
        if len(columns) != 1:
            return None
        found += columns
    first, last = found
    return first if last - first == model.columns(name)[-1] - 1 else None


def _may_pad(model: TracedModel, name: str) -> bool:
    """Whether more tokens than were traced may get padding behind the last.

    BigBird pads to a multiple of its block from the length on at which its attention becomes sparse: 705 tokens by
    default, too many to trace. All methods of that kind in transformers pad at the end.
    """
    is_decoder = model.columns(name)[0] != model.traces[0].columns  # beside an encoder that pads
    return not is_decoder and any(can_pad(module) for module in modules_around(model.model, name))
