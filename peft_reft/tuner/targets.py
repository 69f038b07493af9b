"""Which modules an adapter edits, and with what rank: PEFT's rules for names, ours for the numbers of blocks."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn

from peft_reft.blocks import ModelBlocks, block_number, group_by_stack, own_modules, own_name, pick_layers
from peft_reft.tuner.config import ReftConfig
from peft_reft.tuner.layer import ReftLayer
from peft_reft.tuner.model_sizes import rows_of
from peft_reft.tuner.private import ExcludedModule, get_input_embeddings_name
from peft_reft.tuner.sizes import check_ids

UNMATCHED_SAVED = (
    "The modules_to_save of a ReFT adapter, {names}, name no module of the model, so that none is trained or saved "
    "beside the edits. Each is the end of a module's name."
)
LINEAR_LAYERS = (
    "A ReFT adapter with target_modules={targets!r} edits the outputs of linear layers ({names}), as LoRA does with "
    "their weights. ReFT edits the hidden state after each block: leave target_modules out. Name such modules only if "
    "their output is what you want to edit."
)


def choose_targets(config: ReftConfig, model: nn.Module, blocks: ModelBlocks) -> tuple[set[str], set[str]]:
    """Names of the modules to edit, and of those that would be if `exclude_modules` did not name them.

    Raises:
        ValueError: if the model's blocks cannot be found, or `layers_to_transform` names none of them.
    """
    modules = own_modules(model).items()
    # Another tuner's layer, such as LoRA's, can be edited like the module that it replaced; what is in it cannot.
    inside_layers = tuple(f"{name}." for name, module in modules if isinstance(module, BaseTunerLayer))
    names = [name for name, module in modules if name and not isinstance(module, ReftLayer)]
    names = [name for name in names if not name.startswith(inside_layers)] if inside_layers else names
    stacks = [names]
    if config.target_modules is None:
        stacks = [[own_name(name) for name in stack] for stack in blocks.stacks()]
    # PEFT's rules for names, but not for block numbers: it looks for those inside of blocks only.
    rules = SimpleNamespace(
        target_modules=".*" if config.target_modules is None else config.target_modules,
        exclude_modules=config.exclude_modules,
        modules_to_save=config.modules_to_save,
        target_parameters=None,
    )
    results = {name: check_target_module_exists(rules, name) for stack in stacks for name in stack}
    excluded = {name for name, result in results.items() if isinstance(result, ExcludedModule)}
    matched = [name for name, result in results.items() if result]
    if not matched:
        return set(), excluded  # PEFT says so, with the reason
    if config.target_modules is not None:
        stacks = group_by_stack(matched)
    chosen = set(pick_layers(stacks, config.layers_to_transform))
    return chosen & set(matched), excluded


def check_adapter_name(name: str) -> None:
    """Refuse a name that cannot be the name of a module, before anything is changed.

    Raises:
        ValueError: if it is empty, "*" or an absolute path, holds a dot, or is an attribute of the module that holds
            adapters.
    """
    is_taken = not isinstance(name, str) or hasattr(nn.ModuleDict, name) or name in ("training", "*")
    if is_taken or not name or "." in name or os.path.isabs(name):
        other = re.sub(r"[./*]+", "_", str(name)).strip("_")
        raise ValueError(
            f"adapter_name={name!r} cannot name an adapter: it becomes part of the names of parameters and of a "
            "folder's path, so it must have no dot, not begin with a slash, and not be an attribute of a module such "
            "as 'training', or '*', which stands for all adapters. Use for instance "
            f"{other if other and other != name else f'{other}_adapter'!r}."
        )


def warn_of_settings_without_effect(config: ReftConfig, model: nn.Module, names: Sequence[str]) -> None:
    """Say which settings change nothing, or hardly what they seem to; PEFT does so for keys of `rank_pattern`.

    Args:
        model: the model that gets the adapter.
        names: of the modules that are edited.
    """
    saved = config.modules_to_save
    if saved and not any(name.endswith(tuple(saved)) for name, _ in model.named_modules()):
        warnings.warn(UNMATCHED_SAVED.format(names=sorted(saved)))
    projections = sorted({name.rpartition(".")[2] for name in _linear_layers_within_blocks(model, names)})
    if projections:
        warnings.warn(LINEAR_LAYERS.format(targets=config.target_modules, names=", ".join(projections)))


def _linear_layers_within_blocks(model: nn.Module, targets: Iterable[str]) -> list[str]:
    """Those of the modules that are linear layers with a block's number before them."""
    found, modules = [], own_modules(model)
    for name in targets:
        module = modules[name]
        is_linear = any(isinstance(getattr(module, size, None), int) for size in ("out_features", "nf"))
        if is_linear and not any(True for _ in module.children()) and block_number(name.rpartition(".")[0]) is not None:
            found.append(name)
    return found


def rank_of(config: ReftConfig, name: str) -> int:
    """The rank in the module of this name."""
    patterns = config.rank_pattern or {}
    return patterns.get(get_pattern_key(list(patterns), name), config.r)


def check_shapes(config: ReftConfig, targets: Mapping[str, tuple[int, int]]) -> None:
    """Refuse ranks and widths that cannot be.

    Args:
        targets: width and rank of each module to edit, by its name.

    Raises:
        ValueError: if a rank is larger than the width, or layers of different widths are to share interventions.
    """
    for name, (width, r) in targets.items():
        if r > width:
            raise ValueError(
                f"r={r} is not a rank for hidden states of width {width}, which {name!r} returns: it must be between "
                f"1 and {width}."
            )
    widths = sorted({width for width, _ in targets.values()})
    if config.share_layers and len(widths) > 1:
        raise ValueError(
            f"share_layers=True needs blocks of one width, but these are {widths} wide. Choose blocks of one width "
            "with layers_to_transform or target_modules, or do not share."
        )


def check_trained_tokens(config: ReftConfig, model: nn.Module, edited: Iterable[str]) -> None:
    """Refuse to train tokens that an embedding does not have, or single ones of an embedding whose output is edited:
    PEFT then looks them up by itself.

    Args:
        edited: names of the modules whose output is edited.

    Raises:
        ValueError: naming the token, or the module.
    """
    tokens = config.trainable_token_indices or {}
    by_module = tokens if isinstance(tokens, dict) else {get_input_embeddings_name(model, "embed_tokens"): tokens}
    for module, ids in by_module.items():
        owner = f"{module!r} of {type(model).__name__}"
        check_ids("trainable_token_indices", ids, rows_of(model, module), owner)
        for name in edited:
            if not f".{name}".endswith(f".{module}"):
                continue
            raise ValueError(
                f"trainable_token_indices trains tokens of {name!r}, whose output is edited: those are looked up "
                "without calling that module, so that there would be no edit. Do one of the two, or target the first "
                "block instead."
            )
