"""What an exported graph is given, checked before it runs: runtimes name the node that fails, and broadcast what fits.

A mask of one column, say, multiplies with a prompt of any length: every token would be edited, and nothing said.

Shape letters: B rows, S columns of this forward, L blocks, G position groups, r rank, d hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_reft.export.answers import Run
from peft_reft.export.description import BackboneDescription
from peft_reft.export.files import FLOATS


def checked(run: Run, description: BackboneDescription) -> Run:
    """A graph's function as one that takes masks of the adapter's own groups, and refuses what the graph does not take.

    Args:
        run: takes exactly the graph's inputs.
        description: of the graph.
    """

    def checking(*arguments: Tensor) -> Sequence[Tensor]:
        fitted = [*arguments[:2], *(_fit_mask(mask, description, arguments) for mask in arguments[2:3]), *arguments[3:]]
        check_inputs(description, fitted)
        return run(*fitted)

    return checking


def _fit_mask(mask: Tensor, description: BackboneDescription, arguments: Sequence[Tensor]) -> Tensor:
    """A mask with the groups of the graph: several are one where the adapter has one, fewer are padded with zeros."""
    groups = description.max_groups
    if groups is None and len(arguments) > 4 and arguments[4].dim() == 3:
        groups = arguments[4].shape[1]
    if groups is None or mask.dim() != 3:
        return mask
    if groups == 1:
        return mask.sum(-1, keepdim=True)  # groups have no token twice
    return F.pad(mask, (0, max(0, groups - mask.shape[2])))


def check_inputs(description: BackboneDescription, arguments: Sequence[Tensor]) -> None:
    """Refuse inputs of wrong number, type or shape.

    Raises:
        ValueError: that names the first wrong one, what it is, and what it must be.
    """
    past = [(number, part) for number in range(len(description.cache or [])) for part in ("key", "value")]
    adapter = [] if description.baked is not None else ["down", "bias", "up"]
    names = ["input_ids", "attention_mask", "edit_mask", *adapter, *(f"past.{n}.{part}" for n, part in past)]
    if len(arguments) != len(names):
        raise ValueError(
            f"The backbone takes {len(names)} tensors ({', '.join(names[:7])}{', ...' if len(names) > 7 else ''}), "
            f"and got {len(arguments)}."
        )
    given = dict(zip(names, arguments))
    ids, mask = given["input_ids"], given["edit_mask"]
    if ids.dim() != 2 or mask.dim() != 3:
        raise ValueError(
            f"input_ids have the shape {tuple(ids.shape)} and the edit_mask {tuple(mask.shape)}; they must be "
            "[rows, columns] and [rows, columns, groups]."
        )
    rows, columns = ids.shape
    earlier = given["past.0.key"].shape[-2] if past else 0
    groups, rank = _groups_and_rank(description, given)
    shape = (len(description.blocks), groups, rank)
    wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "input_ids": (torch.long, (rows, columns)),
        "attention_mask": (torch.long, (rows, earlier + columns)),
        "edit_mask": (torch.float32, (rows, columns, groups)),
        "down": (torch.float32, (*shape, description.width)),
        "bias": (torch.float32, shape),
        "up": (torch.float32, (*shape, description.width)),
    }
    for (number, part), name in zip(past, names[len(names) - len(past) :]):
        layer = (description.cache or [])[number]
        width = layer.key if part == "key" else layer.value
        wanted[name] = FLOATS[description.cache_dtype], (rows, layer.heads, earlier, width)
    for name, tensor in given.items():
        dtype, size = wanted[name]
        if tensor.dtype != dtype or tuple(tensor.shape) != size:
            raise ValueError(
                f"{name} is {tensor.dtype} of the shape {list(tensor.shape)}, and must be {dtype} of the shape "
                f"{list(size)}: {rows} rows of {columns} columns behind {earlier}, {len(description.blocks)} blocks."
            )
    if description.max_columns is not None and earlier + columns > description.max_columns:
        raise ValueError(
            f"The row has {earlier + columns} columns, and the backbone was exported for at most "
            f"{description.max_columns}. Export it with --max-columns {earlier + columns}."
        )


def _groups_and_rank(description: BackboneDescription, given: dict[str, Tensor]) -> tuple[int, int]:
    """The sizes that the adapter's inputs must have: the graph's own, or those of `bias` where these are open."""
    if description.baked is not None:
        return description.max_groups or 1, 1
    bias = given["bias"]
    if bias.dim() != 3:
        raise ValueError(f"bias has the shape {tuple(bias.shape)}; it must be [blocks, groups, rank].")
    return description.max_groups or bias.shape[1], description.max_rank or bias.shape[2]
