"""The metrics of GLUE, each a few lines of numpy, and which of them the paper reports for which task.

The paper reports Matthews' correlation for CoLA, Pearson's for STS-B and accuracy for the rest, MRPC and QQP included
(appendix C.3); F1 and Spearman's correlation, the benchmark's further metrics, are computed beside them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

TASKS = ("mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb")  # in the order of the paper's tables


def accuracy(predictions: ArrayLike, labels: ArrayLike) -> float:
    """The share of equal entries."""
    return float(np.mean(np.asarray(predictions) == np.asarray(labels)))


def f1(predictions: ArrayLike, labels: ArrayLike) -> float:
    """F1 of class 1; 0 if nothing of that class is found."""
    p, y = np.asarray(predictions) == 1, np.asarray(labels) == 1
    total = p.sum() + y.sum()
    return float(2 * (p & y).sum() / total) if total else 0.0


def matthews(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Matthews' correlation of two classes, -1 to 1; 0 if either side has one class only."""
    return pearson(np.asarray(predictions) == 1, np.asarray(labels) == 1)


def pearson(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Pearson's correlation, -1 to 1; 0 if either side is constant."""
    p, y = np.asarray(predictions, dtype=float), np.asarray(labels, dtype=float)
    p, y = p - p.mean(), y - y.mean()
    norm = np.sqrt((p**2).sum() * (y**2).sum())
    return float((p * y).sum() / norm) if norm else 0.0


def spearman(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Pearson's correlation of the ranks; equal values share the mean of theirs."""

    def ranks(values: ArrayLike) -> np.ndarray:
        _, inverse, counts = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]

    return pearson(ranks(predictions), ranks(labels))


_FURTHER = {"mrpc": {"f1": f1}, "qqp": {"f1": f1}, "stsb": {"spearman": spearman}, "cola": {"accuracy": accuracy}}
_MAIN = {"cola": {"matthews": matthews}, "stsb": {"pearson": pearson}}


def main_metric(task: str) -> str:
    """The metric that the paper reports and selects by."""
    return next(iter(_MAIN.get(task, {"accuracy": accuracy})))


def glue_scores(task: str, predictions: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """A GLUE task's metrics by name, the one that counts first.

    Args:
        task: one of `TASKS`.
        predictions: class numbers [N]; for stsb the predicted similarity.
        labels: the right ones, [N].
    """
    if task not in TASKS:
        raise ValueError(f"task={task!r} is not in GLUE as the paper uses it; use one of {', '.join(TASKS)}.")
    metrics = {**_MAIN.get(task, {"accuracy": accuracy}), **_FURTHER.get(task, {})}
    return {name: metric(predictions, labels) for name, metric in metrics.items()}


def halves(size: int, seed: int) -> tuple[list[int], list[int]]:
    """Row numbers of a validation set: those to select the best epoch by, and those to report.

    The protocol of RED (Wu et al. 2024) that the paper follows: a random half each, but only 1,000 rows to select by
    where there are more than 5,000 (QNLI, QQP, MNLI).
    """
    order = np.random.default_rng(seed).permutation(size).tolist()
    selected = 1000 if size > 5000 else size // 2
    return sorted(order[:selected]), sorted(order[selected:])
