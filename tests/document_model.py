"""The model of the documents in a folder: a tiny model of SmolLM2's shape, or SmolLM2 itself with PEFT_REFT_SMOLLM2=1.

The documents name the model as the hub does, "HuggingFaceTB/SmolLM2-135M-Instruct". A folder of that name in the
working directory is loaded in its place, so that their programs run word for word and without a network. On the real
model they take many minutes, so that has to be asked for.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from smollm2_stand_in import save_stand_in

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
LOADER = Path(__file__).parents[1] / "examples" / "smollm2.py"
PAGE = Path(__file__).parents[1] / "docs" / "chat.md"


def is_wanted() -> bool:
    """Whether the documents' programs are to run on the real model."""
    return os.environ.get("PEFT_REFT_SMOLLM2") == "1"


def real_model(folder: Path) -> Path:
    """SmolLM2 itself, as the examples make it (538 MB)."""
    spec = importlib.util.spec_from_file_location("smollm2", LOADER)
    assert spec is not None and spec.loader is not None
    loader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loader)
    return loader.smollm2(folder)


def stand_in(folder: Path) -> Path:
    """A tiny model of SmolLM2's shape, with a tokenizer made for the page of the documents that uses it most."""
    save_stand_in(folder, [PAGE.read_text(encoding="utf-8")])
    return folder
