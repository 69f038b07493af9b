"""The command line of the inspection: `python -m peft_reft inspect DIR --prompt TEXT ...`."""

from __future__ import annotations

import importlib.util
import math
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft_reft.command_line import OneLineParser, add_model_options, number
from peft_reft.inspect.batch import is_causal
from peft_reft.inspect.heatmap import LABELS, OF_TRACES
from peft_reft.inspect.run import inspect_adapter
from peft_reft.inspect.tables import Inspection
from peft_reft.integrations.loading import load_adapters
from peft_reft.integrations.threads import share_the_machine
from peft_reft.tuner.fit import most_tokens
from peft_reft.tuner.sizes import printable


def main(argv: list[str]) -> int:
    """`python -m peft_reft inspect DIR --prompt TEXT ...`; returns the exit status."""
    parser = OneLineParser(
        prog="python -m peft_reft inspect",
        description="Measure how far an adapter moves each token of some prompts, and how much each block matters.",
        epilog="A chat model's prompts are encoded by its chat template, as a message of the user.",
    )
    parser.add_argument("directory", metavar="DIR", help="the adapter, as save_pretrained wrote it")
    parser.add_argument("--prompt", action="append", required=True, help="a prompt; may be given several times")
    parser.add_argument("--raw", action="store_true", help="encode the prompts as they are, without the chat template")
    parser.add_argument("--answer", action="append", help="an answer to each prompt: shows edits of generated tokens")
    parser.add_argument("--out", help="where to draw the heat map; the ending is the format (.png, .svg, .pdf)")
    parser.add_argument("--csv", help="where to write the table of edits; effects go to NAME-effects.csv next to it")
    values = [name for name in LABELS if name not in OF_TRACES]
    parser.add_argument("--value", default="relative", choices=values, help="what the heat map shows")
    parser.add_argument("--no-effects", action="store_true", help="do not run the model once more for each block")
    parser.add_argument(
        "--num-labels", type=number(int, 1), help="classes of a classifier, if its base model does not say"
    )
    add_model_options(parser)
    arguments = parser.parse_args(argv)
    share_the_machine()
    try:
        check_files(arguments.out, arguments.csv)
        check_texts(arguments.prompt, arguments.answer)
        draws = arguments.out is not None and can_draw(arguments.out, parser.prog)
        folders = {"default": Path(arguments.directory)}
        model, tokenizer = load_adapters(
            folders, arguments.model, arguments.dtype, arguments.device, arguments.num_labels
        )
        prompts = arguments.prompt
        if not arguments.raw and is_chat(model, tokenizer):
            prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
        found = inspect_adapter(model, prompts, tokenizer, answers=arguments.answer, effects=not arguments.no_effects)
        if arguments.csv:
            path = Path(arguments.csv)
            found.to_csv(path)
            if found.effects:
                found.to_csv(effects_beside(path), "effects")
        if draws:
            found.plot(arguments.out, arguments.value)
    except (ValueError, OSError, ImportError, KeyError) as error:
        print(f"{parser.prog}: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    except IndexError as error:  # of learned positions, which end there
        most, said = most_tokens(model.get_base_model())
        print(f"{parser.prog}: {error}. The model takes at most {most:,} tokens ({said}).", file=sys.stderr)
        return 2
    print(summary(found, arguments.prompt))
    return 0 if draws or arguments.out is None else 1


def check_files(out: str | None, table: str | None) -> None:
    """Raise ValueError for a file that cannot be written, or would replace another. Asked before a model is loaded."""
    for option, path in (("--out", out), ("--csv", table)):
        if path is not None and not Path(path).parent.is_dir():
            raise ValueError(f"{option} {path}: there is no folder {str(Path(path).parent)!r}.")
        if path is not None and Path(path).is_dir():
            raise ValueError(f"{option} {path!r} is a folder; give the name of a file in it.")
    if out is not None and table is not None and Path(out) in (Path(table), effects_beside(Path(table))):
        raise ValueError(f"--out {out} would replace a table of --csv {table}. Give the picture another name.")


def effects_beside(path: Path) -> Path:
    """The file of the effects, which goes with that of the edits."""
    return path.with_name(f"{path.stem}-effects{path.suffix}")


def check_texts(prompts: Sequence[str], answers: Sequence[str] | None) -> None:
    """Raise ValueError if there is not an answer to each prompt, or one of them is no text."""
    if answers is not None and len(answers) != len(prompts):
        raise ValueError(f"There are {len(answers)} answers for {len(prompts)} prompts; give each prompt one.")
    for text in [*prompts, *(answers or [])]:
        if any("\ud800" <= character <= "\udfff" for character in text):  # what Python makes of bytes that are no text
            raise ValueError(f"{text!r} holds bytes that are no text in UTF-8. Give it as text.")


def can_draw(path: str, program: str) -> bool:
    """Whether a picture can be drawn; says what to install if not. Asked before a model is loaded.

    Raises:
        ValueError: if pictures have no format of that ending.
    """
    if importlib.util.find_spec("matplotlib") is None:
        print(
            f"{program}: --out needs matplotlib, which is not installed: pip install matplotlib, or the extra "
            "'.[inspect]' in a clone of peft-reft. Only the numbers follow.",
            file=sys.stderr,
        )
        return False
    from matplotlib.backend_bases import FigureCanvasBase

    endings = FigureCanvasBase.get_supported_filetypes()
    if Path(path).suffix[1:].lower() not in endings:
        raise ValueError(f"--out {path} is no picture; its name must end in one of .{', .'.join(sorted(endings))}.")
    return True


def is_chat(model: Any, tokenizer: Any) -> bool:
    """Whether prompts are to be encoded by the tokenizer's chat template: those of language models that have one."""
    return is_causal(model.get_base_model()) and getattr(tokenizer, "chat_template", None) is not None


def summary(found: Inspection, texts: Sequence[str]) -> str:
    """A few lines per prompt: its text, the prediction, and how much each block matters for it."""
    lines = []
    for prompt in dict.fromkeys(row["prompt"] for row in found.edits):
        lines.append(f"prompt {prompt}: {textwrap.shorten(texts[prompt], 100)}")
        for total in (row for row in found.totals if row["prompt"] == prompt):
            lines.append(
                f"  all blocks: tv {total['tv']:.3f}, kl {total['kl']:.3g} nats; most likely {total['top']!r}, "
                f"unedited {total['top_unedited']!r}"
            )
        effects = {row["block"]: row for row in found.effects if row["prompt"] == prompt}
        edits = [
            row for row in found.edits if row["prompt"] == prompt and row["adapter"] == found.together and row["edited"]
        ]
        for block in dict.fromkeys(row["block"] for row in edits):
            sizes = [row["relative"] for row in edits if row["block"] == block]
            text = f"  {block}: moves {len(sizes)} tokens by {math.fsum(sizes) / len(sizes):.3g} of their length"
            if block in effects:
                text += f"; without it tv {effects[block]['tv']:.3f}, kl {effects[block]['kl']:.3g} nats"
            lines.append(text)
    return "\n".join(lines)
