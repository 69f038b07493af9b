"""Distributed alignment search finds the variables of a network where they are known, in transformers' own Trainer."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.data import default_collate
from trainer_kit import QUIET
from transformers import PretrainedConfig, Trainer, TrainingArguments

from peft_reft import ReftConfig, get_interventions
from peft_reft.causal import InterchangeCollator, interchange_accuracy

WIDTH = 16


class Toy(nn.Module):
    """Is |c - d| < |a - b|? Its first layer holds both distances along directions of a random rotation, and noise."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.config = PretrainedConfig(hidden_size=WIDTH)
        self.first = First(torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0])
        Q = self.first.Q
        self.variables = torch.stack([Q[:, 0] + Q[:, 1], Q[:, 2] + Q[:, 3]]) / 2**0.5  # |a - b| and |c - d|

    def forward(self, x, labels=None):
        z = self.first(x)[:, 0] @ self.first.Q
        margin = 4 * (z[:, 0] + z[:, 1] - z[:, 2] - z[:, 3])
        logits = torch.stack([torch.zeros_like(margin), margin], 1)
        return {**({} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}), "logits": logits}


class First(nn.Module):
    def __init__(self, Q):
        super().__init__()
        self.register_buffer("Q", Q)
        self.noise = nn.Parameter(torch.randn(4, WIDTH - 4))

    def forward(self, x):
        a, b, c, d = x.unbind(1)
        features = torch.stack([a - b, b - a, c - d, d - c], 1).relu()
        return (torch.cat([features, x @ self.noise], 1) @ self.Q.T)[:, None]


def distances(x):
    return (x[:, 0] - x[:, 1]).abs(), (x[:, 2] - x[:, 3]).abs()


def examples(count, seed, parts=False):
    """Bases and sources: the source's |a - b| goes into the base; with parts its |c - d| in every second example."""
    generator = torch.Generator().manual_seed(seed)
    base, source = (torch.rand(count, 4, generator=generator) * 2 - 1 for _ in range(2))
    (first, second), (other_first, other_second) = distances(base), distances(source)
    found = []
    for number in range(count):
        swaps_second = parts and number % 2
        one = first[number] if swaps_second else other_first[number]
        two = other_second[number] if swaps_second else second[number]
        example = {"x": base[number], "source_x": source[number], "labels": (one > two).long()}
        found.append({**example, "subspaces": "second" if swaps_second else "first"} if parts else example)
    return found


def align(r, seed, parts=None, steps=400):
    """A toy network with a trained alignment, and the accuracy before and after."""
    toy = Toy()
    torch.manual_seed(100 + seed)
    settings = {"r": r, "target_modules": ["first"], "positions": "all", "intervention": "interchange"}
    model = get_peft_model(toy, ReftConfig(**settings, subspaces=parts))
    held_out, collator = examples(1000, 1, bool(parts)), InterchangeCollator(default_collate)
    before = interchange_accuracy(model, held_out, collator, batch_size=250)
    options = {
        "per_device_train_batch_size": 64,
        "max_steps": steps,
        "learning_rate": 5e-2,
        "remove_unused_columns": False,
        "seed": seed,
        "label_names": ["labels"],
    }
    arguments = TrainingArguments("unused", **{**QUIET, "logging_strategy": "no", **options})
    Trainer(model, arguments, train_dataset=examples(4000, 0, bool(parts)), data_collator=collator).train()
    after = interchange_accuracy(model, held_out, collator, batch_size=250)
    (intervention,) = get_interventions(model)["first"]
    return toy.variables, intervention.subspace.detach(), before, after


@pytest.mark.parametrize("r", [1, 2])
def test_the_direction_of_a_variable_is_found(r):
    variables, R, before, after = align(r, seed=0)
    assert before < 0.8 and after >= 0.99
    along, across = (R @ variables.T).norm(dim=0)
    assert along >= 0.995 and across <= 0.05


def test_two_variables_are_found_in_two_parts_of_one_r():
    variables, R, before, after = align(2, seed=1, parts={"first": 1, "second": 1})
    assert before < 0.8 and after >= 0.97
    cosines = (R @ variables.T).abs()
    assert cosines.diagonal().min() >= 0.98 and (cosines - cosines.diagonal().diag()).max() < 0.2


def test_a_hypothesis_that_is_wrong_is_not_found():
    toy = Toy()
    torch.manual_seed(0)
    settings = {"r": 1, "target_modules": ["first"], "positions": "all", "intervention": "interchange"}
    model = get_peft_model(toy, ReftConfig(**settings))
    shuffled = examples(400, 1)
    labels = [shuffled[(number + 7) % 400]["labels"] for number in range(400)]
    with torch.no_grad():  # even with the true direction
        get_interventions(model)["first"][0].basis.copy_(toy.variables[:1])
    assert interchange_accuracy(model, shuffled, batch_size=100) > 0.99
    wrong = [{**example, "labels": label} for example, label in zip(shuffled, labels)]
    assert interchange_accuracy(model, wrong, batch_size=100) < 0.65
