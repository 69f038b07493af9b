"""`python -m peft_reft sft`: supervised finetuning of a ReFT adapter, in the style of TRL's own script.

Options are read by sft_options.py. Training is `SFTTrainer`'s. What is done here is to see that there are prompts to
edit, since data without prompts train nothing: conversations are split before their last answer, the marker before
answers is found for the adapter's config, and an example is printed with its edited tokens marked.
"""

from __future__ import annotations

import shlex
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

from datasets import load_dataset
from transformers import AutoConfig, AutoTokenizer, set_seed
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTTrainer, get_dataset, get_quantization_config, is_conversational
from trl.scripts.utils import DatasetConfig

from peft_reft.commands import this_python
from peft_reft.info.files import one_line
from peft_reft.integrations.chat_template import chat_prompt_end
from peft_reft.integrations.collator import KEY, ReftDataCollator
from peft_reft.integrations.edited_tokens import columns_of, with_marks
from peft_reft.integrations.sft_options import PROGRAM, Parser, UserError
from peft_reft.integrations.threads import share_the_machine
from peft_reft.positions.prompts import IGNORED
from peft_reft.tuner.config import ReftConfig

__all__ = ["Parser", "main"]

FILE_TYPES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_data(script: Any, training: Any, mixture: Any) -> tuple[Any, Any]:
    """The data to train on, and those to evaluate on if `--eval_strategy` asks for it, else None.

    Raises:
        UserError: if they cannot be read, or show no prompts.
    """
    name = script.dataset_name
    if not name and not mixture.datasets:
        raise UserError("--dataset is missing: a file (.json, .jsonl, .csv, .parquet), a folder, or a name on the hub.")
    set_seed(training.seed)  # so that all processes split the data alike
    try:
        data = read_data(script, mixture)
    except UserError:
        raise
    except Exception as error:  # the libraries below have no common class of errors for bad data
        cause = f" ({one_line(error.__cause__)})" if error.__cause__ is not None else ""
        reason = str(error) or type(error).__name__
        if not mixture.datasets and not Path(name).exists():
            cause += ". There is no such file or folder here, so it was looked for on the hub."
        raise UserError(f"The data set {name or mixture.datasets!r} cannot be read: {reason}{cause}") from error
    wanted = [script.dataset_train_split, *([script.dataset_test_split] if training.eval_strategy != "no" else [])]
    missing = [split for split in wanted if split not in data]
    if missing:
        raise UserError(
            f"The data set {name or mixture.datasets!r} has the splits {sorted(data)}, but not {missing[0]!r}. Name "
            "them with --dataset_train_split and --dataset_test_split, or set rows aside with --test_split_size 0.1."
        )
    train, *test = (with_prompts(data[split], training) for split in wanted)
    return train, test[0] if test else None


def read_data(script: Any, mixture: Any) -> Any:
    """The splits of a local file, of a folder or a data set on the hub, or of the `datasets` in the YAML file."""
    path = Path(script.dataset_name or "")
    streaming = script.dataset_streaming or mixture.streaming
    if not mixture.datasets and path.is_file():
        if path.suffix not in FILE_TYPES:
            raise ValueError(f"it ends in {path.suffix!r}, not in one of {', '.join(FILE_TYPES)}")
        if path.stat().st_size == 0:
            raise ValueError("the file is empty")
        mixture.datasets = [DatasetConfig(path=FILE_TYPES[path.suffix], data_files=str(path))]
        mixture.streaming = streaming
    elif not mixture.datasets and path.suffix in FILE_TYPES:
        raise UserError(f"The data set {script.dataset_name!r} cannot be read: there is no such file.")
    if mixture.datasets:
        return get_dataset(mixture)
    data = load_dataset(script.dataset_name, name=script.dataset_config, streaming=streaming)
    if mixture.test_split_size is not None:
        return data[script.dataset_train_split].train_test_split(test_size=mixture.test_split_size)
    return data


def with_prompts(data: Any, training: Any) -> Any:
    """The data as rows of `prompt` and `completion`; the last message of a chat is the completion.

    Raises:
        UserError: if there is nothing that could be a prompt.
    """
    columns = set(data.column_names or next(iter(data)))
    if {"prompt", "completion"} <= columns or "input_ids" in columns or training.assistant_only_loss:
        return data
    if "messages" not in columns:
        raise UserError(
            f"The data have the columns {sorted(columns)}, which show no prompts; ReFT edits prompts, and would train "
            "next to nothing. Give each row a `prompt` and a `completion`, or `messages`, the last of them the answer."
        )
    try:
        return data.map(split_chat, remove_columns="messages")
    except ValueError as error:
        raise UserError(str(error)) from error


def split_chat(row: dict[str, Any]) -> dict[str, Any]:
    """A chat as what is given, `prompt`, and the answer to learn, `completion`.

    >>> split_chat({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]})
    {'prompt': [{'role': 'user', 'content': 'Hi'}], 'completion': [{'role': 'assistant', 'content': 'Ho'}]}
    """
    *prompt, answer = row["messages"] or [{}]
    if not prompt or answer.get("role") != "assistant":
        raise ValueError(
            f"A chat of the roles {[message.get('role') for message in row['messages'] or []]} does not end in an "
            "answer of the 'assistant' to something. Drop it, or train on all answers with --assistant_only_loss."
        )
    return {"prompt": prompt, "completion": [answer]}


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
    return (
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


def what_next(folder: str, data: Any) -> str:
    """Where the adapter is, and the commands to talk with it and to look into it."""
    row = next(iter(data))
    prompt = row.get("prompt", "...")
    if isinstance(prompt, list):
        prompt = prompt[-1]["content"]
    where = shlex.quote(folder)
    asked = shlex.quote(prompt if isinstance(prompt, str) and len(prompt) <= 200 else "...")
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
        The exit status: 0, or 2 if something that the user gave cannot be used (a line on stderr says what), or 130
        after Ctrl-C in training.
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
        train, test = load_data(script, training, mixture)
        trainer = make_trainer(training, model, config, train, test)
    except UserError as error:
        print(f"{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    trainer.accelerator.print(what_is_trained(trainer, config))
    try:
        trainer.train(resume_from_checkpoint=resumed)
    except KeyboardInterrupt:
        trainer.accelerator.print(f"\n{PROGRAM}: {what_was_stopped(trainer)}", file=sys.stderr)
        return 130
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
