"""A recipe: one YAML file with all settings of an experiment, resolved for a method, a task and what a user overrides.

The file has the settings that all methods share, and under `methods` what differs by method, and by task of that
method. Resolving merges these, later ones over earlier ones: shared, `methods.<method>`,
`methods.<method>.tasks.<task>`, `smoke` (if asked for), then `key=value` from the command line.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import GenerationConfig
from trl import SFTConfig

import peft_reft  # noqa: F401  (makes REFT known to PEFT)

Settings = dict[str, Any]

KEYS = {
    "name": "of the experiment; results are kept under it",
    "kind": "causal (prompts and completions, generated answers) or glue (classification)",
    "model": "hub name or path of the base model; a mapping is the config of a tiny one",
    "dtype": "of the base model's weights on a GPU",
    "seeds": "that the paper averages over; a run has one",
    "prompts": "a name in prompts.FORMATS",
    "train": "data, and limits of it",
    "training": "fields of trl.SFTConfig (causal) or transformers.TrainingArguments (glue)",
    "evaluation": "tasks with their data, batch size, fields of transformers.GenerationConfig",
    "adapter": "a PEFT config as in adapter_config.json; null trains all weights",
    "published": "the paper's numbers, for the report",
}


class RecipeError(ValueError):
    """A recipe or an override that cannot be run; the message is for the user."""


def load(path: Path | str) -> Settings:
    """A recipe file as it is; one with `extends: other.yaml` is laid over that file of the same folder.

    Raises:
        RecipeError: if there is no such file, or it is no recipe.
    """
    path = Path(path)
    if not path.is_file():
        known = ", ".join(sorted(file.name for file in Path(__file__).parent.glob("*.yaml")))
        raise RecipeError(f"There is no recipe {str(path)!r}; examples/paper has {known}.")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise RecipeError(f"{path} is not a recipe; it must be a mapping with the keys {', '.join(KEYS)} and methods.")
    if "extends" in recipe:
        recipe = merge(load(path.parent / recipe.pop("extends")), recipe)
    _known(recipe, [*KEYS, "methods", "smoke"], f"of {path.name}")
    missing = {"name", "kind", "model", "train", "training", "evaluation", "methods"} - recipe.keys()
    if missing:
        raise RecipeError(f"{path} lacks {', '.join(sorted(missing))}.")
    return recipe


def resolve(
    recipe: Mapping[str, Any],
    method: str,
    task: str | None = None,
    smoke: bool = False,
    model: str | None = None,
    overrides: Sequence[str] = (),
) -> Settings:
    """The settings of one run.

    Args:
        recipe: as from `load`.
        method: a name under `methods`.
        task: the GLUE task, whose settings may differ; None for recipes with one training for all tasks.
        smoke: with the tiny model and data of the `smoke` section.
        model: hub name or path of another base model.
        overrides: "key=value", the key with dots as in "training.learning_rate=1e-3".

    Raises:
        RecipeError: for names that do not exist.
    """
    methods = recipe["methods"]
    if method not in methods:
        raise RecipeError(f"--method {method}: {recipe['name']} has {', '.join(methods)}.")
    settings = {key: value for key, value in recipe.items() if key not in ("methods", "smoke")}
    chosen = dict(methods[method])
    by_task = chosen.pop("tasks", {})
    settings = merge(settings, {"adapter": None, **chosen})
    settings = merge(settings, by_task.get(task, {}))
    if smoke:
        settings = merge(settings, recipe.get("smoke", {}))
    if model is not None:
        settings["model"] = model
    for override in overrides:
        settings = merge(settings, _parse_override(override))
    _check(settings)
    return settings


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> Settings:
    """A copy of `below` with the values of `above` over it; mappings are merged, everything else is replaced."""
    result = copy.deepcopy(dict(below))
    for key, value in above.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = merge(result[key], value)
        else:
            result[key] = copy.deepcopy(value)
    return result


def _parse_override(text: str) -> Settings:
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise RecipeError(f"{text!r} is no setting; write key=value, such as training.learning_rate=1e-3.")
    try:
        parsed: Any = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"{text!r}: the value is not valid YAML.") from error
    if isinstance(parsed, str):
        with contextlib.suppress(ValueError):  # YAML takes 1e-3 for text
            parsed = float(parsed)
    for part in reversed(key.split(".")):
        parsed = {part: parsed}
    return parsed


def _check(settings: Settings) -> None:
    """Refuse names that nothing would read: a setting with a typing error must not pass for a run."""
    _known(settings, KEYS, "of a recipe")
    if settings["kind"] not in ("causal", "glue"):
        raise RecipeError(f"kind={settings['kind']!r} must be causal or glue.")
    _known(settings["train"], ("data", "name", "split", "max_examples"), "of train")
    _known(settings["evaluation"], ("tasks", "batch_size", "generation", "max_examples"), "of evaluation")
    _known(settings["training"], [field.name for field in dataclasses.fields(SFTConfig)], "of training")
    _known(settings["evaluation"].get("generation", {}), vars(GenerationConfig()), "of evaluation.generation")
    if not settings["evaluation"].get("tasks"):
        raise RecipeError("evaluation.tasks is empty; name at least one task with its data.")
    for name, entry in settings["evaluation"]["tasks"].items():
        own = ("train",) if settings["kind"] == "glue" else ()
        _known(entry, ("data", "name", "split", *own), f"of evaluation.tasks.{name}")
        if "data" not in entry:
            raise RecipeError(f"evaluation.tasks.{name} has no data; give evaluation.tasks.{name}.data=...")
    adapter = settings["adapter"]
    if adapter is not None:
        peft_type = adapter.get("peft_type")
        if peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
            raise RecipeError(
                f"adapter.peft_type={peft_type!r} is not a PEFT method; use one of "
                f"{', '.join(sorted(str(name.value) for name in PEFT_TYPE_TO_CONFIG_MAPPING))}."
            )
        fields = [field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[peft_type])]
        _known(adapter, fields, f"of a {peft_type} adapter")


def _known(given: Iterable[str], known: Iterable[str], of: str) -> None:
    known = list(known)
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else f"it may be one of {', '.join(known)}."
            raise RecipeError(f"{name!r} is not a setting {of}; {hint}")
