"""What all programs of this folder do: read the command line, load the model, make what is missing, write it down."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from benchmarks import common
from benchmarks.real_llm import model
from benchmarks.study.store import Store

Cell = dict[str, Any]
Cells = list[Cell]
LONG = ("answers", "trained", "rows")  # what a cell holds that is not printed when it is done


def load(folder: Path) -> tuple[nn.Module, Any]:
    """The frozen float32 model and its tokenizer; one thread from now on."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return model.load(folder, "cpu", torch.float32)


def main(
    program: str | None,
    results: Path,
    picture: Path,
    steps: int,
    setup: Callable[[int], str],
    plan: Callable[[Path, int], Iterator[tuple[str, Callable[[], Cell]]]],
    report: Callable[[Cells], str],
    draw: Callable[[Cells, Path], None],
) -> None:
    """Make the cells that are not stored yet, in the plan's order, and write the report of all.

    Args:
        program: its docstring.
        results: folder of the results, unless the command line names another.
        steps: of a training, unless the command line says otherwise.
        setup: what cells with so many steps have in common; others are kept, and not mixed in.
        plan: of a model's folder and the steps, each cell's key and what makes the cell.
        report, draw: the text of all cells, and their picture, which goes into a file.
    """
    parser = argparse.ArgumentParser(description=program, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of the language model")
    parser.add_argument("--steps", type=int, default=steps, help="of a training; default %(default)s")
    parser.add_argument("--minutes", type=float, default=math.inf, help="of CPU time, after which no cell begins")
    parser.add_argument("--output", type=Path, default=results, help="folder of the results; default %(default)s")
    parser.add_argument("--report", action="store_true", help="only write the report and the picture of what is there")
    given = parser.parse_args()
    if given.model is None and not given.report:
        parser.error("--model: the folder that benchmarks/real_llm/model.py has made")
    store = Store(given.output, setup(given.steps))
    if not given.report:
        for key, make in plan(given.model, given.steps):
            if key in store.cells or time.process_time() > 60 * given.minutes:
                continue
            print(time.strftime("%H:%M:%S"), key, flush=True)
            store.add(key, cell := make())
            print("   ", {what: value for what, value in cell.items() if what not in LONG}, flush=True)
    write(store, report, draw, picture)


def write(store: Store, report: Callable[[Cells], str], draw: Callable[[Cells, Path], None], picture: Path) -> None:
    """report.md and environment.json beside the cells, and the picture if matplotlib is there."""
    folder, cells = store.path.parent, list(store.cells.values())
    spec = sys.modules["__main__"].__spec__
    program = sys.argv[0] if spec is None else f"-m {spec.name}"
    environment = common.environment() | {"command": " ".join(["python", program, *sys.argv[1:]])}
    if "--report" not in sys.argv:
        (folder / "environment.json").write_text(json.dumps(environment, indent=1) + "\n")
    (folder / "report.md").write_text(report(cells))
    if importlib.util.find_spec("matplotlib") is not None:
        draw(cells, picture)
    print(report(cells))
