"""Does ReFT learn as well here as in the paper's own parametrisation? A small fixed task, 5 seeds, the curves drawn.

    python benchmarks/learning.py            # about half an hour on one core
    python benchmarks/learning.py --quick    # two seeds, few steps

A tiny Llama is first trained on a family of tasks (a task token and 4 symbols: answer one of them, as it is or moved
on by one). Then it is frozen, and each LoReFT learns a task that was not among them, named by a token never seen:
answer the third symbol, moved on by three. Base weights, batches and their order, learning rate and seeds are the same
for all:

    here           the default: a fresh adapter that changes nothing
    here, random   ReftConfig(init_weights=False): random weights, R from the Gram matrix
    householder    torch.nn.utils.parametrizations.orthogonal, as pyreft does it, from the very same R, W and b

Some runs stay on a plateau of this task, whatever the parametrisation; two learning rates and two ranks keep that from
deciding the comparison.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from typing import Any

import common
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, nn

from peft_reft import ReftConfig, get_interventions, register_intervention

SYMBOLS, LENGTH = 8, 4
KNOWN_TASKS = [(place, shift) for place in range(LENGTH) for shift in (0, 1)]
NEW_TASK = (2, 3)
VOCAB = SYMBOLS + len(KNOWN_TASKS) + 2  # symbols, known tasks, the new task, the end of the prompt
NEW_TOKEN, END = VOCAB - 2, VOCAB - 1
METHODS = ("here", "here, random", "householder")


class Householder(nn.Module):
    """LoReFT as the paper's code has it: R is kept orthonormal by torch's parametrisation, and read twice."""

    def __init__(self, d: int, r: int):
        super().__init__()
        self.rotate = nn.Linear(r, d, bias=False)  # weight [d, r] is Rᵀ
        nn.init.orthogonal_(self.rotate.weight)
        nn.utils.parametrizations.orthogonal(self.rotate)
        self.source = nn.Linear(d, r)

    def forward(self, h: Tensor) -> Tensor:
        return h + (self.source(h) - h @ self.rotate.weight) @ self.rotate.weight.mT

    @torch.no_grad()
    def copy_from(self, intervention: Any) -> None:
        """Start as the same function."""
        self.rotate.weight = intervention.subspace.mT.contiguous()
        self.source.weight.copy_(intervention.weight)
        self.source.bias.copy_(intervention.bias)


def examples(count: int, generator: torch.Generator, new: bool) -> dict[str, Tensor]:
    """Rows of task token, symbols, end of the prompt, answer; only the answer is labelled."""
    symbols = torch.randint(0, SYMBOLS, (count, LENGTH), generator=generator)
    number = torch.randint(0, len(KNOWN_TASKS), (count,), generator=generator)
    place, shift = torch.tensor(KNOWN_TASKS)[number].unbind(1)
    if new:
        place, shift = (torch.full((count,), value) for value in NEW_TASK)
    answer = (symbols.gather(1, place[:, None]) + shift[:, None]) % SYMBOLS
    task = torch.full((count, 1), NEW_TOKEN) if new else SYMBOLS + number[:, None]
    ids = torch.cat([task, symbols, torch.full((count, 1), END), answer], dim=1)
    return {"input_ids": ids, "labels": torch.where(torch.arange(ids.shape[1]) < LENGTH + 2, -100, ids)}


@torch.no_grad()
def evaluate(model: nn.Module, data: dict[str, Tensor]) -> tuple[float, float]:
    """Loss and accuracy of the answers."""
    model.eval()
    logits = model(**data).logits[:, -2].float()
    target = data["labels"][:, -1]
    return F.cross_entropy(logits, target).item(), (logits.argmax(-1) == target).float().mean().item()


def train(
    model: nn.Module, steps: int, lr: float, seed: int, new: bool, every: int = 0
) -> list[tuple[int, float, float]]:
    """Adam with a linear schedule; the loss and accuracy on fixed held-out rows, every so many steps."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 20) * (1 - step / steps))
    generator = torch.Generator().manual_seed(seed)
    held_out = examples(512, torch.Generator().manual_seed(1_000), new)
    curve = []
    for step in range(steps + 1):
        if every and step % every == 0:
            curve.append((step, *evaluate(model, held_out)))
        if step < steps:
            model.train()
            model(**examples(64, generator, new)).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return curve


def adapted(base: nn.Module, how: str, seed: int, r: int) -> nn.Module:
    """The base model with one kind of LoReFT, seeded."""
    model = common.with_same_weights(base)
    config = {"r": r, "positions": "f1+l1", "task_type": "CAUSAL_LM"}
    torch.manual_seed(seed)
    if how == "here":
        return get_peft_model(model, ReftConfig(**config))
    here = get_peft_model(model, ReftConfig(**config, init_weights=False))
    if how == "here, random":
        return here
    householder = get_peft_model(
        common.with_same_weights(base), ReftConfig(**config, intervention="householder_loreft")
    )
    for block, interventions in get_interventions(householder).items():
        interventions[0].copy_from(get_interventions(here)[block][0])
    return householder


Curves = dict[str, list[list[tuple[int, float, float]]]]  # by method and seed: (step, loss, accuracy)


def curves_of(base: nn.Module, lr: float, r: int, steps: int, seeds: range) -> Curves:
    """Every method with every seed, at one learning rate and rank."""
    curves: Curves = {}
    starts = {}
    for seed in seeds:
        for how in METHODS:
            model = adapted(base, how, seed, r)
            curve = train(model, steps, lr, seed=100 + seed, new=True, every=steps // 25)
            curves.setdefault(how, []).append(curve)
            starts[how] = curve[0][1]
        assert abs(starts["here, random"] - starts["householder"]) < 1e-3, "the two must begin as the same function"
    return curves


def mean_and_deviation(values: list[float]) -> str:
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"


def table(found: dict[str, Curves]) -> str:
    """Final losses and accuracies, by setting and over all of them."""
    lines = ["| setting | LoReFT | final loss | final accuracy | by seed: loss (accuracy) |", "|---|---|---|---|---|"]
    for how in METHODS:
        for setting, curves in found.items():
            losses, accuracies = ([run[-1][i] for run in curves[how]] for i in (1, 2))
            each = ", ".join(f"{loss:.3f} ({accuracy:.3f})" for loss, accuracy in zip(losses, accuracies))
            spread = f"{mean_and_deviation(losses)} | {mean_and_deviation(accuracies)}"
            lines.append(f"| {setting} | {how} | {spread} | {each} |")
        if len(found) > 1:
            losses, accuracies = ([run[-1][i] for curves in found.values() for run in curves[how]] for i in (1, 2))
            spread = f"{mean_and_deviation(losses)} | {mean_and_deviation(accuracies)}"
            lines.append(f"| **all** | **{how}** | {spread} | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--lr", type=float, nargs="+", default=[5e-3, 1e-2])
    parser.add_argument("--rank", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # the model is so small that a second thread only waits
    register_intervention("householder_loreft", Householder)
    seeds = range(2) if arguments.quick else range(5)
    steps, base_steps = (50, 300) if arguments.quick else (arguments.steps, 500)
    record: dict[str, Any] = {**common.environment(), "steps": steps}

    base = common.llama(
        hidden=64, blocks=3, intermediate=128, vocab=VOCAB, num_attention_heads=4, num_key_value_heads=4
    )
    base.requires_grad_(True)
    train(base, base_steps, 3e-3, seed=0, new=False)
    base.requires_grad_(False)
    known = evaluate(base, examples(512, torch.Generator().manual_seed(1_000), False))[1]
    untouched = evaluate(base, examples(512, torch.Generator().manual_seed(1_000), True))
    record["base"] = {"known tasks": known, "new task": untouched}
    found = {f"lr {lr}, r={r}": curves_of(base, lr, r, steps, seeds) for lr in arguments.lr for r in arguments.rank}
    record["curves"] = found
    text = (
        f"{common.heading(record)}\nBase model: accuracy {known:.3f} on the tasks it knows, {untouched[1]:.3f} on the "
        f"new one (loss {untouched[0]:.2f}). {steps} steps of 64 rows, {len(seeds)} seeds; "
        f"mean ± standard deviation.\n\n"
        f"{table(found)}\n"
    )
    print(text)
    if not arguments.no_write:
        common.result_path("learning", "json").write_text(json.dumps(record, indent=1) + "\n")
        common.result_path("learning", "md").write_text(text)
        draw(found)


def draw(found: dict[str, Curves]) -> None:
    """Loss and accuracy over steps, a row for each setting: thin lines are seeds, the thick one their mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(len(found), 2, figsize=(9, 2.8 * len(found) + 0.8), sharex=True, squeeze=False)
    for axes, (setting, curves) in zip(grid, found.items()):
        for color, (how, runs) in zip(("tab:green", "tab:blue", "tab:orange"), curves.items()):
            for which, axis in enumerate(axes, start=1):
                steps = [point[0] for point in runs[0]]
                for run in runs:
                    axis.plot(steps, [point[which] for point in run], color=color, alpha=0.25, linewidth=0.8)
                mean = [statistics.mean(values) for values in zip(*([point[which] for point in run] for run in runs))]
                axis.plot(steps, mean, color=color, label=how, linewidth=2)
        axes[0].set(ylabel="held-out loss", yscale="log", title=setting)
        axes[1].set(ylabel="held-out accuracy", title=setting)
    for axis in grid[-1]:
        axis.set(xlabel="step")
    grid[0][1].legend()
    figure.tight_layout()
    figure.savefig(common.result_path("learning", "png"), dpi=110)


if __name__ == "__main__":
    main()
