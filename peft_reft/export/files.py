"""The file of an adapter's edits (safetensors, a few kilobytes), which an app downloads.

It says enough to be checked against a backbone's description, description.py, before anything is run. Nothing in
either names a folder of the machine on which they were made.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from peft_reft.export.tensors import EditTensors, read_edits
from peft_reft.info.files import one_line
from peft_reft.positions import parse_positions
from peft_reft.tuner.staging import staged

EDITS = "peft_reft.edits"  # the "format" of the file
VERSION = 1
NAMES = ("down", "bias", "up")
FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def short_name(name: str | None) -> str:
    """The last part of a model's name: where it lies on a machine is not the business of a file that is passed on.

    >>> short_name("HuggingFaceTB/SmolLM2-135M-Instruct"), short_name("models/smollm2/"), short_name(None)
    ('SmolLM2-135M-Instruct', 'smollm2', '')
    """
    return PurePosixPath((name or "").replace("\\", "/")).name


def save_adapter_tensors(
    model_or_directory: nn.Module | str | Path,
    path: str | Path,
    dtype: torch.dtype = torch.float16,
    *,
    adapter_name: str | None = None,
    blocks: Sequence[str] | None = None,
    base_model: str | None = None,
) -> None:
    """Write an adapter as one small file for programs that run an exported backbone.

    The file holds "down", "bias" and "up" of the edited blocks alone, and in its metadata their names, the positions,
    what the groups are, and the name of the base model: see `load_adapter_tensors`.

    Args:
        model_or_directory: a model with ReFT adapters, or the directory of a saved one.
        path: of the file, such as "pirate.safetensors".
        dtype: of the stored numbers, torch.float16, float32 or bfloat16.
        adapter_name: of a model's adapters; None for the active one.
        blocks: as for `adapter_tensors`.
        base_model: name of the base model, if it is not to be the one that the adapter says; folders are left out.

    Raises:
        ValueError: for an adapter that is more than these tensors, or has numbers that `dtype` cannot hold; or if there
            is something else at `path`, which is not replaced.
    """
    refuse_other_file(Path(path))
    if dtype not in FLOATS.values():
        raise ValueError(f"dtype={dtype!r} is none of {', '.join(f'torch.{name}' for name in FLOATS)}.")
    found = read_edits(model_or_directory, adapter_name, blocks)
    tensors = {name: getattr(found, name).to(dtype).contiguous() for name in NAMES}
    odd = next((name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())), None)
    if odd is not None:
        raise ValueError(
            f"{odd!r} has the number {float(getattr(found, odd).abs().max()):g}, which {dtype} cannot hold. Save it "
            "with dtype=torch.float32."
        )
    metadata = {
        "format": EDITS,
        "version": str(VERSION),
        "positions": found.positions,
        "share_weights": json.dumps(found.share_weights),
        "blocks": json.dumps(found.blocks),
        "base_model": short_name(base_model if base_model is not None else found.base_model),
    }
    target = Path(path)
    with staged(target.parent) as stage:
        save_file(tensors, stage / target.name, metadata)
        os.chmod(stage / target.name, 0o644)


def refuse_other_file(path: Path) -> None:
    """Raise ValueError if there is something at `path` that is no file of edits, such as the adapter's own weights."""
    if not path.exists():
        return
    try:
        with safe_open(path, framework="pt") as file:
            is_ours = (file.metadata() or {}).get("format") == EDITS
    except Exception:  # no safetensors, or no file
        is_ours = False
    if not is_ours:
        raise ValueError(
            f"{str(path)!r} is there already, and is no file of an adapter's edits, so that it is not replaced. Give "
            "another name, or remove it."
        )


def load_adapter_tensors(path: str | Path) -> EditTensors:
    """Read a file of `save_adapter_tensors`; `BackboneDescription.inputs` makes a graph's inputs of it.

    Raises:
        ValueError: if it is missing, damaged, or something else.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no file {str(path)!r}.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
    except Exception as error:  # SafetensorError, and what a wrong header leads torch to
        raise ValueError(
            f"{str(path)!r} cannot be read ({one_line(error)}); the file is damaged or was cut off. Fetch it again."
        ) from error
    check_format(str(path), metadata, EDITS)
    try:
        blocks, share = _names(json.loads(metadata["blocks"])), json.loads(metadata["share_weights"])
        spec = parse_positions(metadata["positions"])
        down, bias, up = (_floating(name, tensors[name]) for name in NAMES)
    except (KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} lacks what describes an adapter ({one_line(error)}).") from error
    fixed = share != "position" or all(term.width is not None for term in spec.terms)
    groups = spec.num_interventions(share) if (isinstance(share, bool) or share == "position") and fixed else -1
    if (
        down.dim() != 4
        or up.shape != down.shape
        or bias.shape != down.shape[:3]
        or not down.numel()
        or len(blocks) != len(down)
    ):
        raise ValueError(
            f"{str(path)!r} holds tensors of the shapes {list(down.shape)}, {list(bias.shape)} and {list(up.shape)} "
            f"for {len(blocks)} blocks, which are no adapter's: down and up are [blocks, groups, rank, width]."
        )
    if groups != down.shape[1]:
        raise ValueError(
            f"{str(path)!r} has {down.shape[1]} interventions for each block, which does not go with positions="
            f"{str(spec)!r} and share_weights={share!r}."
        )
    if not all(bool(tensor.isfinite().all()) for tensor in (down, bias, up)):
        raise ValueError(f"{str(path)!r} holds numbers that are infinite or NaN.")
    return EditTensors(blocks, down, bias, up, str(spec), share, metadata.get("base_model") or None)


def _names(blocks: Any) -> list[str]:
    if (
        not isinstance(blocks, list)
        or not all(isinstance(name, str) for name in blocks)
        or len({*blocks}) < len(blocks)
    ):
        raise ValueError(f"its blocks are {blocks!r}, where each has a name of its own")
    return blocks


def _floating(name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype not in FLOATS.values():
        raise ValueError(f"{name} is stored as {tensor.dtype}, where edits are one of {', '.join(FLOATS)}")
    return tensor.float()


def check_format(path: str, found: Any, expected: str) -> None:
    if found.get("format") != expected:
        raise ValueError(
            f"{path!r} is no {expected} file: its format is {found.get('format')!r}. `python -m peft_reft export` "
            "writes both kinds; a PEFT adapter is a folder, which save_adapter_tensors turns into such a file."
        )
    if str(found.get("version")) != str(VERSION):
        raise ValueError(f"{path!r} has version {found.get('version')!r} of its format; this is version {VERSION}.")


def named(base_model: str | None) -> str:
    return f", {base_model!r}" if base_model else ""
