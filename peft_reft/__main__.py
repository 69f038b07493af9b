"""`python -m peft_reft`: the package's own commands, and any other Python program with REFT registered.

Which arguments a command takes is the command's business; how a program is run is that of runner.py.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

COMMANDS = {
    "chat": "talk with an adapter in the terminal, at any strength",
    "convert": "import a checkpoint of pyreft or AdapterHub, or export one to pyreft",
    "info": "what an adapter is, without loading a model",
    "inspect": "how far each intervention moves the tokens of a prompt, as a table and a picture",
    "sft": "train an adapter on prompts and completions, or on chats, with TRL",
}
HELP = """\
python -m peft_reft COMMAND ...          one of the commands below; COMMAND --help tells more
python -m peft_reft SCRIPT ...           run a Python script with ReFT adapters known to PEFT
python -m peft_reft -m MODULE ...        the same for a module, as in: -m lm_eval --model reft --model_args ...
python -m peft_reft PROGRAM ...          the same for a command of an installed package, as in: transformers serve

Commands:
""" + "".join(f"  {name:<10}{help}\n" for name, help in COMMANDS.items())


def main(argv: list[str]) -> Any:
    """Run a command or a program.

    Args:
        argv: the command line behind `python -m peft_reft`.

    Returns:
        What `sys.exit` is to be given.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP, end="", file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] in COMMANDS:
        try:
            command = importlib.import_module(f"peft_reft.{argv[0]}")
        except ModuleNotFoundError as error:
            if str(error.name).partition(".")[0] == "peft_reft":
                raise
            print(f"python -m peft_reft {argv[0]} needs {error.name!r}, which is not installed.", file=sys.stderr)
            return 1
        return command.main(argv[1:])
    if argv[0].startswith("-") and argv[0] != "-m":
        print(f"python -m peft_reft: unknown option {argv[0]!r}\n\n{HELP}", end="", file=sys.stderr)
        return 2
    from peft_reft.integrations import runner

    try:
        return runner.run(argv)
    except runner.NoSuchProgram as error:
        print(f"python -m peft_reft: {error}", file=sys.stderr)
        return error.status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
