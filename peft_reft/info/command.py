"""The command line of `adapter_info`: `python -m peft_reft info DIR`."""

from __future__ import annotations

import sys

from peft_reft.command_line import OneLineParser
from peft_reft.info.adapter import adapter_info
from peft_reft.tuner.sizes import printable


def main(argv: list[str]) -> int:
    """`python -m peft_reft info DIR [--json]`; returns the exit status."""
    parser = OneLineParser(
        prog="python -m peft_reft info", description="Describe a saved ReFT adapter, without loading its model."
    )
    parser.add_argument("directory", metavar="DIR", help="the adapter, as save_pretrained wrote it")
    parser.add_argument("--json", action="store_true", help="print all fields as JSON")
    arguments = parser.parse_args(argv)
    try:
        info = adapter_info(arguments.directory)
    except (ValueError, OSError) as error:  # a name too long, a folder that is not to be read
        print(f"{parser.prog}: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    print(info.as_json() if arguments.json else info)
    return 0
