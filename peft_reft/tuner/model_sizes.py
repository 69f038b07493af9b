"""How large the numbers of a config may be for one model: compared before anything is allocated or changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from peft_reft.blocks import configs_of, input_embedding
from peft_reft.positions.notation import parse_positions
from peft_reft.tuner.config import ReftConfig
from peft_reft.tuner.sizes import check_ids

MOST_UNSTATED = 2**20  # tokens that a term of positions may count in a model that does not say how many it takes
MOST_PARAMETERS = 2**27  # of an adapter; a larger base model may have an adapter of its own size
STATED = (  # where the configs of transformers say it
    "max_position_embeddings",
    "max_source_positions",
    "max_target_positions",
    "max_encoder_position_embeddings",
    "max_decoder_position_embeddings",
)


def check_sizes(config: ReftConfig, model: nn.Module, targets: Mapping[str, tuple[int, int]]) -> None:
    """Refuse what this model cannot use, before anything is allocated or changed.

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
