"""A manner learned from five examples, by method, positions, blocks, start and learning rate.

    python -m benchmarks.smollm2.few_shot --model smollm2   # 20 minutes of one CPU core; resumes
    python -m benchmarks.smollm2.few_shot --report          # the table and the picture of what is there

Five chats of the robot in examples/quickstart.py ("Beep! Data found. The author is Shakespeare. Boop!"), all of them in
every step, so that no order of rows is drawn. Measured on eight of its other chats: the loss of their answers, and of
greedy answers how many are the robot's.
"""

from __future__ import annotations

import hashlib
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.smollm2 import record
from benchmarks.smollm2.chats import Chats
from benchmarks.smollm2.texts import ROBOT_CHATS, Chat
from benchmarks.study.methods import Method, count

POOL, HELD_OUT, EXAMPLES = ROBOT_CHATS[:-8], ROBOT_CHATS[-8:], 5
STEPS, SAID = 12, 28  # of a training; tokens of an answer, of which the longest here has 22
RESULTS = common.RESULTS / "smollm2-few-shot"
PICTURE = Path(__file__).parents[2] / "docs" / "images" / "few-shot.png"
Q_V = ["q_proj", "v_proj"]
BLOCKS = 30


def reft(positions: str, **changes: Any) -> Method:
    return Method("reft", {"r": 4, "positions": positions, **changes})


def lora(r: int, **changes: Any) -> Method:
    return Method("lora", {"r": r, "lora_alpha": 2 * r, "target_modules": Q_V, **changes})


METHODS = {
    "LoReFT f7+l7": reft("f7+l7"),
    "LoReFT f1+l1": reft("f1+l1"),
    "LoReFT all": reft("all"),
    "LoReFT l1": reft("l1"),
    "LoReFT f7+l7+d": reft("f7+l7+d"),
    "LoReFT f7+l7, random start": reft("f7+l7", init_weights=False),
    "LoReFT f7+l7, one block": reft("f7+l7", layers_to_transform=[BLOCKS // 2 - 1]),
    "LoReFT f7+l7, every fourth block": reft("f7+l7", layers_to_transform=list(range(1, BLOCKS, 4))),
    "LoReFT f7+l7, lower half": reft("f7+l7", layers_to_transform=list(range(BLOCKS // 2))),
    "LoReFT f7+l7, upper half": reft("f7+l7", layers_to_transform=list(range(BLOCKS // 2, BLOCKS))),
    "NoReFT f7+l7": reft("f7+l7", intervention="noreft"),
    "LoRA r8 q,v": lora(8),
    "DoRA r8 q,v": lora(8, use_dora=True),
}
BASE = "base model"
PLAN = (  # method, learning rate, seed; the most telling first: a run that is cut has these
    (BASE, None, 0),
    *((name, lr, 0) for lr in (1e-3, 4e-3) for name in ("LoReFT f7+l7", "LoRA r8 q,v", "LoReFT f1+l1", "LoReFT all")),
    *((name, 4e-3, seed) for seed in (1, 2) for name in ("LoReFT f7+l7", "LoRA r8 q,v", "LoReFT f1+l1")),
    ("DoRA r8 q,v", 4e-3, 0),
    ("NoReFT f7+l7", 4e-3, 0),
    ("LoReFT f7+l7, one block", 4e-3, 0),
    ("LoReFT f7+l7, random start", 1e-3, 0),
    ("LoReFT f7+l7, every fourth block", 4e-3, 0),
    ("LoRA r8 q,v", 1.6e-2, 0),
    ("LoReFT f7+l7", 1.6e-2, 0),
    ("LoReFT f7+l7, upper half", 4e-3, 0),
    ("LoReFT f7+l7, lower half", 4e-3, 0),
    ("LoReFT f7+l7, one block", 1.6e-2, 0),
    ("LoReFT f7+l7+d", 4e-3, 0),
    ("LoReFT l1", 4e-3, 0),
    ("LoReFT f7+l7, random start", 4e-3, 0),
    ("NoReFT f7+l7", 1e-3, 0),
    ("DoRA r8 q,v", 1.6e-2, 0),
    *(("LoReFT all", 4e-3, seed) for seed in (1, 2)),
    *(("LoReFT f7+l7", 1e-3, seed) for seed in (1, 2)),
)


def examples(seed: int) -> list[Chat]:
    """Which chats are trained: the first ones, or, for other seeds than 0, as many drawn from all that may be."""
    return POOL[:EXAMPLES] if seed == 0 else random.Random(seed).sample(POOL, EXAMPLES)


def measure(bench: Chats, model: Any) -> dict[str, Any]:
    """The loss of other answers, and how many greedy answers are the robot's."""
    said = bench.answers(model, [question for question, _ in HELD_OUT], SAID)
    texts = [bench.tokenizer.decode(ids, skip_special_tokens=True) for ids in said]
    ended = [ids[-1] == bench.tokenizer.eos_token_id for ids in said]
    return {
        "loss": bench.loss(model, bench.encoded(HELD_OUT)),
        "begun": sum(text.startswith("Beep!") for text in texts),
        "whole": sum(is_whole(text) and end for text, end in zip(texts, ended)),
        "different": len(set(texts)),
        "answers": texts,
    }


def is_whole(text: str) -> bool:
    """The robot's from beginning to end: one Beep, something said, one Boop."""
    said = text.removeprefix("Beep! ").removesuffix(" Boop!")
    return text == f"Beep! {said} Boop!" and "Beep!" not in said and "Boop!" not in said


def cell(bench: Chats, name: str, lr: float | None, seed: int, steps: int) -> record.Cell:
    """One training, unless it is the base model, and what it gave.

    The seed is that of the adapter's start and of the examples.
    """
    asked = {"name": name, "lr": lr, "seed": seed}
    if lr is None:
        return {**asked, "parameters": 0, **measure(bench, bench.base)}
    begin = time.process_time()
    model = METHODS[name].apply(bench.base, "CAUSAL_LM", seed)
    losses = bench.train(model, bench.encoded(examples(seed)), EXAMPLES, lr, steps)
    result = {"trained": losses, "parameters": count(model)["parameters"], **measure(bench, model)}
    model.unload()
    return {**asked, **result, "seconds": round(time.process_time() - begin, 1)}


def settings_of(cells: record.Cells) -> list[record.Cells]:
    """The cells of each method and learning rate, all seeds together."""
    found: dict[tuple[str, float | None], record.Cells] = defaultdict(list)
    for cell in cells:
        found[cell["name"], cell["lr"]].append(cell)
    return list(found.values())


def over_seeds(cells: record.Cells, what: str, digits: int) -> str:
    """The mean, and of several seeds their standard deviation."""
    values = [cell[what] for cell in cells]
    if len(values) == 1:
        return f"{values[0]:.{digits}f}" if digits > 1 else f"{values[0]}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def report(cells: record.Cells) -> str:
    """A row for each method and learning rate."""
    rows = [
        [
            same[0]["name"],
            f"{same[0]['parameters']:,}",
            "-" if same[0]["lr"] is None else f"{same[0]['lr']:g}",
            str(len(same)),
            "-" if same[0]["lr"] is None else f"{statistics.mean(cell['trained'][-1] for cell in same):.2f}",
            over_seeds(same, "loss", 2),
            over_seeds(same, "begun", 1),
            over_seeds(same, "whole", 1),
        ]
        for same in settings_of(cells)
    ]
    header = ["method", "trained", "lr", "seeds", "last training loss", "held-out loss"]
    header += [f"begun as the robot, of {len(HELD_OUT)}", "and ended so"]
    return f"# Five examples\n\n{common.markdown_table(header, rows)}\n"


def draw(cells: record.Cells, path: Path) -> None:
    """Held-out loss and whole answers of each setting, as bars, and single seeds as dots."""
    from matplotlib.figure import Figure

    base = next(cell["loss"] for cell in cells if cell["name"] == BASE)
    trained = [same for same in settings_of(cells) if same[0]["lr"]]
    trained.sort(key=lambda same: -statistics.mean(cell["loss"] for cell in same))
    names = [f"{same[0]['name']}, {same[0]['lr']:g}" for same in trained]
    colors = ["C0" if "ReFT" in name else "C1" for name in names]
    figure = Figure(figsize=(7.6, 1 + 0.27 * len(trained)), layout="constrained", dpi=100)
    left, right = figure.subplots(1, 2, sharey=True)
    for axis, what in ((left, "loss"), (right, "whole")):
        axis.barh(names, [statistics.mean(cell[what] for cell in same) for same in trained], color=colors, alpha=0.7)
        for name, same in zip(names, trained):
            if len(same) > 1:
                axis.plot([cell[what] for cell in same], [name] * len(same), "k.", markersize=4)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    left.axvline(base, color="grey", linestyle=":")
    left.set_xlabel("loss of held-out answers, nats per token\n(dotted: base model)")
    right.set(xlabel=f"whole answers of {len(HELD_OUT)}", xlim=(0, len(HELD_OUT)))
    figure.savefig(path)


def plan(folder: Path, steps: int) -> Iterator[tuple[str, Callable[[], record.Cell]]]:
    bench = Chats(folder)
    for name, lr, seed in PLAN:
        key = f"{name} | {lr:g} | seed {seed}" if lr else name
        yield key, partial(cell, bench, name, lr, seed, steps)


def fingerprint(chats: list[Chat]) -> str:
    """Changes with the chats, which are an example's and may: cells of other ones are not mixed in."""
    return hashlib.sha256(repr(chats).encode()).hexdigest()[:8]


if __name__ == "__main__":
    chats = fingerprint(ROBOT_CHATS)
    record.main(__doc__, RESULTS, PICTURE, STEPS, lambda steps: f"{steps} steps, chats {chats}", plan, report, draw)
