"""The names of a ReFT adapter's parameters: in the model, where they hold the adapter's name, and in a file, without.

    in the model   base_model.model.model.layers.0.reft.reft_interventions.default.1.basis
    in a file      base_model.model.model.layers.0.reft.reft_interventions.1.basis
                   `PEFT_PREFIX`    block       CHILD    COLLECTION     adapter group parameter

PEFT recognises a tuner's parameters by the one component that starts with the tuner's prefix, and transformers puts
an adapter's name right behind it. `PEFT_PREFIX` is missing where adapters are injected into a model without a
`PeftModel` around it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from peft_reft.blocks import own_name
from peft_reft.context.block import CHILD  # "reft", the layer's name below its block; it must not hold PREFIX

PREFIX = "reft_"  # PEFT's prefix of the tuner
COLLECTION = "reft_interventions"  # of the layer: adapter name -> its interventions
INTERVENTIONS = f".{CHILD}.{COLLECTION}."  # what stands between a block's name and the rest of a key
PEFT_PREFIX = "base_model.model."  # of every key in a file
_FILE_KEY = re.compile(
    rf"(?:{re.escape(PEFT_PREFIX)})?(?P<block>.+){re.escape(INTERVENTIONS)}(?P<group>[0-9]{{1,9}})\.(?P<parameter>.+)"
)


class FileKey(NamedTuple):
    """The parts of an intervention's key in a file.

    Attributes:
        block: module name of the edited block in the base model.
        group: the intervention's number among those of its block.
        parameter: its name in the intervention.
    """

    block: str
    group: int
    parameter: str

    def __str__(self) -> str:
        return f"{PEFT_PREFIX}{self.block}{INTERVENTIONS}{self.group}.{self.parameter}"


def parse_file_key(key: str) -> FileKey | None:
    """The parts of a key of a file; None if it is not an intervention's.

    >>> parse_file_key("base_model.model.layers.0.reft.reft_interventions.1.basis")
    FileKey(block='layers.0', group=1, parameter='basis')
    """
    match = _FILE_KEY.fullmatch(key)
    return None if match is None else FileKey(match["block"], int(match["group"]), match["parameter"])


def is_intervention(key: str, adapter_name: str | None = None) -> bool:
    """Whether a key is an intervention's; with a name, whether it is that of the adapter's in a model."""
    return (INTERVENTIONS if adapter_name is None else f"{INTERVENTIONS}{adapter_name}.") in key


def without_adapter(key: str, adapter_name: str) -> str:
    """A model's key as it is in a file, also where `torch.compile` has wrapped blocks.

    >>> without_adapter("layers.0.reft.reft_interventions.default.1.basis", "default")
    'layers.0.reft.reft_interventions.1.basis'
    """
    return own_name(key.replace(f"{INTERVENTIONS}{adapter_name}.", INTERVENTIONS))


def without_child(key: str) -> str:
    """A key from which PEFT reads the block's name: as what stands before the component with the tuner's prefix."""
    return key.replace(f".{CHILD}.{PREFIX}", f".{PREFIX}")


def blocks_of(keys: Iterable[str]) -> list[str]:
    """The blocks of interventions' keys, each once, in the keys' order; with PEFT's prefix if the keys have it."""
    return list(dict.fromkeys(key.split(INTERVENTIONS)[0] for key in keys))
