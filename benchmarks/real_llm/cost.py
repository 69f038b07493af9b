"""What a training step costs on this machine, by method: eagerly, as a CUDA graph, and several graphs side by side.

    python -m benchmarks.real_llm.cost --model smollm2 --data data --minutes 2

The first lines also say how many trainings side by side `run.py` should have. Every figure is printed and written when
it is known. Methods are measured alone on the machine, one after the other; a ratio is taken to LoRA r8 q,v.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from benchmarks.real_llm import grid
from benchmarks.real_llm.cells import Bench, Setup, cell_of
from benchmarks.real_llm.sizes import size_of
from benchmarks.real_llm.training import EAGER_STEPS, Training

GANGS = (1, 3, 6)
TIMED = 15


def seconds_of_steps(trainings: list[Training], steps: int) -> float:
    """Wall-clock seconds of so many steps of each, in turns."""
    common.synchronize()
    begin = time.perf_counter()
    for _ in range(steps):
        for training in trainings:
            training.step()
    common.synchronize()
    return time.perf_counter() - begin


def gigabytes(allocated: Callable[[], int]) -> float:
    return allocated() / 2**30


def peak_gigabytes(before: float) -> float | None:
    """The most that was allocated since the last reset, beyond `before`; None on a CPU."""
    return round(gigabytes(torch.cuda.max_memory_allocated) - before, 2) if torch.cuda.is_available() else None


def of_method(bench: Bench, name: str, graph: bool) -> dict[str, Any]:
    """Milliseconds of a step, and the most memory it took beyond what was there before."""
    before = gigabytes(torch.cuda.memory_allocated) if torch.cuda.is_available() else 0
    bench.graph = graph
    training = bench.training(cell_of("cost", name, grid.RATES[grid.EVERYTHING[name].kind][0], 0, 3 * TIMED))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    seconds_of_steps([training], EAGER_STEPS + 1)
    times = [1e3 * seconds_of_steps([training], 1) for _ in range(TIMED)]
    figures = {"step_ms": round(statistics.median(times), 2), "peak_gb": peak_gigabytes(before)}
    training.finish()
    return {"name": name, "how": "graph" if graph else "eager", **figures}


def of_gang(bench: Bench, size: int, name: str = "LoReFT r8 all") -> dict[str, Any]:
    """Steps in a second of all trainings together."""
    before = gigabytes(torch.cuda.memory_allocated)
    bench.graph = True
    cells = [cell_of("cost", name, 1e-3, seed, EAGER_STEPS + 1 + TIMED) for seed in range(size)]
    trainings = [bench.training(cell) for cell in cells]
    seconds_of_steps(trainings, EAGER_STEPS + 1)
    rate = size * TIMED / seconds_of_steps(trainings, TIMED)
    figures = {"steps_per_second": round(rate, 1), "peak_gb": peak_gigabytes(before)}
    for training in trainings:
        training.finish()
    return {"name": name, "how": f"{size} graphs side by side", **figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the language model")
    parser.add_argument("--data", required=True, help="folder with <task>-train.json and <task>-test.json")
    parser.add_argument("--output", type=Path, help="folder; default results/real-llm, with --cpu real-llm-cpu")
    parser.add_argument("--cpu", action="store_true", help="the sizes of run.py --cpu, without graphs")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing after that long")
    options = parser.parse_args()
    size = size_of(None, options.cpu)
    folder = options.output or common.RESULTS / size.folder
    end = time.time() + 60 * options.minutes
    torch.set_num_threads(1)
    setup = Setup(options.model, options.data, **size.setup)
    bench = Bench(dataclasses.replace(setup, seeds=(0,)), not options.cpu)
    folder.mkdir(parents=True, exist_ok=True)
    record = {"run": common.environment(), "rows": []}
    names = list(grid.MAIN)
    work = [(of_method, bench, name, False) for name in names]
    if not options.cpu:  # each method eagerly and as a graph, one after the other
        work = [(of_method, bench, name, graph) for name in names for graph in (False, True)]
        work[2:2] = [(of_gang, bench, size) for size in GANGS]
    for measure, *arguments in work:
        if time.time() > end:
            break
        common.gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        try:
            record["rows"].append(measure(*arguments))
        except (
            RuntimeError
        ) as error:  # a capture that failed: said in the file, and the others are measured all the same
            record["rows"].append({"asked": str(arguments[1:]), "error": str(error)[:500]})
        print(record["rows"][-1], flush=True)
        (folder / "cost.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
