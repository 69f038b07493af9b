"""A section in the README.md of a saved adapter: how to load it, which tokens it edits, how large it is.

PEFT writes a model card when it saves, TRL's trainers write one of their own, and neither asks a tuner for a word. Both
end a save with the config, though: `PeftModel.save_pretrained` writes the card, then the tensors, and calls
`config.save_pretrained(directory)` last, once for every adapter's own directory and on the main process only. So
`ReftConfig.save_pretrained` has `describe_saved` called, and nothing of PEFT or TRL is patched.

The section stands between two comments. Saving again replaces what is between them and touches nothing else.

`model.push_to_hub` saves to a temporary directory and then writes a card of its own over the one there, without the
section, as a trainer's `push_to_hub` does. To push the section, save the adapter and upload the directory:
`model.save_pretrained(directory)`, then `huggingface_hub.upload_folder(repo_id=..., folder_path=directory)`.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from huggingface_hub import ModelCardData
from huggingface_hub.constants import REPOCARD_NAME

from peft_reft.info import AdapterInfo, adapter_info
from peft_reft.info.files import has_weights
from peft_reft.info.reading import AUTO_CLASSES
from peft_reft.info.words import in_bytes
from peft_reft.interventions import BUILT_IN
from peft_reft.tuner.staging import write_text

BEGIN = "<!-- peft_reft: this section is written anew whenever the adapter is saved; write above or below it -->"
END = "<!-- peft_reft: end of the section -->"
SECTION = re.compile(rf"{re.escape(BEGIN)}(?:(?!{re.escape(BEGIN)}).)*?{re.escape(END)}", re.S)


def describe_saved(directory: str | os.PathLike[str]) -> None:
    """Write or refresh the section in the README.md of an adapter that was just saved.

    Without weights in the directory (a config that was saved alone) nothing is written.

    Raises:
        ValueError, OSError: if the adapter cannot be read or the card not be written. `ReftConfig.save_pretrained`
            makes a warning of it, since the adapter itself is on disk by then.
    """
    directory = Path(directory)
    if not has_weights(directory):
        return
    write_section(directory / REPOCARD_NAME, section_of(adapter_info(directory, look_at_weights=False)))


def write_section(path: Path, section: str) -> None:
    """Put a section into the card at `path`, which is made if there is none; the file is replaced as a whole."""
    if path.exists():
        with open(path, encoding="utf-8", newline="") as file:  # line ends stay what they are
            text = file.read()
    else:
        text = f"---\n{ModelCardData(library_name='peft').to_yaml()}\n---\n\n# A ReFT adapter\n"
    changed = with_section(text, section)
    if changed != text:
        write_text(path, changed)


def with_section(text: str, section: str) -> str:
    """A card with the section: in the place of the one it has, else in front of its first heading of second order."""
    newline = "\r\n" if "\r\n" in text else "\n"
    block = f"{BEGIN}\n{section}\n{END}".replace("\n", newline)
    if SECTION.search(text):
        return SECTION.sub(lambda match: block, text, count=1)
    place = first_heading(text)
    before, behind = text[:place].rstrip(), text[place:]
    parts = [before, block, behind] if behind else [before, block + newline]
    return (2 * newline).join(part for part in parts if part)


def first_heading(text: str) -> int:
    """Where the first heading of second order begins, code aside; the end of the text if there is none."""
    place, fenced = 0, False
    for line in text.splitlines(keepends=True):
        if line.lstrip().startswith(("```", "~~~")):
            fenced = not fenced
        if line.startswith("## ") and not fenced:
            return place
        place += len(line)
    return len(text)


def section_of(info: AdapterInfo) -> str:
    """The section: what the adapter is, and how to load it."""
    base = info.base_model or "the-base-model"
    classes = "  # num_labels=N, if it has other classes" if "CLS" in str(info.task_type) else ""
    model_class = AUTO_CLASSES.get(str(info.task_type), "AutoModel")
    mapping = info.config.get("auto_mapping") or {}
    if info.task_type is None and str(mapping.get("base_model_class", "")).isidentifier():
        model_class = mapping["base_model_class"]
    rows = {
        "Edited tokens": f"`{info.positions}`: {info.edited}",
        "Prompt": f"{info.prompt[0].upper()}{info.prompt[1:]}",
        "Intervention": f"`{info.intervention}`: {info.equation or 'of your own, see below'}",
        "Rank": info.ranks_in_words(),
        **({"Subspaces": info.subspaces} if info.subspaces else {}),
        "Blocks": info.blocks_in_words(),
        "Weights": info.weights,
        "Parameters": info.parameters_in_words(),
        "Size": in_bytes(info.size),
    }
    table = "\n".join(f"| {name} | {cell(text)} |" for name, text in rows.items())
    own = (
        ""
        if info.intervention in BUILT_IN
        else f"\nThe intervention {info.intervention!r} is not part of peft-reft: call "
        "`peft_reft.register_intervention` with its class before loading.\n"
    )
    return f"""## Representation finetuning (ReFT)

This adapter edits hidden states of the prompt instead of weights ([paper](https://arxiv.org/abs/2404.03592)). It needs
the package `peft-reft`. `KeyError: 'REFT'` means that the package was not imported in this process: `import peft_reft`
before you load the adapter, or start a program that is not yours as `python -m peft_reft PROGRAM ...`.

```python
import peft_reft  # first
from peft import PeftModel
from transformers import {model_class}

base = {model_class}.from_pretrained({json.dumps(base)}){classes}
model = PeftModel.from_pretrained(base, "path/to/this/directory")
```
{own}
| | |
|---|---|
{table}
"""


def cell(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
