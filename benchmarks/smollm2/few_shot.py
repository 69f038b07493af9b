"""A manner learned from five examples, by method, positions, blocks, start and learning rate; and how long one lasts.

    python -m benchmarks.smollm2.few_shot --model smollm2   # 20 minutes of one CPU core; resumes
    python -m benchmarks.smollm2.few_shot --report          # tables and picture of what is there

`robot`: five chats of examples/quickstart.py ("BEEP. CATS ARE SMALL UNITS WITH FUR. [...] BOOP."), all of them in every
step, so that no order of rows is drawn. Measured on eight of its other chats: the loss of their answers, and of greedy
answers how many are the robot's. `long`: the base model's own answers in capitals, cut after `OPENING` tokens; measured
by the share of capitals in each quarter of answers four times as long.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import common
from benchmarks.smollm2 import record
from benchmarks.smollm2.texts import PIRATE_CHATS, QUESTIONS, ROBOT_CHATS, Chat
from benchmarks.study.methods import Method, count, parameter_groups
from benchmarks.study.store import Store
from benchmarks.study.training import fit

EXAMPLES, HELD_OUT = ROBOT_CHATS[:5], ROBOT_CHATS[-8:]
STEPS, SAID = 12, 28  # of a training; tokens of an answer, of which the longest here has 26
OPENING, LONG_ROWS, LONG_PROMPTS = 32, 8, 4  # tokens, chats, and chats of a step
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
    "LoRA r8 q,v": lora(8),
    "LoReFT f1+l1": reft("f1+l1"),
    "LoReFT all": reft("all"),
    "LoReFT l1": reft("l1"),
    "LoReFT f7+l7, random start": reft("f7+l7", init_weights=False),
    "LoReFT f7+l7, one block": reft("f7+l7", layers_to_transform=[BLOCKS // 2 - 1]),
    "LoReFT f7+l7, every fourth block": reft("f7+l7", layers_to_transform=list(range(1, BLOCKS, 4))),
    "LoReFT f7+l7, lower half": reft("f7+l7", layers_to_transform=list(range(BLOCKS // 2))),
    "LoReFT f7+l7, upper half": reft("f7+l7", layers_to_transform=list(range(BLOCKS // 2, BLOCKS))),
    "NoReFT f7+l7": reft("f7+l7", intervention="noreft"),
    "DoRA r8 q,v": lora(8, use_dora=True),
    "LoReFT f7+l7+d8": reft("f7+l7+d8"),
    "LoReFT f7+l7+d": reft("f7+l7+d"),
}
PLAN = (  # the most telling first: a run that is cut has these
    ("robot", "base model", None),
    ("robot", "LoReFT f7+l7", 4e-3),
    ("robot", "LoRA r8 q,v", 4e-3),
    ("robot", "LoReFT f1+l1", 1e-3),
    ("robot", "LoReFT f7+l7", 1e-3),
    ("robot", "LoRA r8 q,v", 1e-3),
    ("robot", "LoReFT f1+l1", 4e-3),
    ("robot", "LoReFT all", 1e-3),
    ("robot", "LoReFT f7+l7, every fourth block", 1e-3),
    ("robot", "LoReFT all", 4e-3),
    ("robot", "LoReFT f7+l7, random start", 1e-3),
    ("robot", "LoReFT f7+l7, one block", 1e-3),
    ("robot", "LoReFT l1", 1e-3),
    ("long", "base model", None),
    ("long", "LoReFT f7+l7", 1e-3),
    ("long", "LoReFT f7+l7+d", 1e-3),
    ("robot", "LoReFT f7+l7, upper half", 1e-3),
    ("robot", "LoReFT f7+l7, lower half", 1e-3),
    ("robot", "NoReFT f7+l7", 1e-3),
    ("robot", "DoRA r8 q,v", 1e-3),
    ("long", "LoRA r8 q,v", 1e-3),
    ("long", "LoReFT f7+l7+d8", 1e-3),
    ("robot", "LoReFT f7+l7", 3e-4),
    ("robot", "LoRA r8 q,v", 3e-4),
    ("robot", "LoReFT f1+l1", 3e-4),
    ("robot", "LoReFT all", 3e-4),
)


class Bench:
    """The model, and the data as ids of its chat template."""

    def __init__(self, folder: Path):
        self.base, self.tokenizer = record.load(folder)
        self._openings: list[tuple[list[int], list[int]]] = []

    def prompt(self, question: str) -> list[int]:
        message = [{"role": "user", "content": question}]
        text = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def encoded(self, chats: list[Chat]) -> list[tuple[list[int], list[int]]]:
        """Prompts, and answers with the token that ends them."""
        end = self.tokenizer.eos_token_id
        return [(self.prompt(q), [*self.tokenizer(a, add_special_tokens=False)["input_ids"], end]) for q, a in chats]

    def collate(self, pairs: list[tuple[list[int], list[int]]]) -> dict[str, Any]:
        """Padded on the left, so that the last columns have all answers; labels of -100 on prompts and padding."""
        columns = max(len(prompt) + len(answer) for prompt, answer in pairs)
        ids = torch.full((len(pairs), columns), self.tokenizer.pad_token_id)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for row, (prompt, answer) in enumerate(pairs):
            start = columns - len(prompt) - len(answer)
            ids[row, start:] = torch.tensor(prompt + answer)
            labels[row, -len(answer) :] = torch.tensor(answer)
            mask[row, start:] = 1
        keep = max(len(answer) for _, answer in pairs) + 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, "logits_to_keep": keep, "use_cache": False}

    @torch.no_grad()
    def loss(self, model: nn.Module, chats: list[Chat]) -> float:
        """Nats per token of the answers."""
        return round(model.eval()(**self.collate(self.encoded(chats))).loss.item(), 4)

    @torch.no_grad()
    def answers(self, model: nn.Module, questions: list[str], longest: int, shortest: int = 0) -> list[list[int]]:
        """Greedy answers as ids, with the token that ends them if it was said."""
        prompts = [self.prompt(question) for question in questions]
        columns, pad = max(map(len, prompts)), self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (columns - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (columns - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        settings = {"max_new_tokens": longest, "min_new_tokens": shortest, "do_sample": False, "pad_token_id": pad}
        said = model.eval().generate(input_ids=ids, attention_mask=mask, **settings)[:, columns:].tolist()
        end = self.tokenizer.eos_token_id
        return [row[: row.index(end) + 1] if end in row else row for row in said]

    def openings(self) -> list[tuple[list[int], list[int]]]:
        """Questions, and what the base model answers in capitals, cut and without an end; made once."""
        if not self._openings:
            questions = [question for question, _ in PIRATE_CHATS[:LONG_ROWS]]
            for question, ids in zip(questions, self.answers(self.base, questions, OPENING, OPENING)):
                shouted = self.tokenizer.decode(ids).upper()
                answer = self.tokenizer(shouted, add_special_tokens=False)["input_ids"][:OPENING]
                self._openings.append((self.prompt(question), answer))
        return self._openings

    def robot(self, model: nn.Module) -> dict[str, Any]:
        """What is measured of the robot's manner."""
        said = self.answers(model, [question for question, _ in HELD_OUT], SAID)
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in said]
        ended = [ids[-1] == self.tokenizer.eos_token_id for ids in said]
        return {
            "loss": self.loss(model, HELD_OUT),
            "begun": sum(map(is_robot, texts)),
            "whole": sum(is_robot(text) and end and text.endswith("BOOP.") for text, end in zip(texts, ended)),
            "different": len(set(texts)),
            "answers": texts,
        }

    def long(self, model: nn.Module) -> dict[str, Any]:
        """Share of capitals among the letters, by quarter of long answers."""
        said = self.answers(model, QUESTIONS, 4 * OPENING, 4 * OPENING)
        quarters = [
            capitals([self.tokenizer.decode(ids[OPENING * i : OPENING * (i + 1)]) for ids in said]) for i in range(4)
        ]
        return {"capitals": quarters, "answers": [self.tokenizer.decode(ids) for ids in said]}

    def train(self, task: str, method: Method, lr: float, steps: int) -> dict[str, Any]:
        """One training, and what it gave."""
        begin = time.process_time()
        model = method.apply(self.base, "CAUSAL_LM", 0)
        pairs = self.encoded(EXAMPLES) if task == "robot" else self.openings()
        rows = len(pairs) if task == "robot" else LONG_PROMPTS

        def epoch() -> Iterator[dict[str, Any]]:
            for start in range(0, len(pairs), rows):
                yield self.collate(pairs[start : start + rows])

        losses = fit(model, parameter_groups(model, lr, lr), epoch, steps)
        result = {"trained": [round(loss, 4) for loss in losses], "parameters": count(model)["parameters"]}
        result |= self.robot(model) if task == "robot" else self.long(model)
        model.unload()
        return result | {"seconds": round(time.process_time() - begin, 1)}


def is_robot(text: str) -> bool:
    """In capitals, and begun as the robot begins."""
    return text.startswith("BEEP.") and text == text.upper()


def capitals(texts: list[str]) -> float:
    letters = [letter for text in texts for letter in text if letter.isalpha()]
    return round(sum(letter.isupper() for letter in letters) / max(1, len(letters)), 4)


def report(cells: record.Cells) -> str:
    """A table for each task."""
    robot = [
        [
            cell["name"],
            f"{cell['parameters']:,}",
            "-" if cell["lr"] is None else f"{cell['lr']:g}",
            f"{cell['loss']:.2f}",
            f"{cell['begun']}",
            f"{cell['whole']}",
            f"{cell['different']}",
        ]
        for cell in cells
        if cell["task"] == "robot"
    ]
    long = [
        [cell["name"], f"{cell['parameters']:,}", *(f"{100 * share:.0f} %" for share in cell["capitals"])]
        for cell in cells
        if cell["task"] == "long"
    ]
    header = ["method", "trained", "lr", "held-out loss", f"robot's, of {len(HELD_OUT)}", "with its end", "different"]
    parts = [common.markdown_table(header, robot)]
    header = ["method", "trained", *(f"tokens {OPENING * i + 1} to {OPENING * (i + 1)}" for i in range(4))]
    parts.append("## Capitals in long answers\n\n" + common.markdown_table(header, long))
    return "# Five examples\n\n" + "\n\n".join(parts) + "\n"


def draw(cells: record.Cells, path: Path) -> None:
    """Held-out loss and whole answers of each training, as bars."""
    from matplotlib.figure import Figure

    robot = [cell for cell in cells if cell["task"] == "robot"]
    base = next(cell["loss"] for cell in robot if cell["name"] == "base model")
    trained = sorted((cell for cell in robot if cell["lr"]), key=lambda cell: -cell["loss"])
    names = [f"{cell['name']}, {cell['lr']:g}" for cell in trained]
    colors = ["C0" if "ReFT" in cell["name"] else "C1" for cell in trained]
    figure = Figure(figsize=(7.6, 1 + 0.27 * len(trained)), layout="constrained", dpi=100)
    left, right = figure.subplots(1, 2, sharey=True)
    left.barh(names, [cell["loss"] for cell in trained], color=colors)
    left.axvline(base, color="grey", linestyle=":")
    left.set_xlabel("loss of held-out answers, nats per token\n(dotted: base model)")
    right.barh(names, [cell["whole"] for cell in trained], color=colors)
    right.set(xlabel=f"whole answers of {len(HELD_OUT)}", xlim=(0, len(HELD_OUT)))
    for axis in (left, right):
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    figure.savefig(path)


def run(folder: Path, store: Store, steps: int, minutes: float) -> None:
    """The cells that are not stored yet; none begins after so many minutes of CPU time."""
    bench = Bench(folder)
    for task, name, lr in PLAN:
        key = f"{task} | {name} | {lr:g}" if lr else f"{task} | {name}"
        if key in store.cells or time.process_time() > 60 * minutes:
            continue
        measure = bench.robot if task == "robot" else bench.long
        result = {"parameters": 0, **measure(bench.base)} if lr is None else bench.train(task, METHODS[name], lr, steps)
        store.add(key, {"task": task, "name": name, "lr": lr, **result})
        shown = {what: value for what, value in result.items() if what not in ("answers", "trained")}
        print(time.strftime("%H:%M:%S"), key, shown, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of the language model")
    parser.add_argument("--steps", type=int, default=STEPS, help="of a training; default %(default)s")
    parser.add_argument("--minutes", type=float, default=math.inf, help="of CPU time, after which no cell begins")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results; default %(default)s")
    parser.add_argument("--report", action="store_true", help="only write tables and picture of what is there")
    given = parser.parse_args()
    if given.model is None and not given.report:
        parser.error("--model: the folder that benchmarks/real_llm/model.py has made")
    store = Store(given.output, f"{given.steps} steps")
    if not given.report:
        run(given.model, store, given.steps, given.minutes)
    record.write(store, report, draw, PICTURE)


if __name__ == "__main__":
    main()
