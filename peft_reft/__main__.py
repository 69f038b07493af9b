"""`python -m peft_reft`: the package's own commands, and any other Python program with REFT registered.

Which arguments a command takes is the command's business; how a program is run is that of runner.py.
"""

from __future__ import annotations

import difflib
import importlib
import io
import os
import sys
from typing import Any

from peft_reft.commands import COMMANDS, HELP, HELP_OPTIONS, list_commands

EXTRAS = {"sft": "examples"}  # commands whose imports need more than the package does


def main(argv: list[str]) -> Any:
    """Run a command or a program.

    Args:
        argv: the command line behind `python -m peft_reft`.

    Returns:
        What `sys.exit` is to be given.
    """
    if not argv or argv[0] in HELP_OPTIONS:
        return list_commands(argv)
    if argv[0] in COMMANDS:
        try:
            command = importlib.import_module(f"peft_reft.{argv[0]}")
        except ModuleNotFoundError as error:
            if str(error.name).partition(".")[0] == "peft_reft":
                raise
            extra = f": pip install 'peft-reft[{EXTRAS[argv[0]]}]'" if argv[0] in EXTRAS else "."
            print(f"python -m peft_reft {argv[0]} needs {error.name!r}, which is not installed{extra}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:  # some commands import for seconds
            print(file=sys.stderr)
            return 130
        take_any_text()
        try:
            status = command.main(argv[1:])
            if sys.stdout is not None:
                sys.stdout.flush()
            return status
        except KeyboardInterrupt:
            print(file=sys.stderr)
            return 130  # as a shell counts a process that Ctrl-C ended
        except BrokenPipeError:  # who read the output has gone, as `| head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what Python writes when it ends
            return 141  # as a shell counts a process that a closed pipe ended
    if argv[0].startswith("-") and argv[0] != "-m":
        print(f"python -m peft_reft: unknown option {argv[0]!r}\n\n{HELP}", end="", file=sys.stderr)
        return 2
    from peft_reft.integrations import runner

    try:
        return runner.run(argv)
    except runner.CannotRun as error:
        close = difflib.get_close_matches(argv[0], COMMANDS, 1)
        meant = f" Did you mean the command {close[0]!r}?" if close else ""
        if argv[0] == "search":
            meant = " A search is no command but a function: from peft_reft.search import search."
        print(f"python -m peft_reft: {error}{meant}", file=sys.stderr)
        return error.status


def take_any_text() -> None:
    """Characters that a stream's encoding lacks, such as ᵀ or an emoji in ASCII, become question marks, no errors."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
