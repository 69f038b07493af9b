"""InterchangeCollator: batches of bases with their sources, each padded by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from peft_reft.integrations.collator import KEY, pad_locations

PREFIX = "source_"
SOURCES = "source_inputs"
LABELS = "labels"


class InterchangeCollator:
    """Calls `inner_collator` on the bases and on the sources of some examples, and puts the two together.

    Args:
        inner_collator: any callable from a list of examples to a batch of tensors.

    An example brings its source in columns of their own, `source_input_ids`, `source_attention_mask` and so on, or as
    `source_inputs`, a dictionary of the source's columns; `{"number": {...}, "gender": {...}}` there are several
    sources by name of the subspace. `intervention_locations` ([P] or [G, P]) of base and source are padded with -1, and
    `subspaces` become a list; the batch gets `source_inputs` as the model takes them.
    """

    def __init__(self, inner_collator: Callable[[list[Any]], Any]):
        if not callable(inner_collator):
            raise TypeError(f"inner_collator={inner_collator!r} is not callable; pass a collator such as a trainer's.")
        self.inner_collator = inner_collator

    def __call__(self, features: list[Mapping[str, Any]]) -> Any:
        bases, sources = zip(*(split(example) for example in features))
        batch = self._batch(list(bases))
        if not any(sources):
            return batch
        names = list(sources[0])
        if any(source.keys() != sources[0].keys() for source in sources):
            raise ValueError(
                f"Some examples have sources for {sorted({*map(str, names)})}, others for "
                f"{sorted({str(name) for source in sources for name in source} or {'nothing'})}. All examples of a "
                "batch need the same ones; switch off what a row does not need with a column `subspaces`."
            )
        made = {name: self._batch([source[name] for source in sources]) for name in names}
        batch[SOURCES] = made[None] if names == [None] else made
        return batch

    def _batch(self, features: list[dict[str, Any]]) -> Any:
        given = [example.pop(KEY, None) for example in features]
        subspaces = [example.pop("subspaces", None) for example in features]
        has_labels = any(LABELS in example for example in features)
        rows = [example.get("input_ids") for example in features]
        batch = self.inner_collator(features)
        if not has_labels and batch.pop(LABELS, None) is not None:
            batch.pop(KEY, None)  # found by a collator's own labels, which take the whole prompt for an answer
        if any(locations is not None for locations in given):
            batch[KEY] = pad_locations(given, rows, batch.get("input_ids"))
        if any(choice is not None for choice in subspaces):
            batch["subspaces"] = subspaces
        return batch

    def __repr__(self) -> str:
        return f"InterchangeCollator({self.inner_collator!r})"


def split(example: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str | None, dict[str, Any]]]:
    """An example's own columns, and its sources by name of the subspace: None for the only one.

    >>> split({"x": 1, "source_x": 2})
    ({'x': 1}, {None: {'x': 2}})

    Raises:
        ValueError: if it brings sources in both ways.
    """
    base = {name: value for name, value in example.items() if not name.startswith(PREFIX)}
    columns = {
        name.removeprefix(PREFIX): value
        for name, value in example.items()
        if name.startswith(PREFIX) and name != SOURCES
    }
    nested = example.get(SOURCES)
    if nested and columns:
        raise ValueError(
            f"An example has {SOURCES!r} and the columns {sorted(PREFIX + name for name in columns)}: bring sources in "
            "one of the two ways."
        )
    if columns:
        return base, {None: columns}
    if not nested:
        return base, {}
    if all(isinstance(value, Mapping) for value in nested.values()):
        return base, {name: dict(value) for name, value in nested.items()}
    return base, {None: dict(nested)}
