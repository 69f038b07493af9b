"""Command lines of the tools: a mistake ends as one line, and what several tools ask for is declared once."""

from __future__ import annotations

import argparse
import difflib
import math
import tempfile
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

from peft_reft.tuner.sizes import shown

DTYPES = ("auto", "float32", "bfloat16", "float16")


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line on stderr: which argument is wrong, and what was probably meant."""

    def error(self, message: str) -> NoReturn:
        unknown = message.partition("unrecognized arguments: ")[2].split()
        close = difflib.get_close_matches(unknown[0], self._option_string_actions, 1) if unknown else []
        meant = f" Did you mean {close[0]}?" if close else ""
        self.exit(2, f"{self.prog}: {message}.{meant} See {self.prog} --help.\n")


def without_controls(text: str) -> str:
    """A text that a model, a chat template or a data set made: its control characters could steer a terminal.

    They become codes, but for line ends and tabs. All other characters of all scripts stay.
    """
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else f"\\x{ord(c):02x}" for c in text)


def refuse_place(what: str, folder: Path) -> None:
    """Refuse a folder that cannot be written to, before minutes of work; it is not made here.

    Raises:
        ValueError: naming the argument, `what`.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryDirectory(dir=there):
            pass
    except OSError as error:
        raise ValueError(
            f"{what} cannot be {str(folder)!r}: {str(there)!r} takes no files ({error.strerror}). Give another folder."
        ) from error


def device(text: str) -> str:
    """A device of this machine, for `type=` of an option.

    Raises:
        ArgumentTypeError: if it is none; the message lists those that there are.
    """
    there = ["cpu"]
    if torch.accelerator.is_available() and (accelerator := torch.accelerator.current_accelerator()) is not None:
        there += [accelerator.type, *(f"{accelerator.type}:{n}" for n in range(torch.accelerator.device_count()))]
    if text not in there:
        raise argparse.ArgumentTypeError(f"{text!r} is no device of this machine, which has {', '.join(there)}")
    return text


def number(kind: type, low: float, *, above: bool = False, high: float = math.inf) -> Callable[[str], float]:
    """A finite number within bounds, for `type=` of an option.

    Args:
        kind: `int` or `float`.
        low, high: the bounds.
        above: whether `low` itself is out.
    """
    name = "an integer" if kind is int else "a number"
    bounds = f"{'above' if above else 'of at least'} {low}" + (f" and at most {high}" if high < math.inf else "")

    def read(text: str) -> float:
        try:
            value: float = kind(text)
            is_finite = math.isfinite(value)
        except ValueError:
            value, is_finite = math.nan, False
        except OverflowError as error:
            raise argparse.ArgumentTypeError(
                f"{shown(text, 40)} has more digits than any number that is used here"
            ) from error
        if not is_finite or value > high or value < low or (above and value == low):
            raise argparse.ArgumentTypeError(f"{text!r} is not {name} {bounds}")
        return value

    return read


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The options that say which base model an adapter is loaded on, how, and where."""
    parser.add_argument("--model", help="name or folder of the base model (default: the one that the adapter names)")
    parser.add_argument(
        "--dtype", default="auto", choices=DTYPES, help="data type of the base model's weights (default: auto)"
    )
    parser.add_argument("--device", type=device, help="where to run (default: cuda if there is one, else cpu)")
