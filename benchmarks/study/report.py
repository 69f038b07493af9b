"""Tables and pictures of the finished cells: `report.md` and PNG files in the folder of the results.

Says what is there and how often it was run; what it means is said in README.md, by people.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.study import grid
from benchmarks.study.store import Store

Cell = dict[str, Any]


def by_name(cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    """Cells of the same name, in the order of their seeds."""
    found: dict[str, list[Cell]] = defaultdict(list)
    for cell in sorted(cells, key=lambda cell: cell["seed"]):
        found[cell["name"]].append(cell)
    return found


def values(cells: list[Cell], key: str) -> list[float]:
    return [cell["result"][key] for cell in cells if cell["result"].get(key) is not None]


def spread(numbers: list[float]) -> float:
    """Standard deviation over seeds; 0 if there is only one."""
    return statistics.stdev(numbers) if len(numbers) > 1 else 0.0


def shown(numbers: list[float], digits: int = 1, scale: float = 100) -> str:
    """Mean ± standard deviation (number of seeds)."""
    if not numbers:
        return "–"
    text = f"{scale * statistics.mean(numbers):.{digits}f}"
    return text + (f" ± {scale * spread(numbers):.{digits}f}" if len(numbers) > 1 else "")


def table(header: list[str], rows: list[list[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(value) for value in line) + " |" for line in lines)


# Tables.


def encoder_table(store: Store) -> str:
    groups = by_name(store.of("encoder"))
    ordered = sorted(groups.items(), key=lambda item: item[1][0]["result"]["parameters"])
    reference = {cell["seed"]: cell["result"]["test"] for cell in groups.get("LoRA r8", [])}
    rows = []
    for name, cells in ordered:
        result = cells[0]["result"]
        paired = [c["result"]["test"] - reference[c["seed"]] for c in cells if c["seed"] in reference]
        edge = cells[0]["lr"] in (grid.RATES[grid.MAIN[name].kind][i] for i in (0, -1))
        rows.append(
            [
                name,
                f"{result['parameters']:,}",
                f"{result['with_head']:,}",
                shown(values(cells, "test")),
                shown(paired) if name != "LoRA r8" else "",
                f"{cells[0]['lr']:g}{' (edge)' if edge else ''}",
                shown(values(cells, "seconds"), 0, 1),
                len(cells),
            ]
        )
    header = ["method", "parameters", "with head", "test accuracy, %", "less LoRA r8, same seed", "learning rate"]
    return table([*header, "CPU seconds of training", "seeds"], rows)


def ablation_table(store: Store) -> str:
    basis = {cell["seed"]: cell["result"]["test"] for cell in store.of("encoder") if cell["name"] == grid.BASIS}
    rows = []
    for name, cells in by_name(store.of("ablation")).items():
        paired = [cell["result"]["test"] - basis[cell["seed"]] for cell in cells if cell["seed"] in basis]
        parameters = f"{cells[0]['result']['parameters']:,}"
        rows.append([name, parameters, shown(values(cells, "test")), shown(paired), len(cells)])
    return table(["changed", "parameters", "test accuracy, %", f"less {grid.BASIS}, same seed", "seeds"], sorted(rows))


def instructions_table(store: Store) -> str:
    rows = [
        [name, f"{c[0]['result']['parameters']:,}", shown(values(c, "exact")), shown(values(c, "form")), len(c)]
        for name, c in by_name(store.of("instructions")).items()
    ]
    return table(["method", "parameters", "exactly right, %", "one of the six answers, %", "seeds"], rows)


def styles_table(store: Store) -> str:
    rows = []
    for name, cells in by_name(store.of("styles")).items():
        quarters = [[c["result"]["quarters"]["lines"][i] for c in cells] for i in range(4)]
        parameters, loss = f"{cells[0]['result']['parameters']:,}", shown(values(cells, "test loss"), 2, 1)
        rows.append(
            [name, parameters, loss, *(shown([v for v in q if v is not None], 0) for q in quarters), len(cells)]
        )
    header = ["method", "parameters", "loss of held-out answers", "in style in the 1st quarter, %", "2nd", "3rd", "4th"]
    return table([*header, "seeds"], rows)


def composition_table(store: Store) -> str:
    rows = []
    for name, cells in by_name(store.of("composition")).items():
        for what in ("base", "lines", "capitals", "lines + capitals", "both"):
            of = [cell["result"][what] for cell in cells]
            losses = [shown([o["loss"][style] for o in of], 2, 1) for style in ("lines", "capitals", "both")]
            shares = [shown([o[style] for o in of if o[style] is not None], 0) for style in ("lines", "capitals")]
            rows.append([name, what, *shares, *losses, len(cells)])
    header = ["method", "active adapters", "blanks that end lines, %", "capital letters, %", "loss: lines", "capitals"]
    return table([*header, "both", "seeds"], rows)


def rows_table(store: Store) -> str:
    rows = []
    for name, cells in by_name(store.of("composition")).items():
        of = [cell["result"]["rows"] for cell in cells]
        times = [shown([o["seconds"][how] for o in of], 2, 1) for how in ("together", "apart")]
        rows.append([name, shown([o["equal"] for o in of], 0), *times, len(cells)])
    header = ["method", "answers equal to those of one adapter at a time, %", "CPU seconds in one batch", "apart"]
    return table([*header, "seeds"], rows)


def memory_table(store: Store) -> str:
    rows = []
    for name, cells in by_name(store.of("memory")).items():
        row: list[Any] = [name, f"{cells[0]['result']['parameters']:,}"]
        for kind, digits, scale in (("random", 1, 1), ("text", 1, 1), ("prompts", 0, 100)):
            for size in cells[0]["result"][kind]:
                row.append(shown([cell["result"][kind][size] for cell in cells], digits, scale))
        rows.append([*row, len(cells)])
    sizes = next(iter(store.of("memory")))["result"]
    header = [f"of {n} random tokens" for n in sizes["random"]] + [f"of {n} of text" for n in sizes["text"]]
    header += [f"{n} prompts, 8 random tokens each, %" for n in sizes["prompts"]]
    return table(["edits", "parameters", *header, "seeds"], rows)


def tuning_table(store: Store) -> str:
    rows = []
    for name, cells in by_name(store.of("encoder tuning")).items():
        tried = sorted(cells, key=lambda cell: cell["lr"])
        rows.append([name, ", ".join(f"{cell['lr']:g}: {100 * cell['result']['validation']:.1f}" for cell in tried)])
    return table(["method", "learning rate: accuracy on the validation split, %"], rows)


# Pictures.

COLORS = {"LoReFT": "tab:blue", "NoReFT": "tab:cyan", "DiReFT": "tab:green", "LoRA": "tab:red", "IA3": "tab:purple"}
COLORS |= {"BitFit": "tab:brown", "full": "black", "head": "gray"}


def color(name: str) -> str:
    return COLORS.get(name.split()[0], "tab:orange")


def marker(name: str) -> str:
    """By what is edited: all tokens or linear layers, the first token or two of the layers, or both ends."""
    if "ReFT" not in name and "LoRA" not in name:
        return "D"
    return "s" if name.endswith(("all", "all linear")) else "^" if name.endswith("l4") else "o"


def accuracy_picture(store: Store, plt: Any) -> Any:
    """Accuracy against trained numbers, error bars over seeds; methods of one size stand side by side."""
    figure, axis = plt.subplots(figsize=(9.5, 5))
    methods = by_name(store.of("encoder"))
    head = methods.pop("head only", [])
    parameters = {name: cells[0]["result"]["parameters"] for name, cells in methods.items()}
    sizes: dict[str, list[str]] = defaultdict(list)
    for name in sorted(methods, key=lambda name: parameters[name]):
        sizes[f"{parameters[name]:.1g}"].append(name)
    for names in sizes.values():
        for number, name in enumerate(names):
            tests = [100 * value for value in values(methods[name], "test")]
            beside = parameters[name] * 1.08 ** (number - (len(names) - 1) / 2)
            mean, label = statistics.mean(tests), f"{name}: {parameters[name]:,}"
            style = {"color": color(name), "marker": marker(name), "label": label}
            axis.errorbar(beside, mean, spread(tests), capsize=2, elinewidth=1, linestyle="none", **style)
    if head:
        tests = [100 * value for value in values(head, "test")]
        mean = statistics.mean(tests)
        axis.axhspan(mean - spread(tests), mean + spread(tests), color="gray", alpha=0.15)
        axis.axhline(mean, color="gray", linewidth=1, label="head only: 0")
    axis.set(
        xscale="log",
        xlabel="trained numbers without the head (those of about one size stand side by side)",
        ylabel="test accuracy, %",
    )
    axis.set_title("MiniLM names the module family of a docstring (mean and standard deviation over seeds)", fontsize=9)
    axis.legend(
        fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1), title="method: trained numbers", title_fontsize=7
    )
    return figure


def curves_picture(store: Store, plt: Any) -> Any:
    """Training loss, mean over seeds, and validation accuracy of the first seed."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    for name, cells in by_name(store.of("encoder")).items():
        if name in grid.WITH_CURVE:
            losses = [cell["result"]["loss"] for cell in cells]
            tenths = range(5, 100, 10)
            axes[0].plot(tenths, [statistics.mean(v) for v in zip(*losses)], color=color(name), label=name)
            for cell in cells:
                if curve := cell["result"]["curve"]:
                    axes[1].plot(*zip(*((step, 100 * value) for step, value in curve)), color=color(name), marker=".")
    axes[0].set(xlabel="% of the steps", ylabel="training loss")
    axes[1].set(xlabel="step", ylabel="validation accuracy, % (one seed)")
    axes[0].legend(fontsize=7)
    return figure


def edits_picture(store: Store, plt: Any) -> Any:
    """‖Δh‖ / ‖h‖ by block and place, and what each block's edits are worth."""
    cells = store.of("edits")
    figure, axes = plt.subplots(1, len(cells), figsize=(5 * len(cells), 3.4), squeeze=False)
    for axis, cell in zip(axes[0], cells):
        result = cell["result"]
        image = axis.imshow(result["relative"], aspect="auto", cmap="viridis", origin="lower", vmin=0)
        axis.set_xticks(range(len(result["places"])), result["places"], fontsize=7)
        labels = [f"{i} (worth {worth:.2f})" for i, worth in enumerate(result["worth"])]
        axis.set_yticks(range(len(labels)), labels, fontsize=7)
        axis.set(title=f"{cell['name']}: mean ‖Δh‖/‖h‖", xlabel="place of the token", ylabel="block")
        figure.colorbar(image, ax=axis)
    return figure


def ablation_picture(store: Store, plt: Any) -> Any:
    """Accuracy less that of the basis, by what was changed."""
    basis = {cell["seed"]: cell["result"]["test"] for cell in store.of("encoder") if cell["name"] == grid.BASIS}
    entries = []
    for name, cells in sorted(by_name(store.of("ablation")).items(), reverse=True):
        paired = [100 * (cell["result"]["test"] - basis[cell["seed"]]) for cell in cells if cell["seed"] in basis]
        if paired:
            entries.append((name, statistics.mean(paired), spread(paired)))
    figure, axis = plt.subplots(figsize=(7, 0.6 + 0.22 * len(entries)))
    names, means, deviations = zip(*entries)
    axis.barh(names, means, xerr=deviations, color="tab:blue", alpha=0.7, error_kw={"linewidth": 0.8})
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_xlabel(f"test accuracy less that of {grid.BASIS}, points (paired by seed)")
    axis.tick_params(labelsize=7)
    return figure


def styles_picture(store: Store, plt: Any) -> Any:
    """How long a style lasts."""
    figure, axis = plt.subplots(figsize=(8, 3.6))
    groups = by_name(store.of("styles"))
    for number, (name, cells) in enumerate(groups.items()):
        quarters = zip(*(cell["result"]["quarters"]["lines"] for cell in cells))
        shares = [[100 * value for value in quarter if value is not None] or [0.0] for quarter in quarters]
        places = [quarter + 0.03 * (number - (len(groups) - 1) / 2) for quarter in range(1, 5)]
        axis.errorbar(
            places,
            [statistics.mean(share) for share in shares],
            [spread(share) for share in shares],
            linestyle="-" if "+d" in name or "LoRA" in name else "--",
            marker="od^vsP"[number % 6],
            markersize=5,
            color=color(name),
            alpha=0.8,
            label=name,
        )
    axis.set(
        xlabel="quarter of a free-running answer of 96 tokens", ylabel="in the trained style, %", xticks=range(1, 5)
    )
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


SECTIONS: list[tuple[str, str, str, Callable[[Store], str], Callable[[Store, Any], Any] | None]] = [
    ("encoder", "Accuracy against parameters", "accuracy", encoder_table, accuracy_picture),
    ("ablation", "Ablations", "ablations", ablation_table, ablation_picture),
    ("instructions", "Instructions", "", instructions_table, None),
    ("styles", "Long answers", "long-answers", styles_table, styles_picture),
    ("composition", "Two adapters together", "", composition_table, None),
    ("composition", "Rows of one batch with adapters of their own", "", rows_table, None),
    ("memory", "Memorisation: leading tokens recited", "", memory_table, None),
]


def write(store: Store, folder: Path, split: int) -> Path:
    """Write report.md and the pictures; parts without a finished cell are left out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    record = json.loads((folder / "environment.json").read_text())
    count = len(store.cells)
    seconds = sum(cell.get("cpu_seconds", 0) for cell in store.cells.values())
    lines = ["# Results of the study", "", f"{common.heading(record)} {store.setup}; {count} cells."]
    lines += [f"All cells took {seconds / 60:.0f} CPU minutes.", "", "Mean ± standard deviation over seeds.", ""]
    quick = " --quick" * ("quick" in folder.name) + f" --split {split}" * bool(split)

    def save(figure: Any, name: str) -> str:
        figure.tight_layout()
        figure.savefig(folder / f"{name}.png", dpi=100, bbox_inches="tight")
        plt.close(figure)
        return f"![{name}]({name}.png)\n"

    for part, title, name, make_table, draw in SECTIONS:
        if store.of(part):
            command = f"`python -m benchmarks.study.run{quick} --only {part}`"
            lines += [f"## {title}", "", command, "", make_table(store), ""]
            if draw is not None and (part != "ablation" or store.of("encoder")):
                lines.append(save(draw(store, plt), name))
            if part == "encoder":
                lines.append(save(curves_picture(store, plt), "curves"))
    if store.of("edits"):
        command = f"`python -m benchmarks.study.run{quick} --only edits`"
        lines += ["## Where edits act", "", command, "", save(edits_picture(store, plt), "edits")]
    if store.of("base"):
        base = store.of("base")[0]["result"]
        lines += ["## The language model", "", table(list(base), [list(base.values())]), ""]
    if store.of("encoder tuning"):
        lines += [
            "## Learning rates",
            "",
            "One run each, with a seed that is not reported.",
            "",
            tuning_table(store),
            "",
        ]
    path = folder / "report.md"
    path.write_text("\n".join(lines))
    return path
