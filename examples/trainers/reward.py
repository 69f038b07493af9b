"""A reward model with TRL's RewardTrainer: a number for a text, larger for those that are preferred.

    python examples/trainers/reward.py

There is no prompt to find here: positions count over the whole text, in training and in use. (The trainer ends each
text with the end-of-text token, so what is rewarded later must end with it too.) PEFT trains the head, which is new, in
full, and saves it with the adapter.
"""

from __future__ import annotations

from typing import Any

import common
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer

from peft_reft import ReftConfig


@torch.no_grad()
def share_right(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> str:
    """How often the text with the right verdict gets more than the one with the wrong verdict."""
    scores = []
    for name in ("completion", "wrong"):
        texts = [f"{row['prompt']}{row[name]} {tokenizer.eos_token}" for row in rows]
        scores.append(model.eval()(**tokenizer(texts, return_tensors="pt", padding=True).to(model.device)).logits)
    right, wrong = scores
    return f"{(right > wrong).float().mean():.0%}"


def main() -> None:
    """Prefer texts with right verdicts."""
    given = common.options(__doc__)
    model, tokenizer = common.load(given, AutoModelForSequenceClassification, num_labels=1)
    held_out = common.reviews(100, seed=1)
    rows = [
        {"chosen": r["prompt"] + r["completion"], "rejected": r["prompt"] + r["wrong"]} for r in common.reviews(1000)
    ]
    trainer = RewardTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
        peft_config=ReftConfig(r=4, positions="f1+l4", task_type="SEQ_CLS"),
        args=RewardConfig(**common.settings(given, "reward")),
    )
    before = share_right(trainer.model, tokenizer, held_out)
    trainer.train()
    print(f"right verdicts: {before} -> {share_right(trainer.model, tokenizer, held_out)}")
    reloaded = common.save_and_reload(trainer, given, AutoModelForSequenceClassification, num_labels=1)
    print(f"reloaded: {share_right(reloaded, tokenizer, held_out)}")


if __name__ == "__main__":
    main()
