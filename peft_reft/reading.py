"""Opening the files of a stranger's adapter: JSON, safetensors, and pickles of tensors and nothing else."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: if there is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as JSON ({one_line(error)}).") from error
    if not isinstance(found, dict):
        raise ValueError(f"{str(path)!r} holds a {type(found).__name__} where a config is an object.")
    return found


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a file, on the CPU; a pickle is opened with `weights_only=True` and so runs no code.

    Raises:
        ValueError: if the file is missing, damaged, or holds anything but tensors by name.
    """
    if not path.is_file():
        raise ValueError(f"{str(path)!r} is missing; the checkpoint is incomplete. Copy the whole directory.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{str(path)!r} holds more than tensors, and is not opened: a pickle can run any code "
            f"({one_line(error)}). Ask whoever made it for a file of tensors."
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, SafetensorError) as error:
        raise ValueError(f"{str(path)!r} cannot be read ({one_line(error)}); the file is damaged.") from error
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) and isinstance(k, str) for k, t in found.items()):
        raise ValueError(f"{str(path)!r} does not hold tensors by name, as a state dict does.")
    return {name: tensor.detach() for name, tensor in found.items()}


def one_line(error: BaseException) -> str:
    """The beginning of an error's message on one line, with its class."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    return f"{type(error).__name__}: {text[:200]}"
