"""README's table of measured facts, drawn from the files in benchmarks/results.

    python -m benchmarks.facts          # write it into README.md
    python -m benchmarks.facts --print  # print it only

Of each topic the newest file is read (file names end in their date). A figure and the part that measured it, and so its
command, are looked up together: a row cannot name a command that does not measure it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
BEGIN = "| measured | ReFT | LoRA r8 on query and value | command |"
SPLITS = ("study", "study-split1", "study-split2")


class Fact(NamedTuple):
    """One row of the table; `lora` is empty where `reft` compares the two."""

    measured: str
    reft: str
    lora: str
    command: str


def newest(topic: str, folder: Path = RESULTS) -> dict[str, Any]:
    """The newest result file of a topic.

    Raises:
        FileNotFoundError: if there is none.
    """
    paths = list(folder.glob(f"{topic}_*.json"))
    if not paths:
        raise FileNotFoundError(f"There is no {topic}_*.json in {folder}; benchmarks/README.md has the commands.")
    return json.loads(max(paths, key=lambda path: path.stem.rpartition("_")[2]).read_text())


def median(value: Any) -> float:
    """The number of a figure, which may be a spread."""
    return float(value["median"] if isinstance(value, dict) else value)


def trained_numbers(folder: Path) -> Fact:
    """Share of a Llama-2-7B's parameters."""
    setting = newest("full-scale", folder)["parameters"][0]
    words = setting["setting"].removesuffix(", shared").replace("r=", "rank ")
    shares = (f"{setting[name]:.3f} %" for name in ("percent", "lora_qv"))
    return Fact(f"trained numbers, {words}", *shares, "python benchmarks/full_scale.py")


def accuracy(folder: Path) -> Fact:
    """The study's encoder: LoReFT r4 `all` less LoRA r8, paired by split and seed."""
    differences, numbers = [], {}
    for split in SPLITS:
        found: dict[str, dict[int, float]] = {"LoReFT r4 all": {}, "LoRA r8": {}}
        for line in (folder / split / "cells.jsonl").read_text().splitlines():
            cell = json.loads(line)
            if cell["part"] == "encoder" and cell["name"] in found:
                found[cell["name"]][cell["seed"]] = cell["result"]["test"]
                numbers[cell["name"]] = cell["result"]["parameters"]
        reft, lora = found.values()
        differences += [100 * (reft[seed] - lora[seed]) for seed in sorted({*reft} & {*lora})]
    mean, spread = statistics.mean(differences), statistics.stdev(differences)
    seeds = len(differences) // len(SPLITS)
    times = numbers["LoRA r8"] / numbers["LoReFT r4 all"]
    compared = f"{abs(mean):.1f} ± {spread:.1f} points {'less' if mean < 0 else 'more'} than LoRA"
    words = f"accuracy on MiniLM, {len(SPLITS)} splits × {seeds} seeds"
    return Fact(words, f"{compared}, with 1/{times:.0f} of its numbers", "", "python -m benchmarks.study.run")


def cells_of(folder: Path, name: str, **wanted: Any) -> list[dict[str, Any]]:
    """The cells of one method that have these entries, of the setup that ran last.

    Raises:
        KeyError: if there is none.
    """
    cells = [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]
    wanted |= {"name": name, "setup": cells[-1]["setup"]}
    found = [cell for cell in cells if all(cell[what] == value for what, value in wanted.items())]
    if not found:
        raise KeyError(f"{folder.name}/cells.jsonl has no cell with {wanted}.")
    return found


def five_examples(folder: Path) -> Fact:
    """What five examples taught SmolLM2, each method at its best rate: whole answers, and the loss of held-out ones."""
    shown_values, seeds = [], set()
    for name in ("LoReFT f7+l7", "LoRA r8 q,v"):
        cells = cells_of(folder / "smollm2-few-shot", name, lr=4e-3)
        spreads = [(statistics.mean(v), statistics.stdev(v)) for v in zip(*((c["whole"], c["loss"]) for c in cells))]
        (whole, whole_spread), (loss, loss_spread) = spreads
        shown_values.append(f"{whole:.1f} ± {whole_spread:.1f} (loss {loss:.2f} ± {loss_spread:.2f})")
        seeds.add(len(cells))
    words = f"SmolLM2, `f7+l7`, five examples: whole answers of 8, {min(seeds)} seeds"
    return Fact(words, *shown_values, "python -m benchmarks.smollm2.few_shot --model smollm2")


def long_answers(folder: Path) -> Fact:
    """Words in capitals at the end of long answers, where each answer could have left the manner long before."""

    def of(name: str) -> tuple[str, int]:
        cells = cells_of(folder / "smollm2-long-answers", name, manner="capitals", lr=4e-3)
        return f"{100 * statistics.mean(cell['quarters'][-1] for cell in cells):.0f} %", len(cells)

    (reft, seeds), (lora, others) = of("LoReFT f7+l7"), of("LoRA r8 q,v")
    words = f"SmolLM2, `f7+l7`, taught 32 tokens in capitals: capitals in tokens 97 to 128, {min(seeds, others)} seeds"
    return Fact(words, reft, lora, "python -m benchmarks.smollm2.long_answers --model smollm2")


def instructions(folder: Path) -> Fact:
    """What instructions taught SmolLM2, each method at its best rate on validation rows."""
    folder = folder / "real-llm-instructions-cpu-64-steps"

    def tested(cell: dict[str, Any]) -> float:
        return float(cell["result"]["test"]["ultrafeedback_1k"]["answer"])

    (base,) = cells_of(folder, "base model")

    def of(name: str) -> tuple[str, int]:
        rates: dict[float, list[dict[str, Any]]] = {}
        for cell in cells_of(folder, name):
            rates.setdefault(cell["lr"], []).append(cell)
        validation = {
            lr: statistics.mean(c["result"]["validation"]["answer"] for c in cells) for lr, cells in rates.items()
        }
        gains = [tested(base) - tested(cell) for cell in rates[min(validation, key=validation.__getitem__)]]
        return f"{statistics.mean(gains):.3f} ± {statistics.stdev(gains):.3f}", len(gains)

    (reft, seeds), (lora, others) = of("LoReFT r8 f7+l7"), of("LoRA r8 q,v")
    steps = base["setup"].split("; ")[1].partition(" x ")[0]
    words = f"SmolLM2, `f7+l7` r8, {steps} steps on instructions: nats per token of held-out answers below the"
    settings = f"--cpu --tasks ultrafeedback_1k --steps {steps}"
    return Fact(
        f"{words} base model's, {min(seeds, others)} seeds",
        reft,
        lora,
        f"python -m benchmarks.real_llm.run --model smollm2 --data data {settings}",
    )


def reward(folder: Path) -> Fact:
    """What GRPO taught a small model, by where the reward is decided; each method at its best rate, seed 0 left out."""

    def of(task: str, name: str) -> tuple[str, int]:
        found = [
            row["reward"]
            for key, row in newest("reinforcement", folder)["trainings"].items()
            if key.startswith(f"{task} | {name} | ") and " | seed " in key
        ]
        return f"{statistics.mean(found):.3f} ± {statistics.stdev(found):.3f}", len(found)

    every, first = of("even", "LoReFT f1+l1+d"), of("turn", "LoReFT all")
    lora = of("even", "LoRA r4 q,v"), of("turn", "LoRA r4 q,v")
    seeds = min(count for _, count in (every, first, *lora))
    words = f"GRPO, small model, rank 4: reward decided by every token; by the first; {seeds} seeds"
    reft = f"{every[0]} (`f1+l1+d`); {first[0]} (`all`)"
    return Fact(words, reft, "; ".join(shown for shown, _ in lora), "python benchmarks/reinforcement.py")


def of_overhead(folder: Path, figure: str, words: str, unit: str) -> Fact:
    """One figure of overhead.py."""
    for part, content in newest("overhead", folder)["parts"].items():
        for row in content["rows"]:
            if row["figure"] == figure:
                values = (median(row["values"][name]) for name in ("reft", "lora_qv"))
                return Fact(words, *(shown(v, unit) for v in values), f"python benchmarks/overhead.py --only {part}")
    raise KeyError(f"The newest overhead file has no figure {figure!r}.")


def of_gpu(folder: Path, part: str, figure: str, words: str, unit: str) -> Fact:
    """One figure of the GPU benchmark; a part may have it once for each method."""
    content = newest("gpu", folder)
    found: dict[str, Any] = {}
    for row in content["parts"].get(part, {"figures": []})["figures"]:
        if row["name"] == figure:
            found |= row["values"]
    if not {"reft", "lora_qv"} <= set(found):
        raise KeyError(f"The newest GPU file has no figure {figure!r} of both methods in its part {part!r}.")
    hardware = content["runs"][content["parts"][part]["run"]]["hardware"].removeprefix("NVIDIA ")
    values = (shown(median(found[name]), unit) for name in ("reft", "lora_qv"))
    return Fact(f"{hardware}, {part.partition('/')[0]}: {words}", *values, f"python -m benchmarks.gpu --only {part}")


def shown(value: float, unit: str) -> str:
    """A ratio, a count, bytes as kB, or MiB."""
    return {
        "ratio": f"{value:.3f}",
        "times": f"{value:.1f}",
        "count": f"{value:.0f}",
        "kB": f"{value / 1000:,.0f} kB",
        "MiB": f"{value:,.0f} MiB",
    }[unit]


def facts(folder: Path = RESULTS) -> list[Fact]:
    """All rows."""
    overhead = (
        ("forward without grad / base", "forward / base model", "ratio"),
        ("training step / floor", "training step / floor of any training", "ratio"),
        ("tensor operations added to a decode step", "tensor operations added to a decode step", "count"),
        ("64 rows with 64 adapters / with one", "64 adapters in one batch / one", "ratio"),
        ("adapter on disk, bytes", "adapter on disk, 12 blocks of width 768", "kB"),
    )
    gpu = (
        ("135M/forward", "forward / base", "forward / base model", "ratio"),
        ("135M/train", "training step / floor", "training step / floor", "ratio"),
        ("7B/forward", "forward / base", "forward / base model", "ratio"),
        ("7B/train", "training step / floor", "training step / floor", "ratio"),
        ("135M/graphs", "forward as a CUDA graph / base", "forward / base, both as CUDA graphs", "ratio"),
        (
            "135M/kernels",
            "decode step: kernels per block beyond base's",
            "kernels a decode step adds to a block",
            "count",
        ),
        ("135M/many", "64 adapters in one batch / one", "64 adapters in one batch / one", "times"),
        ("135M/resident", "resident: MiB on the device", "1,000 adapters on the GPU", "MiB"),
    )
    return [
        trained_numbers(folder),
        accuracy(folder),
        five_examples(folder),
        long_answers(folder),
        instructions(folder),
        reward(folder),
        *(of_overhead(folder, *row) for row in overhead),
        *(of_gpu(folder, *row) for row in gpu),
    ]


def table(folder: Path = RESULTS) -> str:
    """The rows as Markdown."""
    rows = [f"| {f.measured} | {f.reft} | {f.lora} | `{f.command}` |".replace("|  |", "| |") for f in facts(folder)]
    return "\n".join([BEGIN, "|---|---|---|---|", *rows])


def in_text(text: str) -> str:
    """The table that a text has."""
    begin = text.index(BEGIN)
    end = text.find("\n\n", begin)
    return text[begin : end if end >= 0 else len(text)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="do not write README.md")
    if parser.parse_args().print:
        print(table())
    else:
        text = README.read_text()
        README.write_text(text.replace(in_text(text), table()))


if __name__ == "__main__":
    main()
