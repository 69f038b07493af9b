"""How a model may be called to see its blocks: on which part, and with tokens or images that fit its config."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from peft_reft.blocks.compiled import own_modules
from peft_reft.blocks.configs import configs_of
from peft_reft.blocks.structure import input_embedding, path_of, paths_around

BOTH = {"input_ids", "pixel_values"}  # what a model of text and images takes
MORE_FOR_DECODERS = 5  # columns


@dataclass(frozen=True)
class EntryPoint:
    """A way to call a model on dummy inputs.

    Attributes:
        path: the module to call; the model itself if empty.
        ids_per_row: how many rows of ids make one row of the batch (one for each codebook of an audio model).
        with_image: whether each row of tokens comes with an image.
    """

    path: str = ""
    ids_per_row: int = 1
    with_image: bool = False


def entry_points(model: nn.Module) -> list[EntryPoint]:
    """The ways to call a model on tokens or images alone, to be tried in this order: the model, its body without the
    head, the modules between it and its input embedding; then the same with an image beside the tokens.

    None for models without a config of transformers, and for models of sound: those would run for long, and a part of
    them that takes tokens is their decoder alone.
    """
    whole, config = _argument_names(model, ""), getattr(model, "config", None)
    is_of_sound = "input_ids" not in whole and whole & {"input_features", "input_values"}
    if is_of_sound or not isinstance(config, PretrainedConfig):
        return []
    inner = paths_around(path_of(model, input_embedding(model)))[1:]
    per_row = sorted({1, _setting(config, "num_codebooks", 1)})
    found = []
    paths = dict.fromkeys(["", getattr(model, "base_model_prefix", ""), *inner])
    for with_image, path, ids_per_row in product((False, True), paths, per_row):
        names = _argument_names(model, path)
        if (path == "" or names & BOTH) and (not with_image or names >= BOTH):
            found.append(EntryPoint(path, ids_per_row, with_image))
    return found


def _argument_names(model: nn.Module, path: str) -> set[str]:
    """The names of the arguments of the forward of a part; none if there is no such part."""
    part = own_modules(model).get(path)
    return set() if part is None else set(inspect.signature(type(part).forward).parameters)


def has_images_beside_tokens(model: nn.Module, entry: EntryPoint) -> bool:
    """Whether images may come with the tokens, and have places of their own: no token stands for them."""
    settings = [name for config in configs_of(getattr(model, "config", None)) for name in vars(config)]
    return _argument_names(model, entry.path) >= BOTH and not any("image_token" in name for name in settings)


def dummy_inputs(
    module: nn.Module, entry: EntryPoint, rows: int, columns: int, other_at: int | None = None
) -> dict[str, Tensor]:
    """Tokens (or an image) for a module's forward, by the names of its parameters.

    Args:
        rows, columns: the shape of the tokens. A decoder beside an encoder gets more columns, to tell the two apart.
        other_at: a column (0 or -1) that gets another token than without it.
    """
    names = inspect.signature(type(module).forward).parameters
    config = getattr(module, "config", None)
    inputs: dict[str, Any] = {}
    for name, count in (("input_ids", columns), ("decoder_input_ids", columns + MORE_FOR_DECODERS)):
        if name in names:
            other, *row = _usable_ids(module, count + 1)
            if other_at is not None:
                row[other_at] = other
            inputs[name] = torch.tensor(row).repeat(rows * entry.ids_per_row, 1)
    if "pixel_values" in names and ("input_ids" not in names or entry.with_image):
        inputs["pixel_values"] = torch.zeros(rows, *_image_shape(config))
    if "bbox" in names:
        inputs["bbox"] = torch.zeros(rows, columns, 4, dtype=torch.long)
    if "use_cache" in names:
        inputs["use_cache"] = False
    return inputs


def _setting(config: Any, name: str, default: Any) -> Any:
    """A setting of a config, or of one of its parts."""
    values = (getattr(part, name, None) for part in configs_of(config))
    return next((value for value in values if value is not None), default)


def _image_shape(config: Any) -> tuple[int, ...]:
    size = _setting(config, "image_size", _setting(config, "input_size", 224))
    return (_setting(config, "num_channels", 3), *((size, size) if isinstance(size, int) else tuple(size)[-2:]))


def _usable_ids(module: nn.Module, count: int) -> list[int]:
    """Token ids without a special meaning (padding, an image, the end), as far as the config tells."""
    special: set[int] = set()
    embedding = input_embedding(module)
    size = getattr(embedding, "num_embeddings", None) or 1000
    for config in configs_of(getattr(module, "config", None)):
        for name, value in vars(config).items():
            if "token" in name:
                values = value if isinstance(value, (list, tuple)) else [value]
                special.update(v for v in values if isinstance(v, int))
    ids = [i for i in range(2, size) if i not in special] or [0]
    return (ids * (1 + count // len(ids)))[:count]
