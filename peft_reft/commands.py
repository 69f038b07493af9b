"""The names of the package's commands, and their list, which `python -m peft_reft` alone prints at once.

Importing the package imports PEFT and torch, which takes seconds. This file imports neither.
"""

from __future__ import annotations

import os
import shutil
import sys

COMMANDS = {
    "chat": "talk with an adapter in the terminal, at any strength",
    "convert": "import a checkpoint of pyreft or AdapterHub, or export one to pyreft",
    "export": "a base model as one graph (ONNX, PT2, ExecuTorch) that takes adapters of a few kilobytes as inputs",
    "info": "what an adapter is, without loading a model",
    "inspect": "how far each intervention moves the tokens of a prompt, as a table and a picture",
    "playground": "talk with adapters and their base model side by side, in a local web page",
    "sft": "train an adapter on prompts and completions, or on chats, with TRL",
}
HELP = """\
python -m peft_reft COMMAND ...          one of the commands below; COMMAND --help tells more
python -m peft_reft SCRIPT ...           run a Python script with ReFT adapters known to PEFT
python -m peft_reft -m MODULE ...        the same for a module, as in: -m lm_eval --model reft --model_args ...
python -m peft_reft PROGRAM ...          the same for a command of an installed package, as in: transformers serve
LAUNCHER -m peft_reft SCRIPT ...         the same in many processes; LAUNCHER: accelerate launch, or torchrun

Commands:
""" + "".join(f"  {name:<12}{help}\n" for name, help in COMMANDS.items())
HELP_OPTIONS = ("-h", "--help")


def answer_at_once() -> None:
    """Print the list of commands and end the process, if this is `python -m peft_reft`, alone or with --help.

    The package calls it before its slow imports. The process is any other unless it was started with exactly this
    command: while Python imports the package of `-m`, sys.argv[0] is "-m".
    """
    arguments = sys.argv[1:]
    lists = not arguments or (len(arguments) == 1 and arguments[0] in HELP_OPTIONS)
    before = sys.orig_argv[: len(sys.orig_argv) - len(arguments)]
    if sys.argv[:1] == ["-m"] and before[-2:] == ["-m", "peft_reft"] and lists:
        raise SystemExit(list_commands(arguments))


def this_python() -> str:
    """What to type in a shell to run this Python: "python" if that is it, else its path, from here if it is below."""
    if not sys.executable or shutil.which("python") == sys.executable:
        return "python"
    path = os.path.relpath(sys.executable)
    return sys.executable if path.startswith(os.pardir) else path


def list_commands(arguments: list[str]) -> int:
    """Print the list: to stdout if it was asked for, to stderr if there were no arguments; returns the exit status."""
    print(HELP, end="", file=sys.stdout if arguments else sys.stderr)
    return 0 if arguments else 2
