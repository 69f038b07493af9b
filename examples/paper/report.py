"""Results on disk, and a table of them: scores beside the paper's, trained parameters, time, memory.

python examples/paper/report.py paper-results
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch


def peak_memory() -> int:
    """The most memory taken so far, in bytes: of the GPU if there is one (allocated tensors), else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def write_json(path: Path, content: Any) -> None:
    """A JSON file that is there whole or not at all."""
    _write(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_lines(path: Path, objects: Iterable[Any]) -> None:
    """A file of one JSON object a line, there whole or not at all."""
    _write(path, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in objects))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, suffix=".tmp", delete=False) as file:
        file.write(text)
    Path(file.name).replace(path)


def collect(folder: Path) -> list[dict[str, Any]]:
    """The results of all runs below a folder, in the order of their paths."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.rglob("results.json"))]


def table(results: list[dict[str, Any]]) -> str:
    """One Markdown table for each recipe, a row for each method and model: mean (standard deviation) over seeds, in %.

    "avg" is the mean over the tasks shown. Rows marked "paper" have the numbers that the recipe quotes; beside smoke
    runs there are none.
    """
    lines: list[str] = []
    for name in dict.fromkeys(result["recipe"] for result in results):
        of_recipe = [result for result in results if result["recipe"] == name]
        tasks = list(dict.fromkeys(task for result in of_recipe for task in result["tasks"]))
        header = ["method", "model", "seeds", "params %", *tasks, "avg", "train s", "eval s", "memory MB"]
        lines += [f"## {name}", "", _row(header), _row(["---"] * len(header))]
        groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
        for result in of_recipe:
            groups[result["method"], result["model"]].append(result)
        for (method, model), runs in groups.items():
            means = [_scores(runs, task) for task in tasks]
            lines.append(
                _row(
                    [
                        method,
                        model,
                        str(len({run["seed"] for run in runs})),
                        f"{max(run['parameters']['percent'] for run in runs):.4f}",
                        *(_spread(values) for values in means),
                        _mean([statistics.mean(values) for values in means if values]),
                        f"{sum(run['training']['seconds'] for run in runs):.0f}",
                        f"{sum(task['seconds'] for run in runs for task in run['tasks'].values()):.0f}",
                        f"{max(run['memory_bytes'] for run in runs) / 2**20:,.0f}",
                    ]
                )
            )
        published = {} if of_recipe[0]["smoke"] else of_recipe[0]["published"]
        for method, numbers in published.items():
            given = [numbers.get(task, "-") for task in tasks]
            known = [value for value in given if value != "-"]
            average = f"{statistics.mean(known):.1f}" if known else "-"
            cells = [f"{method} (paper)", numbers["model"], "", numbers["percent"], *given, average, "", "", ""]
            lines.append(_row(map(str, cells)))
        lines.append("")
    return "\n".join(lines)


def _scores(runs: list[dict[str, Any]], task: str) -> list[float]:
    found = [run["tasks"][task]["score"] for run in runs if task in run["tasks"]]
    return [score for score in found if score is not None]


def _spread(values: list[float]) -> str:
    spread = f" ({100 * statistics.stdev(values):.1f})" if len(values) > 1 else ""
    return _mean(values) + spread


def _mean(values: list[float]) -> str:
    return f"{100 * statistics.mean(values):.1f}" if values else "-"


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("usage: python examples/paper/report.py FOLDER  (where run.py put its results)")
    print(table(collect(Path(sys.argv[1]))))
