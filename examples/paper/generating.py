"""Prompts and completions: train with TRL's SFTTrainer, generate answers with the recipe's decoding, judge them."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from answers import gold_of, judge
from datasets import Dataset
from methods import adapter_config, load_model, load_tokenizer, parameters, size, trained, trainer_arguments
from prompts import FORMATS
from recipe import RecipeError
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
    """The training set as columns `prompt` and `completion`. Rows that lack one of them are left out."""
    found = rows(settings["train"], seed, columns=["instruction"])
    pairs = [FORMATS[settings["prompts"]](row) for row in found if row["instruction"]]
    kept = [{"prompt": prompt, "completion": answer} for prompt, answer in pairs if answer]
    if not kept:
        raise RecipeError(
            f"No row of {settings['train']['data']!r} has an instruction with what completes it; they have the columns "
            f"{', '.join(found.column_names)}. See README.md for the formats."
        )
    if len(kept) < len(found):
        warnings.warn(f"{len(found) - len(kept)} of {len(found)} training rows lack an instruction or its completion.")
    return Dataset.from_list(kept)


def questions(settings: Mapping[str, Any], seed: int) -> dict[str, list[dict[str, Any]]]:
    """The test rows of each task, all of which can be asked and, but for instructions, judged.

    Raises:
        RecipeError: if one cannot, with its number.
    """
    judged = settings["prompts"] != "instruct"
    limit, tasks = settings["evaluation"].get("max_examples"), {}
    for name, source in settings["evaluation"]["tasks"].items():
        columns = ["instruction", "answer"] if judged else ["instruction"]
        tasks[name] = list(rows({"max_examples": limit, **source}, seed, split="test", columns=columns))
        for number, row in enumerate(tasks[name]):
            try:
                if not isinstance(row["instruction"], str):
                    raise ValueError(f"instruction={row['instruction']!r} must be a text.")
                if judged:
                    gold_of(row)
            except ValueError as error:
                raise RecipeError(f"Row {number} of {source['data']!r} cannot be tested: {error}") from error
    return tasks


def run(settings: Mapping[str, Any], seed: int, folder: Path) -> dict[str, Any]:
    """Train and evaluate; the adapter and every task's answers are saved in `folder`.

    Returns:
        `parameters`, `training` (seconds, steps, loss, `examples`, and how many more were `too_long`), `memory_bytes`,
        and per task `score` (right answers by the paper's rule, 0 to 1; None for tasks without right answers),
        `careful` (by the careful rule), `rows`, `too_long` (rows whose prompt leaves no room for an answer), `seconds`.
    """
    tokenizer = load_tokenizer(settings)
    tasks, train = questions(settings, seed), examples(settings, seed)  # what is wrong with data shows before training
    base = load_model(settings)
    base_size = size(base)
    adapter = adapter_config(settings)
    trainer = SFTTrainer(
        model=base,
        args=SFTConfig(**{"save_strategy": "no", **trainer_arguments(settings, folder, seed)}),
        train_dataset=train,
        processing_class=tokenizer,
        peft_config=adapter,
    )
    # The trainer drops what has no completion within max_length, so no prompt is edited at a cut end.
    fitting, limit = len(trainer.train_dataset), settings["training"].get("max_length")
    if not fitting:
        raise RecipeError(f"No prompt of {settings['train']['data']!r} is shorter than training.max_length={limit}.")
    if fitting < len(train):
        warnings.warn(
            f"{len(train) - fitting} of {len(train)} prompts fill training.max_length={limit}: not trained on."
        )
    counted = parameters(trainer.model, base_size)
    training = {**trained(trainer), "examples": fitting, "too_long": len(train) - fitting}
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    if adapter is not None and PartialState().is_main_process:
        model.save_pretrained(folder / "adapter")
    measured = {}
    for name, asked in tasks.items():
        begin = time.perf_counter()
        given = generate(model, tokenizer, settings, [FORMATS[settings["prompts"]](row)[0] for row in asked])
        measured[name] = {**score(asked, given, folder / f"{name}.jsonl"), "seconds": time.perf_counter() - begin}
    return {
        "parameters": counted,
        "training": training,
        "memory_bytes": peak_memory(),
        "tasks": measured,
    }


@torch.no_grad()
def generate(model: Any, tokenizer: Any, settings: Mapping[str, Any], prompts: list[str]) -> list[str | None]:
    """What the model answers to each prompt, decoded as the recipe says; shared out over the processes of a launch.

    A prompt is never cut, as its last tokens are edited. One that fills `max_length` or what the model can read is not
    asked: None.
    """
    tokenizer.padding_side = "left"
    decoding = {key: value for key, value in settings["evaluation"]["generation"].items() if value is not None}
    config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **decoding,
    )
    batch_size = settings["evaluation"]["batch_size"]
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = min(filter(None, (decoding.get("max_length"), context)), default=float("inf"))
    fitting = [number for number, prompt in enumerate(prompts) if len(tokenizer(prompt)["input_ids"]) < room]
    if len(fitting) < len(prompts):
        warnings.warn(f"{len(prompts) - len(fitting)} of {len(prompts)} prompts have {room} tokens or more: not asked.")
    given: list[tuple[int, str]] = []
    with PartialState().split_between_processes([(number, prompts[number]) for number in fitting]) as share:
        for start in range(0, len(share), batch_size):
            numbers, batch = zip(*share[start : start + batch_size])
            inputs = tokenizer(list(batch), return_tensors="pt", padding=True).to(model.device)
            output = model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :]
            given += zip(numbers, tokenizer.batch_decode(output, skip_special_tokens=True))
    answers = dict(gather_object(given))
    return [answers.get(number) for number in range(len(prompts))]


def score(asked: Sequence[Mapping[str, Any]], answers: Sequence[str | None], file: Path) -> dict[str, Any]:
    """Judge a task's answers, and write each with what was read in it, one JSON object a line.

    Rows without a right answer are instructions: their answers are written in the format of AlpacaEval, whose judge
    (GPT-4, in the paper) scores them. An answer that is None counts as an empty one.
    """
    given = [answer or "" for answer in answers]
    lines = [{"instruction": row["instruction"], "output": text} for row, text in zip(asked, given)]
    counts = {"rows": len(asked), "too_long": sum(answer is None for answer in answers)}
    if "answer" not in asked[0]:
        write_lines(file, [{**line, "generator": file.parent.name} for line in lines])
        return {"score": None, **counts, "empty": sum(not text.strip() for text in given)}
    verdicts = [judge(text, row) for row, text in zip(asked, given)]
    write_lines(file, [{**line, **verdict} for line, verdict in zip(lines, verdicts)])
    right = {rule: sum(verdict[rule] for verdict in verdicts) / len(verdicts) for rule in ("paper", "careful")}
    return {"score": right["paper"], "careful": right["careful"], **counts}
