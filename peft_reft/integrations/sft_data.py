"""The data of `python -m peft_reft sft`: files and data sets as rows that show where prompts end.

Data without prompts train nothing, so that conversations are split before their last answer, and rows that are neither
texts nor conversations are refused before a model is loaded.
"""

from __future__ import annotations

import glob
import textwrap
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from transformers import set_seed
from trl import get_dataset
from trl.scripts.utils import DatasetConfig

from peft_reft.info.files import one_line
from peft_reft.integrations.sft_options import UserError

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
    try:
        train, *test = (with_prompts(data[split], training) for split in wanted)
    except UnicodeDecodeError as error:
        raise UserError(
            f"The data set {name or mixture.datasets!r} holds bytes that are no text ({one_line(error)}). Save it in "
            "UTF-8."
        ) from error
    return train, test[0] if test else None


def read_data(script: Any, mixture: Any) -> Any:
    """The splits of a local file, of a folder or a data set on the hub, or of the `datasets` in the YAML file."""
    path = Path(script.dataset_name or "")
    streaming = script.dataset_streaming or mixture.streaming
    if not mixture.datasets and path.is_file():
        if path.suffix.lower() not in FILE_TYPES:
            raise ValueError(f"it ends in {path.suffix!r}, not in one of {', '.join(FILE_TYPES)}")
        if path.stat().st_size == 0:
            raise ValueError("the file is empty")
        if FILE_TYPES[path.suffix.lower()] == "json":
            refuse_other_than_rows(path)
        # Escaped: brackets and stars in its name would name other files.
        mixture.datasets = [DatasetConfig(path=FILE_TYPES[path.suffix.lower()], data_files=glob.escape(str(path)))]
        mixture.streaming = streaming
    elif not mixture.datasets and path.suffix in FILE_TYPES:
        raise UserError(f"The data set {script.dataset_name!r} cannot be read: there is no such file.")
    if mixture.datasets:
        return get_dataset(mixture)
    data = load_dataset(script.dataset_name, name=script.dataset_config, streaming=streaming)
    if mixture.test_split_size is not None:
        return data[script.dataset_train_split].train_test_split(test_size=mixture.test_split_size)
    return data


def refuse_other_than_rows(path: Path) -> None:
    """Raise ValueError if a JSON file begins with no row: at a null, the library that reads it ends the process."""
    with open(path, "rb") as file:
        begin = file.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if begin not in (b"{", b"["):
        raise ValueError(
            f"it begins with {begin.decode(errors='backslashreplace')!r}; each row of JSON is an object, as in "
            '{"prompt": "Hello", "completion": " Good day"}, and its text UTF-8'
        )


def with_prompts(data: Any, training: Any) -> Any:
    """The data as rows of `prompt` and `completion`; the last message of a chat is the completion.

    Raises:
        UserError: if there is nothing that could be a prompt.
    """
    columns = set(data.column_names or next(iter(data)))
    if "input_ids" in columns and "completion_mask" in columns and training.completion_only_loss is None:
        training.completion_only_loss = True  # TRL finds out by itself for texts alone
    shows_prompts = "labels" in columns or ("completion_mask" in columns and training.completion_only_loss)
    if training.assistant_only_loss or ("input_ids" in columns and shows_prompts):
        return data
    if {"prompt", "completion"} <= columns:
        rows = data.select_columns(["prompt", "completion"])
        for number, row in enumerate(rows if isinstance(rows, Dataset) else rows.take(1)):  # a stream may have no end
            refuse_other_than_text(number, row)
        return data
    if "messages" not in columns or "input_ids" in columns:
        raise UserError(
            f"The data have the columns {sorted(columns)}, which show no prompts; ReFT edits prompts, and would train "
            "next to nothing. Give each row a `prompt` and a `completion`, or `messages`, the last of them the answer. "
            "Tokens, `input_ids`, need `labels` or a `completion_mask`."
        )
    try:
        return data.map(split_chat, remove_columns="messages")
    except ValueError as error:
        raise UserError(str(error)) from error


def refuse_other_than_text(number: int, row: dict[str, Any]) -> None:
    """Raise a UserError if prompt and completion of a row are neither two texts nor two lists of messages."""
    kinds = [isinstance(value, str) if isinstance(value, str) or is_chat(value) else None for value in row.values()]
    if None in kinds or len({*kinds}) > 1:
        said = " and ".join(f"{name} {textwrap.shorten(repr(value), 60)}" for name, value in row.items())
        raise UserError(
            f"Row {number} of the data has the {said}; both must be texts, or both lists of messages. Fill in what is "
            "empty, or drop the row; numbers become texts in a .jsonl file, between quotation marks."
        )


def is_chat(value: Any) -> bool:
    """Whether a value is a list of messages, at least one."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(message, dict) and "role" in message for message in value)
    )


def split_chat(row: dict[str, Any]) -> dict[str, Any]:
    """A chat as what is given, `prompt`, and the answer to learn, `completion`.

    >>> split_chat({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]})
    {'prompt': [{'role': 'user', 'content': 'Hi'}], 'completion': [{'role': 'assistant', 'content': 'Ho'}]}
    """
    if row["messages"] and not is_chat(row["messages"]):
        said = textwrap.shorten(repr(row["messages"]), 60)
        raise ValueError(f"The messages {said} are no list of messages, each with a 'role' and a 'content'.")
    *prompt, answer = row["messages"] or [{}]
    if not prompt or answer.get("role") != "assistant":
        raise ValueError(
            f"A chat of the roles {[message.get('role') for message in row['messages'] or []]} does not end in an "
            "answer of the 'assistant' to something. Drop it, or train on all answers with --assistant_only_loss."
        )
    return {"prompt": prompt, "completion": [answer]}
