"""A tiny model of SmolLM2's shape, with random weights: blocks, grouped heads, tied embeddings, ChatML, pad = eos."""

from __future__ import annotations

from pathlib import Path

import torch
from chat_templates import TEMPLATES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BLOCKS, HIDDEN = 30, 72


def byte_level(texts: list[str]) -> PreTrainedTokenizerFast:
    """A small byte-level BPE with SmolLM2's special tokens and a chat template as its own."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=800, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=special[1], eos_token=special[2], pad_token=special[2], unk_token=special[0]
    )
    tokenizer.chat_template = TEMPLATES["qwen"][0]
    return tokenizer


def save_stand_in(folder: Path, texts: list[str], blocks: int = BLOCKS) -> None:
    """Model and tokenizer, as `from_pretrained` loads them; the tokenizer is trained on the texts."""
    tokenizer = byte_level(texts)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=blocks,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
