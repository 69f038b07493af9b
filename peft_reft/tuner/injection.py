"""Puts entries on a model and takes everything off again; finds the ReFT layers that are on it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from peft import PeftModel
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.peft_types import TaskType
from torch import nn

from peft_reft.blocks import paths_around, takes_no_text
from peft_reft.context.block import CHILD, keep_called
from peft_reft.context.entry import ForwardEntry
from peft_reft.context.generate import DecoderPromptEntry, GenerateEntry, PrepareEntry, attach_method_entry
from peft_reft.context.method import MethodEntry
from peft_reft.context.outermost import attach_entry, detach_entries
from peft_reft.context.replay import unwrap_checkpoints
from peft_reft.context.state import ModelState
from peft_reft.context.tower import TOWER
from peft_reft.tuner.layer import ReftLayer, detach_layer
from peft_reft.tuner.neighbours import METHODS

IDS = {"input_ids", "decoder_input_ids"}
TOKENS = {*IDS, "inputs_embeds"}  # parameters by which a module takes tokens


def reft_layers(model: nn.Module, adapter_name: str | None = None) -> dict[str, ReftLayer]:
    """The ReFT layers of a model, by the names of their blocks; with a name, those that have this adapter."""
    return {
        name.removesuffix(f".{CHILD}"): layer
        for name, layer in model.named_modules()
        if isinstance(layer, ReftLayer) and (adapter_name is None or adapter_name in layer.reft_interventions)
    }


def editing_layers(model: nn.Module) -> dict[str, ReftLayer]:
    """The ReFT layers with an active adapter, as far as they are switched on, by the names of their blocks."""
    return {
        name: layer
        for name, layer in reft_layers(model).items()
        if not layer.disable_adapters and any(adapter in layer.reft_interventions for adapter in layer.active_adapters)
    }


def base_model_of(model: Any) -> Any:
    """The model below PEFT's wrappers."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return base.model if isinstance(base, BaseTuner) else base


def state_of(model: nn.Module) -> ModelState | None:
    """What the entries and layers of a model share; None for a model without ReFT layers."""
    return next((module.state for module in model.modules() if isinstance(module, ReftLayer)), None)


def rebuild_entries(model: nn.Module, state: ModelState) -> None:
    """Take all entries off, and put one on every module around the blocks that takes tokens: adapters came or went.

    Layers are numbered anew, and plans forgotten, which depend on the numbers. Without layers no entry is left.
    """
    detach_entries(state)
    unwrap_checkpoints(model)
    state.plans.clear()
    layers = reft_layers(model)
    state.layers[:] = layers.values()
    if not layers:
        for module in model.modules():
            for entry in list(module.__dict__.values()):
                if isinstance(entry, MethodEntry):
                    entry.detach()
        return
    for number, (name, layer) in enumerate(layers.items()):
        layer.number = number
        if any(isinstance(model.get_submodule(path), nn.TransformerEncoderLayer) for path in paths_around(name)):
            keep_called(layer.block)
    roles = roles_of(model)
    causal = {"": False}  # by path: whether a module predicts tokens, or one around it; of the whole, the state knows
    paths = sorted({path for name in layers for path in paths_around(name)})
    towers = towers_among(model, paths, roles)
    for path in paths:
        if _inside(path, towers):
            continue  # of a tower's own, which its entry has opened the context for
        module = model.get_submodule(path)
        if path:
            causal[path] = causal[path.rpartition(".")[0]] or predicts_tokens(module)
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):  # never called
            continue
        # An encoder of images takes no tokens, but `generate` runs it by itself.
        is_side = module in roles and roles.get(model.get_submodule(path.rpartition(".")[0])) is None
        takes_tokens = _takes(module, TOKENS)
        if path and not (is_side or takes_tokens or path in towers):
            continue
        below = {name: layer for name, layer in layers.items() if not path or name.startswith(f"{path}.")}
        own = [layer for name, layer in below.items() if path in towers or not _inside(name, towers)]
        role = TOWER if path in towers else roles.get(module, "router" if roles else "")
        entry = ForwardEntry(
            module,
            state,
            role,
            depth=len(path.split(".")) if path else 0,
            causal=role == "" and causal[path],
            layers=own,
            blocks=[name.removeprefix(f"{path}.") for name in below],
        )
        attach_entry(entry)
        if (takes_tokens or not path) and path not in towers:
            _attach_method_entries(module, state)


def _attach_method_entries(module: nn.Module, state: ModelState) -> None:
    if not hasattr(type(module), "generate"):
        return
    entries: list[type[MethodEntry]] = [GenerateEntry, DecoderPromptEntry, PrepareEntry, *METHODS]
    for entry in entries:
        attach_method_entry(entry, module, state)


def towers_among(model: nn.Module, paths: Iterable[str], roles: Mapping[nn.Module, str]) -> list[str]:
    """Those of the paths at which a model that takes tokens has a part that runs images or sounds beside them.

    An encoder of images is none: its rows are those of the decoder's text. Nor is a model of sounds and their text.
    """
    towers: list[str] = []
    for path in paths:
        module = model.get_submodule(path)
        if _inside(path, towers) or not takes_no_text(module) or _holds_text(module, roles):
            continue
        around = [model.get_submodule(name) for name in paths_around(path)]
        if any(_takes(one, TOKENS) and roles.get(one) == roles.get(module) for one in around):
            towers.append(path)
    return towers


def _holds_text(module: nn.Module, roles: Mapping[nn.Module, str]) -> bool:
    """Whether there is a module in it that takes ids of tokens, or another side of an encoder-decoder model."""
    return any(_takes(one, IDS) or roles.get(one) != roles.get(module) for one in module.modules())


def _inside(name: str, paths: Iterable[str]) -> bool:
    return any(name.startswith(f"{path}.") for path in paths)


def _takes(module: nn.Module, names: set[str]) -> bool:
    return bool(names & set(inspect.signature(type(module).forward).parameters))


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


def predicts_tokens(module: Any) -> bool:
    """Whether a module is a causal language model by itself, as transformers says."""
    can_generate = getattr(module, "can_generate", None)
    config = getattr(module, "config", None)
    return bool(can_generate is not None and can_generate()) and not getattr(config, "is_encoder_decoder", False)


def is_causal_lm(model: nn.Module, config: PeftConfig) -> bool:
    """Whether labels of the shape of `input_ids` are next-token targets, so that they show where the prompt ends.

    They are what the model takes them for, also if its adapter is said to be for another task, such as SEQ_2_SEQ_LM
    for a Llama. Where features are extracted there are none.
    """
    if config.task_type in (TaskType.CAUSAL_LM, TaskType.FEATURE_EXTRACTION):
        return config.task_type == TaskType.CAUSAL_LM
    return predicts_tokens(model)


def tidy_up(model: nn.Module) -> None:
    """Take layers without any adapter off a model, and everything else as well if no layer is left."""
    state = state_of(model)
    if state is None:
        return
    for name, layer in reft_layers(model).items():
        if not layer.reft_interventions:
            detach_layer(model.get_submodule(name))
    rebuild_entries(model, state)


def remove_adapter(model: nn.Module, adapter_name: str) -> None:
    """Take what was created for an adapter off a model, whose tuner does not know of it (any more)."""
    for layer in reft_layers(model, adapter_name).values():
        layer.delete_adapter(adapter_name)
    tidy_up(model)


def remove_reft(model: nn.Module) -> None:
    """Take all adapters, layers and entries off a model."""
    for layer in reft_layers(model).values():
        layer.reft_interventions.clear()
    tidy_up(model)
