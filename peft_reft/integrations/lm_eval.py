"""A model class for lm-eval (lm-evaluation-harness) that edits what `generate` would edit, given the same context.

lm-eval's own class, `hf`, scores a continuation in one padded row with its context and does not pass on where the
context ends. The class here, `reft`, passes it as `intervention_locations`; all else is lm-eval's. Importing this
file registers it; `python -m peft_reft -m lm_eval` has done so.

Shape letters: B rows, S columns, G position groups, P positions per group, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from peft_reft.positions import PositionSpec, Tokens, mark
from peft_reft.tuner.injection import reft_layers

Request = tuple[Any, list[int], list[int]]  # context and continuation as texts, or None; the two as tokens
Row = tuple[tuple[int, ...], tuple[int, ...], int]  # context, continuation but for its last token, prompt's part of it


def scoring_locations(
    spec: PositionSpec, share_weights: bool | str, ids: Tensor, contexts: Tensor, lengths: Tensor
) -> Tensor:
    """The columns that `generate` would edit if it were given each row's context and answered with its continuation.

    Args:
        spec, share_weights: of the adapter.
        ids: long [B, S], contexts and continuations, padded on the right.
        contexts: long [B], tokens in each row's context, the prompt.
        lengths: long [B], tokens in each row, context included.

    Returns:
        Long tensor [B, G, P], -1 = unused.

    >>> from peft_reft.positions import parse_positions
    >>> ids = torch.tensor([[5, 6, 7, 8], [5, 6, 0, 0]])
    >>> scoring_locations(parse_positions("f1+l1"), True, ids, torch.tensor([3, 1]), torch.tensor([4, 2]))
    tensor([[[ 0],
             [ 2]],
    <BLANKLINE>
            [[ 0],
             [-1]]])
    """
    column = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    context = column < contexts[:, None]
    prompts = Tokens(context, ids=ids, given=True).prompts(spec.turns, spec.prompt_end)
    answer = ~context & (column < lengths[:, None])
    marks = mark(spec, prompts._replace(answer=answer, answer_order=column - contexts[:, None]), share_weights)
    places = torch.where(marks, column.unsqueeze(1), -1).sort(-1, descending=True).values
    return places[..., : max(1, int(marks.sum(-1).max()))]


def positions_of(model: nn.Module) -> tuple[PositionSpec, bool | str]:
    """Positions and `share_weights` of the active ReFT adapter.

    Raises:
        ValueError: if there is none, or several are active that edit different positions.
    """
    found = {
        (layer.position_specs[name], layer.share_weights[name])
        for layer in reft_layers(model).values()
        for name in layer.active_adapters
        if name in layer.position_specs
    }
    if not found:
        raise ValueError(
            "The model has no active ReFT adapter. Name its folder, as in --model_args pretrained=BASE,peft=ADAPTER; "
            "the base model alone is evaluated with --model hf."
        )
    if len(found) > 1:
        raise ValueError(
            f"The active ReFT adapters edit different positions ({', '.join(sorted(str(s) for s, _ in found))}), which "
            "cannot be given in one call. Evaluate one of them: model.set_adapter(name)."
        )
    return found.pop()


@register_model("reft")
class ReftLM(HFLM):
    """lm-eval's `hf` for models with a ReFT adapter; takes the same arguments.

    Raises:
        ValueError: on construction, if the model has no ReFT adapter, or several with different positions.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        positions_of(self.model)  # fails now rather than after the tasks have been prepared

    def _model_call(
        self,
        inps: Tensor,
        attn_mask: Tensor | None = None,
        labels: Tensor | None = None,
        contexts: list[int] | None = None,
        lengths: list[int] | None = None,
    ) -> Tensor:
        """Logits [B, S, V] of rows [B, S]; without `contexts` and `lengths` (to try a batch size) all is context."""
        if attn_mask is not None:  # an encoder-decoder model: these arguments show where the prompt ends
            return super()._model_call(inps, attn_mask, labels)
        rows, columns = inps.shape
        ends = torch.tensor([contexts or [columns] * rows, lengths or [columns] * rows], device=inps.device)
        locations = scoring_locations(*positions_of(self.model), inps, *ends)
        mixed = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(self.device.type, dtype=mixed, enabled=mixed is not None):
            return self.model(inps, intervention_locations=locations).logits

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each request's continuation, and whether it is what greedy decoding gives.

        lm-eval's own method lets requests of equal tokens share a row whatever their contexts are. Here they share
        one if prompt, context and continuation, but for its last token, are equal.
        """
        if self.backend != "causal":
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        sharing: dict[Row, list[int]] = {}
        for number, request in enumerate(requests):
            sharing.setdefault(self._row_of(request), []).append(number)
        heads = sorted((requests[numbers[0]] for numbers in sharing.values()), key=lambda r: -len(r[1]) - len(r[2]))
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Scoring") as progress:
            for chunk in self._chunks(heads, override_bs):
                for request, scores in zip(chunk, self._scores(chunk)):
                    for number in sharing[self._row_of(request)]:
                        cached_as, _, continuation = requests[number]
                        wanted = torch.tensor(continuation, device=scores.device)
                        greedy = bool((scores.argmax(-1) == wanted).all())
                        answers[number] = float(scores.gather(1, wanted[:, None]).sum()), greedy
                        if cached_as is not None:
                            self.cache_hook.add_partial("loglikelihood", cached_as, answers[number])
                        progress.update()
        return answers

    def _chunks(self, requests: list[Request], override_bs: int | None) -> Any:
        """The requests in batches, as large as the user or lm-eval's search for the largest one says."""
        size, choose = self.batch_size, None
        if size == "auto":
            size = override_bs or 0
            if requests and not size:
                choose = self._batch_scheduler
                self.batch_sizes: dict[int, int] = {}  # of the requests before
        return Collator.get_chunks(requests, n=size, fn=choose)

    def _scores(self, requests: list[Request]) -> list[Tensor]:
        """Log-probabilities [C, V] at the C tokens of each request's continuation, run as one batch."""
        # The last token predicts nothing, and a row that is too long loses its start.
        rows = [(context + continuation)[-(self.max_length + 1) : -1] for _, context, continuation in requests]
        lengths = [len(row) for row in rows]
        contexts = [length - len(continuation) + 1 for length, (_, _, continuation) in zip(lengths, requests)]
        prompts = [context + self._moved(request) for context, request in zip(contexts, requests)]
        ids = pad_sequence([torch.tensor(row, device=self.device) for row in rows], batch_first=True)
        logits = self._model_call(ids, contexts=prompts, lengths=lengths)
        scores = F.log_softmax(logits, dim=-1, dtype=self.softmax_dtype)
        return [row[context - 1 : length] for row, context, length in zip(scores, contexts, lengths)]

    def _moved(self, request: Request) -> int:
        """How many of a continuation's first tokens are the end of the prompt.

        lm-eval moves the white space at the end of a context to the continuation. A chat template's prompt ends in a
        line feed, which is a token of its own: `generate` is given it, and the adapter was trained with it. A space
        that makes one token with the word behind it is not one of the prompt's.
        """
        texts, context, continuation = request
        if not texts or texts[0] == texts[0].rstrip():
            return 0
        prompt, row = self.tok_encode(texts[0]), context + continuation
        return (
            len(prompt) - len(context) if len(context) < len(prompt) < len(row) and row[: len(prompt)] == prompt else 0
        )

    def _row_of(self, request: Request) -> Row:
        _, context, continuation = request
        return tuple(context), tuple(continuation[:-1]), self._moved(request)
