"""What loading an adapter lacks: a check of the whole, and a model that is as before when it fails.

PEFT and transformers load what fits and report the rest, keep a config where they replace weights, and leave what they
created when reading fails. Neither asks the tuner after loading, so register.py puts the functions below around both
`load_adapter` methods; adapters of other types pass through. An adapter that was created to be loaded edits nothing
until its weights are there, whoever loads them (see `ReftLayer.add_adapter`).
"""

from __future__ import annotations

import functools
import inspect
import os
import re
from pathlib import Path
from typing import Any

from peft.config import PeftConfig
from torch import Tensor, nn

from peft_reft.tuner.checkpoint import (
    cannot_replace,
    check_tensors,
    does_not_fit,
    mismatch,
    other_meaning,
    shapes_of,
    warn_of_ignored,
)
from peft_reft.tuner.config import ReftConfig
from peft_reft.tuner.injection import reft_layers, tidy_up
from peft_reft.tuner.keys import is_intervention, without_adapter
from peft_reft.tuner.staging import wait_until_whole

HALVES = (
    "Parts of this adapter's R keep their values ({parts}). Where the others are trained, they lie in parameters of "
    "their own, which transformers cannot load. Leave out is_trainable, and call model.set_adapter(name) afterwards."
)

OTHER_SIZE = re.compile(r"size mismatch for (.*?)\.?$", re.M)  # a line of torch's `load_state_dict`
OF_OTHER_SIZE = (
    "{sizes}. A classifier's head has a row for each class: give the base model's from_pretrained as many as the "
    "adapter was trained with, num_labels=N (--num-labels N)"
)

ON_DISK = (
    "transformers loads no weights of an adapter into blocks that are offloaded to disk, so that nothing would be "
    "edited in {blocks}. Load the model with a device_map that keeps these blocks in memory."
)


def wrap_function(owner: Any, name: str, replacement: Any) -> None:
    """Put a function around one of a class or module: called with the original and its arguments; wrapped once."""
    original = inspect.unwrap(vars(owner)[name])

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return replacement(original, *args, **kwargs)

    setattr(owner, name, wrapped)


def load_by_peft(original: Any, model: Any, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
    """Around `PeftModel.load_adapter`."""
    current = model.peft_config.get(adapter_name)
    is_new = current is None or _is_waiting(model, adapter_name)
    try:
        wait_for_writers(model_id, kwargs.get("subfolder"))
        if isinstance(current, ReftConfig) and not is_new:
            saved = PeftConfig.from_pretrained(model_id, **kwargs)  # which takes what is for it
            reason = other_meaning(saved, current) if saved.peft_type == current.peft_type else "it is of another type"
            if reason is not None:
                raise ValueError(cannot_replace(adapter_name, reason))
        return original(model, model_id, adapter_name, *args, **kwargs)
    except BaseException as error:
        config = model.peft_config.get(adapter_name)
        if is_new and isinstance(config, ReftConfig):
            if list(model.peft_config) == [adapter_name]:
                model.base_model.unload()
            else:
                model.delete_adapter(adapter_name)
        if isinstance(error, KeyError) and isinstance(config, ReftConfig):  # PEFT looks such tensors up by name
            reason = f"its file lacks {error.args[0]}, of its modules_to_save or trainable_token_indices"
            raise ValueError(does_not_fit(model.get_base_model(), reason, config)) from error
        if isinstance(error, RuntimeError) and isinstance(config, ReftConfig):
            sizes = OTHER_SIZE.findall(str(error))  # of modules_to_save or trained tokens: the rest is compared before
            if sizes:
                reason = OF_OTHER_SIZE.format(sizes="; ".join(sizes))
                raise ValueError(does_not_fit(model.get_base_model(), reason, config)) from error
        raise


def wait_for_writers(model_id: Any, subfolder: str | None) -> None:
    """Raise ValueError for a directory in which a save was interrupted between two files."""
    if isinstance(model_id, (str, os.PathLike)) and os.path.isdir(model_id):
        wait_until_whole(Path(model_id, subfolder or ""))


def _is_waiting(model: nn.Module, adapter_name: str) -> bool:
    """Whether an adapter was created to be loaded and has no weights yet."""
    layers = reft_layers(model, adapter_name)
    return bool(layers) and list(layers) == _without_weights(model, adapter_name)


def _without_weights(model: nn.Module, adapter_name: str) -> list[str]:
    """The blocks in which an adapter has parameters, all of them zero or on no device."""
    found = []
    for block, layer in reft_layers(model, adapter_name).items():
        parameters = list(layer.reft_interventions[adapter_name].parameters())
        if parameters and not any(not p.is_meta and bool(p.detach().any()) for p in parameters):
            found.append(block)
    return found


def load_by_transformers(
    original: Any, model: Any, peft_model_id: Any = None, adapter_name: str | None = None, *args: Any, **kwargs: Any
) -> Any:
    """Around the `load_adapter` of transformers' models."""
    wait_for_writers(peft_model_id, (kwargs.get("adapter_kwargs") or {}).get("subfolder"))
    name = "default" if adapter_name is None else adapter_name
    existed = bool(reft_layers(model, name))
    active: list[str] = next((layer.active_adapters for layer in reft_layers(model).values()), [])
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    before = _tensors_in(model)
    try:
        info = original(model, peft_model_id, adapter_name, *args, **kwargs)
        config = getattr(model, "peft_config", {}).get(name)
        if not existed and isinstance(config, ReftConfig):
            warn_of_ignored(*_put_back(before), name)
            reason = _missed(model, name, info)
            if reason is not None:
                raise ValueError(does_not_fit(model, reason, config))
            left_out = _without_weights(model, name)
            if left_out and "disk" in getattr(model, "hf_device_map", {}).values():
                raise ValueError(ON_DISK.format(blocks=", ".join(left_out)))
            check_tensors({key: p for key, p in model.named_parameters() if is_intervention(key, name)})
        return info
    except BaseException as error:
        config = getattr(model, "peft_config", {}).get(name)
        if isinstance(config, ReftConfig):
            _put_back(before)
        if not existed and reft_layers(model, name):
            model.delete_adapter(name)
            tidy_up(model)
            if active:
                model.set_adapter(active)
            for parameter in model.parameters():
                parameter.requires_grad_(id(parameter) in trained)
        parts = config.frozen_subspaces if isinstance(config, ReftConfig) and not config.inference_mode else None
        if parts and isinstance(error, RuntimeError):  # transformers sets parameters, not a state dict
            raise ValueError(HALVES.format(parts=parts)) from error
        raise


def _tensors_in(model: nn.Module) -> list[tuple[str, dict[str, Any], str, Tensor]]:
    """The parameters and buffers of a model: their names, and in which dictionary each is under which key."""
    return [
        (f"{path}.{key}" if path else key, held, key, tensor)
        for path, module in model.named_modules()
        for held in (module._parameters, module._buffers)
        for key, tensor in held.items()
        if tensor is not None
    ]


def _put_back(before: list[tuple[str, dict[str, Any], str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Give a model its own tensors back, where transformers has put some of an adapter's file in their place.

    Returns:
        Those of the file, and the model's own, by name.
    """
    loaded, own = {}, {}
    for name, held, key, tensor in before:
        found = held.get(key)
        if found is not None and found is not tensor:
            loaded[name], own[name], held[key] = found, tensor, tensor
    return loaded, own


def _missed(model: nn.Module, adapter_name: str, info: Any) -> str | None:
    """What keeps the loaded tensors from fitting, from transformers' report."""
    anonymous = functools.partial(without_adapter, adapter_name=adapter_name)
    wanted = shapes_of(dict(model.named_parameters()), adapter_name)
    saved = dict(wanted)
    for key in info.missing_keys:
        saved.pop(anonymous(key), None)
    for key, shape, _ in info.mismatched_keys:
        saved[anonymous(key)] = tuple(shape)
    saved |= {anonymous(key): () for key in info.unexpected_keys if is_intervention(key)}
    return mismatch(saved, wanted)
