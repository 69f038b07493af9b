"""Where the prompts lie in a batch: padding, labels, packed documents, cached columns.

A sequence is one document: a row without its padding, or one of the documents packed into a row. Its prompt
is what is given before the first prediction that counts. Everything here is tensor arithmetic without
data-dependent control flow: no device synchronisation, no graph break.

Shape letters: B rows, S columns of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # the label of a token that is not predicted, as in torch's cross entropy


class Prompts(NamedTuple):
    """Each column's place in the prompt of its document.

    Attributes:
        inside: bool [B, S], True for tokens of a prompt.
        order: long [B, S], number of the token within its document, from 0 (meaningful for tokens).
        length: long [B, 1], or [B, S] where it differs within a row: tokens in the prompt that the column belongs to.
        document: long [B, S], number of the column's document within its row; None if no row holds several.
        num_documents: the most documents a row can hold, None if that is not known without looking at the data.
        answer: bool [B, S], True for generated tokens, in training for those of an answer; None if there are none.
        answer_order: long [B, S], number of the token within its answer, from 0 (meaningful where `answer`).
    """

    inside: Tensor
    order: Tensor
    length: Tensor
    document: Tensor | None = None
    num_documents: int | None = None
    answer: Tensor | None = None
    answer_order: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Prompts:
        """The same function applied to every tensor."""
        mapped: list[Any] = [function(value) if isinstance(value, Tensor) else value for value in self]
        return Prompts(*mapped)

    def repeat(self, times: int) -> Prompts:
        """Each row `times` times in a row, as beam search and `num_return_sequences` expand a batch."""
        return self if times == 1 else self.map(lambda tensor: tensor.repeat_interleave(times, dim=0))

    def followed_by(self, count: int) -> Prompts:
        """The same rows with `count` columns of generated tokens behind them."""
        rows, total = self.inside.shape

        def padded(tensor: Tensor) -> Tensor:
            holds_for_all = tensor is self.length and tensor.shape[1] == 1
            return tensor if holds_for_all else F.pad(tensor, (0, count))

        column = torch.arange(total + count, device=self.inside.device).expand(rows, -1)
        return self.map(padded)._replace(answer=column >= total, answer_order=column - total)


def generated(rows: int, columns: int, order: int | Tensor, device: torch.device) -> Prompts:
    """A forward of generated tokens only, the first of which is the `order`-th of its answer (from 0)."""
    nothing = torch.zeros(rows, columns, dtype=torch.bool, device=device)
    counted = (torch.arange(columns, device=device) + order).expand(rows, columns)
    zero = torch.zeros(rows, 1, dtype=torch.long, device=device)
    return Prompts(nothing, counted, zero, answer=~nothing, answer_order=counted)


def find_prompts(
    valid: Tensor,
    labels: Tensor | None = None,
    starts: Tensor | None = None,
    num_documents: int | None = None,
    turns: str = "first",
    closing: Tensor | None = None,
    answers: bool = True,
) -> Prompts:
    """Find the prompt of every document.

    Args:
        valid: bool [B, S], False for padding, which may be anywhere.
        labels: long [B, S] aligned with the tokens, -100 = not predicted; a document's prompt ends before its
            first label, at or after its second token (a first token is never predicted). A document without any
            label is all prompt.
        starts: bool [B, S], True where a document begins, for rows that pack several; None: a row is one document.
        num_documents: the most documents a row can hold, if known.
        turns: where a document shows several answers, take the prompt of the "first", the "last", or of "all" (the
            tokens before each answer; tokens of earlier answers are left out).
        closing: bool [B, S], True for the last token of a prompt, where labels do not tell (see `marker_ends`).
        answers: whether to number the tokens of answers; only terms for generated tokens ask for them.
    """
    count = valid.cumsum(1)
    order = count - 1  # counts over tokens, never over padding
    document = None
    if starts is not None:
        starts = starts & valid
        document = (starts.cumsum(1) - 1).clamp(min=0)
        order = order - torch.where(starts, order, 0).cummax(1).values

    def counted(flags: Tensor) -> Tensor:
        """How many flags the document has up to each column, that column included."""
        total = flags.cumsum(1)
        if starts is None:
            return total
        return total - torch.where(starts, total - flags.long(), 0).cummax(1).values

    def over_document(flags: Tensor) -> Tensor:
        """How many flags the whole document has: [B, 1], or [B, S] in packed rows."""
        if document is None:
            return flags.sum(1, keepdim=True)
        return torch.zeros_like(order).scatter_add(1, document, flags.long()).gather(1, document)

    if labels is None and closing is None and document is None:
        return Prompts(valid, order, count[:, -1:])
    answer = answer_order = None
    inside = valid
    if labels is not None:
        predicted = valid & (labels != IGNORED) & (order > 0)
        if turns == "first":
            inside = valid > counted(predicted)  # a token, and none before it is predicted
        else:
            closing = following(predicted, valid) & ~predicted & valid
        if answers or turns == "all":
            answer, answer_order = _answers(predicted, valid, valid if starts is None else valid & ~starts)
    if closing is not None and (labels is None or turns != "first"):
        number = counted(closing) - closing.long()  # prompts that ended before the column
        total = over_document(closing)
        limit = total.clamp(max=1) if turns == "first" else total
        inside = valid & ((number < limit) | (total == 0))
        if turns == "all":  # turns count like packed documents, but each prompt reaches back to the first token
            inside = inside if answer is None else inside & ~answer
            length = torch.where(total == 0, over_document(valid), _length_at_next(order, closing))
            turn = closing.cumsum(1) - closing.long() + (0 if document is None else document)
            return Prompts(inside, order, length, turn, None, answer, answer_order)
    if answer is not None:
        answer = answer & ~inside  # earlier answers are part of the last turn's prompt
    return Prompts(inside, order, over_document(inside), document, num_documents, answer, answer_order)


def token_before(valid: Tensor) -> Tensor:
    """Long [B, S]: the column of the last token before each column; -1 where there is none."""
    column = torch.arange(valid.shape[1], device=valid.device)
    return F.pad(torch.where(valid, column, -1).cummax(1).values[:, :-1], (1, 0), value=-1)


def preceding(flags: Tensor, valid: Tensor) -> Tensor:
    """The flags [B, S] of the token before each column; False where there is none. Padding between is passed over."""
    before = token_before(valid)
    return flags.gather(1, before.clamp(min=0)) & (before >= 0)


def following(flags: Tensor, valid: Tensor) -> Tensor:
    """The flags [B, S] of the token behind each column; False where there is none. Padding between is passed over."""
    return preceding(flags.flip(1), valid.flip(1)).flip(1)


def _answers(predicted: Tensor, valid: Tensor, goes_on: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens that generation would have run as generated ones, and their numbers, which begin anew with every answer.

    The last token of an answer is run only if the conversation goes on, and then with the prompt of the next turn.

    Args:
        predicted: bool [B, S], tokens with a label.
        valid: bool [B, S], False for padding.
        goes_on: bool [B, S], tokens that belong to the same document as the token before, if that is one.
    """
    count = predicted.cumsum(1)
    begins = predicted & ~preceding(predicted, valid)
    order = count - 1 - torch.where(begins, count - 1, 0).cummax(1).values
    handed_on = predicted & ~following(predicted, valid) & following(goes_on, valid)
    return predicted & ~handed_on, order


def _length_at_next(order: Tensor, closing: Tensor) -> Tensor:
    """For each column, the length of the prompt that the next `closing` column ends."""
    columns = order.shape[1]
    column = torch.arange(columns, device=order.device).expand_as(order)
    upcoming = torch.where(closing, column, columns - 1).flip(1).cummin(1).values.flip(1)
    return order.gather(1, upcoming) + 1


@dataclass(frozen=True)
class Tokens:
    """A batch of tokens, and all that tells where the prompts in it end.

    Attributes:
        valid: bool [B, S], False for padding.
        labels: long [B, S] aligned with the tokens, or None.
        starts, num_documents: where packed documents begin, as from `document_starts`.
        ids: long [B, S], in which to look for a marker; None if there are only embeddings.
        given: the rows are what `generate` was given: each of them ends a prompt.
    """

    valid: Tensor
    labels: Tensor | None = None
    starts: Tensor | None = None
    num_documents: int | None = None
    ids: Tensor | None = None
    given: bool = False
    _found: dict[Any, Prompts] = field(default_factory=dict, init=False, repr=False, compare=False)

    def prompts(self, turns: str | None = None, prompt_end: Sequence[int] = (), answers: bool = True) -> Prompts:
        """The prompts in the batch, worked out once.

        Args:
            turns: "first", "last" or "all"; None for the first by labels, and the last by a marker.
            prompt_end: token ids that end a prompt, where neither labels nor `generate` tell.
            answers: whether to number the tokens of answers.
        """
        key = (turns, tuple(prompt_end), answers)
        if key not in self._found:
            self._found[key] = self._find(*key)
        return self._found[key]

    def _find(self, turns: str | None, prompt_end: Sequence[int], answers: bool) -> Prompts:
        if prompt_end and self.labels is not None and self.ids is not None and turns != "all":
            masked = self._labels_behind(prompt_end, turns or "last")
            return replace(self, labels=masked).prompts(turns, answers=answers)
        closing = None
        if prompt_end and self.labels is None and self.ids is not None and not (self.given and turns is None):
            closing = self.marked(prompt_end)
            if self.given:
                order = self.valid.cumsum(1)
                closing = closing | (self.valid & (order == order[:, -1:]))
        turns = turns or ("first" if closing is None else "last")
        found = find_prompts(self.valid, self.labels, self.starts, self.num_documents, turns, closing, answers)
        if closing is None or self.given or turns == "all" or not answers:
            return found
        # The tokens behind the marker would have been generated.
        return found._replace(answer=self.valid & ~found.inside, answer_order=found.order - found.length)

    def labels_cover_prompts(self) -> Tensor:
        """Bool [B, 1] or [B, S]: the document's labels begin with its second token, so that they show no prompt."""
        return find_prompts(self.valid, self.labels, self.starts, self.num_documents).length <= 1

    def labels_show_later_prompts(self, prompt_end: Sequence[int] = ()) -> bool:
        """Whether a document's labels show prompts behind the one that counts where no turns are chosen."""
        if self.labels is None:
            return False
        chosen, every = (self.prompts(turns, prompt_end) for turns in (None, "all"))
        return bool((every.inside & ~chosen.inside).any())

    def _labels_behind(self, prompt_end: Sequence[int], turns: str) -> Tensor:
        """The labels; where they cover the prompt too, only those behind the marker, if there is one."""
        assert self.labels is not None
        marked = self.marked(prompt_end)
        whole, prompts = (
            find_prompts(self.valid, None, self.starts, self.num_documents, turns, closing)
            for closing in (None, marked)
        )
        ends = prompts.length < whole.length
        return self.labels.masked_fill(self.labels_cover_prompts() & ends & prompts.inside, IGNORED)

    def marked(self, prompt_end: Sequence[int]) -> Tensor:
        """Bool [B, S]: where the marker ends."""
        assert self.ids is not None
        order = self.valid.cumsum(1) - 1
        total = order[:, -1:] + 1
        number = torch.arange(self.ids.shape[1], device=self.ids.device)
        # The ids of the tokens alone, next to each other: a marker may have padding in its middle.
        tokens = self.ids.gather(1, torch.searchsorted(order, torch.minimum(number, total - 1)))
        ends = marker_ends(tokens, prompt_end)  # entries behind the last token repeat it, and are never read
        return ends.gather(1, order.clamp(min=0)) & self.valid


def marker_ends(ids: Tensor, marker: Sequence[int]) -> Tensor:
    """Bool [B, S]: True for the last token of each occurrence of `marker` in the token ids [B, S]."""
    matches = torch.ones_like(ids, dtype=torch.bool)
    for back, token in enumerate(reversed(marker)):
        matches = matches & (F.pad(ids, (back, 0), value=-1)[:, : ids.shape[1]] == token)
    return matches


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
            a step that does not go up counts as a restart (padding and holes in the mask make it jump up). [4, B, S],
            as of models of images and video: the first of the four are those of the text.
        seq_idx: [B, S], the number of each column's document.
        cu_seq_lens: [D + 1], cumulative lengths of the documents, over all rows one after the other.

    Returns:
        Bool [B, S] and the most documents a row can hold (None if unknown); (None, None) without any description.

    Raises:
        ValueError: if `seq_idx` has another shape.
    """
    rows, columns = valid.shape
    if cu_seq_lens is not None:
        # A column past the end takes the closing boundary (and empty documents at the end), and is cut off.
        total = rows * columns
        starts = torch.zeros(total + 1, dtype=torch.bool, device=valid.device)
        starts = starts.index_fill(0, cu_seq_lens.long().clamp(max=total), True)[:total].view(rows, columns)
        return starts, cu_seq_lens.shape[0]
    if seq_idx is not None:
        if seq_idx.shape != valid.shape:
            raise ValueError(
                f"seq_idx has the shape {tuple(seq_idx.shape)}, but the batch has {rows} rows of {columns} columns. "
                "Pass the number of each column's document, [B, S]."
            )
        changed = seq_idx[:, 1:] != seq_idx[:, :-1]
        return F.pad(changed, (1, 0), value=True), None
    if position_ids is not None and position_ids.dim() == 3 and position_ids.shape[0] == 4:
        position_ids = position_ids[0]
    if position_ids is not None and position_ids.dim() == 2 and position_ids.shape[1] == columns:
        position_ids = position_ids.expand(rows, columns)
        before = token_before(valid)  # whose ids are gathered, since padding in between has ids of its own
        restarted = position_ids <= position_ids.gather(1, before.clamp(min=0))
        return valid & (restarted | (before < 0)), None
    return None, None


def align_shift_labels(shift_labels: Tensor) -> Tensor:
    """Labels aligned with tokens from `shift_labels`, in which column i holds the label of token i + 1."""
    return F.pad(shift_labels[:, :-1], (1, 0), value=IGNORED)
