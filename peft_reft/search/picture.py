"""Drawing the trials of a search: scores in the order of the trials, and against each setting."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from peft_reft.search.trials import finished, scored

if TYPE_CHECKING:
    import optuna
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from peft_reft.search.space import SearchSpace


def draw_trials(study: optuna.Study, space: SearchSpace, metric: str) -> Figure:
    """Scores in the order of the trials, and against each of their settings.

    Dots are complete trials, crosses were given up (at their last score), the ring is the best.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    done, complete = finished(study), {trial.number for trial in scored(study)}
    scores = {trial.number: trial.value for trial in done if trial.value is not None}  # if given up, its last score
    trials = [trial for trial in done if trial.number in scores]
    columns: dict[str, tuple[list[Any], list[Any] | None]] = {
        "trial": ([t.number for t in trials], None),
        "learning rate": ([t.params["learning_rate"] for t in trials], None),
        "rank": ([t.params["rank"] for t in trials], list(space.ranks)),
        "prefix": ([t.params["prefix"] for t in trials], list(space.prefix)),
        "suffix": (
            [t.params.get("suffix", t.params.get("suffix_alone", "—")) for t in trials],
            [*space.suffix, *["—"] * ("all" in space.prefix)],
        ),
        "blocks": ([t.params["blocks"] for t in trials], list(space.blocks)),
        **{name: ([t.params[name] for t in trials], list(values)) for name, values in space.others.items()},
    }
    rows = math.ceil(len(columns) / 3)
    figure = Figure(figsize=(10, 2.9 * rows), layout="constrained", dpi=110)
    panels: list[Axes] = list(figure.subplots(rows, 3, sharey=True, squeeze=False).flat)
    best = study.best_trial.number
    for axes, (name, (values, choices)) in zip(panels, columns.items()):
        places = [choices.index(v) for v in values] if choices is not None else values
        if choices is not None:
            axes.set_xticks(range(len(choices)), [str(c) for c in choices], rotation=35 if name == "blocks" else 0)
            axes.set_xlim(-0.5, len(choices) - 0.5)
        for place, (number, score) in zip(places, scores.items()):
            marker, colour = ("o", "tab:blue") if number in complete else ("x", "tab:gray")
            axes.plot(place, score, marker, color=colour, alpha=0.7, markersize=5)
            if number == best:
                axes.plot(place, score, "o", color="tab:red", markersize=11, fillstyle="none", markeredgewidth=2)
        axes.set_xlabel(name)
        axes.grid(axis="y", alpha=0.3)
    panels[0].locator_params(axis="x", integer=True)
    panels[1].set_xscale("log")
    ticks = rate_ticks(*space.learning_rate)
    panels[1].set_xticks(ticks, [f"{rate:.4g}" for rate in ticks])
    panels[1].xaxis.set_minor_locator(NullLocator())  # matplotlib labels these too where a range is narrow
    edge = 1.1 * (space.learning_rate[1] / space.learning_rate[0]) ** 0.04
    panels[1].set_xlim(space.learning_rate[0] / edge, space.learning_rate[1] * edge)
    for axes in panels[len(columns) :]:
        axes.set_visible(False)
    for axes in panels[: len(columns) : 3]:
        axes.set_ylabel(metric)
    given_up = len(done) - len(complete)
    figure.suptitle(f"{len(complete)} complete trials (dots), {given_up} given up (crosses); ring: the best")
    return figure


def rate_ticks(low: float, high: float) -> list[float]:
    """Learning rates to label on a logarithmic axis: two to five round numbers from `low` to `high`.

    Powers of ten if there are enough of them, else also their halves and fifths, else both ends and their middle.

    >>> rate_ticks(1e-4, 1e-1), rate_ticks(1e-4, 1e-2), rate_ticks(1e-3, 4e-3), rate_ticks(1e-3, 1.5e-3)
    ([0.0001, 0.001, 0.01, 0.1], [0.0001, 0.001, 0.01], [0.001, 0.002, 0.004], [0.001, 0.0012, 0.0015])
    """
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5)):
        ticks = [float(f"{step}e{exponent}") for exponent in exponents for step in steps]
        ticks = [tick for tick in ticks if low <= tick * (1 + 1e-9) and tick <= high * (1 + 1e-9)]
        if len(ticks) >= 3:
            return ticks[:: math.ceil(len(ticks) / 5)]
    ends = (low, math.sqrt(low * high), high)
    return sorted({float(f"{rate:.2g}") for rate in ends if low != high or rate == low})
