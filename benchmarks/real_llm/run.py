"""The comparison, in one command; every finished cell is stored at once, and not run again.

    python -m benchmarks.real_llm.run --model smollm2 --data data --minutes 7 --workers 3 --gang 6   # on a GPU
    python -m benchmarks.real_llm.run --model smollm2 --data data --cpu                              # on two cores
    python -m benchmarks.real_llm.run --model smollm2 --data data --cpu --tasks ultrafeedback_1k     # instructions
    python -m benchmarks.real_llm.run --model smollm2 --data data --report                           # nothing is run

Run in the root of a clone. See README.md for the model and the data.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import queue
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks.real_llm.sizes import INSTRUCTIONS, size_of

RESULTS = Path(__file__).parent.parent / "results"
CONTEXT = multiprocessing.get_context("spawn")
Cell = dict[str, Any]


def work(number: int, graph: bool, orders: Any, results: Any) -> None:
    """A worker: takes the setup, then gangs of cells; hands each finished cell back, and says when it is free.

    After an error it ends: what a broken CUDA graph leaves behind is not known.
    """
    import torch
    import transformers

    from benchmarks.real_llm.cells import Bench

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        bench = Bench(orders.get(), graph)
        while True:
            for cell in bench.run(orders.get()):
                results.put((number, "cell", cell))
            results.put((number, "free", None))
    except Exception:
        results.put((number, "error", traceback.format_exc()))


class Worker:
    """A process that runs gangs, and what it has to do now."""

    def __init__(self, number: int, graph: bool, results: Any):
        self.graph = graph
        self.orders = CONTEXT.Queue()
        self.gang: list[Cell] = []  # without the cells that are done
        self.busy, self.began = False, 0.0
        self.process = CONTEXT.Process(target=work, args=(number, graph, self.orders, results), daemon=True)
        self.process.start()

    def give(self, gang: list[Cell]) -> None:
        self.gang, self.busy, self.began = gang, True, time.time()
        self.orders.put(gang)


class Run:
    """Several workers with several cells each, until there is nothing left to do or the time is over.

    A gang that fails is run again, each of its cells alone and without a CUDA graph; a cell that fails then is left
    out. Both are printed.

    Args:
        workers: running already; they import what they need meanwhile.
        gang: how many cells a worker gets at a time.
    """

    def __init__(self, workers: list[Worker], results: Any, gang: int, store: Any, setup: Any, names: list[str]):
        self.workers, self.results, self.gang = workers, results, gang
        self.store, self.setup, self.names = store, setup, names
        self.failed: dict[str, int] = {}
        self.longest = 0.0  # seconds of a gang
        for worker in workers:
            worker.orders.put(setup)

    def until(self, end: float) -> None:
        """Run until `end`, as `time.time`; what is under way then is dropped."""
        while True:
            for worker in self.workers:
                if not worker.busy and time.time() + 0.8 * self.longest < end and (gang := self.next(worker)):
                    worker.give(gang)
            if not any(worker.busy for worker in self.workers):
                break
            try:
                self.take(*self.results.get(timeout=min(1e6, max(0.1, end - time.time()))))
            except queue.Empty:
                print("The time is over; dropped:", [key(cell) for w in self.workers for cell in w.gang], flush=True)
                break
        for worker in self.workers:
            worker.process.kill()

    def next(self, worker: Worker) -> list[Cell]:
        """The next cells for a worker: new ones, or, if it has no graphs, one that has failed with them."""
        from benchmarks.real_llm import cells

        taken = {key(cell) for other in self.workers for cell in other.gang} | set(self.store.cells)
        free = [cell for cell in cells.plan(self.store, self.setup, self.names) if key(cell) not in taken]
        again = [cell for cell in free if self.failed.get(key(cell)) == 1]
        if again and not worker.graph:
            return again[:1]
        return [cell for cell in free if key(cell) not in self.failed][: self.gang]

    def take(self, number: int, kind: str, what: Any) -> None:
        """What worker `number` says: a finished "cell", that it is "free", or an "error" and its traceback."""
        worker = self.workers[number]
        if kind == "cell":
            self.store.add(key(what), what)
            worker.gang = [cell for cell in worker.gang if key(cell) != key(what)]
            print(f"{time.strftime('%H:%M:%S')} {key(what)}: {summary(what['result'])}", flush=True)
        elif kind == "free":
            self.longest = max(self.longest, time.time() - worker.began)
            worker.busy = False
        else:
            print(what, flush=True)
            for cell in worker.gang:
                self.failed[key(cell)] = self.failed.get(key(cell), 0) + 1
            self.workers[number] = Worker(number, False, self.results)
            self.workers[number].orders.put(self.setup)


def key(cell: Cell) -> str:
    return f"{cell['part']} | {cell['name']} | lr {cell['lr']:g} | seed {cell['seed']} | {cell['steps']} steps"


def summary(result: dict[str, Any]) -> str:
    shown = []
    for name, test in result["test"].items():
        if "accuracy" in test:
            shares = f"{100 * test['accuracy']:.1f} % generated, {100 * test['choice']:.1f} % likeliest"
            shown.append(f"{name} {shares}")
        else:
            shown.append(f"{name} {test['answer']:.4f} nats")
    shown.append("validation " + ", ".join(f"{what} {value:.4f}" for what, value in result["validation"].items()))
    if "loss" in result:
        shown.append(f"loss {result['loss'][-1]}; {result['seconds']} s")
    return "; ".join(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the language model")
    parser.add_argument("--data", required=True, type=Path, help="folder with the files of the tasks")
    parser.add_argument("--output", type=Path, help="folder of the results; default as in sizes.py")
    parser.add_argument("--cpu", action="store_true", help="the small part: short rows, few steps and methods")
    parser.add_argument(
        "--tasks", help=f"by commas; default openbookqa,ARC-Easy, or openbookqa with --cpu; {INSTRUCTIONS} alone"
    )
    parser.add_argument("--steps", type=int, default=None, help="of a training; default as in sizes.py")
    parser.add_argument("--longest", type=int, default=None, help="tokens of a row at most; default as in sizes.py")
    parser.add_argument("--test", type=int, default=None, help="test rows of a task at most; default as in sizes.py")
    parser.add_argument("--methods", default=None, help="names of grid.py, separated by semicolons; default all")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--gang", type=int, default=1, help="trainings side by side in a process")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after that long")
    parser.add_argument("--report", action="store_true", help="only write the report of what is there")
    options = parser.parse_args()
    tasks = tuple(options.tasks.split(",")) if options.tasks else None
    try:
        size = size_of(tasks, options.cpu)
    except ValueError as error:
        parser.error(f"--tasks: {error}")
    folder = options.output or RESULTS / size.folder
    began = time.time()
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    results = CONTEXT.Queue()
    graphs = not (options.cpu or options.eager)
    # Workers come first: importing takes long, and they do it while this process does.
    workers = [] if options.report else [Worker(number, graphs, results) for number in range(options.workers)]

    from benchmarks import common
    from benchmarks.real_llm import cells, grid, report
    from benchmarks.study.store import Store

    changed = {"tasks": tasks, "steps": options.steps, "longest": options.longest, "test": options.test}
    changed = {name: value for name, value in changed.items() if value is not None}
    setup = cells.Setup(options.model, options.data, **{**size.setup, **changed})
    names = options.methods.split(";") if options.methods else list(size.methods or grid.EVERYTHING)
    if unknown := set(names) - set(grid.EVERYTHING):
        parser.error(f"--methods: there is no {sorted(unknown)[0]!r}; use some of {'; '.join(grid.EVERYTHING)}")
    store = Store(folder, setup.of_results())
    if store.others:
        print(f"{store.others} stored cells are of another setup, and not used.")
    if not options.report:
        record = {**common.environment(), "command": " ".join(["python -m benchmarks.real_llm.run", *sys.argv[1:]])}
        (folder / "environment.json").write_text(json.dumps(record, indent=1) + "\n")
        Run(workers, results, options.gang, store, setup, names).until(began + 60 * options.minutes)
    report.write(store, folder)


if __name__ == "__main__":
    main()
