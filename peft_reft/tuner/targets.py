"""Which modules an adapter edits, and with what rank: PEFT's rules for names, ours for the numbers of blocks."""

from __future__ import annotations

import os
import re
from types import SimpleNamespace

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn

from peft_reft.blocks import ModelBlocks, group_by_stack, own_modules, pick_layers
from peft_reft.tuner.config import ReftConfig
from peft_reft.tuner.layer import ReftLayer
from peft_reft.tuner.private import ExcludedModule


def choose_targets(config: ReftConfig, model: nn.Module, blocks: ModelBlocks) -> tuple[set[str], set[str]]:
    """Names of the modules to edit, and of those that would be if `exclude_modules` did not name them.

    Raises:
        ValueError: if the model's blocks cannot be found, or `layers_to_transform` names none of them.
    """
    modules = own_modules(model).items()
    # Another tuner's layer, such as LoRA's, can be edited like the module that it replaced; what is in it cannot.
    inside_layers = tuple(f"{name}." for name, module in modules if isinstance(module, BaseTunerLayer))
    names = [name for name, module in modules if name and not isinstance(module, ReftLayer)]
    names = [name for name in names if not name.startswith(inside_layers)]
    stacks = blocks.stacks() if config.target_modules is None else [names]
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


def rank_of(config: ReftConfig, name: str) -> int:
    """The rank in the module of this name."""
    patterns = config.rank_pattern or {}
    return patterns.get(get_pattern_key(list(patterns), name), config.r)
