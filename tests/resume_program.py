"""What test_trainers.py kills: `python resume_program.py FOLDER [--resume] [--hold STEP]` trains with SFTTrainer.

Rows are shuffled and the adapter has dropout, so that a resumed run has to find its place in the data and in the random
numbers too. With --hold the process says that it has arrived at a step, and waits there to be killed.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import transformers
from conftest import tiny_model
from trainer_kit import QUIET, rows_of_text, word_tokenizer
from trl import SFTConfig, SFTTrainer

from peft_reft import ReftConfig

STEPS, SAVE_STEPS = 6, 2


class Hold(transformers.TrainerCallback):
    """Waits after a step."""

    def __init__(self, folder: Path, step: int | None):
        self.folder, self.step = folder, step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            (self.folder / "holding").touch()
            time.sleep(600)


def train(folder: Path, resume: bool = False, hold: int | None = None) -> None:
    """Train, and save the adapter to FOLDER/final."""
    folder.mkdir(exist_ok=True)
    settings = {**QUIET, "save_strategy": "steps", "save_steps": SAVE_STEPS, "max_steps": STEPS, "max_length": 64}
    trainer = SFTTrainer(
        model=tiny_model("llama"),
        args=SFTConfig(**settings, output_dir=str(folder / "trainer"), gradient_accumulation_steps=2),
        train_dataset=rows_of_text(32, prompt=(1, 6), completion=(2, 4)),
        processing_class=word_tokenizer(),
        peft_config=ReftConfig(task_type="CAUSAL_LM", positions="f2+l2", dropout=0.2, share_weights=False),
        callbacks=[Hold(folder, hold)],
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(folder / "final"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--hold", type=int)
    options = parser.parse_args()
    train(options.folder, options.resume, options.hold)
