"""The command line of the GPU benchmark, and which parts it measures in which order; see the package's docstring."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

import benchmarks.gpu
from benchmarks import common
from benchmarks.gpu import compiled, counts, many, times
from benchmarks.gpu.deadline import Deadline, OutOfTime
from benchmarks.gpu.models import SHAPES
from benchmarks.gpu.record import Figure, Record
from benchmarks.gpu.work import Work

Part = Callable[[Work], Iterator[Figure]]

PARTS: dict[str, Part] = {
    "forward": times.time_forward,
    "train": times.time_training,
    "kernels": counts.count,
    "prefill": times.time_prefill,
    "generate": times.time_generation,
    "many": many.one_batch,
    "graphs": compiled.graphs,
    "resident": many.resident,
    "compiled": compiled.compiled,
}
ONLY_ON_A_GPU = ("graphs",)
LARGE = ("forward", "train", "prefill", "generate")
# The most telling first: what small models cost the host, then whether it vanishes at 7B.
PLAN = [
    *(("135M", part) for part in ("forward", "train", "kernels", "generate")),
    *(("7B", part) for part in LARGE),
    *(("135M", part) for part in ("graphs", "many", "prefill")),
    *(("1.5B", part) for part in LARGE),
    *(("135M", part) for part in ("resident", "compiled")),
]
SMALL = [("tiny", part) for part in PARTS]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu",
        description=benchmarks.gpu.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shapes = ",".join(SHAPES)
    parser.add_argument("--minutes", type=float, default=4, help="from the start to the end, whatever the shape")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shapes", default="135M,1.5B,7B", help=f"of {shapes}, separated by commas")
    parser.add_argument("--only", help=f"parts, or SHAPE/part, separated by commas; of {','.join(PARTS)}")
    parser.add_argument("--again", action="store_true", help="measure also what is in the file")
    parser.add_argument("--rounds", type=int, default=15, help="of a timing, at most")
    parser.add_argument("--seconds", type=float, default=5, help="of a timing's rounds, about")
    parser.add_argument("--tokens", type=int, default=16, help="generated ones")
    parser.add_argument("--adapters", type=int, default=1000, help="of the part `resident`")
    parser.add_argument("--output", type=Path, help="the JSON file (default: in benchmarks/results)")
    parser.add_argument("--commit", default="", help="that is measured, where git cannot tell it (a bare copy)")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parsed = parser.parse_args(arguments)
    parsed.shapes = parsed.shapes.split(",")
    parsed.only = parsed.only.split(",") if parsed.only else []
    if unknown := [shape for shape in parsed.shapes if shape not in SHAPES]:
        parser.error(f"--shapes: {unknown[0]!r} is none of {shapes}")
    if unknown := [part for part in parsed.only if part.rpartition("/")[2] not in PARTS]:
        parser.error(f"--only: {unknown[0]!r} is none of {','.join(PARTS)}")
    if parsed.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; `--device cpu --shapes tiny` shows that the benchmark runs")
    return parsed


def planned(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """The parts to measure, in order: SHAPE/part of --only even if the plan has it not for that shape."""
    asked = [tuple(part.split("/")) for part in arguments.only if "/" in part]
    names = [part for part in arguments.only if "/" not in part]
    plan = [
        (shape, part)
        for shape, part in [*PLAN, *SMALL]
        if shape in arguments.shapes and (part in names or (not arguments.only))
    ]
    plan = [*plan, *(pair for pair in asked if pair not in plan)]
    return [pair for pair in plan if arguments.device == "cuda" or pair[1] not in ONLY_ON_A_GPU]


def main(arguments: Sequence[str] | None = None, begin: float | None = None) -> Record:
    """Measure; returns the record of all that is in the file.

    Args:
        arguments: of the command line; None for the process's own.
        begin: when the minutes began (`time.monotonic()`); None for now.
    """
    given = parse(arguments)
    deadline = Deadline(given.minutes, time.monotonic() if begin is None else begin)
    warnings.simplefilter("ignore")
    command = ["python", "-m", "benchmarks.gpu", *(sys.argv[1:] if arguments is None else arguments)]
    run = common.environment() | {"command": " ".join(command)}
    run["commit"] = given.commit or run["commit"]
    path = None if given.no_write else given.output or common.result_path("gpu", "json")
    record = Record(path, run, deadline)
    work = Work(given.device, deadline, given.rounds, given.seconds, given.tokens, given.adapters)
    print(f"[{deadline.elapsed():6.1f} s] {common.heading(run)}", flush=True)
    key = ""
    try:
        with deadline.alarm():
            for shape, part in planned(given):
                key = f"{shape}/{part}"
                if not record.has(key) or given.again:
                    deadline.check()
                    measure(record, work, shape, part)
    except OutOfTime:
        print(f"[{deadline.elapsed():6.1f} s] {given.minutes:g} minutes are over, in {key}; the same command goes on")
    return record


def measure(record: Record, work: Work, shape: str, part: str) -> None:
    """One part; an error is written into its place, and the next part goes on."""
    key = f"{shape}/{part}"
    record.begin(key)
    try:
        work.use(SHAPES[shape])
        for figure in PARTS[part](work):
            record.add(key, figure)
    except (Exception, OutOfTime) as error:
        record.end(key, error)
        if isinstance(error, OutOfTime):
            raise
    else:
        record.end(key)
