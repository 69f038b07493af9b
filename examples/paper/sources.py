"""Rows of a data set, from the hub, a URL or a file, whatever they are used for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from recipe import RecipeError

HERE = Path(__file__).parent


def rows(source: Mapping[str, Any], seed: int = 0, split: str = "train") -> Dataset:
    """The rows that a recipe's `data` entry names.

    Args:
        source: `data` is a JSON or JSON-lines file (a path, as seen from here or from this folder, or a URL), or else
            the hub name of a data set, with its configuration's `name` and its `split`. `max_examples` takes that many
            rows, drawn by `seed`.
        split: which split, where the source does not say.

    Raises:
        RecipeError: if there is no data, with what was looked for.
    """
    data = source["data"]
    try:
        if data.endswith((".json", ".jsonl")):
            if "://" not in data and not Path(data).exists():
                data = str(HERE / data)
            loaded = load_dataset("json", data_files=data, split="train")
        else:
            loaded = load_dataset(data, source.get("name"), split=source.get("split", split))
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise RecipeError(
            f"The data {source['data']!r} cannot be loaded ({reason}). Give "
            "another hub name, URL or .json file, as in train.data=... or evaluation.tasks.<task>.data=..."
        ) from error
    limit = source.get("max_examples")
    if limit is not None and limit < len(loaded):
        loaded = loaded.shuffle(seed=seed).select(range(limit))
    return loaded
