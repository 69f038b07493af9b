"""Prompts and completions: train with TRL's SFTTrainer, generate answers with the recipe's decoding, judge them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from answers import judge
from datasets import Dataset
from methods import adapter_config, load_model, load_tokenizer, parameters, size, trained, trainer_arguments
from prompts import FORMATS
from report import peak_memory, write_lines
from sources import rows
from transformers import GenerationConfig
from trl import SFTConfig, SFTTrainer


def texts(settings: Mapping[str, Any]) -> Iterator[str]:
    """All prompts and completions of a recipe, for a smoke run's vocabulary."""
    for source in (settings["train"], *settings["evaluation"]["tasks"].values()):
        for row in rows(source):
            yield "".join(FORMATS[settings["prompts"]](row))


def examples(settings: Mapping[str, Any], seed: int) -> Dataset:
    """The training set as columns `prompt` and `completion`. Rows without a completion are left out."""
    pairs = [FORMATS[settings["prompts"]](row) for row in rows(settings["train"], seed)]
    return Dataset.from_list([{"prompt": prompt, "completion": answer} for prompt, answer in pairs if answer])


def run(settings: Mapping[str, Any], seed: int, folder: Path) -> dict[str, Any]:
    """Train and evaluate; the adapter and every task's answers are saved in `folder`.

    Returns:
        `parameters`, `training` (seconds, steps, loss), `memory_bytes`, and per task `score` (right answers by the
        paper's rule, 0 to 1; None for tasks without right answers), `careful` (by the careful rule), `rows`, `seconds`.
    """
    tokenizer = load_tokenizer(settings)
    base = load_model(settings)
    base_size = size(base)
    adapter = adapter_config(settings)
    trainer = SFTTrainer(
        model=base,
        args=SFTConfig(**{"save_strategy": "no", **trainer_arguments(settings, folder, seed)}),
        train_dataset=examples(settings, seed),
        processing_class=tokenizer,
        peft_config=adapter,
    )
    counted = parameters(trainer.model, base_size)
    training = trained(trainer)
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    if adapter is not None and PartialState().is_main_process:
        model.save_pretrained(folder / "adapter")
    tasks = {}
    for name, source in settings["evaluation"]["tasks"].items():
        begin = time.perf_counter()
        limit = settings["evaluation"].get("max_examples")
        asked = list(rows({"max_examples": limit, **source}, seed, split="test"))
        given = generate(model, tokenizer, settings, [FORMATS[settings["prompts"]](row)[0] for row in asked])
        tasks[name] = {**score(asked, given, folder / f"{name}.jsonl"), "seconds": time.perf_counter() - begin}
    return {
        "parameters": counted,
        "training": training,
        "memory_bytes": peak_memory(),
        "tasks": tasks,
    }


@torch.no_grad()
def generate(model: Any, tokenizer: Any, settings: Mapping[str, Any], prompts: list[str]) -> list[str]:
    """What the model answers to each prompt, decoded as the recipe says; shared out over the processes of a launch."""
    tokenizer.padding_side = "left"
    decoding = {key: value for key, value in settings["evaluation"]["generation"].items() if value is not None}
    config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **decoding,
    )
    batch_size = settings["evaluation"]["batch_size"]
    given: list[tuple[int, str]] = []
    with PartialState().split_between_processes(list(enumerate(prompts))) as share:
        for start in range(0, len(share), batch_size):
            numbers, batch = zip(*share[start : start + batch_size])
            inputs = tokenizer(list(batch), return_tensors="pt", padding=True).to(model.device)
            output = model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :]
            given += zip(numbers, tokenizer.batch_decode(output, skip_special_tokens=True))
    return [answer for _, answer in sorted(gather_object(given))]


def score(asked: list[Mapping[str, Any]], given: list[str], file: Path) -> dict[str, Any]:
    """Judge a task's answers, and write each with what was read in it, one JSON object a line.

    Rows without a right answer are instructions: their answers are written in the format of AlpacaEval, whose judge
    (GPT-4, in the paper) scores them.
    """
    if not asked or "answer" not in asked[0]:
        lines = [{"instruction": row["instruction"], "output": text} for row, text in zip(asked, given)]
        write_lines(file, [{**line, "generator": file.parent.name} for line in lines])
        return {"score": None, "rows": len(asked), "empty": sum(not text.strip() for text in given)}
    verdicts = [judge(text, row) for row, text in zip(asked, given)]
    lines = [{"instruction": row["instruction"], "output": text} for row, text in zip(asked, given)]
    write_lines(file, [{**line, **verdict} for line, verdict in zip(lines, verdicts)])
    right = {rule: sum(verdict[rule] for verdict in verdicts) / len(verdicts) for rule in ("paper", "careful")}
    return {"score": right["paper"], "careful": right["careful"], "rows": len(asked)}
