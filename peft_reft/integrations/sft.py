"""`python -m peft_reft sft`: supervised finetuning of a ReFT adapter, in the style of TRL's own script.

Options are read by sft_options.py, data by sft_data.py. Training is `SFTTrainer`'s. What is done here is to see that
there are prompts to edit: the marker before answers is found for the adapter's config, and an example is printed with
its edited tokens marked.
"""

from __future__ import annotations

import shlex
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTTrainer, get_quantization_config, is_conversational

from peft_reft.command_line import refuse_place, without_controls
from peft_reft.commands import this_python
from peft_reft.integrations.chat_template import chat_prompt_end
from peft_reft.integrations.collator import KEY, ReftDataCollator
from peft_reft.integrations.edited_tokens import columns_of, with_marks
from peft_reft.integrations.sft_data import load_data
from peft_reft.integrations.sft_options import PROGRAM, Parser, UserError
from peft_reft.integrations.threads import share_the_machine
from peft_reft.positions.prompts import IGNORED
from peft_reft.tuner.config import ReftConfig
from peft_reft.tuner.sizes import printable

__all__ = ["Parser", "main"]


def make_trainer(training: Any, model: Any, config: ReftConfig, train: Any, test: Any) -> Any:
    """The trainer, with the model loaded.

    Raises:
        UserError: if the model cannot be loaded, or not be edited as the config says.
    """
    try:
        AutoConfig.from_pretrained(
            model.model_name_or_path, revision=model.model_revision, trust_remote_code=training.trust_remote_code
        )
    except (OSError, ValueError) as error:
        name = model.model_name_or_path
        where = "" if Path(name).is_dir() else " There is no such folder here, so it was looked for on the hub."
        raise UserError(
            f"The base model {name!r} cannot be loaded.{where} {textwrap.shorten(str(error), 300)}"
        ) from error
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "trust_remote_code": training.trust_remote_code,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(training.model_init_kwargs or {}),
    }
    try:
        if config.prompt_end is None and is_conversational(next(iter(train))):
            config.prompt_end = marker_of(model, training)
        trainer = SFTTrainer(
            model=model.model_name_or_path,
            args=training,
            train_dataset=train,
            eval_dataset=test,
            quantization_config=get_quantization_config(model),
            peft_config=config,
        )
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error
    for rows, name in ((trainer.train_dataset, "train"), (trainer.eval_dataset, "evaluate")):
        if rows is not None and next(iter(rows), None) is None:
            raise UserError(
                f"No row is left to {name} on: every prompt takes up all of --max_length {training.max_length}, so "
                "that nothing is left of its completion, or the completions are empty. Raise --max_length, shorten "
                "the prompts, or fill in the completions."
            )
    # With label smoothing the labels do not reach the model; locations do.
    trainer.data_collator = ReftDataCollator(trainer.data_collator, config)
    return trainer


def marker_of(model: Any, training: Any) -> list[int] | None:
    """What the base model's chat template puts before answers, for whole conversations without labels; None if nothing.

    Training does without it: the labels show where prompts end.
    """
    if training.chat_template_path:
        return None  # another template takes the place of the tokenizer's own
    tokenizer = AutoTokenizer.from_pretrained(
        model.model_name_or_path, revision=model.model_revision, trust_remote_code=training.trust_remote_code
    )
    try:
        return chat_prompt_end(tokenizer)
    except ValueError as error:
        print(f"{PROGRAM}: the adapter's config gets no prompt_end. {error}", file=sys.stderr)
        return None


def what_is_trained(trainer: Any, config: ReftConfig) -> str:
    """How much is trained, and the first example with its edited tokens between « and »."""
    trainable, total = trainer.accelerator.unwrap_model(trainer.model).get_nb_trainable_parameters()
    batch = trainer.data_collator([next(iter(trainer.train_dataset))])
    ids, edited = batch["input_ids"][0].tolist(), columns_of(batch[KEY][0])
    labels = batch["labels"][0].tolist()
    start = next((column for column in range(1, len(ids)) if labels[column] != IGNORED), len(ids))
    decode = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    behind = {column - start for column in edited if column >= start}
    return without_controls(
        f"Training {trainable:,} of {total:,} parameters: {config.intervention} of rank {config.r} at "
        f"{config.positions}, learning rate {trainer.args.learning_rate:g}.\n"
        f"The first example, with the edited tokens between « and »:\n"
        f"  prompt  {with_marks(decode, ids[:start], edited)}\n"
        f"  answer  {with_marks(decode, ids[start:], behind)}"
    )


def what_was_stopped(trainer: Any) -> str:
    """How far the training came until Ctrl-C, and how to go on."""
    done = f"stopped in step {trainer.state.global_step + 1} of {trainer.state.max_steps}; the adapter was not saved."
    checkpoint = get_last_checkpoint(trainer.args.output_dir)
    if checkpoint is None:
        return f"{done} There is no checkpoint to go on from; --save_steps N writes one every N steps."
    return f"{done} The same command with --resume_from_checkpoint {shlex.quote(checkpoint)} goes on."


def diverged(trainer: Any) -> bool:
    """Whether a trained number is infinite or not a number, in this process or in another that trains with it."""
    trained = [p.to_local() if hasattr(p, "to_local") else p for p in trainer.model.parameters() if p.requires_grad]
    odd = any(not bool(p.detach().isfinite().all()) for p in trained)
    counted = torch.tensor(float(odd), device=trainer.accelerator.device)
    return bool(trainer.accelerator.reduce(counted, reduction="sum") > 0)


def what_next(folder: str, data: Any) -> str:
    """Where the adapter is, and the commands to talk with it and to look into it."""
    row = next(iter(data))
    prompt = row.get("prompt", "...")
    if isinstance(prompt, list):
        prompt = prompt[-1]["content"]
    where = shlex.quote(folder)
    short = isinstance(prompt, str) and len(prompt) <= 200 and without_controls(prompt) == prompt
    asked = shlex.quote(prompt if short else "...")
    return (
        f"The adapter is in {folder}. To talk with it, and to see what it edits:\n"
        f"  {this_python()} -m peft_reft chat {where}\n"
        f"  {this_python()} -m peft_reft inspect {where} --prompt {asked}"
    )


def end(trainer: Any) -> None:
    """End the trackers and the process group.

    What distributed training put around the model goes first: freed after the group that it talks through, it can wait
    forever for a thread of that group, which waits for it.
    """
    trainer.accelerator.wait_for_everyone()
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    trainer.accelerator.end_training()


def main(argv: list[str]) -> int:
    """Train an adapter as the command line says.

    Returns:
        The exit status: 0, or 2 if something that the user gave cannot be used (a line on stderr says what), or 1 if
        the training diverged, so that nothing is saved, or 130 after Ctrl-C in training.
    """
    # What TRL and PEFT use as their own, under names that transformers has changed
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing` is deprecated", FutureWarning)
    share_the_machine()
    try:
        # The data are looked at before the model is loaded, which may take minutes.
        config, script, training, model, mixture = Parser().parse(argv)
        resumed = training.resume_from_checkpoint
        if isinstance(resumed, str) and not Path(resumed).is_dir():
            raise UserError(f"--resume_from_checkpoint {resumed} is no folder. Name a checkpoint-N in --output_dir.")
        if isinstance(resumed, str) and not Path(resumed, "trainer_state.json").is_file():
            raise UserError(
                f"--resume_from_checkpoint {resumed} is no checkpoint: it has no trainer_state.json. Name a "
                "checkpoint-N in --output_dir."
            )
        try:
            refuse_place("--output_dir", Path(training.output_dir))
        except ValueError as error:
            raise UserError(str(error)) from error
        train, test = load_data(script, training, mixture)
        trainer = make_trainer(training, model, config, train, test)
    except UserError as error:
        print(f"{PROGRAM}: error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    trainer.accelerator.print(what_is_trained(trainer, config))
    try:
        trainer.train(resume_from_checkpoint=resumed)
    except KeyboardInterrupt:
        trainer.accelerator.print(f"\n{PROGRAM}: {what_was_stopped(trainer)}", file=sys.stderr)
        return 130
    if diverged(trainer):
        trainer.accelerator.print(
            f"{PROGRAM}: the training diverged: the adapter holds numbers that are infinite or NaN, and is not saved. "
            f"Train again with a --learning_rate below {training.learning_rate:g}, or from a checkpoint.",
            file=sys.stderr,
        )
        end(trainer)
        return 1
    if test is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    trainer.save_model(training.output_dir)
    trainer.accelerator.print(what_next(training.output_dir, train))
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
    end(trainer)
    return 0
