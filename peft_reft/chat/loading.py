"""Saved adapters on their base model, with the tokenizer: what `chat` and `playground` begin with."""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from peft.utils import CONFIG_NAME
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_reft.chat.talker import Talker
from peft_reft.tuner.files import read_config


def add_loading_arguments(parser: ArgumentParser) -> None:
    """What the command lines have in common."""
    parser.add_argument(
        "directories", nargs="+", metavar="DIR", help="an adapter, as save_pretrained wrote it, or a folder of adapters"
    )
    parser.add_argument("--model", help="name or folder of the base model (default: the one that the adapter names)")
    parser.add_argument(
        "--dtype", default="auto", help="of the base model: auto, float32, bfloat16, ... (default: auto)"
    )
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="length of an answer (default: 200)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default: 0)")
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, help="above 1 for less repetition (default: 1)"
    )
    parser.add_argument("--system", help="a system message, before the conversation")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")


def open_talker(arguments: Namespace) -> tuple[Talker, list[str]]:
    """What the arguments of `add_loading_arguments` ask for, and the names of its adapters.

    Raises:
        ValueError, OSError, ImportError: if something cannot be loaded; the message says what.
    """
    transformers.logging.set_verbosity_error()
    folders = adapter_folders(arguments.directories)
    model, tokenizer = load_adapters(folders, arguments.model, arguments.dtype, arguments.device)
    transformers.set_seed(arguments.seed)
    talker = Talker(model, tokenizer, arguments.max_new_tokens, arguments.temperature, arguments.repetition_penalty)
    return talker, list(folders)


def adapter_folders(directories: Sequence[str]) -> dict[str, Path]:
    """The adapters in some directories, each under a name of its own: that of its folder.

    Raises:
        ValueError: if there is none in one of them.
    """
    folders: dict[str, Path] = {}
    for directory in map(Path, directories):
        inside = sorted(found.parent for found in directory.glob(f"*/{CONFIG_NAME}"))
        for folder in inside if inside and not (directory / CONFIG_NAME).is_file() else [directory]:
            read_config(folder)  # raises, if it is no adapter
            name = plain = Path(os.path.abspath(folder)).name.replace(".", "_")  # PEFT takes no dots in a name
            number = 2
            while name in folders:
                name, number = f"{plain}_{number}", number + 1
            folders[name] = folder
    return folders


def load_adapters(
    folders: dict[str, Path], model_name: str | None, dtype: str = "auto", device: str | None = None
) -> tuple[Any, Any]:
    """The adapters on one base model, ready to answer, and the tokenizer.

    Args:
        folders: by the adapters' names.
        model_name: of the base model; None for the one that the first adapter names.

    No code of theirs is run. (transformers would ask on the terminal by default, and take piped input for the answer.)

    Raises:
        ValueError: if no base model is named, it cannot be loaded, or an adapter does not fit it.
    """
    first = next(iter(folders.values()))
    name = model_name or read_config(first).get("base_model_name_or_path")
    if not name:
        raise ValueError(f"{str(first)!r} does not name its base model; give it with --model.")
    try:
        base: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"The base model {name!r} cannot be loaded; --model names another. {error}") from error
    model: Any = None
    for adapter, folder in folders.items():
        if model is None:
            model = PeftModel.from_pretrained(base, folder, adapter_name=adapter)
        else:
            model.load_adapter(folder, adapter_name=adapter)
    has_tokenizer = (first / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(first if has_tokenizer else name, trust_remote_code=False)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval(), tokenizer
