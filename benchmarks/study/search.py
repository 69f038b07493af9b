"""Settings for LoReFT on the encoder task, found by `peft_reft.search` in 40 short trials.

    python -m benchmarks.study.search                 # goes on where it stopped; about 15 minutes of one core
    python -m benchmarks.study.search --report        # once it has ended: compares with what the study has by now

Run in the root of a clone. A trial is one training of the study (its data, steps, head, and the seed of its tuning),
scored on the validation split. The best setting is then trained with seeds of the study and tested on the test split,
as every cell of the ablations is (see grid.py). Writes search_encoder.json and search_encoder.png beside the study's
results; the trials themselves stay in a cache folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.study import cells, encoder, grid, task
from benchmarks.study.methods import Method, parameter_groups
from benchmarks.study.run import RESULTS, prepare_worker, setup_of
from benchmarks.study.store import Store
from benchmarks.study.training import WARMUP, fit
from peft_reft import ReftConfig
from peft_reft.search import Attempt, SearchSpace, search

METRIC = "validation accuracy"
RATES = (min(grid.ABLATED_RATES), max(grid.ABLATED_RATES))  # the range that the ablations cover
SCORED = (25, 50)  # steps after which a trial may be given up; there are 100


def objective(attempt: Attempt, data: task.Task, path: Path) -> float:
    """Train one setting as `encoder.run` does, with scores in between."""
    seed = cells.TUNING_SEED
    base = encoder.base_model(path, len(data.families), seed).requires_grad_(False)
    model = Method("reft", settings_of(attempt.config)).apply(base, "SEQ_CLS", seed)
    steps = int(encoder.EPOCHS * -(-len(data.train) // encoder.BATCH))
    rng = random.Random(f"batches {seed}")

    def report(step: int) -> None:
        if step in SCORED:
            attempt.report(encoder.accuracy(model, path, data.validation), step)

    groups = parameter_groups(model, attempt.learning_rate, encoder.HEAD_LR)
    fit(model, groups, lambda: encoder.batches(path, data.train, encoder.BATCH, rng), steps, report)
    return encoder.accuracy(model, path, data.validation)


def settings_of(config: ReftConfig) -> dict[str, Any]:
    """What the search chooses, as the study writes a method down."""
    return {"r": config.r, "positions": config.positions, "layers_to_transform": config.layers_to_transform}


def study_cells(split: int) -> list[dict[str, Any]]:
    """The cells that the study has stored. They are only read: it may be at work on them."""
    file = results(split) / "cells.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    setup = setup_of(split, cells.FULL)
    return [cell for cell in found if cell["setup"] == setup]


def results(split: int) -> Path:
    return RESULTS / ("study" + f"-split{split}" * bool(split))


def ablations(split: int, seeds: list[int]) -> dict[str, dict[str, Any]]:
    """Test accuracies of the ablation grid and of LoReFT in the main part, best first, as far as the study has them."""
    found: dict[str, list[float]] = {}
    for cell in study_cells(split):
        is_loreft = cell["part"] == "encoder" and cell["name"].startswith("LoReFT")
        if cell["seed"] in seeds and (cell["part"] == "ablation" or is_loreft):
            found.setdefault(cell["name"], []).append(cell["result"]["test"])
    return dict(sorted(((name, mean(found[name])) for name in found), key=lambda item: -item[1]["mean"]))


def tuned(split: int) -> dict[str, float]:
    """Validation accuracies of LoReFT in the study's own tuning, best first: of the same seed as the trials'."""
    found = {
        f"{cell['name']}, lr {cell['lr']:g}": cell["result"]["validation"]
        for cell in study_cells(split)
        if cell["part"] == "encoder tuning" and cell["name"].startswith("LoReFT") and cell["seed"] == cells.TUNING_SEED
    }
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def mean(values: list[float]) -> dict[str, Any]:
    """Mean and standard deviation of some runs."""
    spread = round(statistics.stdev(values), 4) if len(values) > 1 else None
    return {"mean": round(statistics.mean(values), 4), "sd": spread, "runs": len(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--seeds", default="0,1,2", help="of the final runs of the best setting, comma-separated")
    parser.add_argument("--split", type=int, default=0, help="which random division of the files")
    parser.add_argument("--report", action="store_true", help="no final runs but those that are there")
    arguments = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    prepare_worker()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    data, path = task.load(arguments.split), encoder.model_path()
    fixed = [data.fingerprint, encoder.MAX_TOKENS, encoder.BATCH, encoder.EPOCHS, encoder.HEAD_LR, WARMUP]
    setup = hashlib.sha256(json.dumps(fixed).encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = cache / "peft-reft-study" / f"search-{setup}"

    space = SearchSpace.of(encoder.base_model(path, len(data.families), 0), learning_rate=RATES)
    result = search(
        lambda attempt: objective(attempt, data, path),
        space,
        ReftConfig(task_type="SEQ_CLS"),
        folder,
        metric=METRIC,
        n_trials=arguments.trials,
    )
    best = {"lr": result.learning_rate, "settings": settings_of(result.config)}
    name = f"trial {result.trial}"
    store = Store(folder / "final", setup)
    for seed in seeds:
        cell = {"part": "search", "name": name, "seed": seed, **best}
        if cells.key(cell) not in store.cells and not arguments.report:
            method = Method("reft", best["settings"])
            found = encoder.run(data, method, result.learning_rate, seed, measure=("validation", "test"))
            store.add(cells.key(cell), {**cell, "result": found})
            print(f"{time.strftime('%H:%M:%S')} {cells.key(cell)}: test {found['test']:.4f}", flush=True)
    final = [cell["result"] for cell in store.cells.values() if cell["name"] == name and cell["seed"] in seeds]
    trials = [trial for trial in result.study.trials if trial.state.name in ("COMPLETE", "PRUNED")]
    written = {
        "command": f"python -m benchmarks.study.search --trials {arguments.trials} --seeds {arguments.seeds}"
        + f" --split {arguments.split}" * bool(arguments.split),
        "best": {**best, "trial": result.trial, METRIC: result.value},
        "trained numbers of the best": final[0]["parameters"] if final else None,
        "test accuracy of the best": mean([found["test"] for found in final]) if final else None,
        "test accuracy of the ablations and of LoReFT in the main part, same seeds": ablations(arguments.split, seeds),
        f"{METRIC} in the study's tuning, same seed as the trials": tuned(arguments.split),
        "trials": [
            {
                "number": trial.number,
                "state": trial.state.name,
                METRIC: trial.value,
                "at step": {str(step): value for step, value in trial.intermediate_values.items()},
                "seconds": round(trial.duration.total_seconds(), 1) if trial.duration else None,
                **trial.params,
            }
            for trial in trials
        ],
    }
    output = results(arguments.split)
    output.mkdir(parents=True, exist_ok=True)
    (output / "search_encoder.json").write_text(json.dumps(written, indent=1) + "\n")
    shutil.copyfile(folder / "trials.png", output / "search_encoder.png")
    print(json.dumps({key: value for key, value in written.items() if key != "trials"}, indent=1))


if __name__ == "__main__":
    main()
