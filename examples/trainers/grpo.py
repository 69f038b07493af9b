"""Group relative policy optimisation with TRL's GRPOTrainer: answers are sampled, and rewarded.

    python examples/trainers/grpo.py

What is sampled and what is scored afterwards is edited at the same tokens: those of the prompt. vLLM (use_vllm=True)
cannot run the edits; sample with transformers, as here.
"""

from __future__ import annotations

import common
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from peft_reft import ReftConfig


def main() -> None:
    """Reward the right verdicts."""
    given = common.options(__doc__)
    model, tokenizer = common.load(given)
    held_out = common.reviews(100, seed=1)
    data = Dataset.from_list(common.reviews(1000)).rename_column("completion", "right")

    def is_right(completions: list[str], right: list[str], **others: object) -> list[float]:
        """1 for a right verdict. What the data set has besides prompts is handed over by name."""
        return [float(said.strip() == wanted.strip()) for said, wanted in zip(completions, right, strict=True)]

    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=data,
        peft_config=ReftConfig(r=4, positions="f1+l3", task_type="CAUSAL_LM"),
        reward_funcs=is_right,
        args=GRPOConfig(
            **common.settings(given, "grpo", per_device_train_batch_size=64),  # 8 prompts
            num_generations=8,
            max_completion_length=1,
            beta=0.0,  # stay as close to the model without the adapter as this; 0 saves the reference's forwards
        ),
    )
    before = common.probability(trainer.model, tokenizer, held_out)
    trainer.train()
    print(f"probability of the right verdict: {before} -> {common.probability(trainer.model, tokenizer, held_out)}")
    reloaded = common.save_and_reload(trainer, given)
    print(f"reloaded: {common.probability(reloaded, tokenizer, held_out)}")


if __name__ == "__main__":
    main()
