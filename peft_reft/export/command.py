"""The command line: `python -m peft_reft export BASE OUT` and `python -m peft_reft export --adapter DIR OUT`."""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_reft.command_line import OneLineParser, number, refuse_place
from peft_reft.export.backbone import exportable
from peft_reft.export.check import check_backbone
from peft_reft.export.files import FLOATS, save_adapter_tensors
from peft_reft.export.programs import FORMATS, export_backbone, refuse_missing_packages
from peft_reft.export.quantise import INTEGERS
from peft_reft.info.files import is_reft_adapter, read_config
from peft_reft.tuner.sizes import printable

FAULTS = (ValueError, OSError, ImportError)
OF_BACKBONES = ("format", "cache", "max_rank", "max_groups", "max_columns", "bake", "tokens", "no_check")


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    made = OneLineParser(
        prog="python -m peft_reft export",
        usage="%(prog)s BASE OUT [options]\n       %(prog)s --adapter DIR OUT [--dtype ...] [--base-model NAME]",
        description="Export a base model as one graph in which edits are inputs, and adapters as small files for it.",
    )
    made.add_argument("paths", nargs="+", metavar="BASE OUT", help="name or folder of the base model; folder to write")
    made.add_argument(
        "--adapter", metavar="DIR", help="a saved adapter, to be written as the file (or into the folder) OUT"
    )
    made.add_argument("--format", default="onnx", choices=list(FORMATS), help="of the graph (default: onnx)")
    made.add_argument(
        "--cache", action=argparse.BooleanOptionalAction, default=True, help="keys and values as inputs and outputs"
    )
    made.add_argument(
        "--dtype",
        choices=[*FLOATS, *INTEGERS],
        help="of the backbone's weights (default: float32), or of an adapter's file (default: float16)",
    )
    made.add_argument("--max-rank", type=number(int, 1), help="fix the rank of the inputs; smaller adapters are padded")
    made.add_argument("--max-groups", type=number(int, 1), help="fix the number of position groups of the inputs")
    made.add_argument("--max-columns", type=number(int, 2), help="the longest row that the graph takes")
    made.add_argument("--bake", metavar="DIR", help="put this adapter into the graph, which then serves it alone")
    made.add_argument("--base-model", metavar="NAME", help="what the files call the base model (default: its own name)")
    made.add_argument(
        "--tokens", type=number(int, 1), default=12, help="length of the answers that are compared (default: 12)"
    )
    made.add_argument("--no-check", action="store_true", help="do not run the file and compare its answers")
    return made


def main(argv: Sequence[str]) -> int:
    """`python -m peft_reft export ...`: returns the exit status; 1 if the file answers other than the model."""
    made = parser()
    arguments = made.parse_args(argv)
    paths = [Path(path) for path in arguments.paths]
    if len(paths) != (1 if arguments.adapter else 2):
        made.error("give BASE and OUT for a backbone, or OUT alone with --adapter DIR")
    idle = [name for name in OF_BACKBONES if getattr(arguments, name) != made.get_default(name)]
    if arguments.adapter and idle:
        option = f"--{'no-' * (idle[0] == 'cache')}{idle[0].replace('_', '-')}"
        made.error(f"{option} is for backbones; an adapter's file fits them all, so leave it out")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("torch").setLevel(logging.ERROR)  # its exporters' warnings to each other
    logging.getLogger("onnxruntime").setLevel(logging.ERROR)  # its rounding says what it does with each node
    try:
        if arguments.adapter:
            return _adapter(arguments, paths[0])
        return _backbone(arguments, paths[1])
    except FAULTS as error:
        print(f"{made.prog}: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2


def _adapter(arguments: argparse.Namespace, out: Path) -> int:
    dtype = arguments.dtype or "float16"
    if dtype not in FLOATS:
        raise ValueError(f"--dtype {dtype} is for backbones; the edits of an adapter stay in floating point.")
    read_config(Path(arguments.adapter))  # raises, if it is no adapter
    if out.is_dir() or out.suffix != ".safetensors":
        out = out / f"{Path(arguments.adapter).resolve().name}.safetensors"
    refuse_place("OUT", out.parent)
    save_adapter_tensors(arguments.adapter, out, FLOATS[dtype], base_model=arguments.base_model)
    print(f"{out}: {out.stat().st_size:,} bytes")
    return 0


class Steps:
    """Says what is done, and how long the last thing took."""

    def __init__(self) -> None:
        self.begun = time.perf_counter()

    def __call__(self, text: str) -> None:
        now = time.perf_counter()
        print(f"[{now - self.begun:6.1f} s] {text}", flush=True)


def _backbone(arguments: argparse.Namespace, out: Path) -> int:
    say = Steps()
    name, dtype = arguments.paths[0], arguments.dtype or "float32"
    if dtype not in FORMATS[arguments.format].dtypes:
        raise ValueError(
            f"--dtype {dtype} is none for --format {arguments.format}; use one of "
            f"{', '.join(FORMATS[arguments.format].dtypes)}."
        )
    if is_reft_adapter(Path(name)):
        raise ValueError(
            f"{name!r} is a saved adapter, and BASE is a base model. Export the base model that it was trained on, and "
            f"the adapter by --adapter {name}."
        )
    refuse_missing_packages(arguments.format)
    refuse_place("OUT", out)
    say(f"Loading {name}")
    precision = FLOATS.get(dtype, torch.float32)
    experts = FORMATS[arguments.format].experts
    base: Any = AutoModelForCausalLM.from_pretrained(name, dtype=precision, trust_remote_code=False)
    if experts is not None:
        base.set_experts_implementation(experts)
    parameters = sum(p.numel() for p in base.parameters())
    model, baked = base, None
    if arguments.bake:
        model, baked = PeftModel.from_pretrained(base, arguments.bake, adapter_name="baked"), "baked"
    backbone = exportable(model, cache=arguments.cache, baked=baked)
    kept = "no cache" if backbone.cache is None else f"a cache of {len(backbone.cache)} layers"
    say(f"Tracing {len(backbone.blocks)} blocks of width {backbone.width}, {parameters:,} parameters, {kept}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's exporters to each other
        description = export_backbone(
            backbone,
            out,
            arguments.format,
            quantised=dtype if dtype in INTEGERS else None,
            max_rank=arguments.max_rank,
            max_groups=arguments.max_groups,
            max_columns=arguments.max_columns,
            base_model=arguments.base_model,
            progress=say,
        )
    for file in sorted(out.glob(f"{description.file}*")):
        say(f"{file}: {file.stat().st_size:,} bytes")
    _tokenizer(name, out)
    if arguments.no_check:
        return 0
    say("Running the file, and comparing its greedy answers with the model's")
    base.float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about names in its own code
        lines, equal = check_backbone(model, out, arguments.tokens)
    print("\n".join(f"           {line}" for line in lines), flush=True)
    rounded = dtype != "float32"
    if equal or rounded:
        say("Done" if equal else f"Done; weights in {dtype} answer otherwise than those of the model in float32")
        return 0
    say("The file does not answer as the model does")
    return 1


def _tokenizer(name: str, out: Path) -> None:
    """Put the tokenizer beside the backbone, if there is one: an app needs both."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except FAULTS:
        print("           no tokenizer is found with the base model; the app needs one of its own", flush=True)
        return
    tokenizer.save_pretrained(out)
