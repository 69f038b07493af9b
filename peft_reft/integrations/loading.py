"""Saved adapters on their base model, with the tokenizer: what the tools that run a model begin with."""

from __future__ import annotations

import textwrap
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel

from peft_reft.info.files import one_line, read_adapter
from peft_reft.info.reading import AUTO_CLASSES
from peft_reft.tuner.sizes import shown


def load_adapters(
    folders: dict[str, Path],
    model_name: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    num_labels: int | None = None,
) -> tuple[Any, Any]:
    """The adapters on one base model, in eval mode, and the tokenizer.

    No code of theirs is run. (transformers would ask on the terminal by default, and take piped input for the answer.)

    Args:
        folders: by the adapters' names, as `save_pretrained` wrote them.
        model_name: of the base model; None for the one that the first adapter names.
        dtype: of its weights, as transformers names it.
        device: None for the GPU if there is one, else the CPU.
        num_labels: classes of a classifier, if its base model does not say.

    Raises:
        ValueError: if a folder holds no adapter (said before a model is loaded, which may take minutes), no base model
            is named, it cannot be loaded, or an adapter does not fit it.
    """
    config, *_ = [read_adapter(folder).config for folder in folders.values()]
    first = next(iter(folders.values()))
    name = model_name or config.get("base_model_name_or_path")
    if not name:
        raise ValueError(f"{str(first)!r} does not name its base model; give it with --model.")
    if not isinstance(name, str):
        raise ValueError(
            f"{str(first)!r} has base_model_name_or_path={shown(name)}, which is no name; give it with --model."
        )
    auto = getattr(transformers, AUTO_CLASSES.get(str(config.get("task_type")), "AutoModelForCausalLM"))
    more = {} if num_labels is None else {"num_labels": num_labels}
    model: Any
    try:
        model = auto.from_pretrained(name, dtype=dtype, trust_remote_code=False, **more)
    except Exception as error:  # of damaged files; of their kinds only two say by themselves what is wrong
        where = "" if Path(name).is_dir() else " There is no such folder here, so it was looked for on the hub."
        said = textwrap.shorten(str(error) if isinstance(error, (OSError, ValueError)) else one_line(error), 300)
        raise ValueError(
            f"The base model {shown(name)} cannot be loaded; --model names another.{where} {said}"
        ) from error
    for adapter, folder in folders.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # PEFT reads what transformers has renamed
                if isinstance(model, PeftModel):
                    model.load_adapter(folder, adapter_name=adapter)
                else:
                    model = PeftModel.from_pretrained(model, folder, adapter_name=adapter)
        except RuntimeError as error:  # tensors that torch cannot copy into the model's
            raise ValueError(f"The adapter in {str(folder)!r} does not fit {name!r}: {error}") from error
    source = first if (first / "tokenizer_config.json").is_file() else name
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # of damaged files
        said = textwrap.shorten(one_line(error), 300)
        raise ValueError(f"The tokenizer in {str(source)!r} cannot be loaded. {said}") from error
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval(), tokenizer
