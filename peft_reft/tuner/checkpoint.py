"""Checking an adapter against the model before any of its tensors is loaded.

PEFT loads what fits and reports the rest as missing keys; an adapter that fits half a model would then run, with
some blocks edited and others not. And where it puts new weights in the place of old ones, it keeps the old config.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from peft import PeftModel
from peft.config import PeftConfig
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from peft_reft.tuner.injection import base_model_of
from peft_reft.tuner.keys import INTERVENTIONS, PEFT_PREFIX, blocks_of, is_intervention, without_adapter
from peft_reft.tuner.sizes import printable

# Settings that say what weights mean, and that the names and shapes of interventions do not show.
MEANING = (
    "intervention",
    "positions",
    "share_weights",
    "share_layers",
    "subspaces",
    "prompt_end",
    "turns",
    "act_fn",
    "trainable_token_indices",
    "modules_to_save",
)


def mismatch(saved: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> str | None:
    """What keeps saved tensors from fitting a model, in words; None if all of them fit.

    Args:
        saved: shapes in the checkpoint, by parameter name without the adapter's.
        wanted: shapes that the model has for this adapter, by the same names.
    """
    saved_blocks, wanted_blocks = blocks_of(saved), blocks_of(wanted)
    unknown = [block for block in saved_blocks if block not in wanted_blocks]
    absent = [block for block in wanted_blocks if block not in saved_blocks]
    if unknown or absent:
        parts = [f"the adapter has {len(saved_blocks)} edited blocks, this model {len(wanted_blocks)}"]
        parts += [f"the model lacks {_some(unknown)}"] if unknown else []
        parts += [f"the adapter lacks {_some(absent)}"] if absent else []
        return "; ".join(parts)
    for name, shape in wanted.items():
        if name not in saved:
            return f"the adapter lacks {name}; it was made with another intervention or share_weights"
        if saved[name] != shape:
            if len(shape) != len(saved[name]):
                kind = "intervention"
            else:
                kind = "hidden size" if shape[0] == saved[name][0] else "rank"
            return f"{name} is {list(saved[name])} in the adapter and {list(shape)} in this model: another {kind}"
    surplus = [name for name in saved if name not in wanted]
    if surplus:
        return f"the adapter has {_some(surplus)} on top; it was made with another intervention or share_weights"
    return None


def does_not_fit(model: object, reason: str, config: PeftConfig) -> str:
    """The message of the error for an adapter that does not fit a model."""
    if isinstance(model, PeftModel):
        return (
            f"This ReFT adapter does not fit {type(model).__name__}, which has adapters already: {reason}. Load "
            "another one with model.load_adapter(path, adapter_name)."
        )
    return (
        f"This ReFT adapter does not fit {type(model).__name__}: {reason}. Load it into the model it was "
        f"trained on (base_model_name_or_path={config.base_model_name_or_path!r})."
    )


def other_meaning(new: PeftConfig, current: PeftConfig) -> str | None:
    """Which setting gives the weights of two adapters different meanings, in words; None if there is none."""
    for name in MEANING:
        ours, theirs = getattr(current, name), getattr(new, name)
        if name == "subspaces" and ours and theirs:  # whose order counts
            ours, theirs = list(ours.items()), list(theirs.items())
        if ours != theirs and (name != "modules_to_save" or {*(ours or ())} != {*(theirs or ())}):
            return f"{name} is {theirs!r} in the new adapter and {ours!r} in the one that it would replace"
    return None


def cannot_replace(adapter_name: str, reason: str) -> str:
    """The message of the error for weights that cannot take the place of an adapter's."""
    return (
        f"The weights of adapter {adapter_name!r} cannot be replaced, and are what they were: {reason}. Load the new "
        "adapter under another name with load_adapter; delete_adapter removes the old one."
    )


def shapes_of(tensors: Mapping[str, Tensor], adapter_name: str | None = None) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that belong to interventions, by their names in a file.

    Args:
        tensors: those of a file; with a name those of a model, of which the adapter's are looked at.
    """
    return {
        name if adapter_name is None else without_adapter(name, adapter_name): tuple(tensor.shape)
        for name, tensor in tensors.items()
        if is_intervention(name, adapter_name)
    }


def fitting_tensors(
    state_dict: Mapping[str, Tensor], model: nn.Module, config: PeftConfig, adapter_name: str
) -> dict[str, Tensor]:
    """The tensors of a file that belong to an adapter, after a check that they fit the model as a whole.

    Raises:
        ValueError: naming the mismatch, or a tensor without finite numbers.
    """
    current = model.state_dict()
    own, ignored = own_tensors(state_dict, model, adapter_name)
    wanted = shapes_of(current, adapter_name)
    if config.share_layers and wanted and own:  # stored once, for the first of the blocks
        first, *others = blocks_of(wanted)
        stored = {name: tensor for name, tensor in own.items() if name.startswith(first + INTERVENTIONS)}
        for block in others:
            own = {name.replace(first, block, 1): tensor for name, tensor in stored.items()} | own
    reason = mismatch(shapes_of(own), wanted)
    if reason is not None:
        raise ValueError(does_not_fit(base_model_of(model), reason, config))
    check_tensors(own, current)
    warn_of_ignored(ignored, current, adapter_name)
    return own


def own_tensors(
    state_dict: Mapping[str, Tensor], model: nn.Module, adapter_name: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What of a file belongs to an adapter: its interventions, `modules_to_save` and trained tokens; and the rest.

    PEFT would load the rest too, into whatever module has its name: the base model's own, or another adapter's.

    Args:
        state_dict: keys as `BaseTuner._remap_adapter_state_dict_for_load` gets them: interventions without the
            adapter's name, modules that are saved in full with it.
    """
    own = set()
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            name = name.removeprefix("_fsdp_wrapped_module.")  # as PEFT does
            own |= {f"{name}.{key}" for key in module.adapter_state_dict_load_map(adapter_name).values()}
    own |= {f"{PEFT_PREFIX}{key}" for key in own}
    kept = {key: tensor for key, tensor in state_dict.items() if key in own or is_intervention(key)}
    return kept, {key: tensor for key, tensor in state_dict.items() if key not in kept}


def warn_of_ignored(ignored: Mapping[str, Tensor], current: Mapping[str, Tensor], adapter_name: str) -> None:
    """Warn of tensors that are not the adapter's, unless they are what the model has already.

    Args:
        current: the model's tensors.
    """
    names = [name for name, tensor in ignored.items() if not _is_same(tensor, current.get(name))]
    if names:
        warnings.warn(
            f"The file of adapter {adapter_name!r} holds tensors that are not the adapter's, and that are not loaded: "
            f"{_some(names)}. An adapter brings its interventions, modules_to_save and trained tokens, and never "
            "changes the base model. Tokens or layers that are trained with it belong in trainable_token_indices or "
            "modules_to_save; what you trust, such as the embeddings of a grown vocabulary, put into the base model "
            "yourself with its load_state_dict(..., strict=False)."
        )


def check_tensors(tensors: Mapping[str, Tensor], current: Mapping[str, Tensor] | None = None) -> None:
    """Refuse tensors that hold no finite floating-point numbers.

    Args:
        current: the model's tensors; what is of another kind there, such as a counter in a module that is saved in
            full, may be so in a file.

    Raises:
        ValueError: naming the first such tensor.
    """
    for name, tensor in tensors.items():
        there = None if current is None else current.get(name)
        if not tensor.is_floating_point():
            if there is not None and not there.is_floating_point() and not is_intervention(name):
                continue
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"{name} is of type {kind} in the adapter's file; weights are floating-point numbers.")
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # a part of a distributed tensor
        if not local.is_meta and not bool(local.float().isfinite().all()):
            raise ValueError(
                f"{name} is infinite or not a number (NaN) at some place in the adapter's file: its training diverged, "
                "or the file is damaged. Train again with a smaller learning rate, or load an earlier checkpoint."
            )


def _is_same(tensor: Tensor, there: Tensor | None) -> bool:
    if there is None or there.is_meta or there.shape != tensor.shape or there.dtype != tensor.dtype:
        return False
    return bool((there.to(tensor.device) == tensor).all())


def _some(names: list[str]) -> str:
    return printable(", ".join(names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
