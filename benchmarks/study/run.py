"""The study, in one command; every finished cell is stored at once, and not run again.

    python -m benchmarks.study.run                      # all of it: under an hour on 2 cores
    python -m benchmarks.study.run --quick              # five minutes
    python -m benchmarks.study.run --seeds 5,6,7 --split 1
    python -m benchmarks.study.run --only encoder       # one part; others: ablation, edits, instructions, styles, ...
    python -m benchmarks.study.run --report             # tables and pictures of what is there, nothing run

Run in the root of a clone. Results go to benchmarks/results/study (--quick: study-quick; other splits: study-split1).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.study import causal, cells, encoder, grid, instructions, memory, report, styles, task, training
from benchmarks.study.store import Store

RESULTS = Path(__file__).parent.parent / "results"


def setup_of(split: int, scale: cells.Scale) -> str:
    """What all cells have in common: data, sizes, steps. A change of it makes stored cells old."""
    data = task.load(split, scale.sizes).fingerprint
    fixed = [encoder.MAX_TOKENS, encoder.BATCH, training.WARMUP, encoder.HEAD_LR, scale.epochs, scale.sizes]
    fixed += [
        scale.base_steps,
        scale.steps,
        causal.BATCH,
        instructions.STEPS,
        styles.STEPS,
        memory.STEPS,
        memory.LENGTHS,
    ]
    return f"split {split}, data {data}, settings {hashlib.sha256(json.dumps(fixed).encode()).hexdigest()[:8]}"


def prepare_worker() -> None:
    """One thread in each process: two that wait for each other are slower."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def run_all(
    store: Store,
    plan: Callable[[], Iterable[dict[str, Any]]],
    run: Callable[[dict[str, Any]], dict[str, Any]],
    pool: Executor,
    workers: int,
    until: float = float("inf"),
) -> None:
    """Run the cells that are not stored yet, until that is all or the time is over (what has begun is finished).

    Args:
        plan: the cells that can be run, finished ones included, the first first; asked again after each cell.
        run: gives a cell with its result.
        pool: where `run` is called, so many at a time as `workers`.
        until: when to begin no more, as `time.time`.
    """
    running: dict[Future, str] = {}
    while True:
        for cell in plan():
            if len(running) == workers or time.time() > until:
                break
            key = cells.key(cell)
            if key not in store.cells and key not in running.values():
                running[pool.submit(run, cell)] = key
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            key = running.pop(future)
            store.add(key, future.result())
            print(f"{time.strftime('%H:%M:%S')} {key}: {summary(future.result()['result'])}", flush=True)


def summary(result: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in result.items() if isinstance(value, (int, float)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small data, few methods, one seed")
    parser.add_argument("--only", default=",".join(cells.TOPICS), help="comma-separated parts; default %(default)s")
    parser.add_argument("--methods", default=None, help="comma-separated methods of the encoder task; default all")
    parser.add_argument("--seeds", default=None, help="comma-separated; default 0,1,2,3,4, or 0 with --quick")
    parser.add_argument("--split", type=int, default=0, help="which random division of the files")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further cell after that long")
    parser.add_argument("--output", type=Path, default=None, help="folder of the results")
    parser.add_argument("--report", action="store_true", help="only write the report of what is there")
    arguments = parser.parse_args()
    topics = arguments.only.split(",")
    if unknown := set(topics) - set(cells.TOPICS):
        parser.error(f"--only: there is no part {sorted(unknown)[0]!r}; use some of {', '.join(cells.TOPICS)}")
    scale = cells.QUICK if arguments.quick else cells.FULL
    if arguments.methods is not None:
        methods = tuple(arguments.methods.split(","))
        if unknown := set(methods) - set(grid.MAIN):
            parser.error(f"--methods: there is no {sorted(unknown)[0]!r}; use some of {', '.join(grid.MAIN)}")
        scale = dataclasses.replace(scale, encoder=methods, edits=tuple(m for m in scale.edits if m in methods))
    seeds = [int(seed) for seed in (arguments.seeds or ("0" if arguments.quick else "0,1,2,3,4")).split(",")]
    name = "study" + "-quick" * arguments.quick + f"-split{arguments.split}" * bool(arguments.split)
    folder = arguments.output or RESULTS / name
    store = Store(folder, setup_of(arguments.split, scale))
    if store.others:
        print(f"{store.others} stored cells are of another setup, and not used.")
    if not arguments.report:
        (folder / "environment.json").write_text(json.dumps(common.environment(), indent=1) + "\n")
        os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
        plan = functools.partial(cells.plan, store, seeds, scale, topics)
        run = functools.partial(cells.run, split=arguments.split, scale=scale)
        until = time.time() + 60 * arguments.minutes
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(arguments.workers, context, prepare_worker) as pool:
            run_all(store, plan, run, pool, arguments.workers, until)
    report.write(store, folder, arguments.split)


if __name__ == "__main__":
    main()
