"""Drawing an inspection: blocks and tokens as a heat map, and next to it how much each block matters."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from peft_reft.inspect.fonts import lettering

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OF_TRACES = ("restored", "effect")  # of peft_reft.causal.trace; the others are of an Inspection
LABELS = {
    "relative": "‖Δh‖ / ‖h‖\n(1: as long as h itself)",
    "edit_norm": "‖Δh‖\n(units of the hidden state)",
    "turn": "angle between h and h + Δh\n(degrees)",
    "angle_before": "angle of h to the subspace\n(degrees)",
    "angle_after": "angle of h + Δh to the subspace\n(degrees)",
    "edit_angle": "angle of Δh to the subspace\n(degrees)",
    "restored": "part of the clean answer that returns\n(1: all of it)",
    "effect": "change of the metric",
}
Row = dict[str, Any]
UNEDITED = "#e6e6e6"
GAP = "…"  # with their number, a run of tokens that no block edits
CELL, ROW, MARGIN, WIDEST = 0.34, 0.26, 1.5, 40  # inches


def draw(
    edits: Sequence[Row],
    effects: Sequence[Row],
    totals: Sequence[Row],
    value: str,
    adapter: str,
    prompts: Sequence[int] | None,
    max_unedited: int | None,
) -> Figure:
    """A panel per prompt (and per stack of an encoder-decoder model): blocks upwards, tokens to the right.

    Args:
        edits, effects, totals: the tables of an `Inspection`; the last two may be empty.
        value: what the colours show: a key of `LABELS`.
        adapter, prompts, max_unedited: as in `Inspection.plot`.

    Raises:
        ValueError: for a value, adapter or prompt that is not in the tables.
    """
    from matplotlib.figure import Figure

    known = [name for name in LABELS if not edits or name in edits[0]]
    if value not in known:
        raise ValueError(f"value={value!r} cannot be drawn; use one of {', '.join(known)}.")
    rows = [row for row in edits if row["adapter"] == adapter and (prompts is None or row["prompt"] in prompts)]
    if not rows:
        adapters, numbers = (list(dict.fromkeys(row[key] for row in edits)) for key in ("adapter", "prompt"))
        raise ValueError(
            f"There is nothing to draw for adapter={adapter!r}, prompts={prompts!r}: the inspection has the adapters "
            f"{adapters} and the prompts {numbers}."
        )
    keys = dict.fromkeys((row["prompt"], row["stack"]) for row in rows)
    panels = [Panel(rows, *key, value, max_unedited) for key in keys]
    effects = [row for row in effects if not math.isnan(row["tv"])]
    finite = [number for panel in panels for line in panel.grid for number in line if math.isfinite(number)]
    low = min(finite, default=0.0) if value.startswith("angle") else 0.0
    high = max(finite, default=1.0)
    high = high if high > low else low + 1

    widest = max(len(panel.tokens) for panel in panels)
    width = max(4.5, MARGIN + CELL * widest) + (2.2 if effects else 0) + 1
    heights = [max(2.8, ROW * len(panel.blocks) + MARGIN) for panel in panels]
    figure = Figure(figsize=(min(width, WIDEST), sum(heights)), layout="constrained", dpi=110)
    ratios = [max(3.0, CELL * widest), 1.8] if effects else [1]
    grid = figure.subplots(len(panels), len(ratios), squeeze=False, width_ratios=ratios, height_ratios=heights)
    image: Any = None
    for panel, axes in zip(panels, grid):
        image = panel.draw(axes[0], low, high)
        total = next((row for row in totals if row["prompt"] == panel.prompt), None)
        axes[0].set_xlim(-0.5, widest - 0.5)  # cells of one size in all panels
        (title,), families = lettering([panel.title(total, len(panels) > 1)])
        axes[0].set_title(title, fontsize=9, loc="left", parse_math=False, fontfamily=families)
        if effects:
            panel.draw_effects(axes[1], effects)
    bar = figure.colorbar(image, ax=grid[:, 0].tolist(), pad=0.01, aspect=max(8, 25 * sum(heights) / 6), shrink=0.9)
    bar.set_label(LABELS[value], fontsize=8)
    bar.ax.tick_params(labelsize=8)
    return figure


class Panel:
    """The heat map of one prompt in one stack.

    Attributes:
        tokens: texts of the columns.
        blocks: names of the lines, lowest first.
        grid: [blocks][tokens], NaN where nothing is edited.
    """

    def __init__(self, rows: list[Row], prompt: int, stack: str, value: str, max_unedited: int | None):
        self.prompt, self.stack = prompt, stack
        own = [row for row in rows if (row["prompt"], row["stack"]) == (prompt, stack)]
        lines = list(dict.fromkeys((row["block"], row["call"]) for row in own))
        repeated = len({block for block, _ in lines}) < len(lines)
        self.blocks = [block for block, _ in lines]
        self.lines = [f"{block} ({call})" if repeated else block for block, call in lines]
        names = {row["position"]: row for row in own}
        edited = {row["position"] for row in own if row["edited"]}
        answer = {row["position"] for row in own if row["part"] == "answer"}
        columns = collapsed(list(names), edited, answer, max_unedited)
        self.tokens = [f"{GAP} {len(run)}" if len(run) > 1 else shown(names[run[0]]["token"]) for run in columns]
        kept = [run[0] if len(run) == 1 else None for run in columns]
        cells = {((row["block"], row["call"]), row["position"]): row[value] for row in own if row["edited"]}
        self.grid = [[cells.get((line, position), math.nan) for position in kept] for line in lines]
        parts = [names[run[0]]["part"] for run in columns]
        self.answer = parts.index("answer") if "answer" in parts else None

    def draw(self, axes: Axes, low: float, high: float) -> Any:
        """The map itself; returns matplotlib's image."""
        import matplotlib
        import numpy

        colours = matplotlib.colormaps["viridis"].with_extremes(bad=UNEDITED)
        values = numpy.ma.masked_invalid(numpy.array(self.grid))
        settings: dict[str, Any] = {"vmin": low, "vmax": high, "cmap": colours, "interpolation": "none"}
        image = axes.imshow(values, aspect="auto", origin="lower", **settings)
        upright = all(len(token) <= 2 for token in self.tokens)
        every = max(1, math.ceil(CELL * len(self.tokens) / WIDEST / 2))  # as many labels as there is room for
        axes.set_xticks(range(0, len(self.tokens), every))
        labels, families = lettering(self.tokens[::every])
        for text in axes.set_xticklabels(labels, rotation=0 if upright else 90, fontsize=8):
            text.set_parse_math(False)  # a token may be a dollar sign
            text.set_fontfamily(families)
        step = max(1, math.ceil(len(self.lines) / 40))
        axes.set_yticks(range(0, len(self.lines), step), short(self.lines)[::step], fontsize=8)
        axes.set_xticks([n - 0.5 for n in range(1, len(self.tokens))], minor=True)
        axes.set_yticks([n - 0.5 for n in range(1, len(self.lines))], minor=True)
        axes.grid(which="minor", color="white", linewidth=0.8)
        axes.tick_params(which="both", length=0)
        for side in axes.spines.values():
            side.set_visible(False)
        if self.answer is not None:
            axes.axvline(self.answer - 0.5, color="black", linewidth=1.2, linestyle="--")
        legend = ["grey: not edited"] if any(math.isnan(cell) for line in self.grid for cell in line) else []
        legend += [] if self.answer is None else ["dashed line: the answer begins"]
        axes.set_xlabel(f"token   ({'; '.join(legend)})" if legend else "token", fontsize=8)
        axes.set_ylabel("block", fontsize=8)
        return image

    def draw_effects(self, axes: Axes, effects: list[Row]) -> None:
        """A bar per block: how much of the prediction is lost without it. All panels have the same scale."""
        own = {row["block"]: row["tv"] for row in effects if row["prompt"] == self.prompt}
        sizes = [own.get(block, 0.0) for block in self.blocks]
        axes.barh(range(len(sizes)), sizes, color="#440154", height=0.7)
        axes.set_ylim(-0.5, len(sizes) - 0.5)
        axes.set_xlim(0, max(1e-6, 1.08 * max(row["tv"] for row in effects)))
        axes.set_yticks([])
        axes.tick_params(labelsize=8)
        axes.locator_params(axis="x", nbins=4)
        axes.set_xlabel("change of the prediction without\nthe block (total variation)", fontsize=8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)

    def title(self, total: Row | None, several: bool) -> str:
        parts = [f"prompt {self.prompt}"] if several else []
        parts += [self.stack] if self.stack else []
        text = ", ".join(parts)
        if total is not None and not math.isnan(total["tv"]):
            top, unedited = (shown(total[key]) for key in ("top", "top_unedited"))
            words = f'most likely "{top}", unedited "{unedited}"'
            words += f"\ntotal variation between the two {total['tv']:.2f}"
            text = f"{text}: {words}" if text else words
        return text


def collapsed(positions: list[int], edited: set[int], answer: set[int], longest: int | None) -> list[list[int]]:
    """The columns of a panel: a position each, but one column for a long run of positions that no block edits.

    >>> collapsed([0, 1, 2, 3, 4], edited={0, 4}, answer=set(), longest=2)
    [[0], [1, 2, 3], [4]]
    """
    columns: list[list[int]] = []
    for (is_edited, _), run in groupby(positions, key=lambda position: (position in edited, position in answer)):
        members = list(run)
        apart = is_edited or longest is None or len(members) <= max(longest, 1)
        columns += [[position] for position in members] if apart else [members]
    return columns


def shown(token: str, room: int = 15) -> str:
    """A token as a label: spaces and line ends made visible, nothing that could break the line, `room` characters.

    >>> shown(" the"), shown("x" * 30), shown("🐢 (1/3)")
    ('␣the', 'xxxxxxxxxxxxxxx…', '🐢 (1/3)')
    """
    part = re.search(r" \(\d/\d\)$", token)  # of a character that takes several tokens
    text, ending = (token, "") if part is None else (token[: part.start()], part[0])
    text = text.replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r").replace(" ", "␣")
    text = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
    return (text if len(text) <= room + 1 else text[:room] + "…") + ending


def short(names: list[str]) -> list[str]:
    """Names of blocks without what all of them begin with, down to the numbers.

    >>> short(["model.layers.0", "model.layers.1"]), short(["encoder.0.x", "decoder.0.x"])
    (['0', '1'], ['encoder.0.x', 'decoder.0.x'])
    """
    parts = [name.split(".") for name in names]
    common = 0
    while all(len(part) > common + 1 and part[common] == parts[0][common] for part in parts):
        common += 1
    return [".".join(part[common:]) for part in parts]
