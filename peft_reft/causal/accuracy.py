"""Interchange intervention accuracy: how often the model answers as the causal hypothesis says after an interchange."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from peft_reft.causal.collator import InterchangeCollator
from peft_reft.causal.probe import on_device
from peft_reft.positions import IGNORED
from peft_reft.tuner.injection import base_model_of, predicts_tokens


@torch.no_grad()
def interchange_accuracy(
    model: nn.Module, dataset: Any, collator: Callable[[list[Any]], Any] | None = None, batch_size: int = 8
) -> float:
    """The share of examples whose label the model predicts when their sources are exchanged into their bases.

    Args:
        model: with an adapter that takes a source.
        dataset: examples with `labels`: what the hypothesis says that the base's answer becomes. One class per row; or,
            for language models, a token per column, −100 where nothing is predicted, all of which count.
        collator: makes batches with `source_inputs`; None for an `InterchangeCollator` of tensors of one size.
        batch_size: examples per forward.

    Returns:
        Between 0 and 1. Compare it with chance, and with the same of an alignment that was not trained.

    Raises:
        ValueError: if a batch has no labels or no sources, a row none that counts, or the labels do not fit the output.
    """
    base = base_model_of(model)
    collate = InterchangeCollator(default_collate) if collator is None else collator
    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=collate)
    right = total = 0
    with evaluating(model):
        for batch in loader:
            for name in ("labels", "source_inputs"):
                if batch.get(name) is None:
                    raise ValueError(f"A batch has no {name!r}, but {sorted(batch)}. Wrap the collator in one.")
            if not isinstance(batch["labels"], Tensor):
                raise ValueError(
                    f"The labels of a batch are a {type(batch['labels']).__name__}: without a collator the examples "
                    'must be tensors of one size. Use dataset.with_format("torch"), or pass a collator.'
                )
            inputs = on_device(dict(batch), model)
            found = hits(output_of(model(**inputs)), inputs["labels"], predicts_tokens(base))
            right, total = right + int(found.sum()), total + len(found)
    if not total:
        raise ValueError("The dataset is empty.")
    return right / total


def output_of(output: Any) -> Tensor:
    """The logits in what a model returned."""
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise ValueError(f"The model returned {type(output).__name__}, in which there are no `logits`.")
    return logits


def hits(logits: Tensor, labels: Tensor, causal: bool) -> Tensor:
    """Which rows are predicted right, [B].

    Args:
        logits: [B, C] for labels [B], or [B, S, C] for labels [B, S], −100 where nothing counts.
        causal: whether a column's logits predict the next column's label.

    >>> hits(torch.eye(3)[None], torch.tensor([[-100, 0, 2]]), causal=True)
    tensor([False])
    """
    if logits.dim() != labels.dim() + 1 or logits.shape[:-1] != labels.shape:
        raise ValueError(f"labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(logits.shape)}.")
    predicted = logits.argmax(-1)
    if labels.dim() == 1:
        return predicted == labels
    if causal:
        predicted, labels = predicted[:, :-1], labels[:, 1:]
    empty = (labels == IGNORED).all(1)
    if empty.any():
        raise ValueError(
            f"Row {int(empty.nonzero()[0])} of a batch has no label that is predicted: no answer to it would be wrong. "
            f"Drop such examples{'; a label in the first column is none, which nothing precedes' if causal else ''}."
        )
    return ((predicted == labels) | (labels == IGNORED)).all(1)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, and every module back into its own."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
