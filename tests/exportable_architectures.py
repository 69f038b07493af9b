"""Which of transformers' causal language models can be exported with their edits as inputs: a sweep over tiny ones.

    python tests/exportable_architectures.py [--types llama gpt2 ...] [--format onnx] [--limit SECONDS] [--write FILE]

For every type: a tiny model with an adapter of random weights; the backbone of `exportable` is traced with open sizes
as `export_backbone` does it, and the graph answers greedily with the adapter and without, as generate does: "equal".
With a key/value cache first; types that are refused one are tried without. `--format` writes a file and runs that in
place of the graph. What is "refused" says why, and so does what transformers itself does not build here. "differs" and
"failed" are faults of the package. At the end, how many of how many; the status is 1 if there was a fault.
"""

from __future__ import annotations

import argparse
import collections
import json
import signal
import sys
import tempfile
import time
import warnings
from typing import Any

import torch
import transformers
from architectures import FIRST_SPECIAL, model_types, tiny_model
from peft import get_peft_model

from peft_reft import ReftConfig
from peft_reft.export import adapter_tensors, export_backbone, exportable, greedy_answer, open_backbone
from peft_reft.export.answers import Run
from peft_reft.export.backbone import Backbone
from peft_reft.export.graph import Sizes, trace
from peft_reft.export.programs import FORMATS
from peft_reft.info.files import one_line

TOKENS = 8
CONFIG = {"r": 3, "positions": "f2+l2+d3", "share_weights": False, "intervention": "direft", "init_weights": False}


def answers(model: Any, prompt: list[int]) -> list[int]:
    """What the package itself answers."""
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    ends = {"eos_token_id": None, "pad_token_id": 0, "max_new_tokens": TOKENS, "do_sample": False}
    settings = transformers.GenerationConfig(**ends)
    model.get_base_model().generation_config = transformers.GenerationConfig()  # without penalties and forced tokens
    found = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    return found[0, len(prompt) :].tolist()


def run_of(backbone: Backbone, kind: str | None) -> Run:
    """The graph of a backbone as a function, from a file of that kind if one is named."""
    if kind is None:
        return trace(backbone, Sizes()).module(check_guards=False)
    with tempfile.TemporaryDirectory() as folder:
        export_backbone(backbone, folder, kind)
        return open_backbone(folder)[0]


def examine(model_type: str, cache: bool, kind: str | None) -> tuple[str, str]:
    """A verdict on a type of model, and what it rests on."""
    try:
        base = tiny_model(model_type)
    except Exception as error:  # transformers lacks a package for it, or its config class contradicts itself
        return "not built", one_line(error)
    prompt = torch.randint(5, FIRST_SPECIAL - 1, (6,), generator=torch.Generator().manual_seed(1)).tolist()
    if kind is not None and FORMATS[kind].experts is not None:
        base.set_experts_implementation(FORMATS[kind].experts)
    try:
        exportable(base, cache=cache)
        model = get_peft_model(base, ReftConfig(task_type="CAUSAL_LM", **CONFIG)).eval()
        for groups in base.modules():
            if hasattr(groups, "basis"):
                groups.basis.data.mul_(3)
        backbone = exportable(model, cache=cache)
        tensors = adapter_tensors(model)
        exported = run_of(backbone, kind)
    except ValueError as error:
        return "refused", str(error)
    expected = answers(model, prompt)
    with model.disable_adapter():
        plain = answers(model, prompt)
    for run, name in ((backbone, "eager"), (exported, kind or "traced")):
        for strength, wanted in ((1.0, expected), (0.0, plain)):
            past = backbone.empty_past() if cache else None
            got = greedy_answer(run, prompt, tensors, CONFIG["positions"], False, past, TOKENS, strength)
            if got != wanted:
                return "differs", f"{name}, strength {strength}: {got}, expected {wanted}"
    return ("equal", "the adapter changes the answer" if expected != plain else "the adapter changes nothing")


def examined(model_type: str, cache: bool, kind: str | None, limit: int) -> tuple[str, str]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {limit} s of CPU time")

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, limit)
    try:
        return examine(model_type, cache, kind)
    except Exception as error:
        return "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def main() -> int:
    """Go through the types and print a line for each; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="*", help="model types (default: all)")
    parser.add_argument("--format", choices=["onnx", "pt2"], help="a kind of file to write and run (default: none)")
    parser.add_argument("--limit", type=int, default=300, help="seconds of CPU time for each try (default: 300)")
    parser.add_argument("--write", help="a file that gets a line of JSON for each type")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    counts: collections.Counter[str] = collections.Counter()
    for model_type in arguments.types or model_types("causal"):
        begun = time.monotonic()
        verdict, why = examined(model_type, True, arguments.format, arguments.limit)
        row = {"type": model_type, "cache": verdict, "why": why}
        if verdict == "refused":
            row["no cache"], row["why not"] = examined(model_type, False, arguments.format, arguments.limit)
        counts[f"{verdict} with a cache, {row['no cache']} without" if "no cache" in row else verdict] += 1
        row["seconds"] = f"{time.monotonic() - begun:.0f}"
        print(json.dumps(row), flush=True)
        if arguments.write:
            with open(arguments.write, "a") as file:
                file.write(json.dumps(row) + "\n")
    print("\n".join(f"{number:4} of {counts.total()}: {what}" for what, number in counts.most_common()))
    return int(any("differs" in what or "failed" in what for what in counts))


if __name__ == "__main__":
    sys.exit(main())
