"""The files of saved adapters, as strangers may have made them: opened with care.

Nothing that is read is executed: configs are JSON, tensors come from safetensors, or from a pickle that may hold
tensors and nothing else. Writing is the work of tuner/staging.py.
"""

from __future__ import annotations

import difflib
import json
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor

from peft_reft.tuner.staging import wait_until_whole


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter's directory.

    Attributes:
        config: adapter_config.json, as it stands.
        file: the file of weights.
        tensors: by their names in that file. Those of safetensors are mapped into memory: whoever looks at names,
            shapes and dtypes alone reads no more than the file's header.
    """

    config: dict[str, Any]
    file: Path
    tensors: dict[str, Tensor]


def read_adapter(directory: Path) -> SavedAdapter:
    """The adapter in a directory that `save_pretrained` wrote.

    Raises:
        ValueError: if it is missing, damaged, not safe to open, or an adapter of another type.
    """
    config = read_config(directory)
    file = weights_file(directory)
    return SavedAdapter(config, file, read_tensors(file))


def read_config(directory: Path) -> dict[str, Any]:
    """adapter_config.json of a ReFT adapter, as it stands.

    Raises:
        ValueError: if it is missing, unreadable or that of something else, or if a save was interrupted.
    """
    wait_until_whole(directory)
    path = directory / CONFIG_NAME
    if not path.is_file():
        inside = sorted(str(found.parent) for found in directory.glob(f"*/{CONFIG_NAME}"))
        hint = f" There are adapters in {', '.join(map(repr, inside))}." if inside else meant(directory)
        what = f"has no {CONFIG_NAME}" if directory.is_dir() else "is no directory"
        raise ValueError(
            f"{str(directory)!r} {what}, so it is no saved adapter. Give the directory that save_pretrained wrote (a "
            f"download of it, if it is on the hub).{hint}"
        )
    config = read_json(path)
    kind = config.get("peft_type")
    if kind != "REFT":
        raise ValueError(f"{str(directory)!r} holds an adapter of the type {kind!r}, and not one of the type 'REFT'.")
    return config


def meant(directory: Path) -> str:
    """A question after the directory of adapters that was probably meant by a misspelt one, or nothing."""
    there = {str(found.parents[up]) for up in (0, 1) for found in directory.parent.glob(f"*/{'*/' * up}{CONFIG_NAME}")}
    close = difflib.get_close_matches(str(directory), sorted(there), 1)
    return f" Did you mean {close[0]!r}?" if close and not directory.is_dir() else ""


def is_reft_adapter(directory: Path) -> bool:
    """Whether a directory has the config of a ReFT adapter.

    Raises:
        ValueError: if it has a config that cannot be read.
    """
    path = directory / CONFIG_NAME
    return path.is_file() and read_json(path).get("peft_type") == "REFT"


def has_weights(directory: Path) -> bool:
    """Whether a directory has a file of an adapter's weights."""
    return any((directory / name).is_file() for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME))


def weights_file(directory: Path) -> Path:
    """The file of an adapter's weights.

    Raises:
        ValueError: if there is none.
    """
    for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        if (directory / name).is_file():
            return directory / name
    raise ValueError(f"{str(directory)!r} has the config of a ReFT adapter and no {SAFETENSORS_WEIGHTS_NAME}.")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: if there is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as JSON ({one_line(error)}).") from error
    if not isinstance(found, dict):
        raise ValueError(f"{str(path)!r} holds a {type(found).__name__} where a config is an object.")
    return found


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a file, on the CPU; a pickle is opened with `weights_only=True` and so runs no code.

    Raises:
        ValueError: if the file is missing, damaged, or holds anything but plain tensors by name.
    """
    if not path.is_file():
        raise ValueError(f"{str(path)!r} is missing; the checkpoint is incomplete. Copy the whole directory.")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except Exception as error:  # SafetensorError, and what a wrong header leads torch to
            raise _damaged(path, error) from error
    found = _read_pickle(path)
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) and isinstance(k, str) for k, t in found.items()):
        raise ValueError(f"{str(path)!r} does not hold tensors by name, as a state dict does.")
    tensors = {name: tensor.detach() for name, tensor in found.items()}
    odd = next((name for name, tensor in tensors.items() if not _is_stored(tensor)), None)
    # A few stored numbers can pretend to be any number of tensors of any size.
    if odd is not None or sum(t.numel() * t.element_size() for t in tensors.values()) > 4 * path.stat().st_size:
        raise ValueError(
            f"{str(path)!r} is not opened: {odd or 'its tensors together'} would take more memory than the file has "
            "bytes. Ask whoever made it for plain tensors, each stored in full."
        )
    return tensors


def _read_pickle(path: Path) -> Any:
    """What a file of `torch.save` holds, if it is made of tensors and plain containers.

    Raises:
        ValueError: if it is damaged, packed, or holds more.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as packed:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in packed.infolist()):
                    raise ValueError("its entries are compressed, which torch.save never does")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        if "weights_only" in str(error).lower() or "weights only" in str(error).lower():
            raise ValueError(
                f"{str(path)!r} holds more than tensors, and is not opened: a pickle can run any code "
                f"({one_line(error)}). Ask whoever made it for a file of tensors."
            ) from error
        raise _damaged(path, error) from error


def _is_stored(tensor: Tensor) -> bool:
    """Whether a tensor is a plain one whose numbers are all there."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{str(path)!r} cannot be read ({one_line(error)}); the file is damaged.")


def one_line(error: BaseException) -> str:
    """The beginning of an error's message on one line, with its class."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    return f"{type(error).__name__}: {text[:200]}"
