"""What ReFT learns from a reward with TRL's GRPOTrainer, beside LoRA, each at its own learning rate of four.

    python benchmarks/reinforcement.py            # two tasks, nine methods: a quarter of an hour of one CPU core
    python benchmarks/reinforcement.py --quick    # one rate, few steps: a minute

One small Llama, trained here, answers two kinds of prompts of four digits. They differ in where a better answer is
decided:

- `turn`: half of its answers repeat the digits, half turn them round. Reward 1 for turned round: the answer's first
  token decides, and the base model goes on as it began, mostly without a mistake.
- `even`: six random digits. Reward: the share of even ones. Every token decides.

Seed 0 tries every learning rate; the other seeds train each method at the rate that earned most, with another start,
other prompts and other samples. Means are over the other seeds alone: seed 0 chose the rate, and its best is flattered.

Every finished training is written at once and not run again by the same command. The first lines check that sampling
and scoring are one policy: log-probabilities of sampled tokens in `generate` against TRL's forward for the loss.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, PeftConfig, PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.trainer_callback import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks import common
from peft_reft import ReftConfig

DIGITS, LENGTH, SAID = 10, 4, 6  # kinds of digits, digits of a prompt, digits of an answer to `even`
WORDS = ["<pad>", "<eos>", "<unk>", *map(str, range(DIGITS)), "turn", "even", "="]
ZERO = WORDS.index("0")
TASKS = ("even", "turn")
RATES = (1.6e-2, 4e-3, 6.4e-2, 1e-3)  # the likeliest first: a run that is cut has these
ROWS, GROUP = 32, 8  # answers of a step, answers to one prompt
Row = dict[str, Any]  # what one training gave


def reft(positions: str, **changes: Any) -> ReftConfig:
    return ReftConfig(**{"r": 4, "positions": positions, "task_type": "CAUSAL_LM", **changes})


def lora(r: int) -> LoraConfig:
    return LoraConfig(r=r, lora_alpha=2 * r, target_modules=common.Q_V, task_type="CAUSAL_LM")


def methods() -> dict[str, PeftConfig]:
    """New configs: PEFT writes into those that it is given."""
    return {
        "LoRA r4 q,v": lora(4),
        "LoReFT f1+l1": reft("f1+l1"),
        "LoReFT all": reft("all"),
        "LoReFT f1+l1+d": reft("f1+l1+d"),
        "LoReFT all+d": reft("all+d"),
        "LoReFT f1+l1, random start": reft("f1+l1", init_weights=False),
        "LoReFT f1+l1+d, random start": reft("f1+l1+d", init_weights=False),
        "LoRA r2 q,v": lora(2),
        "LoReFT r8 all": reft("all", r=8),
    }


def right_answer(task: str, digits: Tensor, draw: torch.Generator) -> Tensor:
    """What the base model learns to say to prompts [B, LENGTH]: token ids with <eos>, [B, SAID + 1]."""
    rows = len(digits)
    if task == "even":
        said = torch.randint(DIGITS, (rows, SAID), generator=draw)
    else:
        turned = torch.rand(rows, 1, generator=draw) < 0.5
        said = torch.where(turned, digits.flip(1), digits)
    answer = torch.zeros(rows, SAID + 1, dtype=torch.long)
    answer[:, : said.shape[1]] = said + ZERO
    answer[:, said.shape[1]] = WORDS.index("<eos>")
    return answer


def rows_of(task: str, count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Prompts [count, LENGTH + 2] and their digits [count, LENGTH]."""
    digits = torch.randint(DIGITS, (count, LENGTH), generator=draw)
    first, last = (torch.full((count, 1), WORDS.index(word)) for word in (task, "="))
    return torch.cat([first, digits + ZERO, last], 1), digits


def reward(task: str, prompt: str, answer: str) -> float:
    """From 0 to 1."""
    digits, said = prompt.split()[1 : 1 + LENGTH], answer.split()
    if task == "even":
        return sum(int(word) % 2 == 0 for word in said if word.isdigit()) / max(len(said), SAID)
    return float(said == digits[::-1])


def begins_right(task: str, prompt: str, answer: str) -> bool:
    """Whether the answer's first token is one that earns."""
    first = answer.split()[:1]
    return first == prompt.split()[LENGTH : LENGTH + 1] if task == "turn" else first in [[word] for word in "02468"]


def base_model(steps: int) -> LlamaForCausalLM:
    """A Llama of hidden 64 and two blocks that answers both kinds."""
    model = common.llama(
        64, 2, 256, len(WORDS), num_attention_heads=4, num_key_value_heads=4, eos_token_id=1, pad_token_id=0
    )
    model.requires_grad_(True).train()
    draw = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        parts = []
        for task in TASKS:
            prompts, digits = rows_of(task, 32, draw)
            parts.append(torch.cat([prompts, right_answer(task, digits, draw)], 1))
        ids = torch.cat(parts)
        labels = ids.masked_fill(ids == 0, -100)
        labels[:, : LENGTH + 2] = -100
        loss = model(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval().requires_grad_(False)


def word_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def trainer_of(
    base: LlamaForCausalLM, task: str, config: PeftConfig, lr: float, steps: int, folder: str, seed: int = 0
) -> GRPOTrainer:
    tokenizer = word_tokenizer()
    prompts, _ = rows_of(task, 512, torch.Generator().manual_seed(1 + 1000 * seed))
    torch.manual_seed(seed)  # the adapter's start; TRL seeds later

    def rewarded(prompts: list[str], completions: list[str], **others: Any) -> list[float]:
        """TRL hands more over by name, such as the ids."""
        return [reward(task, prompt, said) for prompt, said in zip(prompts, completions)]

    settings = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "bf16": False, "disable_tqdm": True}
    return GRPOTrainer(
        model=common.with_same_weights(base),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": " ".join(WORDS[i] for i in row)} for row in prompts]),
        peft_config=config,
        reward_funcs=rewarded,
        args=GRPOConfig(
            folder,
            learning_rate=lr,
            max_steps=steps,
            seed=seed,
            per_device_train_batch_size=ROWS,
            num_generations=GROUP,
            max_completion_length=SAID + 1,
            beta=0.0,
            logging_steps=10,
            **settings,
        ),
    )


@torch.no_grad()
def measured(model: torch.nn.Module, task: str) -> Row:
    """Of 256 sampled answers to prompts that were not trained: their mean reward, and how many begin right."""
    prompts, _ = rows_of(task, 256, torch.Generator().manual_seed(2))
    torch.manual_seed(3)
    settings = {"max_new_tokens": SAID + 1, "do_sample": True, "top_k": 0, "pad_token_id": 0}
    said = model.eval().generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), **settings)
    tokenizer = word_tokenizer()
    texts = [tokenizer.batch_decode(part, skip_special_tokens=True) for part in (prompts, said[:, prompts.shape[1] :])]
    return {
        "reward": round(sum(reward(task, *pair) for pair in zip(*texts)) / len(prompts), 4),
        "begun": round(sum(begins_right(task, *pair) for pair in zip(*texts)) / len(prompts), 4),
    }


@torch.no_grad()
def largest_gap(base: LlamaForCausalLM, config: PeftConfig, folder: str) -> tuple[float, float]:
    """Log-probabilities of sampled tokens in `generate` less those of TRL's scoring forward: the largest gap.

    Also the largest difference that the adapter, which gets random weights, makes to them.
    """
    trainer = trainer_of(base, "even", config, 1e-3, 1, folder)
    model: PeftModel = trainer.model.eval()
    draw = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
    prompts, _ = rows_of("even", 16, draw)
    prompts = torch.nn.functional.pad(prompts, (3, 0))  # as shorter prompts are
    mask = (prompts != 0).long()
    settings = {"max_new_tokens": SAID, "min_new_tokens": SAID, "do_sample": True, "top_k": 0, "pad_token_id": 0}
    made = model.generate(
        input_ids=prompts, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **settings
    )
    said = made.sequences[:, prompts.shape[1] :]
    sampled = torch.stack(made.logits, 1).log_softmax(-1).gather(-1, said[..., None])[..., 0]
    every = torch.cat([mask, torch.ones_like(said)], 1)
    scored = trainer._get_per_token_logps_and_entropies(model, made.sequences, every, SAID)[0]
    with model.disable_adapter():
        plain = trainer._get_per_token_logps_and_entropies(model, made.sequences, every, SAID)[0]
    return float((sampled - scored).abs().max()), float((plain - scored).abs().max())


def train(base: LlamaForCausalLM, task: str, name: str, lr: float, seed: int, steps: int, folder: str) -> Row:
    """One training: its rewards on the way, and the reward of answers to other prompts afterwards."""
    begin = time.process_time()
    trainer = trainer_of(base, task, methods()[name], lr, steps, folder, seed)
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    curve = [round(line["reward"], 4) for line in trainer.state.log_history if "reward" in line]
    norms = [round(float(line["grad_norm"]), 5) for line in trainer.state.log_history if "grad_norm" in line]
    return {
        **measured(trainer.model, task),
        "curve": curve,
        "gradient norms": norms,
        "trained": trained,
        "CPU seconds": round(time.process_time() - begin, 1),
    }


def key_of(task: str, name: str, lr: float, seed: int) -> str:
    return f"{task} | {name} | {lr:g}" + (f" | seed {seed}" if seed else "")


def best_rate(trainings: dict[str, Row], task: str, name: str, rates: Iterable[float]) -> float:
    """The rate with the highest reward of seed 0; of equal ones the likeliest, which `rates` names first."""
    return max(rates, key=lambda lr: trainings.get(key_of(task, name, lr, 0), {"reward": -1.0})["reward"])


def mean_and_spread(values: list[float]) -> str:
    """With the standard deviation over seeds."""
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def seeds_table(record: dict[str, Any]) -> str:
    """Each method at its best rate, by task: seeds that did not choose it, at the end and on the way."""
    rows = []
    for task in record["base"]:
        for name in methods():
            lr = best_rate(record["trainings"], task, name, RATES)
            begin = key_of(task, name, lr, 0) + " | seed "
            found = [row for key, row in record["trainings"].items() if key.startswith(begin)]
            if found:
                ends, ways = [row["reward"] for row in found], [statistics.mean(row["curve"]) for row in found]
                each = ", ".join(f"{value:.2f}" for value in sorted(ends))
                begun = mean_and_spread([row["begun"] for row in found]) if "begun" in found[0] else "-"
                trained = f"{found[0]['trained']:,}"
                rows.append([task, name, trained, f"{lr:g}", mean_and_spread(ends), each, begun, mean_and_spread(ways)])
    header = [
        "task",
        "method",
        "trained",
        "best rate",
        "reward of other prompts",
        "by seed",
        "first token right",
        "on the way",
    ]
    return common.markdown_table(header, rows)


def markdown(record: dict[str, Any]) -> str:
    """All rates of each method, by task; then other seeds at the best."""
    lines = []
    for name in methods():
        cells = []
        for task in record["base"]:
            found = {
                key.split(" | ")[2]: row["reward"]
                for key, row in record["trainings"].items()
                if key.startswith(f"{task} | {name} | ") and "seed" not in key
            }
            cells.append(", ".join(f"{rate}: {found[rate]:.2f}" for rate in sorted(found, key=float)) or "-")
        lines.append([name, *cells])
    base = ["base model", *(f"{row['reward']:.2f}" for row in record["base"].values())]
    table = common.markdown_table(["reward by learning rate, seed 0", *record["base"]], [base, *lines])
    parts = ["# Reinforcement learning", table, "## Other seeds at the best rate", seeds_table(record)]
    return "\n\n".join([*parts, f"`{record['command']}`: {common.heading(record)}\n"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--methods", help="names, separated by semicolons; default all")
    parser.add_argument("--rates", default=",".join(map(str, RATES)), help="learning rates, separated by commas")
    parser.add_argument("--seeds", type=int, default=3, help="others than 0, of each method at its best rate")
    parser.add_argument("--steps", type=int, default=100, help="of a training")
    parser.add_argument("--minutes", type=float, default=math.inf, help="of CPU time, after which no training begins")
    parser.add_argument("--output", type=Path, help="the JSON file (default: in benchmarks/results)")
    parser.add_argument("--quick", action="store_true", help="40 steps of three methods at 1.6e-2, nothing written")
    given = parser.parse_args()
    names = given.methods.split(";") if given.methods else list(methods())[: 3 if given.quick else None]
    if unknown := set(names) - set(methods()):
        parser.error(f"--methods: {min(unknown)!r} is none of {'; '.join(methods())}")
    if unknown := set(given.tasks.split(",")) - set(TASKS):
        parser.error(f"--tasks: {min(unknown)!r} is none of {', '.join(TASKS)}")
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    path = given.output or common.result_path("reinforcement", "json")
    record = common.environment() | {"command": f"python {shlex.join(['benchmarks/reinforcement.py', *sys.argv[1:]])}"}
    record |= {"base": {}, "gaps": {}, "trainings": {}}
    if path.exists() and not given.quick:
        earlier = json.loads(path.read_text())
        record |= {"base": earlier["base"], "trainings": earlier["trainings"]}
        commands = [*earlier["command"].split(", then "), record["command"]]
        record["command"] = ", then ".join(dict.fromkeys(commands))
    with tempfile.TemporaryDirectory() as folder:
        run(given, names, record, None if given.quick else path, folder)


def trainings(
    given: argparse.Namespace, names: list[str], found: dict[str, Row]
) -> Iterator[tuple[str, str, float, int]]:
    """Task, method, rate and seed of each training that is not found: all rates, then the other seeds at the best."""
    rates = RATES[:1] if given.quick else tuple(map(float, given.rates.split(",")))
    for seed in range(1 if given.quick else 1 + given.seeds):
        for task in given.tasks.split(","):
            for number in range(len(rates) if seed == 0 else 1):
                for name in names:
                    lr = best_rate(found, task, name, rates) if seed else rates[number]
                    if key_of(task, name, lr, seed) not in found:
                        yield task, name, lr, seed


def run(given: argparse.Namespace, names: list[str], record: dict[str, Any], path: Path | None, folder: str) -> None:
    """What the record lacks; both files are written after each training.

    Args:
        path: of the JSON file; None to print only.
        folder: for trainers, which want one.
    """

    def say(words: str) -> None:
        print(f"[{time.process_time():6.1f} s] {words}", flush=True)

    base = base_model(300 if given.quick else 600)
    say("the base model is trained")
    for name in ("LoReFT f1+l1", "LoReFT all+d", "LoRA r4 q,v"):
        gap, effect = record["gaps"][name] = largest_gap(base, methods()[name], folder)
        say(f"{name}: sampling and scoring differ by {gap:.1e} nats, the adapter makes {effect:.2f}")
        if gap > 1e-3 * effect:
            raise RuntimeError(f"{name}: what is scored is not the policy that was sampled from")
    record["base"] |= {task: measured(base, task) for task in given.tasks.split(",")}
    say(f"rewards of the base model: {record['base']}")
    for task, name, lr, seed in trainings(given, names, record["trainings"]):
        if time.process_time() > 60 * given.minutes:
            break
        row = train(base, task, name, lr, seed, 40 if given.quick else given.steps, folder)
        record["trainings"][key_of(task, name, lr, seed)] = row
        say(f"{key_of(task, name, lr, seed)}: {row}")
        if path is not None:
            path.write_text(json.dumps(record, indent=1) + "\n")
            path.with_suffix(".md").write_text(markdown(record))


if __name__ == "__main__":
    main()
