"""Where the edits of a trained adapter act: ‖Δh‖ / ‖h‖ by block and place, on test texts of the encoder task.

Trains as encoder.py does; the looking is `peft_reft.inspect`'s.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.study import encoder
from benchmarks.study.methods import Method
from benchmarks.study.task import Task

ENDS = 4  # tokens at each end that have a column of their own
TEXTS = 64


def place(position: int, length: int) -> str:
    """The name of a token's place: counted from the start, from the end, or in the middle."""
    if position < ENDS:
        return f"f{position + 1}"
    return f"l{length - position}" if length - position <= ENDS else "middle"


def run(task: Task, method: Method, lr: float, seed: int, epochs: float, path: Path | None = None) -> dict[str, Any]:
    """One cell.

    Returns:
        "places", the columns, from the first token to the last; "relative", mean ‖Δh‖ / ‖h‖ [block][place]; "worth", by
        block, how far the predicted probabilities move (total variation) when that block alone does not edit.
    """
    from peft_reft.inspect import inspect_adapter

    path = path or encoder.model_path()
    model = method.apply(encoder.base_model(path, len(task.families), seed).requires_grad_(False), "SEQ_CLS", seed)
    encoder.train(model, task, path, lr, seed, epochs)
    texts = [example.text for example in task.test]
    lengths = [len(ids) for ids in encoder.tokenizer(path)(texts)["input_ids"]]
    chosen = [text for text, n in zip(texts, lengths) if 2 * ENDS < n <= encoder.MAX_TOKENS][:TEXTS]
    seen = inspect_adapter(model, chosen, encoder.tokenizer(path), batch_size=16)
    length: dict[int, int] = defaultdict(int)
    for row in seen.edits:
        length[row["prompt"]] = max(length[row["prompt"]], row["position"] + 1)
    places = [f"f{n + 1}" for n in range(ENDS)] + ["middle"] + [f"l{n}" for n in range(ENDS, 0, -1)]
    blocks = sorted({row["depth"] for row in seen.edits})
    found: dict[tuple[int, str], list[float]] = defaultdict(list)
    for row in seen.edits:
        where = place(row["position"], length[row["prompt"]])
        found[row["depth"], where].append(row["relative"] if row["edited"] else 0.0)
    moved: dict[int, list[float]] = defaultdict(list)
    for row in seen.effects:
        moved[row["depth"]].append(row["tv"])
    return {
        "places": places,
        "relative": [[round(sum(v) / len(v), 4) for v in (found[block, name] for name in places)] for block in blocks],
        "worth": [round(sum(moved[block]) / len(moved[block]), 4) for block in blocks],
        "texts": len(chosen),
    }
