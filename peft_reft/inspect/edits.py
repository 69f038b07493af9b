"""The table of edits: what was noted down about a block, as a row for each token."""

from __future__ import annotations

from typing import Any

from peft_reft.blocks.numbering import block_number
from peft_reft.inspect.batch import Batch, Columns
from peft_reft.inspect.spy import Note


def edit_rows(note: Note, batch: Batch, stack: str) -> list[dict[str, Any]]:
    """The rows of `Inspection.edits` for one block's call.

    Args:
        stack: of the block.
    """
    shape = note.deltas[0].edited.shape
    columns = batch.stacks.get(stack)
    if columns is None or columns.valid.shape != shape:  # vectors that are not those of tokens
        columns = Columns.without_tokens(*shape)
    positions = (columns.valid.long().cumsum(1) - 1).tolist()
    answer = columns.answer.tolist()
    ids = [[-1] * shape[1]] * shape[0] if columns.ids is None else columns.ids.tolist()
    depth = block_number(note.block)
    found = []
    for deltas in note.deltas:
        edited = deltas.edited.tolist()
        terms = [(term, where.tolist()) for term, where in deltas.terms]
        numbers = {key: value.tolist() for key, value in deltas.numbers.items()}
        for row, column in columns.valid.nonzero().tolist():
            token, position = ids[row][column], positions[row][column]
            named = [term for term, where in terms if edited[row][column] and where[row][column]]
            found.append(
                {
                    "prompt": batch.first + row,
                    "block": note.block,
                    "depth": depth,
                    "stack": stack,
                    "call": note.call,
                    "adapter": deltas.adapter,
                    "position": position,
                    "column": column,
                    "token": columns.names[row][column] if columns.names else str(position),
                    "token_id": token,
                    "part": "answer" if answer[row][column] else "prompt",
                    "edited": edited[row][column],
                    "term": named[0] if named else "",
                    **{key: value[row][column] for key, value in numbers.items()},
                }
            )
    return found
