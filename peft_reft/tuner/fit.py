"""Whether a config fits one model: found out before anything is allocated or changed.

What holds for any model is checked when the config is built: see config.py and sizes.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from peft_reft.blocks import block_number, configs_of, input_embedding, own_modules
from peft_reft.positions.notation import parse_positions
from peft_reft.tuner.config import ReftConfig
from peft_reft.tuner.injection import reft_layers
from peft_reft.tuner.private import get_input_embeddings_name
from peft_reft.tuner.sizes import check_ids, shown

MOST_UNSTATED = 2**20  # tokens that a term of positions may count in a model that does not say how many it takes
MOST_PARAMETERS = 2**27  # of an adapter; a larger base model may have an adapter of its own size
STATED = (  # where the configs of transformers say it
    "max_position_embeddings",
    "max_source_positions",
    "max_target_positions",
    "max_encoder_position_embeddings",
    "max_decoder_position_embeddings",
)

UNMATCHED_SAVED = (
    "The modules_to_save of a ReFT adapter, {names}, name no module of the model, so that none is trained or saved "
    "beside the edits. Each is the end of a module's name."
)
LINEAR_LAYERS = (
    "A ReFT adapter with target_modules={targets} edits the outputs of linear layers ({names}), as LoRA does with "
    "their weights. ReFT edits the hidden state after each block: leave target_modules out. Name such modules only if "
    "their output is what you want to edit."
)


def check_fit(config: ReftConfig, model: nn.Module, targets: Mapping[str, tuple[int, int]]) -> None:
    """Refuse what this model cannot use; warn of settings that change nothing, or hardly what they seem to.

    Args:
        model: the model that gets the adapter.
        targets: width and rank of each module to edit, by its name.

    Raises:
        ValueError: naming the field, and the limit.
    """
    check_shapes(config, targets)
    check_sizes(config, model, targets)
    _check_trained_tokens(config, model, {*targets, *reft_layers(model)})
    saved = config.modules_to_save
    if saved and not any(name.endswith(tuple(saved)) for name, _ in model.named_modules()):
        warnings.warn(UNMATCHED_SAVED.format(names=sorted(saved)))  # PEFT does so for keys of `rank_pattern`
    modules, projections = own_modules(model), set()
    for name in targets:
        around, _, last = name.rpartition(".")
        if block_number(around) is not None and _is_linear_layer(modules[name]):
            projections.add(last)
    if projections:
        warnings.warn(LINEAR_LAYERS.format(targets=shown(config.target_modules), names=", ".join(sorted(projections))))


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


def check_sizes(config: ReftConfig, model: nn.Module, targets: Mapping[str, tuple[int, int]]) -> None:
    """Refuse more tokens than this model takes or knows, and more parameters than it has.

    Args:
        targets: width and rank of each module to edit, by its name.

    Raises:
        ValueError: naming the field, the model and its limit.
    """
    name = type(model).__name__
    spec = parse_positions(config.positions)
    most, said = most_tokens(model)
    for term in spec.terms:
        if term.count > most:
            raise ValueError(
                f"positions={config.positions!r} counts {term.count} tokens, but {name} takes at most {most} ({said}). "
                "Use a smaller number, or 'all' for every token of the prompt."
            )
    marker = config.prompt_end if isinstance(config.prompt_end, (list, tuple)) else ()
    check_ids("prompt_end", marker, vocabulary_of(model), name)
    sizes = [rank * (2 * width + 1) for width, rank in targets.values()]  # the source, the basis and the bias
    blocks = max(sizes, default=0) if config.share_layers else sum(sizes)
    size = blocks * spec.num_interventions(config.share_weights)
    if size > max(MOST_PARAMETERS, sum(parameter.numel() for parameter in model.parameters())):
        raise ValueError(
            f"r={config.r}, positions={config.positions!r} and share_weights={config.share_weights!r} make an "
            f"adapter of {size} parameters in {len(targets)} block(s), more than {name} itself has, and more than "
            f"{MOST_PARAMETERS}. Use a smaller rank or fewer positions."
        )


def most_tokens(model: nn.Module) -> tuple[int, str]:
    """The most tokens that a model takes in one sequence, and in words where that stands."""
    unstated = MOST_UNSTATED, "its config does not say how many"
    limits: list[tuple[int, str]] = []
    for config in configs_of(getattr(model, "config", None)):
        stated = [
            (value, f"{name} in its config")
            for name in STATED
            if isinstance(value := getattr(config, name, None), int) and value > 0
        ]
        if not stated and hasattr(config, "num_hidden_layers"):
            return unstated  # the images of a model with a text part are not bounded by what the text part says
        limits += stated
    return max(limits, default=unstated)


def vocabulary_of(model: Any) -> int | None:
    """How many token ids a model knows; None if it does not say."""
    config = getattr(model, "config", None)
    if not isinstance(config, PretrainedConfig):
        return None
    size = getattr(config.get_text_config(), "vocab_size", None)
    if not isinstance(size, int):
        return None
    return max(size, getattr(input_embedding(model), "num_embeddings", 0))


def rows_of(model: nn.Module, name: str) -> int | None:
    """How many rows the embedding of this name, or within a wrapper of it, has; the largest of several, or None."""
    sizes = [
        module.num_embeddings
        for own, module in model.named_modules()
        if isinstance(module, nn.Embedding) and f".{name}." in f".{own}."
    ]
    return max(sizes, default=None)


def _check_trained_tokens(config: ReftConfig, model: nn.Module, edited: Iterable[str]) -> None:
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
            if f".{name}".endswith(f".{module}"):
                raise ValueError(
                    f"trainable_token_indices trains tokens of {name!r}, whose output is edited: those are looked up "
                    "without calling that module, so that there would be no edit. Do one of the two, or target the "
                    "first block instead."
                )


def _is_linear_layer(module: nn.Module) -> bool:
    is_linear = any(isinstance(getattr(module, size, None), int) for size in ("out_features", "nf"))
    return is_linear and next(module.children(), None) is None
