"""Tables and pictures of the finished cells."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.real_llm import grid
from benchmarks.study.store import Store

CHANCE = 25  # per cent, of four choices
Results = list[dict[str, Any]]


def write(store: Store, folder: Path) -> None:
    """Write report.md into the folder, and accuracy.png if there is anything to see and matplotlib."""
    methods = by_name(store)
    parts = [f"# Results\n\n{store.setup}", "## Accuracy, %", accuracy_table(methods)]
    if table := answer_table(methods):
        parts += ["## What was learned of the answer, by learning rate", table]
    if methods and (picture := accuracy_picture(methods, folder)):
        parts.append(f"![accuracy against trained numbers]({picture})")
    if (folder / "cost.json").exists():
        parts += ["## What a step costs", cost_table(json.loads((folder / "cost.json").read_text()))]
    if (folder / "environment.json").exists():
        record = json.loads((folder / "environment.json").read_text())
        parts.append(f"`{record['command']}`: {common.heading(record)}")
    (folder / "report.md").write_text("\n\n".join(parts) + "\n")


def by_name(store: Store) -> dict[str, dict[float, Results]]:
    """The results of each method by learning rate, the first seed first; methods in the order of the grid."""
    found: dict[str, dict[float, Results]] = {name: defaultdict(list) for name in grid.EVERYTHING}
    for cell in sorted(store.of("main"), key=lambda cell: cell["seed"]):
        found[cell["name"]][cell["lr"]].append(cell["result"])
    return {name: rates for name, rates in found.items() if rates}


def best_rate(rates: dict[float, Results]) -> float:
    """The learning rate whose first seed has the least cross entropy on validation rows; test rows are not asked."""
    nats = {rate: results[0]["validation"]["cross_entropy"] for rate, results in rates.items()}
    return min(nats, key=lambda rate: nats[rate] if math.isfinite(nats[rate]) else math.inf)


def accuracy_table(methods: dict[str, dict[float, Results]]) -> str:
    rows, tasks = [], []
    for name, rates in methods.items():
        lr = best_rate(rates)
        best = rates[lr]
        tasks = list(best[0]["test"])
        tests = [
            mean([100 * result["test"][task][what] for result in best])
            for task in tasks
            for what in ("accuracy", "choice")
        ]
        nats = ", ".join(f"{rate:g}: {rates[rate][0]['validation']['cross_entropy']:.3f}" for rate in sorted(rates))
        rows.append([name, f"{best[0]['parameters']:,}", f"{lr:g}", str(len(best)), *tests, nats])
    header = ["method", "trained", "lr", "seeds"]
    header += [f"{task}, {how}" for task in tasks for how in ("generated", "likeliest")]
    return common.markdown_table([*header, "validation nats by learning rate"], rows)


def answer_table(methods: dict[str, dict[float, Results]]) -> str:
    """For each learning rate the validation loss of whole answers, and how many generated ones are in the format.

    Cells that were measured before there was such a loss are left out; "" if no others are there.
    """
    rows = []
    for name, rates in methods.items():
        measured = {lr: results[0] for lr, results in sorted(rates.items()) if "answer" in results[0]["validation"]}
        if measured:
            nats = ", ".join(f"{lr:g}: {result['validation']['answer']:.3f}" for lr, result in measured.items())
            shares = ", ".join(
                f"{lr:g}: {100 * statistics.mean(test['in_format'] for test in result['test'].values()):.0f} %"
                for lr, result in measured.items()
            )
            rows.append([name, nats, shares])
    header = ["method", "validation, nats per token of the answer", "generated answers in the format"]
    return common.markdown_table(header, rows) if rows else ""


def accuracy_picture(methods: dict[str, dict[float, Results]], folder: Path) -> str | None:
    """Generated answers against trained numbers, a panel for each task; returns the file's name.

    A filled mark is a method at its best rate (the mean over seeds, and their standard deviation), a hollow one another
    rate. None without matplotlib.
    """
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot as plt
    except ImportError:
        return None
    tasks = list(next(iter(next(iter(methods.values())).values()))[0]["test"])
    figure, axes = plt.subplots(1, len(tasks), figsize=(4.6 * len(tasks) + 1, 4.2), sharey=True, squeeze=False)
    for axis, task in zip(axes[0], tasks):
        axis.axhline(CHANCE, color="gray", linewidth=1, linestyle=":")
        axis.set(xscale="log", xlabel="trained numbers", title=task)
        for number, (name, rates) in enumerate(methods.items()):
            best = best_rate(rates)
            for rate, results in rates.items():
                accuracies = [100 * result["test"][task]["accuracy"] for result in results]
                spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0
                style = {"color": f"C{number % 10}", "marker": marker(name), "linestyle": "none"}
                style |= {"label": name} if rate == best else {"markerfacecolor": "none", "alpha": 0.5}
                axis.errorbar(results[0]["parameters"], statistics.mean(accuracies), spread, **style)
    axes[0][0].set_ylabel("generated answers that are right, %")
    axes[0][-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.tight_layout()
    figure.savefig(folder / "accuracy.png", dpi=110)
    plt.close(figure)
    return "accuracy.png"


def marker(name: str) -> str:
    """The mark of a method's family in the picture."""
    return "o" if "ReFT" in name else "s" if "oRA" in name else "^"


def cost_table(record: dict[str, Any]) -> str:
    """What cost.py measured: a step alone, eagerly and as a CUDA graph, and several trainings side by side."""
    methods: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    gangs = []
    for row in record["rows"]:
        if "step_ms" in row:
            methods[row["name"]][row["how"]] = row
        elif "steps_per_second" in row:
            gangs.append([row["name"], row["how"], f"{row['steps_per_second']}", show(row["peak_gb"])])
    rows = [
        [name, *(show(ways.get(how, {}).get(what)) for how in ("eager", "graph") for what in ("step_ms", "peak_gb"))]
        for name, ways in methods.items()
    ]
    parts = [common.markdown_table(["method", "eager, ms", "GB", "CUDA graph, ms", "GB"], rows)]
    if gangs:
        parts.append(common.markdown_table(["method", "how", "steps in a second", "GB"], gangs))
    return "\n\n".join(parts)


def show(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def mean(values: list[float]) -> str:
    """Mean and standard deviation, in per cent."""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"
