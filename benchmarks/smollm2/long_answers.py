"""How far into a long answer a manner holds, by the positions that are edited, beside LoRA.

    python -m benchmarks.smollm2.long_answers --model smollm2   # 25 minutes of one CPU core; resumes
    python -m benchmarks.smollm2.long_answers --report          # the tables and the picture of what is there

Two manners of the study's: `capitals`, and `lines`, every word on a line of its own. Trained are the openings of the
base model's own answers to eight questions, so rewritten: `OPENING` tokens of each, and no end. Every seed has other
questions, and another start of the adapter. Measured are greedy answers to six further questions, four times as long
and without an end: the share of their words in the manner by quarter, and the first word that is not.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.real_llm.rows import Row
from benchmarks.smollm2 import few_shot, record
from benchmarks.smollm2.chats import Chats
from benchmarks.smollm2.few_shot import BASE, lora, reft
from benchmarks.smollm2.texts import PIRATE_CHATS, QUESTIONS
from benchmarks.study.methods import count

OPENING, LONG = 32, 128  # tokens that are trained, and of an answer
TRAINED, ROWS, STEPS = 8, 4, 12  # questions, rows of a step, steps
RESULTS = common.RESULTS / "smollm2-long-answers"
PICTURE = Path(__file__).parents[2] / "docs" / "images" / "long-answers.png"
MANNERS: dict[str, Callable[[str], str]] = {"capitals": str.upper, "lines": lambda text: text.replace(" ", "\n")}
METHODS = {
    "LoReFT f7+l7": reft("f7+l7"),
    "LoReFT f7+l7+d8": reft("f7+l7+d8"),
    "LoReFT f7+l7+d": reft("f7+l7+d"),
    "LoReFT f1+l1": reft("f1+l1"),
    "LoReFT all": reft("all"),
    "LoRA r8 q,v": lora(8),
}
FOUR = (("LoReFT f7+l7", 1e-3), ("LoReFT f7+l7+d", 1e-3), ("LoRA r8 q,v", 4e-3), ("LoReFT f7+l7+d8", 1e-3))
HIGHER = (("LoReFT f7+l7", 4e-3), ("LoReFT f7+l7+d", 4e-3))
PLAN = (  # manner, method, learning rate, seed; the most telling first: a run that is cut has these
    ("capitals", BASE, None, 0),
    *(("capitals", *method, seed) for seed in (0, 1) for method in FOUR),
    ("lines", BASE, None, 0),
    *(("lines", *method, 0) for method in FOUR),
    *(("capitals", *method, seed) for seed in (0, 1) for method in HIGHER),
    ("capitals", "LoReFT f7+l7", 4e-3, 2),
    ("capitals", "LoRA r8 q,v", 4e-3, 2),
    ("capitals", "LoReFT f7+l7+d", 4e-3, 2),
    ("capitals", "LoReFT f7+l7", 1e-3, 2),
    ("capitals", "LoReFT f7+l7+d", 1e-3, 2),
    ("capitals", "LoReFT f1+l1", 4e-3, 0),
    ("lines", "LoReFT f1+l1", 4e-3, 0),
    ("capitals", "LoReFT all", 4e-3, 0),
    ("lines", "LoReFT f7+l7", 4e-3, 0),
    *(("capitals", "LoReFT f1+l1", 4e-3, seed) for seed in (1, 2)),
    *(("capitals", "LoReFT f1+l1", 1e-3, seed) for seed in (0, 1, 2)),
)


def kept(manner: str, text: str) -> list[bool]:
    """For each word of the text, or for each gap between two, whether it is in the manner."""
    if manner == "capitals":
        return [word == word.upper() for word in text.split()]
    return ["\n" in gap for gap in re.findall(r"\s+", text.strip())]


def share(manner: str, texts: list[str]) -> float:
    """Of all words of these texts, how many are in the manner; from 0 to 1."""
    words = [word for text in texts for word in kept(manner, text)]
    return round(sum(words) / max(1, len(words)), 4)


def first_break(manner: str, text: str) -> int:
    """How many words are in the manner before the first that is not; all, if there is none."""
    words = kept(manner, text)
    return words.index(False) if False in words else len(words)


class Bench:
    """The model, and the base's own answers, from which the training rows are made."""

    def __init__(self, folder: Path):
        self.chats = Chats(folder)

    def rows(self, manner: str, seed: int) -> list[Row]:
        """The seed's questions, and the first `OPENING` tokens of the base model's answers in the manner."""
        tokenizer, first = self.chats.tokenizer, TRAINED * seed
        questions = [question for question, _ in PIRATE_CHATS[first : first + TRAINED]]
        said = self.chats.answers(self.chats.base, questions, OPENING, OPENING)
        texts = [MANNERS[manner](tokenizer.decode(ids)) for ids in said]
        answers = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [Row(self.chats.prompt(question), ids[:OPENING]) for question, ids in zip(questions, answers)]

    def measure(self, model: Any, manner: str) -> dict[str, Any]:
        """The share in the manner by quarter, and where each answer leaves it."""
        said = self.chats.answers(model, QUESTIONS, LONG, LONG)
        decode, part = self.chats.tokenizer.decode, LONG // 4
        quarters = [[decode(ids[part * i : part * (i + 1)]) for ids in said] for i in range(4)]
        texts = [decode(ids) for ids in said]
        return {
            "quarters": [share(manner, quarter) for quarter in quarters],
            "breaks": [first_break(manner, text) for text in texts],
            "words": [len(kept(manner, text)) for text in texts],
            "answers": texts,
        }

    def cell(self, manner: str, name: str, lr: float | None, seed: int, steps: int) -> record.Cell:
        """One training, unless it is the base model, and what it gave."""
        begin = time.process_time()
        asked = {"manner": manner, "name": name, "lr": lr, "seed": seed}
        if lr is None:
            return {**asked, "parameters": 0, **self.measure(self.chats.base, manner)}
        rows = self.rows(manner, seed)
        model = METHODS[name].apply(self.chats.base, "CAUSAL_LM", seed)
        losses = self.chats.train(model, rows, ROWS, lr, steps)
        result = {"trained": losses, "parameters": count(model)["parameters"], **self.measure(model, manner)}
        model.unload()
        return {**asked, **result, "seconds": round(time.process_time() - begin, 1)}


def of_manner(cells: record.Cells, manner: str) -> list[record.Cells]:
    """The cells of each method and learning rate, all seeds together."""
    return few_shot.settings_of([cell for cell in cells if cell["manner"] == manner])


def by_quarter(same: record.Cells) -> list[float]:
    """The mean share over seeds, in per cent."""
    return [100 * statistics.mean(shares) for shares in zip(*(cell["quarters"] for cell in same))]


def report(cells: record.Cells) -> str:
    """A table for each manner."""
    part = LONG // 4
    header = ["method", "trained", "lr", "seeds", *(f"tokens {part * i + 1} to {part * (i + 1)}" for i in range(4))]
    header += ["last quarter by seed", "whole answers"]
    parts = []
    for manner in MANNERS:
        rows = []
        for same in of_manner(cells, manner):
            pairs = [pair for cell in same for pair in zip(cell["breaks"], cell["words"])]
            rows.append(
                [
                    same[0]["name"],
                    f"{same[0]['parameters']:,}",
                    "-" if same[0]["lr"] is None else f"{same[0]['lr']:g}",
                    str(len(same)),
                    *(f"{value:.0f} %" for value in by_quarter(same)),
                    ", ".join(f"{100 * cell['quarters'][-1]:.0f}" for cell in same),
                    f"{sum(first == words for first, words in pairs)} of {len(pairs)}",
                ]
            )
        parts.append(f"## {manner.capitalize()}\n\n{common.markdown_table(header, rows)}")
    return "# A manner in long answers\n\n" + "\n\n".join(parts) + "\n"


def draw(cells: record.Cells, path: Path) -> None:
    """The share in the manner by quarter of the answer: the mean as a line, seeds as dots, a panel for each manner."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 3.2), layout="constrained", dpi=100)
    panels = figure.subplots(1, len(MANNERS), sharey=True)
    colors = {name: f"C{number}" for number, name in enumerate(METHODS)} | {BASE: "grey"}
    middles = [LONG // 8 * (2 * i + 1) for i in range(4)]
    for axis, manner in zip(panels, MANNERS):
        for same in of_manner(cells, manner):
            name, lr = same[0]["name"], same[0]["lr"]
            style = {"color": colors[name], "linestyle": "--" if "ReFT" in name and lr == 4e-3 else "-"}
            axis.plot(middles, by_quarter(same), label=name if lr is None else f"{name}, {lr:g}", **style)
            for cell in same:
                axis.plot(middles, [100 * value for value in cell["quarters"]], ".", color=colors[name], alpha=0.6)
        axis.axvline(OPENING, color="grey", linestyle=":", linewidth=1)
        axis.set(title=manner, xlim=(0, LONG))
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    panels[0].set(ylabel="words in the manner, %", ylim=(0, 105))
    figure.supxlabel("token of the answer (dotted: end of what was trained)", fontsize="medium")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=7, frameon=False)
    figure.savefig(path)


def plan(folder: Path, steps: int) -> Iterator[tuple[str, Callable[[], record.Cell]]]:
    bench = Bench(folder)
    for manner, name, lr, seed in PLAN:
        key = f"{manner} | {name} | {lr:g} | seed {seed}" if lr else f"{manner} | {name}"
        yield key, partial(bench.cell, manner, name, lr, seed, steps)


def setup(steps: int) -> str:
    return f"{steps} steps of {ROWS} rows, {OPENING} tokens"


if __name__ == "__main__":
    record.main(__doc__, RESULTS, PICTURE, STEPS, setup, plan, report, draw)
