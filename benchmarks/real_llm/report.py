"""Tables and pictures of the finished cells."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.real_llm import grid
from benchmarks.real_llm.evaluate import best_rate, criterion
from benchmarks.real_llm.sizes import INSTRUCTIONS
from benchmarks.study.store import Store

CHANCE = 25  # per cent, of four choices
LORA = "LoRA r8 q,v"  # what others are compared with, row by row
Results = list[dict[str, Any]]


def write(store: Store, folder: Path) -> None:
    """Write report.md into the folder, and a picture if there is anything to see and matplotlib."""
    methods = by_name(store)
    base = next((cell["result"] for cell in store.of("base")), None)
    parts = [f"# Results\n\n{store.setup}"]
    if INSTRUCTIONS in store.setup:
        parts += ["## Nats per token of held-out answers", loss_table(methods, base)]
        of_test, words = loss, "nats per token of held-out answers"
        lines = {task: test["answer"] for task, test in base["test"].items()} if base else {}
    else:
        parts += ["## Accuracy, %", accuracy_table(methods, base)]
        if table := answer_table(methods, base):
            parts += ["## What was learned of the answer, by learning rate", table]
        of_test, words = accuracy, "generated answers that are right, %"
        lines = dict.fromkeys(tasks_of(methods), CHANCE)
    if methods and (name := picture(methods, folder, of_test, words, lines)):
        parts.append(f"![{words}; by trained numbers]({name})")
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


def tasks_of(methods: dict[str, dict[float, Results]]) -> list[str]:
    return [task for rates in methods.values() for results in rates.values() for task in results[0]["test"]]


def accuracy(test: dict[str, Any]) -> float:
    return 100 * float(test["accuracy"])


def loss(test: dict[str, Any]) -> float:
    return float(test["answer"])


def common_columns(name: str, rates: dict[float, Results]) -> list[str]:
    """A method's name, how much it trains, its best rate, and how many seeds have it."""
    lr = best_rate(rates)
    return [name, f"{rates[lr][0]['parameters']:,}", f"{lr:g}", str(len(rates[lr]))]


def validation_column(rates: dict[float, Results]) -> str:
    """The mean over the seeds of each learning rate, and how many there are."""
    shown = []
    for rate, results in sorted(rates.items()):
        nats = statistics.mean(criterion(result) for result in results)
        shown.append(f"{rate:g}: {nats:.3f}" + f" ({len(results)} seeds)" * (len(results) > 1))
    return ", ".join(shown)


def accuracy_table(methods: dict[str, dict[float, Results]], base: dict[str, Any] | None) -> str:
    rows, tasks = [], []

    def tests_of(results: Results) -> list[str]:
        return [
            mean([100 * result["test"][task][what] for result in results])
            for task in tasks
            for what in ("accuracy", "choice")
        ]

    if base:
        tasks = list(base["test"])
        rows.append(["base model", "0", "-", "-", *tests_of([base]), f"{criterion(base):.3f}"])
    for name, rates in methods.items():
        best = rates[best_rate(rates)]
        tasks = list(best[0]["test"])
        rows.append([*common_columns(name, rates), *tests_of(best), validation_column(rates)])
    header = ["method", "trained", "lr", "seeds"]
    header += [f"{task}, {how}" for task in tasks for how in ("generated", "likeliest")]
    return common.markdown_table([*header, "validation nats by learning rate"], rows)


def loss_table(methods: dict[str, dict[float, Results]], base: dict[str, Any] | None) -> str:
    """The cross entropy of test answers, and its differences to the base model's and to LoRA's on the same rows."""
    rows = []
    if base:
        (test,) = base["test"].values()
        shown = [f"{test['answer']:.3f}", f"{math.exp(test['answer']):.2f}", "", ""]
        rows.append(["base model", "0", "-", "-", *shown, f"{criterion(base):.3f}"])
    lora = methods[LORA][best_rate(methods[LORA])] if LORA in methods else None
    for name, rates in methods.items():
        best = rates[best_rate(rates)]
        nats = [loss(test) for result in best for test in result["test"].values()]
        shown = [mean(nats, 3), f"{math.exp(statistics.mean(nats)):.2f}"]
        shown += [difference(best, others) if others and others is not best else "" for others in ([base], lora)]
        rows.append([*common_columns(name, rates), *shown, validation_column(rates)])
    header = ["method", "trained", "lr", "seeds", "test", "perplexity", "less the base model's", f"less {LORA}'s"]
    return common.markdown_table([*header, "validation by learning rate"], rows)


def difference(results: Results, others: Results) -> str:
    """The difference in nats per token, both means over seeds, and its standard error over the test's rows."""
    gaps, tokens = [], []
    for task, test in results[0]["test"].items():
        ours, theirs = (zip(*(result["test"][task]["nats"] for result in some)) for some in (results, others))
        gaps += [statistics.mean(a) - statistics.mean(b) for a, b in zip(ours, theirs)]
        tokens += test["tokens"]
    ratio = sum(gaps) / sum(tokens)
    rest = sum((gap - ratio * count) ** 2 for gap, count in zip(gaps, tokens))
    error = math.sqrt(rest * len(gaps) / max(1, len(gaps) - 1)) / sum(tokens)
    return f"{ratio:+.3f} ± {error:.3f}"


def answer_table(methods: dict[str, dict[float, Results]], base: dict[str, Any] | None) -> str:
    """For each learning rate the validation loss of whole answers, and how many generated ones are in the format.

    Cells that were measured before there was such a loss are left out; "" if no others are there.
    """
    rows = []
    if base:
        share = 100 * statistics.mean(test["in_format"] for test in base["test"].values())
        rows.append(["base model", f"{base['validation']['answer']:.3f}", f"{share:.0f} %"])
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


def picture(
    methods: dict[str, dict[float, Results]],
    folder: Path,
    of_test: Callable[[dict[str, Any]], float],
    words: str,
    lines: dict[str, float],
) -> str | None:
    """A figure of the tests against trained numbers, a panel for each task; returns the file's name.

    A filled mark is a method at its best rate (the mean over seeds, and their standard deviation), a hollow one another
    rate. None without matplotlib.

    Args:
        of_test: the figure of a test, which `words` says.
        lines: by task, where a dotted line is drawn: chance, or the base model.
    """
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot as plt
    except ImportError:
        return None
    tasks = list(dict.fromkeys(tasks_of(methods)))
    figure, axes = plt.subplots(1, len(tasks), figsize=(4.6 * len(tasks) + 1, 4.2), sharey=True, squeeze=False)
    for axis, task in zip(axes[0], tasks):
        if task in lines:
            axis.axhline(lines[task], color="gray", linewidth=1, linestyle=":")
        axis.set(xscale="log", xlabel="trained numbers", title=task)
        for number, (name, rates) in enumerate(methods.items()):
            best = best_rate(rates)
            for rate, results in rates.items():
                values = [of_test(result["test"][task]) for result in results]
                spread = statistics.stdev(values) if len(values) > 1 else 0
                style = {"color": f"C{number % 10}", "marker": marker(name), "linestyle": "none"}
                style |= {"label": name} if rate == best else {"markerfacecolor": "none", "alpha": 0.5}
                axis.errorbar(results[0]["parameters"], statistics.mean(values), spread, **style)
    axes[0][0].set_ylabel(words)
    axes[0][-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.tight_layout()
    file = f"{of_test.__name__}.png"
    figure.savefig(folder / file, dpi=110)
    plt.close(figure)
    return file


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


def mean(values: list[float], digits: int = 1) -> str:
    """Mean, and of several values their standard deviation."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"
