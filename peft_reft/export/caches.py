"""The key/value cache of a model as plain tensors, in the order in which an exported graph takes and returns them.

A graph knows no cache objects. What a layer keeps is two tensors [B, heads, past, d]; all layers keep the whole past
here, those with a sliding window too: which keys a token may look at is what the model's masks say.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

WHOLE_ROWS = "It may do without: cache=False exports a graph that runs the whole row for every token."


class LayerCache(NamedTuple):
    """What one layer keeps of a token.

    Attributes:
        layer: its number in the model's cache.
        heads: key/value heads.
        key, value: widths of a head's key and value.
    """

    layer: int
    heads: int
    key: int
    value: int


def cache_argument(model: nn.Module) -> str:
    """The name by which a model's forward takes a key/value cache: `cache` from transformers 5.24 on.

    Raises:
        ValueError: if it takes none.
    """
    known = inspect.signature(type(model).forward).parameters
    for name in ("cache", "past_key_values"):
        if name in known:
            return name
    raise ValueError(
        f"{type(model).__name__} takes no key/value cache (its forward has no past_key_values). {WHOLE_ROWS}"
    )


@torch.no_grad()
def cache_shape(model: nn.Module) -> list[LayerCache]:
    """What the layers of a causal language model keep, those that keep something.

    Raises:
        ValueError: if that is more than keys and values, or not to be had from outside.
    """
    name, argument = type(model).__name__, cache_argument(model)
    config: Any = model.config
    own = DynamicCache(config=config)
    odd = [layer for layer in own.layers if not _keeps_keys_and_values(layer)]
    if odd:
        raise ValueError(
            f"{name} keeps more than keys and values: {len(odd)} of its {len(own.layers)} layers have a "
            f"{type(odd[0]).__name__}, which an exported graph cannot be given. {WHOLE_ROWS}"
        )
    cache = DynamicCache()
    device = next(model.parameters()).device
    ids = torch.ones(2, 3, dtype=torch.long, device=device)
    model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, **{argument: cache})
    found = []
    for number, layer in enumerate(cache.layers):
        keys, values = layer.keys, layer.values
        if keys is None or not keys.numel():  # it uses those of another layer
            continue
        shape = tuple(keys.shape)
        if keys.dim() != 4 or values.dim() != 4 or (shape[0], shape[2]) != (2, 3) or values.shape[:3] != keys.shape[:3]:
            raise ValueError(
                f"{name} keeps tensors of the shapes {shape} and {tuple(values.shape)} for 2 rows of 3 tokens, where "
                f"keys and values are [2, heads, 3, width]. {WHOLE_ROWS}"
            )
        found.append(LayerCache(number, keys.shape[1], keys.shape[3], values.shape[3]))
    if not found:
        raise ValueError(f"{name} was given a key/value cache and kept nothing in it. {WHOLE_ROWS}")
    return found


def _keeps_keys_and_values(layer: Any) -> bool:
    if type(layer).__name__ == "DummyLayer":  # of a block without attention, or one that uses another's keys
        return True
    return type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)


def cache_of(shape: Sequence[LayerCache], past: Sequence[Tensor]) -> DynamicCache:
    """The cache that holds `past`: key and value of each layer of `shape`, in turn."""
    if len(past) != 2 * len(shape):
        raise ValueError(
            f"The backbone takes {2 * len(shape)} tensors of the past, a key and a value for each of {len(shape)} "
            f"layers, and got {len(past)}. `empty_past(rows)` gives those of a row's first forward."
        )
    cache = DynamicCache()
    cache.layers = [DynamicLayer() for _ in range(1 + max(layer.layer for layer in shape))]
    for layer, key, value in zip(shape, past[0::2], past[1::2]):
        kept = cache.layers[layer.layer]
        kept.lazy_initialization(key, value)
        kept.keys, kept.values = key, value
    return cache


def tensors_of(shape: Sequence[LayerCache], cache: DynamicCache) -> list[Tensor]:
    """Key and value of each layer of `shape`, in turn."""
    return [part for layer in shape for part in (cache.layers[layer.layer].keys, cache.layers[layer.layer].values)]


def empty_past(shape: Sequence[LayerCache] | None, dtype: torch.dtype, rows: int = 1, columns: int = 0) -> list[Tensor]:
    """Keys and values of `columns` earlier columns, all zero, in a graph's order; [] without a cache."""
    return [
        torch.zeros(rows, layer.heads, columns, width, dtype=dtype)
        for layer in shape or []
        for width in (layer.key, layer.value)
    ]
