"""The options of `python -m peft_reft sft`: ReftConfig's fields with `reft_` in front, and all of TRL's own.

TRL's parser reads them from the command line and a YAML file (`--config`); LoRA's are refused. The help begins with
what is ReFT's own and what most runs change; the defaults that suit ReFT are set here.
"""

from __future__ import annotations

import argparse
import difflib
import math
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, field, fields, make_dataclass
from types import NoneType
from typing import Any, NoReturn, get_args, get_type_hints

import torch
import yaml
from peft.config import PeftConfig
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser

from peft_reft.tuner.config import ReftConfig

PROGRAM = "python -m peft_reft sft"
USAGE = f"{PROGRAM} --model MODEL --dataset DATA [--reft_positions f7+l7] [--config FILE] [options of trl sft]"
ALIASES = {
    "model": "model_name_or_path",
    "dataset": "dataset_name",
    "reft_layers": "reft_layers_to_transform",
}
LORA = [f.name for f in fields(ModelConfig) if f.name.startswith("lora_") or f.name in ("use_rslora", "use_dora")]
LEARNING_RATE = 1e-3  # TRL's 2e-5 is for whole models; in an adapter of a few thousand numbers it changes nothing
USUAL = {
    "model": "the base model: its name on the hub, or its folder",
    "dataset": "a file (.json, .jsonl, .csv, .parquet), a folder, or a name on the hub; its rows have a `prompt` and a "
    "`completion`, or `messages`",
    "output_dir": "where the adapter is saved",
    "config": "a YAML file with options; those of the command line win",
    "learning_rate": "1e-3 to 4e-3 suit language models",
    "num_train_epochs": "times through the data",
    "max_steps": "steps of training instead, if above 0",
    "per_device_train_batch_size": "rows of a step, on each device",
    "test_split_size": "share of the rows that are set aside for --eval_strategy",
    "seed": "of the order of the rows and the initial weights",
}


class UserError(Exception):
    """What the user gave cannot be used; the message says why, and what to do."""


def kinds_of(name: str) -> set[Any]:
    """The types that a field of `ReftConfig` may have, None left out."""
    hint = get_type_hints(ReftConfig)[name]
    return set(get_args(hint) if get_args(hint) and not isinstance(hint, type) else [hint]) - {NoneType}


def option_of(name: str, default: Any) -> tuple[str, Any, Any]:
    """A field of `ReftConfig` as one that an argument parser can read: (name, type, dataclass field)."""
    kinds = kinds_of(name)
    kind: Any = next((kind for kind in (list[str], str, list[int], int, float, bool) if kind in kinds), str)
    if kinds != {kind}:
        kind, default = kind | None, None  # not passed on unless it is given
    return f"reft_{name}", kind, field(default=default, metadata={"help": argparse.SUPPRESS})  # see Parser.format_help


OTHERS = {f.name for f in fields(PeftConfig)} | {"frozen_subspaces"}  # which a trained adapter is given, no new one
OPTIONS = [f for f in fields(ReftConfig) if f.name not in OTHERS]
ReftArguments: Any = make_dataclass("ReftArguments", [option_of(f.name, f.default) for f in OPTIONS])


def reft_config(arguments: Any) -> ReftConfig:
    """The adapter's config from its options; text is read as in YAML where a field is more than text."""
    values = {}
    for f in OPTIONS:
        value, kinds = getattr(arguments, f"reft_{f.name}"), kinds_of(f.name)
        if isinstance(value, str) and str in kinds and bool in kinds:
            value = {"true": True, "false": False}.get(value.lower(), value)
        elif isinstance(value, str) and str not in kinds:
            value = yaml.safe_load(value)
        if value is not None:
            values[f.name] = value
    return ReftConfig(task_type="CAUSAL_LM", **values)


class Parser(TrlParser):
    """TRL's parser, with short names for what every run needs, and defaults that suit ReFT."""

    def __init__(self) -> None:
        classes = (ReftArguments, ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig)
        super().__init__(classes, prog=PROGRAM, usage=USAGE)
        self.set_defaults(learning_rate=LEARNING_RATE)
        if not torch.accelerator.is_available():
            self.set_defaults(use_cpu=True, bf16=False)  # TRL's default, bf16, needs a GPU

    def format_help(self) -> str:
        """What is ReFT's own and what is usual, then everything that TRL has."""
        own = [entry(f"reft_{f.name}", str(f.metadata.get("help", "")), default_of(f)) for f in OPTIONS]
        usual = [entry(name, text, self.get_default(ALIASES.get(name, name))) for name, text in USUAL.items()]
        everything = super().format_help().partition("\n\n")[2]
        sections = {
            f"usage: {USAGE}\n\nWhat is trained (the fields of ReftConfig):": own,
            "What every run needs, and what most runs change:": usual,
            "Everything that trl sft takes, but for LoRA's options, which are refused:": [everything],
        }
        return "\n\n".join("\n".join([title, *lines]) for title, lines in sections.items())

    def error(self, message: str) -> NoReturn:
        option, is_ambiguous, matches = message.removeprefix("ambiguous option: ").partition(" could match ")
        raise UserError(self.no_option(option, matches.split(", ")) if is_ambiguous else message)

    def no_option(self, text: str, begin_so: Sequence[str] = ()) -> str:
        """The message for what is no option: a field of ReftConfig without its `reft_`, or something like an option.

        Args:
            begin_so: the options that begin as the text does.
        """
        name, known = text.partition("=")[0], [*(f"--{name}" for name in ALIASES), *self._option_string_actions]
        meant = [f"--reft_{name.lstrip('-')}"]
        if meant[0] not in known:  # of the two spellings of an option, that of its help
            meant = [option for option in begin_so if "-" not in option[2:]] or difflib.get_close_matches(
                name, known, 1
            )
        few = ", ".join(meant[:5]) + (f" or one of {len(meant) - 5} others" if len(meant) > 5 else "")
        return f"{name!r} is no option.{f' Did you mean {few}?' if few else ''} --help lists them."

    def set_defaults_with_config(self, **values: Any) -> Any:
        return super().set_defaults_with_config(**{ALIASES.get(name, name): value for name, value in values.items()})

    def parse(self, argv: list[str]) -> tuple[ReftConfig, Any, Any, Any, Any]:
        """The command line and the YAML file that it names: the adapter's config, and TRL's four argument objects.

        Raises:
            UserError: also for arguments that would have no effect.
        """
        arguments = []
        for text in argv:
            name, equals, value = text.partition("=")
            if name.startswith("--"):
                name = name.replace("-", "_").replace("__", "--", 1)
                name = f"--{ALIASES.get(name[2:], name[2:])}"
            arguments += [name, value] if name == "--config" and equals else [name + equals + value]
        self.set_defaults(**dict.fromkeys(LORA))  # so that those that are given show
        try:
            parsed = self.parse_args_and_config(arguments, return_remaining_strings=True)
            reft, script, training, model, mixture, unknown = parsed
            config = reft_config(reft)
        except (OSError, ValueError, IndexError, yaml.YAMLError) as error:
            raise UserError(str(error)) from error
        if unknown:
            raise UserError(self.no_option(unknown[0]))
        given = [f"--{name}" for name in LORA if getattr(model, name) is not None]
        if given:
            raise UserError(
                f"{', '.join(given)} would have no effect: this command trains a ReFT adapter, whose options begin "
                "with --reft_. For LoRA use `trl sft`."
            )
        if not model.model_name_or_path:
            raise UserError("--model is missing: the name or folder of the base model.")
        refuse_numbers(training)
        if training.completion_only_loss is False:
            raise UserError(
                "--completion_only_loss False trains on the prompt too, so that nothing of it is left to edit. Leave "
                "it out: ReFT edits the prompt and trains on the completion."
            )
        return config, script, training, model, mixture


def refuse_numbers(training: Any) -> None:
    """Raise a UserError for numbers with which a training fails after its model is loaded, or trains nothing."""
    counts = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
    rules = {
        "seed": (0 <= training.seed < 2**32, f"from 0 to {2**32 - 1}"),
        "learning_rate": (0 < training.learning_rate < math.inf, "a number above 0"),
        "num_train_epochs": (training.max_steps > 0 or 0 < training.num_train_epochs < math.inf, "a number above 0"),
        "max_length": (training.max_length is None or training.max_length > 0, "at least 1"),
        **{name: (getattr(training, name) > 0, "at least 1") for name in counts},
    }
    for name, (fits, words) in rules.items():
        if not fits:
            raise UserError(f"--{name} {getattr(training, name)} cannot be used; it must be {words}.")


def default_of(option: Any) -> Any:
    """The default of a field of `ReftConfig`."""
    return None if option.default is MISSING else option.default


def entry(name: str, text: str, default: Any) -> str:
    """An option as the help shows it."""
    known = "" if default is None else f" (default: {default})"
    return textwrap.fill(text + known, 118, initial_indent=f"  --{name:<28} ", subsequent_indent=" " * 33)
