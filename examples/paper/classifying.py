"""Classification: train a task of GLUE with transformers' Trainer, keep the best epoch, and report on held-out rows.

The validation set is split in two by the seed: one part selects the epoch, the other is reported (appendix C.3).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
from accelerate import PartialState
from datasets import Dataset, Value
from methods import adapter_config, load_model, load_tokenizer, parameters, size, trained, trainer_arguments
from recipe import RecipeError
from report import peak_memory
from scores import TASKS, glue_scores, halves, main_metric
from sources import is_file, rows
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

# The one or two columns with the text.
COLUMNS = {
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "mrpc": ("sentence1", "sentence2"),
    "rte": ("sentence1", "sentence2"),
    "stsb": ("sentence1", "sentence2"),
}
LABELS = {"mnli": 3, "stsb": 1}  # the others have 2; one label is a regression


def texts(settings: Mapping[str, Any]) -> Iterator[str]:
    """All texts of a recipe's task, for a smoke run's vocabulary."""
    (task,) = settings["evaluation"]["tasks"]
    for row in rows(training_source(settings, task)):
        yield from (row[column] for column in COLUMNS[task])


def training_source(settings: Mapping[str, Any], task: str) -> dict[str, Any]:
    """The training rows: those of the recipe's `train`, of the task's `train` file, or of its data's training split."""
    entry = dict(settings["evaluation"]["tasks"][task])
    own_file = entry.pop("train", None)
    own = {"data": own_file} if own_file else {}
    source = {"name": task, **entry, **own, "split": "train", **settings["train"]}
    if is_file(entry["data"]) and not own and "data" not in settings["train"]:
        raise RecipeError(
            f"evaluation.tasks.{task}.data={entry['data']!r} is one file, to evaluate by. Give another to train on: "
            f"evaluation.tasks.{task}.train=..."
        )
    return source


def labelled(source: Mapping[str, Any], task: str, seed: int, split: str) -> Dataset:
    """A task's rows with a label each: a class number, for stsb a similarity from 0 to 5.

    Raises:
        RecipeError: if a row has no such label, as in GLUE's test splits, or lacks a text.
    """
    found = rows(source, seed, split, columns=[*COLUMNS[task], "label"])
    most = 5 if task == "stsb" else LABELS.get(task, 2) - 1
    for number, label in enumerate(found["label"]):
        known = isinstance(label, (int, float)) and 0 <= label <= most
        if not known or (task != "stsb" and label != int(label)):
            raise RecipeError(
                f"Row {number} of {source['data']!r} ({split}) has label={label!r}; in {task} a label is a "
                f"{'similarity' if task == 'stsb' else 'whole number'} from 0 to {most}, as in nyu-mll/glue."
            )
    for column in COLUMNS[task]:
        for number, text in enumerate(found[column]):
            if not isinstance(text, str):
                raise RecipeError(
                    f"Row {number} of {source['data']!r} ({split}) has {column}={text!r}, which is no text."
                )
    return found.cast_column("label", Value("float32" if task == "stsb" else "int64"))


def run(settings: Mapping[str, Any], seed: int, folder: Path) -> dict[str, Any]:
    """Train and evaluate the one task that the settings are resolved for; the adapter is saved in `folder`.

    Returns:
        `parameters`, `training`, `memory_bytes`, and for the task `score` (the metric that the paper reports), all
        metrics by name, `rows`, and `selection` (the score of the selected epoch on the selection half).
    """
    (task,) = settings["evaluation"]["tasks"]
    if task not in TASKS:
        raise RecipeError(f"The task {task!r} is not in GLUE as the paper uses it; use one of {', '.join(TASKS)}.")
    limit = settings["evaluation"].get("max_examples")
    source = {"name": task, "max_examples": limit, **settings["evaluation"]["tasks"][task]}
    arguments = trainer_arguments(settings, folder, seed)
    tokenizer, max_length = load_tokenizer(settings), arguments.pop("max_length")

    def encoded(part: Any) -> Any:
        kept = [column for column in part.column_names if column not in ("label", *COLUMNS[task])]
        return part.map(
            lambda batch: tokenizer(
                *(batch[column] for column in COLUMNS[task]), truncation=True, max_length=max_length
            ),
            batched=True,
            remove_columns=[*kept, *COLUMNS[task]],
        ).rename_column("label", "labels")

    train = encoded(labelled(training_source(settings, task), task, seed, "train"))
    validation = encoded(labelled(source, task, seed, "validation"))
    selection, held_out = halves(len(validation), seed)
    if not selection:
        raise RecipeError(f"{source['data']!r} has one row; one to select the epoch by and one to report are needed.")

    base = load_model(settings, num_labels=LABELS.get(task, 2), pad_token_id=tokenizer.pad_token_id)
    base_size = size(base)
    adapter = adapter_config(settings)
    model = base if adapter is None else peft.get_peft_model(base, adapter)

    def compute_metrics(prediction: Any) -> dict[str, float]:
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        predicted = logits.squeeze(-1) if task == "stsb" else np.argmax(logits, axis=-1)
        return glue_scores(task, predicted, prediction.label_ids)

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=1,
            load_best_model_at_end=True,
            metric_for_best_model=main_metric(task),
            greater_is_better=True,
            per_device_eval_batch_size=settings["evaluation"]["batch_size"],
            **arguments,
        ),
        train_dataset=train,
        eval_dataset=validation.select(selection),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=compute_metrics,
    )
    counted = parameters(trainer.model, base_size)
    training = trained(trainer)
    found = trainer.predict(validation.select(held_out), metric_key_prefix="held_out").metrics
    metrics = {name: found[f"held_out_{name}"] for name in glue_scores(task, [0, 1], [0, 1])}
    if adapter is not None and PartialState().is_main_process:
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder / "adapter")
    return {
        "parameters": counted,
        "training": training,
        "memory_bytes": peak_memory(),
        "tasks": {
            task: {
                "score": metrics[main_metric(task)],
                **metrics,
                "rows": len(held_out),
                "selection": trainer.state.best_metric,
                "seconds": found["held_out_runtime"],
            }
        },
    }
