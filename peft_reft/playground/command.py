"""The command line: `python -m peft_reft playground DIR [DIR ...]`."""

from __future__ import annotations

import importlib.util
import os
import socket
import sys

from peft_reft.chat.loading import add_loading_arguments, open_talker
from peft_reft.command_line import OneLineParser, number
from peft_reft.playground.replies import Replies
from peft_reft.tuner.sizes import printable

PROGRAM = "python -m peft_reft playground"
ADDRESS = "127.0.0.1"  # for this machine only


def main(argv: list[str]) -> int:
    """`python -m peft_reft playground DIR [DIR ...]`: returns the exit status."""
    parser = OneLineParser(
        prog=PROGRAM,
        description="Talk with adapters and their base model side by side, in a web page of this machine only.",
    )
    add_loading_arguments(parser)
    parser.add_argument("--port", type=number(int, 1, high=65535), help="default: the first free one from 7860 on")
    parser.add_argument("--no-browser", action="store_true", help="do not open the page in the browser")
    arguments = parser.parse_args(argv)
    missing = [name for name in ("gradio", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:  # before the model is loaded, which may take minutes
        print(f"{PROGRAM} needs {' and '.join(missing)}: pip install 'peft-reft[playground]'", file=sys.stderr)
        return 1
    if (reason := why_not(arguments.port)) is not None:
        print(
            f"{PROGRAM}: --port {arguments.port} cannot be used ({reason}). Give another one, or none.", file=sys.stderr
        )
        return 2
    try:
        talker, names = open_talker(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"{PROGRAM}: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    from peft_reft.playground.page import build, serve

    page = build(Replies(talker, arguments.system), names, str(talker.model.config.name_or_path))
    try:
        serve(page, ADDRESS, arguments.port, not arguments.no_browser)
    except OSError as error:
        print(f"{PROGRAM}: the page cannot be served: {error}", file=sys.stderr)
        return 2
    return 0


def why_not(port: int | None) -> str | None:
    """Why no page can be served at a port of this machine; None if one can. Asked before a model is loaded."""
    if port is None:
        return None
    try:
        with socket.create_server((ADDRESS, port)):
            return None
    except OSError as error:
        return os.strerror(error.errno or 0)
