"""What the trainer examples share: reviews to judge, a small model that writes them, options, and how to score answers.

A review is two sentences that are both kind or both unkind, and "verdict :". The small model has read many of them, of
which only two in three had the right verdict: it is right with a probability of 67%. The examples teach it to be right.
It is trained once, in some seconds, and kept in <output>/base; with --model there is a real one instead.
"""

from __future__ import annotations

import argparse
import os
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

THINGS = ["soup", "bread", "room", "bed", "film", "song", "train", "garden", "coffee", "waiter"]
KIND, UNKIND = ["lovely", "tasty", "clean", "bright", "warm"], ["awful", "stale", "dirty", "dull", "cold"]
VERDICTS = ("good", "bad")


def options(description: str | None) -> argparse.Namespace:
    """The options of every example."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--model", help="hub id or path of a real model; default: a small one, made here")
    parser.add_argument("--output", type=Path, default=Path("trainer-examples"), help="folder for what is saved")
    parser.add_argument("--steps", type=int, help="training steps; default: enough to learn it")
    found = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.set_seed(0)
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # so small a model gains nothing from more
    return found


def reviews(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Reviews as `prompt`, each with its `completion` and with the `wrong` one."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        first, second = draw.sample(THINGS, 2)
        words = draw.sample((KIND, UNKIND)[number % 2], 2)
        right, wrong = VERDICTS[number % 2], VERDICTS[1 - number % 2]
        prompt = f"the {first} was {words[0]} and the {second} was {words[1]} . verdict :"
        rows.append({"prompt": prompt, "completion": f" {right}", "wrong": f" {wrong}"})
    return rows


def load(given: argparse.Namespace, kind: Any = AutoModelForCausalLM, **settings: Any) -> tuple[Any, Any]:
    """The base model, of the class `kind`, and its tokenizer."""
    base = given.model or given.output / "base"
    if given.model is None:
        with PartialState(cpu=not torch.cuda.is_available()).main_process_first():  # the others find it
            if not base.exists():
                make_base_model(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = kind.from_pretrained(base, **settings)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def make_base_model(folder: Path, steps: int = 300) -> None:
    """Train a small Llama to write reviews, one in three of them with the wrong verdict.

    It is kept for later runs, so that it is whole whatever `--steps` says.
    """
    words = ["<pad>", "<eos>", "<unk>", *["the", "was", "and", ".", "verdict", ":"], *THINGS, *KIND, *UNKIND, *VERDICTS]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(words), pad_token_id=0, bos_token_id=None, eos_token_id=1, **size)
    )
    draw = random.Random(0)
    drawn = [(row, draw.choice(("completion", "completion", "wrong"))) for row in reviews(2000)]
    texts = [f"{row['prompt']}{row[verdict]} <eos>" for row, verdict in drawn]
    tokens = torch.tensor(tokenizer(texts)["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        batch = tokens[torch.randint(len(tokens), (32,))]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    unfinished = folder.with_name(folder.name + ".unfinished")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    os.replace(unfinished, folder)


def settings(given: argparse.Namespace, name: str, **more: Any) -> dict[str, Any]:
    """Arguments for any trainer's config; those that are specific to one come with `more`."""
    steps = more.pop("max_steps", 150) if given.steps is None else given.steps
    gpu = torch.cuda.is_available()
    return {
        "output_dir": str(given.output / name),
        "max_steps": steps,
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-2 if given.model is None else 2e-3,  # a narrow model wants larger steps
        "logging_steps": max(1, steps // 3),
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not gpu,
        "bf16": gpu,
        "seed": 0,
        **more,
    }


@torch.no_grad()
def probability(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> str:
    """The mean probability of the right verdict as against the wrong one, where `generate` writes it."""
    batch = tokenizer([row["prompt"] for row in rows], return_tensors="pt", padding=True, padding_side="left")
    first = (
        model.eval()
        .generate(
            **batch.to(model.device),
            max_new_tokens=1,
            output_logits=True,
            return_dict_in_generate=True,
            do_sample=False,
        )
        .logits[0]
    )
    names = ("completion", "wrong")  # their first tokens
    ids = [[tokenizer(row[name], add_special_tokens=False)["input_ids"][0] for name in names] for row in rows]
    return f"{first.float().cpu().gather(1, torch.tensor(ids)).softmax(-1)[:, 0].mean():.0%}"


def save_and_reload(trainer: Any, given: argparse.Namespace, kind: Any = AutoModelForCausalLM, **settings: Any) -> Any:
    """Save the adapter to <output>/adapter-..., and put it on a fresh base model."""
    folder = f"{trainer.args.output_dir}-adapter"
    trainer.save_model(folder)
    trainer.accelerator.wait_for_everyone()
    fresh, _ = load(given, kind, **settings)
    print(f"saved in {folder}")
    return PeftModel.from_pretrained(fresh, folder).to(trainer.model.device)
