"""Classification with transformers' Trainer: metrics, rows grouped by length, the best checkpoint, predictions.

    python examples/trainers/classification.py

Class labels say nothing about prompts: positions count over the whole text. The head is trained in full and saved with
the adapter. A run that was stopped goes on with `trainer.train(resume_from_checkpoint=True)`.
"""

from __future__ import annotations

import common
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, Trainer, TrainingArguments

from peft_reft import ReftConfig


def main() -> None:
    """Tell kind reviews from unkind ones."""
    given = common.options(__doc__)
    model, tokenizer = common.load(given, AutoModelForSequenceClassification, num_labels=2)

    def prepared(rows: list[dict[str, str]]) -> Dataset:
        texts = [row["prompt"].removesuffix(" verdict :") for row in rows]
        labels = [common.VERDICTS.index(row["completion"].strip()) for row in rows]
        return Dataset.from_list([{**tokenizer(t), "labels": n} for t, n in zip(texts, labels, strict=True)])

    def accuracy(prediction) -> dict[str, float]:
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    each = max(1, (150 if given.steps is None else given.steps) // 3)
    schedule = {"eval_strategy": "steps", "eval_steps": each, "save_strategy": "steps", "save_steps": each}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "accuracy"}
    trainer = Trainer(
        model=get_peft_model(model, ReftConfig(r=4, positions="f1+l3", task_type="SEQ_CLS")),
        processing_class=tokenizer,
        train_dataset=prepared(common.reviews(1000)),
        eval_dataset=prepared(common.reviews(100, seed=1)),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
        args=TrainingArguments(
            **common.settings(given, "classification", **schedule, **best), train_sampling_strategy="group_by_length"
        ),
    )
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    after = trainer.predict(trainer.eval_dataset).metrics["test_accuracy"]
    print(f"right verdicts: {before:.0%} -> {after:.0%}")
    trainer.model = common.save_and_reload(trainer, given, AutoModelForSequenceClassification, num_labels=2)
    print(f"reloaded: {trainer.predict(trainer.eval_dataset).metrics['test_accuracy']:.0%}")


if __name__ == "__main__":
    main()
