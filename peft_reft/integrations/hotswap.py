"""PEFT's `hotswap_adapter` for ReFT: other weights for an adapter, in place, so that a compiled model goes on as it is.

PEFT's own code for it is about LoRA's ranks and scalings, and looks up by name the function that swaps weights: that
one sends ReFT's adapters here. What keeps one adapter from taking another's place is worked out in tuner/checkpoint.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft.config import PeftConfig
from peft.utils import get_peft_model_state_dict, hotswap, set_peft_model_state_dict
from peft.utils.peft_types import PeftType
from torch import Tensor, nn

from peft_reft.tuner.checkpoint import cannot_replace, mismatch, other_meaning, shapes_of
from peft_reft.tuner.config import ReftConfig
from peft_reft.tuner.injection import reft_layers
from peft_reft.tuner.loading import wait_for_writers, wrap_function
from peft_reft.tuner.model import ReftModel
from peft_reft.tuner.private import insert_adapter_name_into_state_dict


def register() -> None:
    """Let PEFT's `hotswap_adapter` take ReFT's adapters."""
    wrap_function(hotswap, "hotswap_adapter", swap_when_whole)
    wrap_function(hotswap, "hotswap_adapter_from_state_dict", swap_by_type)
    # Nothing for PEFT to compare: it does so with the active adapter, which need not be the one that is replaced.
    hotswap.CONFIG_KEYS_TO_CHECK[PeftType["REFT"]] = []


def swap_when_whole(
    original: Any, model: Any, model_name_or_path: str, adapter_name: str, *args: Any, **kwargs: Any
) -> None:
    """As PEFT's `hotswap_adapter`, when no save to that directory is about to put its files in place."""
    wait_for_writers(model_name_or_path, kwargs.get("subfolder"))
    original(model, model_name_or_path, adapter_name, *args, **kwargs)


def swap_by_type(
    original: Any,
    model: Any,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    config: PeftConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """As PEFT's `hotswap_adapter_from_state_dict`, the original, to which adapters of other types are left."""
    if config.peft_type != PeftType["REFT"]:
        original(model, state_dict, adapter_name, config, parameter_prefix)
    else:
        swap_weights(model, state_dict, adapter_name, config, ReftModel.prefix)


def swap_weights(
    model: nn.Module, state_dict: Mapping[str, Tensor], adapter_name: str, config: PeftConfig, prefix: str
) -> None:
    """Put the weights of a saved adapter in the place of an adapter's, and set its strength to 1.

    All tensors are compared first, those of `modules_to_save` too. The adapter keeps its config, and with it what
    is for training only (`dropout`).

    Args:
        state_dict: the saved tensors, with the adapter's name put in as `hotswap_adapter` does it.
        config: of the saved adapter.
        prefix: the one that PEFT has for ReFT.

    Raises:
        ValueError: if the model has no such adapter, or weights of another meaning, name or shape. Nothing is changed.
    """
    model = model._modules.get("_orig_mod") or model  # should torch.compile have wrapped it
    adapters = getattr(model, "peft_config", {})
    current = adapters.get(adapter_name)
    if not isinstance(current, ReftConfig):
        raise ValueError(
            f"The model has no ReFT adapter {adapter_name!r} whose weights could be replaced; its adapters are "
            f"{sorted(adapters)}. Load a new one with load_adapter."
        )
    wanted = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    names = insert_adapter_name_into_state_dict({name: name for name in wanted}, adapter_name, prefix)
    saved = {names.get(key, key): tensor for key, tensor in state_dict.items()}
    reason = other_meaning(config, current) or mismatch(shapes_of(saved), shapes_of(wanted))
    if reason is None:
        shapes = [{name: tensor.shape for name, tensor in tensors.items()} for tensors in (saved, wanted)]
        different = sorted({name for name, _ in shapes[0].items() ^ shapes[1].items()})
        if different:
            reason = f"other modules are trained in full, or of another shape: {', '.join(different)}"
        elif any(tensor.is_meta for tensor in wanted.values()):
            reason = "they are offloaded, so that there is nothing to write to"
    if reason is not None:
        raise ValueError(cannot_replace(adapter_name, reason))
    set_peft_model_state_dict(model, saved, adapter_name)
    for layer in reft_layers(model).values():
        if adapter_name in layer.scaling:
            layer.scaling[adapter_name] = 1.0
