"""The two base models of the stored checkpoints, as files, so that every version of transformers has the same weights.

Run first, with torch 2.13.0 and transformers 4.45.1: `python make_base.py`. It writes base/llama and base/roberta.
"""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaForSequenceClassification

BASE = Path(__file__).parent / "base"
TOKENS = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}

if __name__ == "__main__":
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**TOKENS, **SHAPE, num_key_value_heads=1, max_position_embeddings=64))
    roberta = RobertaForSequenceClassification(
        RobertaConfig(**TOKENS, **SHAPE, max_position_embeddings=40, type_vocab_size=1, num_labels=3)
    )
    for name, model in {"llama": llama, "roberta": roberta}.items():
        with torch.no_grad():  # the usual initialisation is so small that every token gets nearly the same logits
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.3)
        model.save_pretrained(BASE / name)
