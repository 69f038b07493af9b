"""The files of a saved adapter: its config, and the parameters of its interventions.

Nothing is executed or fetched: the config is JSON, tensors come from safetensors (or from a pickle that may hold
tensors only).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import Tensor

from peft_reft.blocks.numbering import block_number
from peft_reft.reading import read_json, read_tensors

KEY = re.compile(r"(?:base_model\.model\.)?(?P<block>.+)\.reft\.reft_interventions\.(?P<group>\d+)\.(?P<name>.+)")
AUTO_CLASSES = {  # the class of transformers that makes the base model, by task type
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}

# Parameters by block, number of the intervention in it, and name.
Parameters = dict[str, dict[int, dict[str, Tensor]]]


def read_config(directory: Path) -> dict[str, Any]:
    """adapter_config.json of a ReFT adapter, as it stands: nothing of it is imported or executed.

    Raises:
        ValueError: if it is missing, unreadable or that of something else.
    """
    path = directory / CONFIG_NAME
    if not path.is_file():
        inside = sorted(str(found.parent) for found in directory.glob(f"*/{CONFIG_NAME}"))
        hint = f" There are adapters in {', '.join(map(repr, inside))}." if inside else ""
        what = "has no" if directory.is_dir() else "is no directory, let alone one with an"
        raise ValueError(
            f"{str(directory)!r} {what} {CONFIG_NAME}, so it is no saved adapter. Give the directory that "
            f"save_pretrained wrote (a download of it, if it is on the hub).{hint}"
        )
    config = read_json(path)
    kind = config.get("peft_type")
    if kind != "REFT":
        raise ValueError(f"{str(directory)!r} holds an adapter of the type {kind!r}, and not one of the type 'REFT'.")
    return config


def weights_file(directory: Path) -> Path:
    """The file of an adapter's weights.

    Raises:
        ValueError: if there is none.
    """
    for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        if (directory / name).is_file():
            return directory / name
    raise ValueError(f"{str(directory)!r} has the config of a ReFT adapter and no {SAFETENSORS_WEIGHTS_NAME}.")


def read_interventions(file: Path) -> tuple[Parameters, dict[str, Tensor]]:
    """The parameters of the interventions in a file of weights, blocks in their order, and what else is stored by name.

    Raises:
        ValueError: if the file cannot be read, or holds no intervention.
    """
    found: Parameters = {}
    others = {}
    for key, tensor in read_tensors(file).items():
        match = KEY.fullmatch(key)
        if match is None:
            others[key] = tensor
        else:
            found.setdefault(match["block"], {}).setdefault(int(match["group"]), {})[match["name"]] = tensor
    if not found:
        raise ValueError(
            f"{str(file)!r} holds no weights of a ReFT adapter: none of its {len(others)} tensors lies below "
            "'.reft.reft_interventions.'. Save the adapter with PeftModel.save_pretrained."
        )
    # As the model runs them, not as the letters of their names: by stack and number.
    order = sorted(found, key=lambda name: (re.sub(r"\d+", "", name), block_number(name) or 0, name))
    return {name: found[name] for name in order}, others
