"""How long a text one edited token can carry in SmolLM2-135M, as pyreft's memorisation example asks of larger models.

    python -m benchmarks.smollm2.memorisation --model smollm2   # about 20 minutes of one CPU core
    python -m benchmarks.smollm2.memorisation --report          # the table and the picture of what is there

The prompt is "Recite 1:", and its last token is edited until the model recites what it never saw. A setting climbs a
ladder: when all tokens of a length are recited the next length is trained from there, until one is not learned within
`STEPS` steps. Strings are text (the pirate's answers of examples/quickstart.py, in their order) or random tokens, which
nothing can be guessed of.

For one prompt an edit of one block is one vector, whatever the rank. So there is a second question: how many prompts
can be given a string of their own by one block. A finished setting is stored at once, and not run again.

benchmarks/real_llm/model.py makes the folder of the model.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import common
from benchmarks.real_llm.rows import Row, collate
from benchmarks.smollm2 import record
from benchmarks.smollm2.texts import PIRATE_CHATS
from benchmarks.study.methods import Method, count, trainable

LENGTHS = (8, 16, 32, 64, 128, 256)  # tokens
NUMBERS, SHORT = (4,), 8  # of prompts, tokens of each of their strings
STEPS = 100  # of one length at most
RESULTS = common.RESULTS / "smollm2-memorisation"
PICTURE = Path(__file__).parents[2] / "docs" / "images" / "memorisation.png"
MIDDLE = 14  # of 30 blocks, counted from 0


def one_token(r: int, **changes: Any) -> Method:
    return Method("reft", {"r": r, "positions": "l1", **changes})


ONE_BLOCK = {"layers_to_transform": [MIDDLE]}
METHODS = {
    "one block, r1": one_token(1, **ONE_BLOCK),
    "all blocks, r1": one_token(1),
    "one block, r16": one_token(16, **ONE_BLOCK),
    "one block, r4": one_token(4, **ONE_BLOCK),
    "one block and d, r4": Method("reft", {"r": 4, "positions": "l1+d", **ONE_BLOCK}),
    "LoRA r1 q,v": Method("lora", {"r": 1, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj"]}),
}
RATES = {"one block": 3.2e-2, "else": 8e-3}  # from a trial of three rates on 8 random tokens, not searched for
PLAN = (  # the most telling first: a run that is cut has these
    ("text", "one block, r1"),
    ("random", "one block, r1"),
    ("prompts", "one block, r1"),
    ("prompts", "one block, r4"),
    ("text", "all blocks, r1"),
    ("prompts", "one block, r16"),
    ("random", "all blocks, r1"),
    ("text", "one block, r16"),
    ("random", "LoRA r1 q,v"),
    ("random", "one block and d, r4"),
)


PAD = 0  # in batches whose rows are all as long, so that nothing is padded


def leading(logits: Tensor, rows: list[Row]) -> list[int]:
    """How many tokens of each string are the likeliest ones, up to the first that is not."""
    start, found = len(rows[0].prompt), []
    for guesses, row in zip(logits.argmax(-1), rows):
        right = guesses[start - 1 : start - 1 + len(row.answer)] == torch.tensor(row.answer)
        found.append(int(right.long().cumprod(0).sum()))
    return found


def climb(model: nn.Module, rows: list[Row], lr: float, steps: int) -> dict[str, Any]:
    """Train until everything is recited, or for so many steps; the best recital on the way counts."""
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=lr, weight_decay=0.0)
    batch, best, begin = collate(rows, PAD), [0], time.process_time()
    wanted = sum(len(row.answer) for row in rows)
    for step in range(steps + 1):  # the last one only looks
        output = model(**batch, use_cache=False)
        best = max(best, leading(output.logits, rows), key=sum)
        if sum(best) == wanted or step == steps:
            break
        output.loss.backward()
        nn.utils.clip_grad_norm_(trainable(model).values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    seconds = round(time.process_time() - begin, 1)
    return {"recited": sum(best), "of": wanted, "steps": step, "loss": round(output.loss.item(), 4), "seconds": seconds}


@torch.no_grad()
def generated(model: nn.Module, prompt: list[int], string: list[int]) -> int:
    """Leading tokens of `string` that greedy `generate` says, which sees nothing of it."""
    ids = torch.tensor([prompt])
    settings = {"max_new_tokens": len(string), "min_new_tokens": len(string), "do_sample": False}
    said = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :]
    return int((said == torch.tensor(string)).long().cumprod(0).sum())


@torch.no_grad()
def surprise(base: nn.Module, prompt: list[int], string: list[int]) -> Tensor:
    """Bits of each token of the string for the base model: what an edit has to bring."""
    batch = collate([Row(prompt, string)], PAD)
    logits = base(**batch, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return nn.functional.cross_entropy(logits, torch.tensor(string), reduction="none") / math.log(2)


def ladder(base: nn.Module, tokenizer: Any, kind: str, method: Method, lr: float, steps: int) -> list[dict[str, Any]]:
    """The lengths that a setting recites, and the first that it does not."""
    string = strings(tokenizer, kind)
    prompt = tokenizer("Recite 1:")["input_ids"]
    bits = surprise(base, prompt, string).cumsum(0).tolist()
    model, rungs = method.apply(base, "CAUSAL_LM", 0), []
    for length in LENGTHS:
        rung = {
            "length": length,
            "bits": round(bits[length - 1], 1),
            **climb(model, [Row(prompt, string[:length])], lr, steps),
        }
        rungs.append(rung)
        print(f"    {rung}", flush=True)
        if rung["recited"] < length:
            break
        rung["generated"] = generated(model, prompt, string[:length])
    model.unload()
    return rungs


def several(base: nn.Module, tokenizer: Any, method: Method, lr: float, steps: int) -> list[dict[str, Any]]:
    """How much of the strings of several prompts one adapter recites; each number from a fresh adapter."""
    draw, found = random.Random(0), []
    for number in NUMBERS:
        prompts = tokenizer([f"Recite {10 + i}:" for i in range(number)])["input_ids"]
        rows = [Row(prompt, draw.choices(ordinary(tokenizer), k=SHORT)) for prompt in prompts]
        model = method.apply(base, "CAUSAL_LM", 0)
        found.append({"prompts": number, **climb(model, rows, lr, steps)})
        print(f"    {found[-1]}", flush=True)
        model.unload()
    return found


def ordinary(tokenizer: Any) -> list[int]:
    """Tokens that are not special."""
    return sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))


def strings(tokenizer: Any, kind: str) -> list[int]:
    """As many tokens as the longest of the lengths, of "text" or "random"."""
    if kind == "random":
        return random.Random(0).choices(ordinary(tokenizer), k=max(LENGTHS))
    return tokenizer(" ".join(answer for _, answer in PIRATE_CHATS))["input_ids"][: max(LENGTHS)]


def report(cells: list[dict[str, Any]]) -> str:
    """Tables of all settings."""
    rungs, rows = [], []
    for cell in cells:
        for row in cell["rows"]:
            recited = f"{row['recited']} of {row['of']}"
            if "length" in row:
                bits = f"{row['bits']:.0f}"
                rungs.append([cell["kind"], cell["name"], f"{cell['parameters']:,}", bits, recited, str(row["steps"])])
            else:
                rows.append([cell["name"], f"{cell['parameters']:,}", str(row["prompts"]), recited, str(row["steps"])])
    one = common.markdown_table(
        ["string", "edit", "trained", "bits for the base model", "tokens recited", "steps"], rungs
    )
    many = common.markdown_table(["edit", "trained", "prompts", "tokens recited", "steps"], rows)
    return f"# Memorisation\n\n## One prompt\n\n{one}\n\n## Several prompts, {SHORT} random tokens each\n\n{many}\n"


def draw(cells: list[dict[str, Any]], path: Path) -> None:
    """Tokens recited against those asked for, and against the string's bits; and several prompts, where measured."""
    from matplotlib.figure import Figure

    several = [(cell["name"], row) for cell in cells if cell["kind"] == "prompts" for row in cell["rows"]]
    figure = Figure(figsize=(9.6 if several else 7, 3.2), layout="constrained", dpi=100)
    axes = figure.subplots(1, 3 if several else 2)
    colors = {name: f"C{number}" for number, name in enumerate(METHODS)}
    axes[0].plot(LENGTHS[:-1], LENGTHS[:-1], color="grey", linestyle=":", linewidth=1)
    for cell in (cell for cell in cells if cell["kind"] != "prompts"):
        style = {"marker": "o", "markersize": 4, "color": colors[cell["name"]]}
        style |= {"linestyle": "-" if cell["kind"] == "text" else "--", "label": f"{cell['kind']}: {cell['name']}"}
        recited = [row["recited"] for row in cell["rows"]]
        axes[0].plot([row["length"] for row in cell["rows"]], recited, **style)
        shares = [100 * row["recited"] / row["of"] for row in cell["rows"]]
        axes[1].plot([row["bits"] for row in cell["rows"]], shares, **style)
    axes[0].set(xscale="log", yscale="log", xlabel="tokens asked for", ylabel="tokens recited")
    axes[0].set(xticks=LENGTHS[:-1], xticklabels=LENGTHS[:-1], yticks=LENGTHS[:-1], yticklabels=LENGTHS[:-1])
    axes[0].minorticks_off()
    axes[0].legend(fontsize=7, frameon=False)
    axes[1].set(xlabel="bits of the string for the base model", ylabel="recited, %", ylim=(0, 105))
    for name, row in several:
        label = f"{name},\n{row['prompts']} prompts"
        axes[2].bar(label, 100 * row["recited"] / row["of"], width=0.6, color=colors[name])
    if several:
        axes[2].set(ylim=(0, 105), title=f"{SHORT} random tokens each", ylabel="recited, %")
        axes[2].tick_params(axis="x", labelsize=7)
    for axis in axes:
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    figure.savefig(path)


def cell(base: nn.Module, tokenizer: Any, kind: str, name: str, steps: int) -> record.Cell:
    """One setting: its ladder, or what several prompts were taught."""
    method = METHODS[name]
    lr = RATES["one block" if name.startswith("one block") else "else"]
    if kind == "prompts":
        rows = several(base, tokenizer, method, lr, steps)
    else:
        rows = ladder(base, tokenizer, kind, method, lr, steps)
    model = method.apply(base, "CAUSAL_LM", 0)
    parameters = count(model)["parameters"]
    model.unload()
    return {"kind": kind, "name": name, "lr": lr, "parameters": parameters, "rows": rows}


def plan(folder: Path, steps: int) -> Iterator[tuple[str, Callable[[], record.Cell]]]:
    base, tokenizer = record.load(folder)
    for kind, name in PLAN:
        yield f"{kind} | {name}", partial(cell, base, tokenizer, kind, name, steps)


if __name__ == "__main__":
    record.main(__doc__, RESULTS, PICTURE, STEPS, lambda steps: f"{steps} steps at most", plan, report, draw)
