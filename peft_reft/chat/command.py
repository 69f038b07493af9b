"""The command line: `python -m peft_reft chat DIR`."""

from __future__ import annotations

import sys

import transformers

from peft_reft.chat.loading import add_loading_arguments, open_talker
from peft_reft.chat.session import Session
from peft_reft.command_line import OneLineParser, without_controls
from peft_reft.info.files import one_line
from peft_reft.tuner.sizes import printable


def main(argv: list[str]) -> int:
    """`python -m peft_reft chat DIR`: returns the exit status."""
    parser = OneLineParser(
        prog="python -m peft_reft chat",
        description="Talk with an adapter in the terminal. There, /help lists the commands.",
    )
    add_loading_arguments(parser)
    arguments = parser.parse_args(argv)
    if sys.stdin is None:
        print(f"{parser.prog}: its standard input, where it reads what you say, is closed.", file=sys.stderr)
        return 2
    transformers.logging.disable_progress_bar()
    try:
        talker, names = open_talker(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"{parser.prog}: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    session = Session(talker, names, arguments.system, adapter=names[0])
    who = printable(f"{', '.join(names)} on {talker.model.config.name_or_path}")
    print(f"{who}. /help lists the commands, /quit ends.")
    if getattr(talker.tokenizer, "chat_template", None) is None:
        print("The tokenizer has no chat template: each line is given to the model as it is, without the lines before.")
    talk(session)
    return 0


def talk(session: Session) -> None:
    """Read lines and answer them, until the end of the input or /quit."""
    while True:
        try:
            line = input("you> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not sys.stdin.isatty():
            print(line)  # a terminal shows what is typed; a transcript should have it, too
        if not line.strip():
            continue
        if line.startswith("/"):
            said = session.command(line)
            if said is None:
                return
            print(printable(said))
            continue
        print(printable(f"{session.speaker}> "), end="", flush=True)
        try:
            for piece in session.answer(line):
                print(without_controls(piece), end="", flush=True)
        except KeyboardInterrupt:
            pass
        except ValueError as error:
            print(without_controls(str(error)), end="")
        except RuntimeError as error:  # of torch: no memory, or no finite probabilities to sample from
            print(f"There is no answer ({printable(one_line(error))}). Try another /strength or --temperature.", end="")
        print()
