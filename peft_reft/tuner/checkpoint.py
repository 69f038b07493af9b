"""Checking an adapter against the model before any of its tensors is loaded.

PEFT loads what fits and reports the rest as missing keys; an adapter that fits half a model would then run, with
some blocks edited and others not. And where it puts new weights in the place of old ones, it keeps the old config.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from peft.config import PeftConfig
from torch import Tensor

# Settings that say what weights mean, and that the names and shapes of interventions do not show.
MEANING = (
    "intervention",
    "positions",
    "share_weights",
    "share_layers",
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
    return (
        f"This ReFT adapter does not fit {type(model).__name__}: {reason}. Load it into the model it was "
        f"trained on (base_model_name_or_path={config.base_model_name_or_path!r})."
    )


def other_meaning(new: PeftConfig, current: PeftConfig) -> str | None:
    """Which setting gives the weights of two adapters different meanings, in words; None if there is none."""
    for name in MEANING:
        ours, theirs = getattr(current, name), getattr(new, name)
        if ours != theirs and (name != "modules_to_save" or {*(ours or ())} != {*(theirs or ())}):
            return f"{name} is {theirs!r} in the new adapter and {ours!r} in the one that it would replace"
    return None


def cannot_replace(adapter_name: str, reason: str) -> str:
    """The message of the error for weights that cannot take the place of an adapter's."""
    return (
        f"The weights of adapter {adapter_name!r} cannot be replaced, and are what they were: {reason}. Load the new "
        "adapter under another name with load_adapter; delete_adapter removes the old one."
    )


def blocks_of(names: Iterable[str]) -> list[str]:
    """Names of the edited blocks, from the names of their interventions' parameters."""
    return list(dict.fromkeys(name.split(".reft.reft_interventions.")[0] for name in names))


def intervention_shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that belong to interventions."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items() if ".reft.reft_interventions." in name}


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
