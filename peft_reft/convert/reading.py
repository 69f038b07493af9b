"""Reading the files of a stranger's checkpoint: JSON, safetensors, and pickles of tensors and nothing else."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from peft_reft.convert.conversion import ConversionError
from peft_reft.convert.structure import one_line


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ConversionError: if there is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} cannot be read as JSON ({one_line(error)}).") from error
    if not isinstance(found, dict):
        raise ConversionError(f"{path} holds a {type(found).__name__} where a config is an object.")
    return found


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a file, on the CPU; a pickle is opened with `weights_only=True` and so runs no code.

    Raises:
        ConversionError: if the file is missing, damaged, or holds anything but tensors by name.
    """
    if not path.is_file():
        raise ConversionError(f"{path} is missing; the checkpoint is incomplete. Copy the whole directory.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"{path} holds more than tensors, and is not opened: a pickle can run any code ({one_line(error)}). Ask "
            "whoever made it for a file of tensors."
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, SafetensorError) as error:
        raise ConversionError(f"{path} cannot be read ({one_line(error)}); the file is damaged.") from error
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) and isinstance(k, str) for k, t in found.items()):
        raise ConversionError(f"{path} does not hold tensors by name, as a state dict does.")
    return {name: tensor.detach() for name, tensor in found.items()}
