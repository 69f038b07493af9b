"""The methods of the study: how each is put on a model, and what it trains.

A method is a kind and the arguments of its config, so that it can be written into a result and made again:

>>> from benchmarks.study.methods import Method
>>> Method("reft", {"r": 4, "positions": "f1"}).config("SEQ_CLS").r
4

Knows nothing of data or training.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftConfig, get_peft_model
from torch import nn

from peft_reft import ReftConfig

KINDS = ("reft", "lora", "ia3", "bitfit", "head", "full")
HEAD = "classifier"  # the one module that all methods train on a classifier, at a learning rate of its own


@dataclass(frozen=True)
class Method:
    """One way to finetune.

    Args:
        kind: "reft", "lora", "ia3", "bitfit" (all biases), "head" (nothing but the classifier) or "full".
        settings: arguments of the kind's config.
    """

    kind: str
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} is no method of the study; use one of {', '.join(KINDS)}.")

    def config(self, task_type: str) -> PeftConfig:
        """The config of the three kinds that are PEFT's.

        Raises:
            KeyError: for the others.
        """
        make = {"reft": ReftConfig, "lora": LoraConfig, "ia3": IA3Config}[self.kind]
        return make(task_type=task_type, **self.settings)

    def apply(self, model: nn.Module, task_type: str, seed: int) -> nn.Module:
        """The model with this method on it, seeded; what it trains has `requires_grad`."""
        torch.manual_seed(seed)
        if self.kind in ("reft", "lora", "ia3"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT on the names of a local base model
                return get_peft_model(model, self.config(task_type))
        for name, parameter in model.named_parameters():
            wanted = {"full": True, "bitfit": name.endswith("bias"), "head": False}[self.kind]
            parameter.requires_grad_(wanted or in_head(name))
        return model


def in_head(name: str) -> bool:
    """Whether a parameter of that name is the classifier's (PEFT keeps the untrained one beside it)."""
    return HEAD in name.split(".")


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def count(model: nn.Module) -> dict[str, int]:
    """Trained numbers, without the head and with it."""
    sizes = {name: parameter.numel() for name, parameter in trainable(model).items()}
    return {
        "parameters": sum(size for name, size in sizes.items() if not in_head(name)),
        "with_head": sum(sizes.values()),
    }


def parameter_groups(model: nn.Module, lr: float, head_lr: float) -> list[dict[str, Any]]:
    """For the optimizer: what the method trains, and the head at a rate of its own, unless the head is all there is."""
    parameters = trainable(model)
    head_lr = lr if all(map(in_head, parameters)) else head_lr
    groups = [
        {"params": [p for name, p in parameters.items() if not in_head(name)], "lr": lr},
        {"params": [p for name, p in parameters.items() if in_head(name)], "lr": head_lr},
    ]
    return [group for group in groups if group["params"]]
