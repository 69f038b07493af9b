"""Tables and pictures of the finished cells."""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.real_llm import grid
from benchmarks.study.store import Store


def write(store: Store, folder: Path) -> None:
    """Write report.md into the folder."""
    by_name: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for cell in store.of("main"):
        by_name[cell["name"]].append(cell)
    rows = []
    for name in grid.EVERYTHING:
        if name not in by_name:
            continue
        first = min(cell["seed"] for cell in by_name[name])
        tried = {c["lr"]: c["result"]["validation"]["cross_entropy"] for c in by_name[name] if c["seed"] == first}
        lr = min(tried, key=lambda rate: tried[rate])
        best = [cell["result"] for cell in by_name[name] if cell["lr"] == lr]
        tests = [
            mean([100 * result["test"][task][what] for result in best])
            for task in best[0]["test"]
            for what in ("accuracy", "choice")
        ]
        nats = ", ".join(f"{rate:g}: {tried[rate]:.3f}" for rate in sorted(tried))
        rows.append([name, f"{best[0]['parameters']:,}", f"{lr:g}", str(len(best)), *tests, nats])
    tasks = list(next(iter(by_name.values()))[0]["result"]["test"]) if by_name else []
    header = ["method", "trained", "lr", "seeds"]
    header += [f"{task}, {how}" for task in tasks for how in ("generated", "likeliest")]
    table = common.markdown_table([*header, "validation nats by learning rate"], rows)
    (folder / "report.md").write_text(f"# Results\n\n{store.setup}\n\n{table}\n")


def mean(values: list[float]) -> str:
    """Mean and standard deviation, in per cent."""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"
