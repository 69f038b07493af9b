"""Which modules an adapter edits, and with what rank: PEFT's rules for names, ours for the numbers of blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import SimpleNamespace

from peft.tuners.tuners_utils import BaseTunerLayer, _ExcludedModule, check_target_module_exists
from peft.utils.other import _get_input_embeddings_name, get_pattern_key
from torch import nn

from peft_reft.blocks import ModelBlocks, group_by_stack, pick_layers
from peft_reft.tuner.attach import reft_layers
from peft_reft.tuner.config import ReftConfig
from peft_reft.tuner.layer import CHILD


def choose_targets(config: ReftConfig, model: nn.Module, survey: ModelBlocks) -> tuple[set[str], set[str]]:
    """Names of the modules to edit, and of those that would be if `exclude_modules` did not name them.

    Raises:
        ValueError: if the model's blocks cannot be found, or `layers_to_transform` names none of them.
    """
    names = [name for name, module in model.named_modules() if name and not isinstance(module, BaseTunerLayer)]
    inside_layers = tuple(f"{name}.{CHILD}." for name in reft_layers(model))
    names = [name for name in names if not name.startswith(inside_layers)] if inside_layers else names
    stacks = survey.stacks() if config.target_modules is None else [names]
    # PEFT's rules for names, but not for block numbers: it looks for those inside of blocks only.
    rules = SimpleNamespace(
        target_modules=".*" if config.target_modules is None else config.target_modules,
        exclude_modules=config.exclude_modules,
        modules_to_save=config.modules_to_save,
        target_parameters=None,
    )
    results = {name: check_target_module_exists(rules, name) for stack in stacks for name in stack}
    excluded = {name for name, result in results.items() if isinstance(result, _ExcludedModule)}
    matched = [name for name, result in results.items() if result]
    if not matched:
        return set(), excluded  # PEFT says so, with the reason
    if config.target_modules is not None:
        stacks = group_by_stack(matched)
    chosen = set(pick_layers(stacks, config.layers_to_transform))
    return chosen & set(matched), excluded


def own_name(name: str) -> str:
    """A module's name in the model itself, should torch.compile have wrapped that."""
    return name.removeprefix("_orig_mod.")


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
                f"r={r} is not a rank for hidden states of width {width}, which {name!r} puts out: it must be between "
                f"1 and {width}."
            )
    widths = sorted({width for width, _ in targets.values()})
    if config.share_layers and len(widths) > 1:
        raise ValueError(
            f"share_layers=True needs blocks of one width, but these are {widths} wide. Choose blocks of one width "
            "with layers_to_transform or target_modules, or do not share."
        )


def check_trained_tokens(config: ReftConfig, model: nn.Module, edited: Iterable[str]) -> None:
    """Refuse to train single tokens of an embedding whose output is edited: PEFT then looks the tokens up by itself.

    Args:
        edited: names of the modules whose output is edited.

    Raises:
        ValueError: if `trainable_token_indices` are of one of these modules.
    """
    tokens = config.trainable_token_indices
    if tokens is None:
        return
    trained = list(tokens) if isinstance(tokens, dict) else [_get_input_embeddings_name(model, "embed_tokens")]
    for name in edited:
        if any(f".{name}".endswith(f".{embedding}") for embedding in trained):
            raise ValueError(
                f"trainable_token_indices trains tokens of {name!r}, whose output is edited: those are looked up "
                "without calling that module, so that there would be no edit. Do one of the two, or target the first "
                "block instead."
            )
