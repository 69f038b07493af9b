"""`python -m peft_reft sft`: supervised finetuning of a ReFT adapter, in the style of TRL's own script.

All arguments are those of TRL's `sft`, read by TRL's parser from the command line or a YAML file (`--config`), but
those for LoRA; in their place stand the fields of `ReftConfig` with `reft_` in front. Training is `SFTTrainer`'s. What
is done here is to see that there are prompts to edit: ReFT edits the prompt, so data without prompts train nothing.
"""

from __future__ import annotations

import sys
from dataclasses import field, fields, make_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import yaml
from datasets import load_dataset
from peft.config import PeftConfig
from transformers import set_seed
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    get_dataset,
    get_quantization_config,
)
from trl.scripts.utils import DatasetConfig

from peft_reft.integrations.collator import ReftDataCollator
from peft_reft.tuner.config import ReftConfig

PROGRAM = "python -m peft_reft sft"
ALIASES = {
    "model": "model_name_or_path",
    "dataset": "dataset_name",
    "reft_layers": "reft_layers_to_transform",
}
LORA = [f.name for f in fields(ModelConfig) if f.name.startswith("lora_") or f.name in ("use_rslora", "use_dora")]
FILE_TYPES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


class UserError(Exception):
    """What the user gave cannot be used; the message says why, and what to do."""


def kinds_of(name: str) -> set[Any]:
    """The types that a field of `ReftConfig` may have, None left out."""
    hint = get_type_hints(ReftConfig)[name]
    return set(get_args(hint) if get_args(hint) and not isinstance(hint, type) else [hint]) - {NoneType}


def option_of(name: str, default: Any, help: str) -> tuple[str, Any, Any]:
    """A field of `ReftConfig` as one that an argument parser can read: (name, type, dataclass field)."""
    kinds = kinds_of(name)
    kind: Any = next((kind for kind in (list[str], str, list[int], int, float, bool) if kind in kinds), str)
    if kinds != {kind}:
        kind, default = kind | None, None  # not passed on unless it is given
    return f"reft_{name}", kind, field(default=default, metadata={"help": help.replace("%", "%%")})


OPTIONS = [f for f in fields(ReftConfig) if f.name not in {inherited.name for inherited in fields(PeftConfig)}]
ReftArguments: Any = make_dataclass(
    "ReftArguments", [option_of(f.name, f.default, f.metadata.get("help", "")) for f in OPTIONS]
)


def reft_config(arguments: Any) -> ReftConfig:
    """The adapter's config from its options; text is read as in YAML where a field is more than text."""
    values = {}
    for f in OPTIONS:
        value, kinds = getattr(arguments, f"reft_{f.name}"), kinds_of(f.name)
        if isinstance(value, str) and str in kinds and bool in kinds:
            value = {"true": True, "false": False}.get(value.lower(), value)
        elif isinstance(value, str) and str not in kinds:
            value = yaml.safe_load(value)
        if value is not None:
            values[f.name] = value
    return ReftConfig(task_type="CAUSAL_LM", **values)


class Parser(TrlParser):
    """TRL's parser, with short names for what every run needs."""

    def set_defaults_with_config(self, **values: Any) -> Any:
        return super().set_defaults_with_config(**{ALIASES.get(name, name): value for name, value in values.items()})

    def parse(self, argv: list[str]) -> tuple[ReftConfig, Any, Any, Any, Any]:
        """The command line and the YAML file that it names: the adapter's config, and TRL's four argument objects.

        Raises:
            UserError: also for arguments that would have no effect.
        """
        arguments = []
        for text in argv:
            name, equals, value = text.partition("=")
            if name.startswith("--"):
                name = name.replace("-", "_").replace("__", "--", 1)
                name = f"--{ALIASES.get(name[2:], name[2:])}"
            arguments += [name, value] if name == "--config" and equals else [name + equals + value]
        self.set_defaults(**dict.fromkeys(LORA))  # so that those that are given show
        try:
            reft, script, training, model, mixture = self.parse_args_and_config(arguments)
            config = reft_config(reft)
        except (OSError, ValueError, IndexError, yaml.YAMLError) as error:
            raise UserError(str(error)) from error
        given = [f"--{name}" for name in LORA if getattr(model, name) is not None]
        if given:
            raise UserError(
                f"{', '.join(given)} would have no effect: this command trains a ReFT adapter, whose options begin "
                "with --reft_. For LoRA use `trl sft`."
            )
        if not model.model_name_or_path:
            raise UserError("--model is missing: the name or folder of the base model.")
        if training.completion_only_loss is False:
            raise UserError(
                "--completion_only_loss False trains on the prompt too, so that nothing of it is left to edit. Leave "
                "it out: ReFT edits the prompt and trains on the completion."
            )
        return config, script, training, model, mixture


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
    except Exception as error:  # the libraries below have no common class of errors for bad data
        raise UserError(f"The data set {name or mixture.datasets!r} cannot be read: {error}") from error
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
        mixture.datasets = [DatasetConfig(path=FILE_TYPES[path.suffix], data_files=str(path))]
        mixture.streaming = streaming
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
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "trust_remote_code": training.trust_remote_code,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(training.model_init_kwargs or {}),
    }
    try:
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
        The exit status: 0, or 2 if something that the user gave cannot be used (a line on stderr says what).
    """
    usage = f"{PROGRAM} --model MODEL --dataset DATA [--reft_positions f7+l7] [--config FILE] [options of trl sft]"
    classes = (ReftArguments, ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig)
    try:
        # The data are looked at before the model is loaded, which may take minutes.
        config, script, training, model, mixture = Parser(classes, prog=PROGRAM, usage=usage).parse(argv)
        train, test = load_data(script, training, mixture)
        trainer = make_trainer(training, model, config, train, test)
    except UserError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    if test is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    trainer.save_model(training.output_dir)
    trainer.accelerator.print(f"The adapter is in {training.output_dir}")
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
    end(trainer)
    return 0
