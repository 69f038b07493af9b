"""Kahneman-Tversky optimisation with TRL's KTOTrainer: single answers, each of which is wanted or not.

python examples/trainers/kto.py
"""

from __future__ import annotations

import common
from datasets import Dataset
from trl import KTOConfig, KTOTrainer

from peft_reft import ReftConfig


def main() -> None:
    """Learn from right verdicts that were praised, and wrong ones that were not."""
    given = common.options(__doc__)
    model, tokenizer = common.load(given)
    held_out = common.reviews(100, seed=1)
    rows = [
        {"prompt": row["prompt"], "completion": row["completion" if wanted else "wrong"], "label": wanted}
        for row in common.reviews(500)
        for wanted in (True, False)
    ]
    data = Dataset.from_list(rows)
    trainer = KTOTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=data,
        peft_config=ReftConfig(r=4, positions="f1+l3", task_type="CAUSAL_LM"),
        args=KTOConfig(**common.settings(given, "kto"), beta=0.1),
    )
    before = common.probability(trainer.model, tokenizer, held_out)
    trainer.train()
    print(f"probability of the right verdict: {before} -> {common.probability(trainer.model, tokenizer, held_out)}")
    reloaded = common.save_and_reload(trainer, given)
    print(f"reloaded: {common.probability(reloaded, tokenizer, held_out)}")


if __name__ == "__main__":
    main()
