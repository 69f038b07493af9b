"""Tiny models and tokenizers for smoke runs: random weights, and a vocabulary from the smoke data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers


def save_tiny(folder: Path, kind: str, config: Mapping[str, Any], texts: Iterable[str]) -> str:
    """Save a model and tokenizer as they would come from the hub; returns the folder.

    Args:
        kind: causal or glue.
        config: settings of the model's config class, with its `model_type`.
        texts: what the vocabulary is learned from.
    """
    tokenizer = _tokenizer(texts, pair=kind == "glue")
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model_config = transformers.AutoConfig.for_model(**config, vocab_size=len(tokenizer), **ids)
    model_class = transformers.AutoModelForCausalLM if kind == "causal" else transformers.AutoModel
    model_class.from_config(model_config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _tokenizer(texts: Iterable[str], pair: bool) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE; begins with <s> as Llama's does, with `pair` in RoBERTa's format for one or two sentences."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    single, double = ("<s> $A </s>", "<s> $A </s> </s> $B </s>") if pair else ("<s> $A", "<s> $A $B")
    bpe.post_processor = processors.TemplateProcessing(
        single=single, pair=double, special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    )
