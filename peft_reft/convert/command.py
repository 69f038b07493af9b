"""The command line of the converter: `python -m peft_reft convert SRC DST`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from peft_reft.command_line import OneLineParser
from peft_reft.convert import convert
from peft_reft.tuner.sizes import printable


def parser() -> OneLineParser:
    """The arguments, by the names that `peft_reft.convert.convert` has for them."""
    made = OneLineParser(
        prog="python -m peft_reft convert",
        description="Convert a ReFT checkpoint of pyreft or AdapterHub into a PEFT adapter, or one into pyreft's form.",
    )
    made.add_argument("src", help="directory of the checkpoint")
    made.add_argument("dst", help="directory to write")
    made.add_argument("--to", default="peft", choices=["peft", "pyreft"], help="format to write (default: peft)")
    made.add_argument("--positions", help="which tokens pyreft edited, such as f2+l2; its files do not say")
    made.add_argument("--model", help="base model, a path or hub name of which only the config is read")
    made.add_argument("--kind", help="intervention, where the files do not say: noreft or direft for AdapterHub")
    made.add_argument("--act-fn", help="activation that pyreft was used with; its files do not say")
    made.add_argument("--task-type", help="PEFT's task type, such as CAUSAL_LM or SEQ_CLS")
    made.add_argument("--base-model-name-or-path", help="base model to name in the adapter's config, if not --model")
    made.add_argument("--without-head", action="store_true", help="leave out the trained weights of the model's head")
    made.add_argument("--overwrite", action="store_true", help="replace an adapter at DST")
    return made


def run(argv: Sequence[str]) -> int:
    """Convert and print what was made; 0, or 2 with one line on stderr."""
    options = vars(parser().parse_args(argv))
    head = not options.pop("without_head")
    try:
        print(convert(options.pop("src"), options.pop("dst"), head=head, **options))
    except (ValueError, OSError) as error:
        print(f"python -m peft_reft convert: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    return 0
