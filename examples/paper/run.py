"""Run an experiment of the paper: train, evaluate, save the results, print them beside the paper's.

    python examples/paper/run.py examples/paper/commonsense.yaml                    # LoReFT, the first seed
    python examples/paper/run.py examples/paper/glue_base.yaml --method lora --tasks cola,rte --seed all
    python examples/paper/run.py examples/paper/arithmetic.yaml --model meta-llama/Llama-3.2-1B adapter.r=4
    accelerate launch examples/paper/run.py examples/paper/instruct.yaml            # on all GPUs of the machine
    python examples/paper/run.py examples/paper/commonsense.yaml --smoke            # a tiny model and data, no network

A run that has its results already is not run again, so that the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import classifying
import datasets
import generating
import report
import torch
import transformers
from accelerate import PartialState
from recipe import RecipeError, load, resolve
from tiny import save_tiny

KINDS = {"causal": generating, "glue": classifying}


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; settings to override may stand anywhere."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("recipe", help="a YAML file of this folder, or your own")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="as in training.learning_rate=1e-3 adapter.r=4"
    )
    parser.add_argument("--method", default="loreft", help="one that the recipe has; default: loreft")
    parser.add_argument("--model", help="hub name or path of another base model")
    parser.add_argument("--tasks", help="some of the recipe's tasks, with commas in between; default: all")
    parser.add_argument("--seed", default="first", help="a number, or 'all' of the recipe's seeds; default: the first")
    parser.add_argument("--output", type=Path, default=Path("paper-results"), help="folder of the results")
    parser.add_argument("--again", action="store_true", help="also run what has its results already")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, data of this folder, a few steps")
    return parser.parse_intermixed_args(argv)


def chosen_tasks(settings: Mapping[str, Any], asked: str | None) -> dict[str, Any]:
    """The entries of `evaluation.tasks` that were asked for."""
    tasks = settings["evaluation"]["tasks"]
    names = asked.split(",") if asked else list(tasks)
    unknown = [name for name in names if name not in tasks]
    if unknown:
        raise RecipeError(f"--tasks {asked}: {settings['name']} has {', '.join(tasks)}.")
    return {name: tasks[name] for name in names}


def chosen_seeds(recipe: Mapping[str, Any], asked: str) -> list[int]:
    """The seeds that were asked for."""
    seeds = recipe.get("seeds", [42])
    if asked in ("first", "all"):
        return seeds[:1] if asked == "first" else seeds
    try:
        return [int(asked)]
    except ValueError:
        raise RecipeError(f"--seed {asked} must be a number, or all.") from None


def run_one(settings: dict[str, Any], method: str, seed: int, folder: Path, smoke: bool) -> dict[str, Any]:
    """One training with its evaluation; the results are returned and saved as `results.json`."""
    wanted = json.loads(json.dumps(settings))
    transformers.set_seed(seed)
    kind = KINDS[settings["kind"]]
    name = settings["model"]
    if isinstance(name, Mapping):
        if not smoke:
            raise RecipeError("A model of its own config is for --smoke; give the hub name or path of a model.")
        with PartialState().main_process_first():
            settings["model"] = str(folder / "tiny-model")
            if PartialState().is_main_process:
                save_tiny(folder / "tiny-model", settings["kind"], name, kind.texts(settings))
        name = f"tiny {name['model_type']}"
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    measured = kind.run(settings, seed, folder)
    results = {
        "recipe": settings["name"],
        "method": method,
        "model": name,
        "seed": seed,
        "smoke": smoke,
        **measured,
        "published": settings.get("published", {}),
        "settings": wanted,
        "environment": {
            **{package: version(package) for package in ("peft-reft", "peft", "transformers", "trl", "torch")},
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor(),
            "processes": PartialState().num_processes,
        },
    }
    if PartialState().is_main_process:
        report.write_json(folder / "results.json", results)
    return results


def is_done(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether a run has its results already.

    Raises:
        RecipeError: if they are the results of other settings.
    """
    file = folder / "results.json"
    if not file.is_file():
        return False
    if json.loads(file.read_text(encoding="utf-8"))["settings"] != json.loads(json.dumps(settings)):
        raise RecipeError(f"{file} has results of other settings. Give another --output, or replace them with --again.")
    print(f"{folder} has its results already; --again runs it once more.")
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; returns the exit status."""
    options = arguments(argv)
    PartialState(cpu=not torch.cuda.is_available())  # without this, each process on a CPU takes itself for the only one
    warnings.filterwarnings("ignore", category=FutureWarning)  # of the libraries to each other
    datasets.disable_progress_bars()
    if options.smoke:
        transformers.logging.disable_progress_bar()
    try:
        recipe = load(options.recipe)
        done = []
        for seed in chosen_seeds(recipe, options.seed):
            settings = resolve(recipe, options.method, None, options.smoke, options.model, options.overrides)
            tasks = chosen_tasks(settings, options.tasks)
            if settings["kind"] == "glue" and len(tasks) > 1 and "data" in settings["train"]:
                raise RecipeError(
                    f"train.data={settings['train']['data']!r} is for one task, not {', '.join(tasks)}. Choose one "
                    "with --tasks, or give each its own: evaluation.tasks.<task>.train=..."
                )
            # One training for all tasks, or, in GLUE, one for each.
            for name in tasks if settings["kind"] == "glue" else [None]:
                settings = resolve(recipe, options.method, name, options.smoke, options.model, options.overrides)
                settings["evaluation"]["tasks"] = tasks if name is None else {name: tasks[name]}
                model = settings["model"]
                model = "tiny" if isinstance(model, Mapping) else model.strip("/").replace("/", "--")
                folder = options.output / settings["name"] / model / options.method / f"seed{seed}" / (name or "")
                if options.again or not is_done(folder, settings):
                    run_one(settings, options.method, seed, folder, options.smoke)
                done.append(folder)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if PartialState().is_main_process:
        print("\n" + report.table([result for folder in done for result in report.collect(folder)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
