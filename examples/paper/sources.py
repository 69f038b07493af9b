"""Rows of a data set, from the hub, a URL or a file, whatever they are used for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from recipe import RecipeError

HERE = Path(__file__).parent

# Kinds of files, and how `datasets` reads each. In a CSV file a text such as "null" is a text, as in the other kinds.
FILES: dict[str, tuple[str, dict[str, Any]]] = {
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", {"keep_default_na": False}),
    ".parquet": ("parquet", {}),
}


def is_file(data: str) -> bool:
    """Whether `data` names one file, which is all rows; else it is the hub name or the folder of a data set."""
    return Path(data).suffix in FILES


def rows(source: Mapping[str, Any], seed: int = 0, split: str = "train", columns: Iterable[str] = ()) -> Dataset:
    """The rows that a recipe's `data` entry names; at least one.

    Args:
        source: `data` is a file (a path, as seen from here or from this folder, or a URL): a JSON list or lines of
            JSON, CSV or Parquet. Or else it is the hub name of a data set, or a folder of one, with its
            configuration's `name` and its `split`. `max_examples` takes that many rows, drawn by `seed`.
        split: which split, where the source does not say.
        columns: that the rows must have.

    Raises:
        RecipeError: if there are no such rows, with what was looked for.
    """
    data = source["data"]
    try:
        if is_file(data):
            if "://" not in data and not Path(data).exists():
                data = str(HERE / data)
            builder, options = FILES[Path(data).suffix]
            loaded = load_dataset(builder, data_files=data, split="train", **options)
        else:
            loaded = load_dataset(data, source.get("name"), split=source.get("split", split))
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise RecipeError(
            f"The data {source['data']!r} cannot be loaded ({reason}). Give another hub "
            f"name, URL or {', '.join(FILES)} file, as in train.data=... or evaluation.tasks.<task>.data=..."
        ) from error
    missing = [column for column in columns if column not in loaded.column_names]
    if missing or not len(loaded):
        raise RecipeError(
            f"The data {source['data']!r} has {len(loaded)} rows with the columns {', '.join(loaded.column_names)}; "
            f"the recipe needs at least one row with {', '.join(columns)}."
        )
    limit = source.get("max_examples")
    if limit is not None and limit < len(loaded):
        loaded = loaded.shuffle(seed=seed).select(range(limit))
    return loaded
