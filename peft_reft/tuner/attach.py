"""Puts the hooks on a model and takes everything off again; finds the ReFT layers that are on it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from peft.config import PeftConfig
from peft.utils.peft_types import TaskType
from torch import nn

from peft_reft.blocks import ModelBlocks
from peft_reft.context.cache import FactorCache
from peft_reft.context.generation import GenerateEntry
from peft_reft.context.host import Host, Stage
from peft_reft.context.root import Root
from peft_reft.integrations.continuous_batching import BatchingEntry
from peft_reft.tuner.layer import CHILD, ReftLayer, detach_layer

TOKENS = {"input_ids", "inputs_embeds", "decoder_input_ids"}  # parameters by which a module takes tokens


def reft_layers(model: nn.Module) -> dict[str, ReftLayer]:
    """The ReFT layers of a model, by the names of their blocks."""
    suffix = f".{CHILD}"
    return {name.removesuffix(suffix): layer for name, layer in model.named_modules() if isinstance(layer, ReftLayer)}


def attach_hosts(model: nn.Module, causal: bool, survey: ModelBlocks | None = None) -> None:
    """Hook every module around the blocks that takes tokens, and `generate`; what is hooked already stays so."""
    layers = reft_layers(model)
    host = Host.of(model)
    root = host.root if host is not None else Root(causal, [], FactorCache(), survey or ModelBlocks(model))
    root.causal = root.causal or causal
    root.layers[:] = layers.values()
    roles = roles_of(model)
    for name in sorted(around(layers)):
        module = model.get_submodule(name)
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):  # never called
            continue
        # An encoder of images takes no tokens, but `generate` runs it by itself.
        is_side = module in roles and roles.get(model.get_submodule(name.rpartition(".")[0])) is None
        takes_tokens = bool(TOKENS & set(inspect.signature(type(module).forward).parameters))
        if Host.of(module) is None:
            depth = len(name.split(".")) if name else 0
            kind = Host if not name or is_side or takes_tokens else Stage
            kind(module, root, roles.get(module, "router" if roles else ""), depth).attach(module)
        if not (takes_tokens or not name):
            continue
        if hasattr(type(module), "generate") and not isinstance(module.__dict__.get("generate"), GenerateEntry):
            module.generate = GenerateEntry(module, root)  # type: ignore[assignment]
            if hasattr(type(module), "init_continuous_batching"):
                module.init_continuous_batching = entry = BatchingEntry(module)  # type: ignore[assignment]
                root.batching = entry.requests


def around(blocks: Iterable[str]) -> set[str]:
    """Names of the modules that blocks lie in, the model's own ("") among them."""
    parts = [name.split(".") for name in blocks]
    return {".".join(path[:depth]) for path in parts for depth in range(len(path))} | {""}


def roles_of(model: Any) -> dict[nn.Module, str]:
    """For an encoder-decoder model, which side each module is on; modules above both are left out."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False) or not hasattr(model, "get_encoder"):
        return {}
    encoder, decoder = model.get_encoder(), model.get_decoder()
    if decoder is not model and any(module is encoder for module in decoder.modules()):
        decoder = decoder.get_decoder()  # a model around a text model gives the whole of it for its decoder
    sides = {"encoder": encoder, "decoder": decoder}
    return {
        module: side
        for side, stack in sides.items()
        if isinstance(stack, nn.Module) and stack is not model
        for module in stack.modules()
    }


def is_causal_lm(model: nn.Module, config: PeftConfig) -> bool:
    """Whether labels of the shape of `input_ids` are next-token targets, so that they tell where the prompt ends."""
    if config.task_type is not None:
        return config.task_type == TaskType.CAUSAL_LM
    can_generate = getattr(model, "can_generate", None)
    return bool(can_generate is not None and can_generate()) and not model.config.is_encoder_decoder  # type: ignore[union-attr]


def tidy_up(model: nn.Module) -> None:
    """Take layers without any adapter off a model, and the hooks as well if no layer is left."""
    for name, layer in reft_layers(model).items():
        if not layer.reft_interventions:
            detach_layer(model.get_submodule(name))
    if layers := reft_layers(model):
        attach_hosts(model, False)
        kept = around(layers)
        for name, module in model.named_modules():
            if isinstance(Host.of(module), Stage) and name not in kept:
                Host.detach(module)
    else:
        remove_reft(model)


def remove_reft(model: nn.Module) -> None:
    """Take all layers and hooks off a model."""
    for name in reft_layers(model):
        detach_layer(model.get_submodule(name))
    for module in model.modules():
        Host.detach(module)
        for name, entry in list(module.__dict__.items()):
            if isinstance(entry, (GenerateEntry, BatchingEntry)):
                del module.__dict__[name]
