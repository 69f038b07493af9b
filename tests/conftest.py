"""Tiny models from configs (nothing is downloaded), batches, and adapters with weights that do something.

Test modules import the functions from here: `from conftest import tiny_model`.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig

from peft_reft import ReftConfig, get_interventions

# Run by commands of their own: PEFT's own tests, and programs for the environments of other libraries.
collect_ignore = ["peft_suite", "checkpoints", "vllm_engine"]

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCAB, HIDDEN, BLOCKS, PAD, EOS = 100, 32, 3, 0, 1

_TOKENS = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": 2, "eos_token_id": EOS}
_LLAMA_LIKE = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}
_BERT_LIKE = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 130,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_SETTINGS = {
    "llama": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "mistral": {**_LLAMA_LIKE, "sliding_window": None},
    "gpt2": {
        "n_embd": HIDDEN,
        "n_layer": BLOCKS,
        "n_head": 4,
        "n_positions": 128,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "opt": {
        "hidden_size": HIDDEN,
        "word_embed_proj_dim": HIDDEN,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4,
        "ffn_dim": 64,
        "max_position_embeddings": 128,
        "dropout": 0.0,
    },
    "bert": _BERT_LIKE,
    "roberta": _BERT_LIKE,
    "t5": {
        "d_model": HIDDEN,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": BLOCKS,
        "num_decoder_layers": BLOCKS,
        "num_heads": 4,
        "dropout_rate": 0.0,
        "decoder_start_token_id": PAD,
    },
}
_HEADS = {
    "causal": transformers.AutoModelForCausalLM,
    "masked": transformers.AutoModelForMaskedLM,
    "seq2seq": transformers.AutoModelForSeq2SeqLM,
    "classifier": transformers.AutoModelForSequenceClassification,
    "base": transformers.AutoModel,
}

DECODERS = ("llama", "qwen2", "mistral", "gpt2", "opt")
ENCODERS = ("bert", "roberta")
FAMILIES = (*DECODERS, *ENCODERS, "t5")


def tiny_config(family: str, **changes) -> transformers.PretrainedConfig:
    """The config of a tiny model; `changes` are settings of that family's config class."""
    return AutoConfig.for_model(family, **{**_TOKENS, **_SETTINGS[family], **changes})


def tiny_model(family: str, head: str | None = None, seed: int = 0, **changes) -> transformers.PreTrainedModel:
    """A seeded model in eval mode; the same arguments give the same weights.

    Args:
        family: one of `FAMILIES`.
        head: "causal", "masked", "seq2seq", "classifier" or "base"; None for what the family is used for.
        seed: of the random weights.
        changes: settings of the config.
    """
    if head is None:
        head = "causal" if family in DECODERS else "masked" if family in ENCODERS else "seq2seq"
    torch.manual_seed(seed)
    model = _HEADS[head].from_config(tiny_config(family, **changes)).eval()
    with torch.no_grad():  # the usual initialisation is so small that every token gets nearly the same logits
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return model


def batch(*lengths: int, side: str = "right", seed: int = 0) -> dict[str, Tensor]:
    """Random rows of the given lengths, padded on one side to the longest: input_ids and attention_mask."""
    generator = torch.Generator().manual_seed(seed)
    columns = max(lengths)
    ids = torch.full((len(lengths), columns), PAD)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        where = slice(0, length) if side == "right" else slice(columns - length, columns)
        ids[row, where] = torch.randint(3, VOCAB, (length,), generator=generator)
        mask[row, where] = 1
    return {"input_ids": ids, "attention_mask": mask}


def inputs_of(model: nn.Module, *lengths: int, side: str = "right", seed: int = 0) -> dict[str, Tensor]:
    """A batch that the model's forward accepts; encoder-decoder models get decoder inputs as well."""
    inputs = batch(*(lengths or (7, 4)), side=side, seed=seed)
    if getattr(model.config, "is_encoder_decoder", False):
        rows = inputs["input_ids"].shape[0]
        inputs["decoder_input_ids"] = torch.tensor([[PAD, 5, 6]]).expand(rows, -1)
    return inputs


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Tensor], **kwargs) -> Tensor:
    """Logits of a forward (the last hidden states of a model without a head), without gradients."""
    output = model(**inputs, **kwargs)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


@torch.no_grad()
def randomize(model: nn.Module, adapter: str | None = None, seed: int = 1, scale: float = 0.5) -> nn.Module:
    """Give an adapter's interventions random weights, so that the adapter does something; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    for interventions in get_interventions(model, adapter).values():
        for parameter in interventions.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def reft_model(model: nn.Module, seed: int = 1, adapter: str = "default", **settings) -> PeftModel:
    """`model` with a ReFT adapter that has random weights; `settings` are fields of `ReftConfig`."""
    peft_model = get_peft_model(model, ReftConfig(**settings), adapter_name=adapter).eval()
    return randomize(peft_model, adapter, seed)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def llama() -> transformers.PreTrainedModel:
    """A tiny decoder, fresh for each test."""
    return tiny_model("llama")


@pytest.fixture(params=FAMILIES)
def any_model(request) -> transformers.PreTrainedModel:
    """A tiny model of each family, with the head that it is used with."""
    return tiny_model(request.param)
