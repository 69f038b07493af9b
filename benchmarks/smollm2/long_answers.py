"""How far into a long answer a manner holds, by the positions that are edited, beside LoRA.

    python -m benchmarks.smollm2.long_answers --model smollm2   # 20 minutes of one CPU core; resumes
    python -m benchmarks.smollm2.long_answers --report          # the tables and the picture of what is there

Two manners of the study's: `capitals`, and `lines`, every word on a line of its own. Trained are the openings of the
base model's own answers to eight questions, so rewritten: `OPENING` tokens of each, and no end. Measured are greedy
answers to six other questions, four times as long and without an end: the share of their words in the manner by
quarter, and the first word that is not.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.smollm2 import record
from benchmarks.smollm2.chats import Chats, Pair
from benchmarks.smollm2.few_shot import lora, reft
from benchmarks.smollm2.texts import PIRATE_CHATS, QUESTIONS
from benchmarks.study.methods import Method, count
from benchmarks.study.store import Store

OPENING, LONG = 32, 128  # tokens that are trained, and of an answer
TRAINED = [question for question, _ in PIRATE_CHATS[:8]]
ROWS, STEPS = 4, 12
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
PLAN = (  # the most telling first: a run that is cut has these
    ("capitals", "base model", None),
    ("capitals", "LoReFT f7+l7", 1e-3),
    ("capitals", "LoReFT f7+l7+d", 1e-3),
    ("capitals", "LoRA r8 q,v", 4e-3),
    ("capitals", "LoReFT f7+l7+d8", 1e-3),
    ("lines", "base model", None),
    ("lines", "LoReFT f7+l7", 1e-3),
    ("lines", "LoReFT f7+l7+d", 1e-3),
    ("lines", "LoRA r8 q,v", 4e-3),
    ("lines", "LoReFT f7+l7+d8", 1e-3),
    ("capitals", "LoReFT f1+l1", 1e-3),
    ("lines", "LoReFT f1+l1", 1e-3),
    ("lines", "LoReFT f7+l7", 4e-3),
    ("lines", "LoReFT all", 1e-3),
    ("capitals", "LoReFT all", 1e-3),
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
    """The model, and the base's answers from which the training rows are made."""

    def __init__(self, folder: Path):
        self.chats = Chats(folder)
        self.openings = self.chats.answers(self.chats.base, TRAINED, OPENING, OPENING)

    def pairs(self, manner: str) -> list[Pair]:
        """The questions, and the first `OPENING` tokens of their answers in the manner."""
        tokenizer = self.chats.tokenizer
        texts = [MANNERS[manner](tokenizer.decode(ids)) for ids in self.openings]
        answers = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [(self.chats.prompt(question), ids[:OPENING]) for question, ids in zip(TRAINED, answers)]

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

    def cell(self, manner: str, method: Method | None, lr: float | None, steps: int) -> dict[str, Any]:
        """One training, unless it is the base model, and what it gave."""
        begin = time.process_time()
        if method is None or lr is None:
            return {"parameters": 0, **self.measure(self.chats.base, manner)}
        model = method.apply(self.chats.base, "CAUSAL_LM", 0)
        losses = self.chats.train(model, self.pairs(manner), ROWS, lr, steps)
        result = {"trained": losses, "parameters": count(model)["parameters"], **self.measure(model, manner)}
        model.unload()
        return result | {"seconds": round(time.process_time() - begin, 1)}


def report(cells: record.Cells) -> str:
    """A table for each manner."""
    part = LONG // 4
    header = ["method", "trained", "lr", "last loss", *(f"tokens {part * i + 1} to {part * (i + 1)}" for i in range(4))]
    header += ["whole answers", "words before the first break, median"]
    parts = []
    for manner in MANNERS:
        rows = [
            [
                cell["name"],
                f"{cell['parameters']:,}",
                "-" if cell["lr"] is None else f"{cell['lr']:g}",
                f"{cell['trained'][-1]:.2f}" if "trained" in cell else "-",
                *(f"{100 * value:.0f} %" for value in cell["quarters"]),
                f"{sum(b == w for b, w in zip(cell['breaks'], cell['words']))} of {len(cell['words'])}",
                f"{statistics.median(cell['breaks']):g} of {statistics.median(cell['words']):g}",
            ]
            for cell in cells
            if cell["manner"] == manner
        ]
        parts.append(f"## {manner.capitalize()}\n\n{common.markdown_table(header, rows)}")
    return "# A manner in long answers\n\n" + "\n\n".join(parts) + "\n"


def draw(cells: record.Cells, path: Path) -> None:
    """The share in the manner by quarter of the answer, a panel for each manner."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 3.2), layout="constrained", dpi=100)
    panels = figure.subplots(1, len(MANNERS), sharey=True)
    colors = {name: f"C{number}" for number, name in enumerate(METHODS)} | {"base model": "grey"}
    middles = [LONG // 8 * (2 * i + 1) for i in range(4)]
    for axis, manner in zip(panels, MANNERS):
        for cell in (cell for cell in cells if cell["manner"] == manner):
            label = cell["name"] if cell["lr"] is None else f"{cell['name']}, {cell['lr']:g}"
            style = {"marker": "o", "markersize": 4, "color": colors[cell["name"]], "label": label}
            style |= {"linestyle": "--" if cell["lr"] == 4e-3 else "-"}
            axis.plot(middles, [100 * value for value in cell["quarters"]], **style)
        axis.axvline(OPENING, color="grey", linestyle=":", linewidth=1)
        axis.set(title=manner, xlabel="token of the answer (dotted: end of what was trained)", xlim=(0, LONG))
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    panels[0].set(ylabel="words in the manner, %", ylim=(0, 105))
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside right center", fontsize=7, frameon=False)
    figure.savefig(path)


def run(folder: Path, store: Store, steps: int, minutes: float) -> None:
    """The cells that are not stored yet; none begins after so many minutes of CPU time."""
    bench = Bench(folder)
    for manner, name, lr in PLAN:
        key = f"{manner} | {name} | {lr:g}" if lr else f"{manner} | {name}"
        if key in store.cells or time.process_time() > 60 * minutes:
            continue
        result = bench.cell(manner, METHODS.get(name), lr, steps)
        store.add(key, {"manner": manner, "name": name, "lr": lr, **result})
        shown = {what: value for what, value in result.items() if what not in ("answers", "trained")}
        print(time.strftime("%H:%M:%S"), key, shown, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of the language model")
    parser.add_argument("--steps", type=int, default=STEPS, help="of a training; default %(default)s")
    parser.add_argument("--minutes", type=float, default=math.inf, help="of CPU time, after which no cell begins")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results; default %(default)s")
    parser.add_argument("--report", action="store_true", help="only write the tables and the picture of what is there")
    given = parser.parse_args()
    if given.model is None and not given.report:
        parser.error("--model: the folder that benchmarks/real_llm/model.py has made")
    store = Store(given.output, f"{given.steps} steps of {ROWS} rows, {OPENING} tokens")
    if not given.report:
        run(given.model, store, given.steps, given.minutes)
    record.write(store, report, draw, PICTURE)


if __name__ == "__main__":
    main()
