"""Where the prompts lie in a batch: padding, labels, packed documents, cached columns.

A sequence is one document: a row without its padding, or one of the documents packed into a row. Its prompt
is what is given before the first prediction that counts. Everything here is tensor arithmetic without
data-dependent control flow: no device synchronisation, no graph break.

Shape letters: B rows, S columns of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # the label of a token that is not predicted, as in torch's cross entropy


@dataclass(frozen=True)
class Prompts:
    """Each column's place in the prompt of its document.

    Attributes:
        inside: bool [B, S], True for tokens of a prompt.
        order: long [B, S], number of the token within its prompt, from 0 (meaningful where `inside`).
        length: long [B, 1], or [B, S] for packed rows: tokens in the prompt of the column's document.
        document: long [B, S], number of the column's document within its row; None if no row packs several.
        num_documents: the most documents a row can hold, None if that is not known without looking at the data.
    """

    inside: Tensor
    order: Tensor
    length: Tensor
    document: Tensor | None = None
    num_documents: int | None = None

    def repeat(self, times: int) -> Prompts:
        """Each row `times` times in a row, as beam search and `num_return_sequences` expand a batch."""
        if times == 1:
            return self
        return self._map(lambda tensor: tensor.repeat_interleave(times, dim=0))

    def window(self, start: int, columns: int) -> Prompts:
        """The columns `start ... start + columns - 1`, as a forward that continues a cache sees them."""
        stop, total = start + columns, self.inside.shape[1]

        def cut(tensor: Tensor) -> Tensor:
            if tensor.shape[1] != total:  # length [B, 1] holds for every column
                return tensor
            return F.pad(tensor[:, start:stop], (0, max(0, columns - max(0, total - start))))

        return self._map(cut)

    def _map(self, function) -> Prompts:
        document = None if self.document is None else function(self.document)
        return Prompts(function(self.inside), function(self.order), function(self.length), document, self.num_documents)


def find_prompts(
    valid: Tensor,
    labels: Tensor | None = None,
    starts: Tensor | None = None,
    num_documents: int | None = None,
) -> Prompts:
    """Find the prompt of every document.

    Args:
        valid: bool [B, S], False for padding.
        labels: long [B, S] aligned with the tokens, -100 = not predicted; a document's prompt ends before its
            first label, at or after its second token (a first token is never predicted). None: every valid
            token is prompt. A document without any label is all prompt.
        starts: bool [B, S], True where a document begins, for rows that pack several; None: a row is one document.
        num_documents: the most documents a row can hold, if known.
    """
    order = valid.long().cumsum(1) - 1  # counts over tokens, never over padding
    document = None
    if starts is not None:
        starts = starts & valid
        document = (starts.long().cumsum(1) - 1).clamp(min=0)
        order = order - torch.where(starts, order, 0).cummax(1).values
    inside = valid
    if labels is not None:
        predicted = valid & (labels != IGNORED) & (order > 0)
        answered = predicted.long().cumsum(1)
        if starts is not None:  # count within the document: take off what earlier documents hold
            answered = answered - torch.where(starts, answered, 0).cummax(1).values
        inside = valid & (answered == 0)
    if document is None:
        return Prompts(inside, order, inside.long().sum(1, keepdim=True))
    per_document = torch.zeros_like(order).scatter_add(1, document, inside.long())
    return Prompts(inside, order, per_document.gather(1, document), document, num_documents)


def document_starts(
    valid: Tensor,
    position_ids: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seq_lens: Tensor | None = None,
) -> tuple[Tensor | None, int | None]:
    """Where documents begin in packed rows, by whichever description the batch brings.

    Args:
        valid: bool [B, S].
        position_ids: long [B, S], restarting with every document; looked at on valid tokens only, and only
            a step that does not go up counts as a restart (padding and holes in the mask make it jump up).
        seq_idx: [B, S], the number of each column's document.
        cu_seq_lens: [D + 1], cumulative lengths of the documents of a single row.

    Returns:
        Bool [B, S] and the most documents a row can hold (None if unknown); (None, None) without any description.
    """
    rows, columns = valid.shape
    if cu_seq_lens is not None and rows == 1:
        # A column past the end takes the closing boundary (and empty documents at the end), and is cut off.
        starts = torch.zeros(columns + 1, dtype=torch.bool, device=valid.device)
        starts = starts.index_fill(0, cu_seq_lens.long().clamp(max=columns), True)[None, :columns]
        return starts, cu_seq_lens.shape[0]
    if seq_idx is not None and seq_idx.shape == valid.shape:
        changed = seq_idx[:, 1:] != seq_idx[:, :-1]
        return F.pad(changed, (1, 0), value=True), None
    if position_ids is not None and position_ids.dim() == 2 and position_ids.shape[1] == columns:
        position_ids = position_ids.expand(rows, columns)
        # The id of the last valid token before each column: gathered, since padding in between has ids of its own.
        column = torch.arange(columns, device=valid.device).expand(rows, columns)
        latest = torch.where(valid, column, -1).cummax(1).values
        before = F.pad(latest[:, :-1], (1, 0), value=-1)
        restarted = position_ids <= position_ids.gather(1, before.clamp(min=0))
        return valid & (restarted | (before < 0)), None
    return None, None


def align_shift_labels(shift_labels: Tensor) -> Tensor:
    """Labels aligned with tokens from `shift_labels`, in which column i holds the label of token i + 1."""
    return F.pad(shift_labels[:, :-1], (1, 0), value=IGNORED)
