"""The options that `chat` and `playground` have in common, and the talker that they ask for."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

import transformers
from peft.utils import CONFIG_NAME

from peft_reft.chat.talker import Talker
from peft_reft.command_line import add_model_options, number
from peft_reft.info.files import read_config
from peft_reft.integrations.loading import load_adapters
from peft_reft.integrations.threads import share_the_machine
from peft_reft.interventions import REGISTRY, takes_source
from peft_reft.tuner.targets import check_adapter_name


def add_loading_arguments(parser: ArgumentParser) -> None:
    """What the command lines have in common."""
    parser.add_argument(
        "directories", nargs="+", metavar="DIR", help="an adapter, as save_pretrained wrote it, or a folder of adapters"
    )
    add_model_options(parser)
    parser.add_argument(
        "--max-new-tokens", type=number(int, 1), default=200, help="tokens of an answer at most (default: 200)"
    )
    parser.add_argument(
        "--temperature", type=number(float, 0), default=0.0, help="0 takes the likeliest token (default: 0)"
    )
    parser.add_argument(
        "--repetition-penalty",
        type=number(float, 0, above=True),
        default=1.0,
        help="above 1 for less repetition (default: 1)",
    )
    parser.add_argument("--system", help="a system message at the beginning of the conversation")
    parser.add_argument(
        "--seed", type=number(int, 0, high=2**32 - 1), default=0, help="seed of the sampling (default: 0)"
    )


def open_talker(arguments: Namespace) -> tuple[Talker, list[str]]:
    """What the arguments of `add_loading_arguments` ask for, and the names of its adapters.

    Raises:
        ValueError, OSError, ImportError: if something cannot be loaded; the message says what.
    """
    transformers.logging.set_verbosity_error()
    share_the_machine()
    folders = adapter_folders(arguments.directories)
    if sys.stderr.isatty():
        print(f"Loading {', '.join(folders)} and the base model ...", file=sys.stderr, flush=True)
    model, tokenizer = load_adapters(folders, arguments.model, arguments.dtype, arguments.device)
    transformers.set_seed(arguments.seed)
    talker = Talker(model, tokenizer, arguments.max_new_tokens, arguments.temperature, arguments.repetition_penalty)
    return talker, list(folders)


def adapter_folders(directories: Sequence[str]) -> dict[str, Path]:
    """The adapters in some directories, each under a name of its own: that of its folder.

    Raises:
        ValueError: if there is none in one of them, or one for another task than generation.
    """
    folders: dict[str, Path] = {}
    for directory in map(Path, directories):
        inside = sorted(found.parent for found in directory.glob(f"*/{CONFIG_NAME}"))
        for folder in inside if inside and not (directory / CONFIG_NAME).is_file() else [directory]:
            config = read_config(folder)
            task, intervention = config.get("task_type"), config.get("intervention")
            if task not in ("CAUSAL_LM", None):
                raise ValueError(f"{str(folder)!r} is an adapter for {task}; only one for CAUSAL_LM answers questions.")
            if isinstance(intervention, str) and intervention in REGISTRY and takes_source(intervention):
                raise ValueError(
                    f"{str(folder)!r} is an adapter with intervention={intervention!r}, which takes its values from a "
                    "second input, and a chat has none. Pass source_inputs= to generate in a program."
                )
            name = plain = name_of(folder)
            number = 2
            while name in folders:
                name, number = f"{plain}_{number}", number + 1
            folders[name] = folder
    return folders


def name_of(folder: Path) -> str:
    """The name that an adapter gets: that of its folder, changed where PEFT would take it for something else."""
    name = Path(os.path.abspath(folder)).name.replace(".", "_")
    try:
        check_adapter_name(name)
    except ValueError:
        return f"{name.strip('_')}_adapter"
    return name
