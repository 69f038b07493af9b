"""Stand-ins for the hub models that PEFT's tests load: tiny, with random weights, made from configs.

They are written into a cache directory in the hub's own layout, so that `from_pretrained("org/name")` finds them
offline by the usual code. Run `python standins.py DIR` to make them, or let `run.py` do it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, PreTrainedTokenizerFast

VOCAB = 1024
TOKENS = {"vocab_size": VOCAB, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
LLAMA_LIKE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
}
BERT_LIKE = {
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 512,
}
GPT_LIKE = {"n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 512}
OPT_LIKE = {
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "ffn_dim": 32,
    "max_position_embeddings": 512,
}
T5_LIKE = {"d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 5, "num_heads": 4, "decoder_start_token_id": 0}
GEMMA3 = {**LLAMA_LIKE, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 64}
BLOOM = {"hidden_size": 32, "n_layer": 2, "n_head": 4}
BART_LIKE = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 512,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    "pad_token_id": 2,  # as the end of a sequence: PEFT's comparison of generated rows takes the two for one
}

CAUSAL, SEQ2SEQ, BASE, CLASSIFIER = "CausalLM", "Seq2SeqLM", "", "SequenceClassification"

# repository -> model type, head, settings
MODELS = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("opt", CAUSAL, OPT_LIKE),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("gpt2", CAUSAL, GPT_LIKE),
    "peft-internal-testing/tiny-random-gpt2": ("gpt2", CAUSAL, GPT_LIKE),
    "hf-internal-testing/tiny-random-gpt2": ("gpt2", CAUSAL, GPT_LIKE),
    "openai-community/gpt2": ("gpt2", CAUSAL, GPT_LIKE),
    "gpt2": ("gpt2", CAUSAL, GPT_LIKE),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("gptj", CAUSAL, {**GPT_LIKE, "rotary_dim": 4}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("llama", CAUSAL, LLAMA_LIKE),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": ("llama", CAUSAL, LLAMA_LIKE),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": ("llama", CAUSAL, LLAMA_LIKE),
    "peft-internal-testing/tiny-dummy-qwen2": ("qwen2", CAUSAL, {**LLAMA_LIKE, "num_key_value_heads": 2}),
    "trl-internal-testing/tiny-Qwen2ForCausalLM-2.5": ("qwen2", CAUSAL, LLAMA_LIKE),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("mistral", CAUSAL, {**LLAMA_LIKE, "num_key_value_heads": 2}),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("gemma3_text", CAUSAL, GEMMA3),
    "peft-internal-testing/opt-125m": ("opt", CAUSAL, {**OPT_LIKE, "num_hidden_layers": 12}),
    "facebook/opt-125m": ("opt", CAUSAL, {**OPT_LIKE, "num_hidden_layers": 12}),
    "facebook/opt-350m": ("opt", CAUSAL, OPT_LIKE),
    "peft-internal-testing/tiny-random-BloomForCausalLM": ("bloom", CAUSAL, BLOOM),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": ("gpt_neox", CAUSAL, LLAMA_LIKE),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": ("t5", SEQ2SEQ, T5_LIKE),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": ("t5", SEQ2SEQ, T5_LIKE),
    "peft-internal-testing/tiny-random-t5": ("t5", SEQ2SEQ, T5_LIKE),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("bart", SEQ2SEQ, BART_LIKE),
    "peft-internal-testing/tiny-random-BertModel": ("bert", BASE, BERT_LIKE),
    "hf-internal-testing/tiny-random-BertModel": ("bert", BASE, BERT_LIKE),
    "peft-internal-testing/tiny-random-RobertaModel": ("roberta", BASE, BERT_LIKE),
    "peft-internal-testing/tiny-random-DebertaModel": ("deberta", BASE, BERT_LIKE),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("deberta-v2", BASE, BERT_LIKE),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": ("bert", CLASSIFIER, BERT_LIKE),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": ("roberta", CLASSIFIER, BERT_LIKE),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": ("llama", CLASSIFIER, LLAMA_LIKE),
}

ADAPTERS = {
    "peft-internal-testing/tiny-opt-lora-revision": ("test", "peft-internal-testing/tiny-random-OPTForCausalLM")
}
COMMIT = "0" * 40


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer, whose ids stay below `VOCAB`."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    symbols = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token"), special))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **names)


def make_model(model_type: str, head: str, settings: dict) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**TOKENS, **settings})
    model = getattr(transformers, f"AutoModelFor{head}" if head else "AutoModel").from_config(config)
    with torch.no_grad():  # the usual initialisation leaves a tiny model next to blind for its input
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1)
    return model


def make_standins(cache: Path) -> None:
    """Write all stand-ins into a cache directory, as `HF_HUB_CACHE` names it; those already there are kept."""
    tokenizer = make_tokenizer()
    for repository, (model_type, head, settings) in MODELS.items():
        if snapshot := new_snapshot(cache, repository, "main"):
            make_model(model_type, head, settings).save_pretrained(snapshot)
            tokenizer.save_pretrained(snapshot)
    for repository, (revision, base) in ADAPTERS.items():
        if snapshot := new_snapshot(cache, repository, revision):
            config = LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path=base)
            get_peft_model(make_model(*MODELS[base]), config).save_pretrained(snapshot)


def new_snapshot(cache: Path, repository: str, revision: str) -> Path | None:
    """The folder for a repository's files; None if there is one already."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    if (folder / "refs" / revision).exists():
        return None
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / revision).write_text(COMMIT)
    return folder / "snapshots" / COMMIT


if __name__ == "__main__":
    make_standins(Path(sys.argv[1]))
