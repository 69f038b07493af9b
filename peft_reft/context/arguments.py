"""What the arguments of a forward call tell: shapes, padding, cache, and the caller's own locations.

Shape letters: B rows, S columns of this forward, G position groups, P positions per group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def window_of(locations: Tensor, past: int | Tensor, columns: int) -> Tensor:
    """Columns of the whole row as columns of a forward that starts behind `past` of them; -1 for those outside."""
    locations = locations - past
    return torch.where((locations >= 0) & (locations < columns), locations, -1)


def token_shape(arguments: dict[str, Any], ids_per_row: int = 1) -> tuple[int, int] | None:
    """Rows and columns of a call's tokens; None if it has none, or not as one row per sequence.

    Args:
        ids_per_row: how many rows of `input_ids` make one row (audio models have one for each codebook).
    """
    for name, dims, per_row in (("inputs_embeds", 3, 1), ("input_ids", 2, ids_per_row)):
        value = arguments.get(name)
        if isinstance(value, Tensor) and value.dim() == dims:
            return value.shape[0] // per_row, value.shape[1]
    return None


def token_device(arguments: dict[str, Any]) -> torch.device:
    """Where a call's tokens are."""
    value = arguments.get("inputs_embeds")
    return (arguments["input_ids"] if value is None else value).device


def is_mask(mask: Any, rows: int, columns: int) -> bool:
    """Whether this is a padding mask of at least these columns."""
    return isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[0] == rows and mask.shape[1] >= columns


def valid_columns(mask: Any, rows: int, columns: int, device: torch.device) -> Tensor:
    """Bool [B, S]: which columns of this forward are no padding, by a 2-D or 4-D attention mask or none."""
    if is_mask(mask, rows, columns):
        return mask[:, -columns:].to(device=device, dtype=torch.bool)
    if (
        isinstance(mask, Tensor)
        and mask.dim() == 4
        and mask.shape[0] == rows
        and mask.shape[-1] == mask.shape[-2] == columns
    ):
        # A token that may look at itself is no padding; additive masks hold 0 where one may look.
        diagonal = mask[:, 0].diagonal(dim1=-2, dim2=-1).to(device)
        return diagonal if diagonal.dtype == torch.bool else diagonal == 0
    return torch.ones(rows, columns, dtype=torch.bool, device=device)


def past_length(arguments: dict[str, Any], columns: int, seen: int) -> int | Tensor:
    """How many columns are in the call's cache already.

    Args:
        seen: what is known from earlier forwards, for caches that do not tell.

    Returns:
        An int, or a tensor on the device if the cache counts there.
    """
    cache: Any = arguments.get("past_key_values")
    if hasattr(cache, "get_seq_length"):
        try:
            return cache.get_seq_length()
        except ValueError:  # a cache of linear-attention layers only
            return seen
    if isinstance(cache, (tuple, list)) and cache:  # the old format: (key, value) [B, H, S, d] of each layer
        return int(cache[0][0].shape[-2])
    mems = arguments.get("mems")
    if isinstance(mems, (tuple, list)) and mems:  # hidden states [M, B, d] of the past, or of the last part of it
        kept = int(mems[0].shape[0])
        if seen - kept > columns:  # more than what this forward could run once more
            raise ValueError(
                f"The model's memory keeps {kept} of {seen} columns, so the place of the next ones cannot be told. "
                "Set model.config.mem_len to at least the length of the sequence."
            )
        return kept
    if any(arguments.get(name) is not None for name in ("cache_params", "state")):
        return seen
    return 0


def keeps_a_cache(arguments: dict[str, Any]) -> bool:
    """Whether the forward leaves its columns in a cache, so that they will not be run again."""
    if any(arguments.get(name) is not None for name in ("past_key_values", "cache_params", "state", "mems")):
        return True
    return bool(arguments.get("use_cache"))


def check_locations(locations: Any, shape: tuple[int, int] | None, past: int | Tensor) -> Tensor:
    """`intervention_locations` as a long tensor [B, G, P].

    Raises:
        ValueError: if they are no columns of this batch. (What the values are is looked at on the CPU only:
            elsewhere that would make the device wait.)
    """
    rule = "Pass a LongTensor [B, P] or [B, G, P] of columns of the padded row, -1 = unused."
    if not isinstance(locations, Tensor) or locations.dim() not in (2, 3) or locations.is_floating_point():
        what = (
            f"a {locations.dtype} tensor of shape {tuple(locations.shape)}"
            if isinstance(locations, Tensor)
            else f"{locations!r}"
        )
        raise ValueError(f"intervention_locations is {what}. {rule}")
    if shape is not None:
        rows, columns = shape
        if locations.shape[0] != rows:
            raise ValueError(
                f"intervention_locations has {locations.shape[0]} rows, but the batch has {rows}; it belongs to "
                f"another batch. {rule}"
            )
        if locations.device.type == "cpu" and not torch.compiler.is_compiling() and locations.numel():
            least, most = int(locations.min()), int(locations.max())
            if least < -1 or most >= columns + int(past):
                wrong = least if least < -1 else most
                raise ValueError(
                    f"intervention_locations holds {wrong}, but the rows have the columns 0 to "
                    f"{columns + int(past) - 1}. {rule}"
                )
    locations = locations.long()
    locations = locations if locations.dim() == 3 else locations.unsqueeze(1)
    flat = locations.flatten(1)  # a column that is named twice is edited once, by the first
    repeated = (flat.unsqueeze(1) == flat.unsqueeze(2)).tril(-1).any(-1).view_as(locations)
    return torch.where(repeated, -1, locations)
