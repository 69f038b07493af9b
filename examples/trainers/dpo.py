"""Direct preference optimisation with TRL's DPOTrainer: of two answers, which one is preferred.

    python examples/trainers/dpo.py

The reference policy is the model without its adapter. To go on from a trained adapter, pass a PeftModel and no
peft_config: the trainer then copies the adapter, and the copy is the reference.
"""

from __future__ import annotations

import common
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from peft_reft import ReftConfig


def main() -> None:
    """Prefer the right verdicts to the wrong ones."""
    given = common.options(__doc__)
    model, tokenizer = common.load(given)
    held_out = common.reviews(100, seed=1)
    rows = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": r["wrong"]} for r in common.reviews(1000)]
    data = Dataset.from_list(rows)
    trainer = DPOTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=data,
        peft_config=ReftConfig(r=4, positions="f1+l3", task_type="CAUSAL_LM"),
        args=DPOConfig(**common.settings(given, "dpo"), beta=0.1),
    )
    before = common.probability(trainer.model, tokenizer, held_out)
    trainer.train()
    print(f"probability of the right verdict: {before} -> {common.probability(trainer.model, tokenizer, held_out)}")
    reloaded = common.save_and_reload(trainer, given)
    print(f"reloaded: {common.probability(reloaded, tokenizer, held_out)}")


if __name__ == "__main__":
    main()
