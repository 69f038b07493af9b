"""The base model's structure without its weights: names of its blocks, their widths, what it is for.

A checkpoint of pyreft numbers the blocks, this package names them, so that the model has to be asked. It is built from
its config on the meta device, which takes no memory; no code of a model that is not part of transformers is run.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from typing import Any, TypeAlias, Union

import torch
import transformers
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from peft_reft.blocks import ModelBlocks
from peft_reft.info.files import one_line

TASK_TYPES = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
ModelLike: TypeAlias = Union[str, os.PathLike[str], PretrainedConfig, nn.Module]  # noqa: UP007  (mypy skips transformers)


def task_of(class_name: str) -> str | None:
    """The task type of PEFT for a model class of transformers, None if its name tells none.

    >>> task_of("RobertaForSequenceClassification"), task_of("RobertaModel")
    ('SEQ_CLS', None)
    """
    return next((task for ending, task in TASK_TYPES.items() if class_name.endswith(ending)), None)


class Structure:
    """What is known about a base model.

    Args:
        model: a path or hub name, from which only the config is read; a config; or a model.

    Attributes:
        name: the model's class.
        path: the path or hub name, None if a model or config was given.
        task_type: what the class is for, by PEFT's names, None if neither its name nor the config says.

    Raises:
        ValueError: if the model cannot be built from what was given, or its blocks cannot be found.
    """

    def __init__(self, model: ModelLike):
        self.path = os.fspath(model) if isinstance(model, (str, os.PathLike)) else None
        self.model = model if isinstance(model, nn.Module) else on_meta(model)
        self.name = type(self.model).__name__
        config: Any = getattr(self.model, "config", None)
        is_named = isinstance(model, nn.Module) or bool(config.architectures)
        self.task_type = task_of(self.name) if is_named else None  # else it is a guess at the class
        self._blocks = ModelBlocks(self.model)
        self._modules = [name for name, _ in self.model.named_modules() if name]
        self.stacks = self._blocks.stacks()

    def block(self, number: int) -> str:
        """The name of the block with a number, in a model with one stack of blocks.

        Raises:
            ValueError: if there is no such block, or several.
        """
        if len(self.stacks) > 1:
            raise ValueError(
                f"{self.name} has {len(self.stacks)} stacks of blocks, so that block {number} is not one of them."
            )
        (stack,) = self.stacks
        if not 0 <= number < len(stack):
            raise ValueError(
                f"The checkpoint edits block {number}, but {self.name} has {len(stack)} block(s). Pass the model that "
                "it was trained on."
            )
        return stack[number]

    def module(self, name: str) -> str:
        """The module that another version or head of the model calls `name`: `layers.3` for `model.layers.3`.

        Raises:
            ValueError: if there is none, or several.
        """
        if name in self._modules:
            return name
        longer = [own for own in self._modules if own.endswith(f".{name}")]
        shorter = [own for own in self._modules if name.endswith(f".{own}")]
        found = longer or [own for own in shorter if len(own) == max(map(len, shorter))]
        if len(found) != 1:
            raise ValueError(
                f"The checkpoint edits {name!r}, which {self.name} {'has several of' if found else 'does not have'}; "
                f"its blocks are {', '.join(stack[0] + ' ...' for stack in self.stacks)}. Pass the model that it was "
                "trained on."
            )
        return found[0]

    def has_blocks(self, names: Iterable[str]) -> bool:
        """Whether these are blocks that are found in the model by their numbers alone."""
        names = set(names)
        if not names <= {name for stack in self.stacks for name in stack}:
            return False
        numbers = [{index for index, name in enumerate(stack) if name in names} for stack in self.stacks]
        return all(found == numbers[0] for found in numbers)

    def has_all_blocks(self, names: Iterable[str]) -> bool:
        """Whether these are all of the model's blocks."""
        return set(names) == {name for stack in self.stacks for name in stack}

    def has_module(self, name: str) -> bool:
        """Whether the model has a module of this name."""
        return name in self._modules

    def tensors_of(self, modules: Iterable[str]) -> set[str]:
        """Names of the parameters in these modules."""
        wanted = tuple(f"{module}." for module in modules)
        return {name for name, _ in self.model.named_parameters() if name.startswith(wanted)}

    def width_of(self, name: str) -> int:
        """The width of the hidden states that a module returns."""
        return self._blocks.shape_of(name)[0]


def on_meta(model: str | os.PathLike[str] | PretrainedConfig) -> nn.Module:
    """A model without weights, from its config."""
    if isinstance(model, PretrainedConfig):
        config = model
    else:
        try:
            config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        except Exception as error:
            raise ValueError(
                f"model={os.fspath(model)!r}: its config cannot be read ({one_line(error)}). Pass a directory with the "
                "model's config.json, a name on the hub, or in Python the model itself."
            ) from error
    named = [getattr(transformers, name, None) for name in getattr(config, "architectures", None) or []]
    classes = [found for found in named if isinstance(found, type) and issubclass(found, PreTrainedModel)]
    auto: Any = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModel
    build: Any = classes[0] if classes else functools.partial(auto.from_config, trust_remote_code=False)
    try:
        with torch.device("meta"):
            return build(config)
    except Exception as error:  # whatever a model's own code may raise
        raise ValueError(
            f"No {getattr(build, '__name__', 'model')} can be built from the config of {type(config).__name__} "
            f"({one_line(error)}). Pass the model itself, from Python: model=..."
        ) from error
