"""What all programs of this folder do with model and results."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from benchmarks import common
from benchmarks.real_llm import model
from benchmarks.study.store import Store

Cells = list[dict[str, Any]]


def load(folder: Path) -> tuple[nn.Module, Any]:
    """The frozen float32 model and its tokenizer; one thread from now on."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return model.load(folder, "cpu", torch.float32)


def write(store: Store, report: Callable[[Cells], str], draw: Callable[[Cells, Path], None], picture: Path) -> None:
    """report.md and environment.json beside the cells, and the picture if matplotlib is there."""
    folder, cells = store.path.parent, list(store.cells.values())
    spec = sys.modules["__main__"].__spec__
    program = sys.argv[0] if spec is None else f"-m {spec.name}"
    environment = common.environment() | {"command": " ".join(["python", program, *sys.argv[1:]])}
    if "--report" not in sys.argv:
        (folder / "environment.json").write_text(json.dumps(environment, indent=1) + "\n")
    (folder / "report.md").write_text(report(cells))
    if importlib.util.find_spec("matplotlib") is not None:
        draw(cells, picture)
    print(report(cells))
