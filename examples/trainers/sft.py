"""Supervised finetuning with TRL's SFTTrainer: prompts and completions, of which only the completions are learnt.

    python examples/trainers/sft.py                    # half a minute, no network
    accelerate launch --multi_gpu --num_processes 2 examples/trainers/sft.py    # two processes; without GPUs too

The trainer makes labels in which the prompt is -100, and so tells the adapter where the prompt ends.
"""

from __future__ import annotations

import common
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from peft_reft import ReftConfig


def main() -> None:
    """Teach the verdicts, and compare before, after, and reloaded."""
    given = common.options(__doc__)
    model, tokenizer = common.load(given)
    held_out = common.reviews(100, seed=1)
    data = Dataset.from_list(common.reviews(1000)).select_columns(["prompt", "completion"])
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=data,
        peft_config=ReftConfig(r=4, positions="f1+l3", task_type="CAUSAL_LM"),
        args=SFTConfig(**common.settings(given, "sft")),
    )
    before = common.probability(trainer.model, tokenizer, held_out)
    trainer.train()
    print(f"probability of the right verdict: {before} -> {common.probability(trainer.model, tokenizer, held_out)}")
    reloaded = common.save_and_reload(trainer, given)
    print(f"reloaded: {common.probability(reloaded, tokenizer, held_out)}")


if __name__ == "__main__":
    main()
