"""Checkpoints made by AdapterHub's adapters, with the logits that it gives. Needs make_base.py to have run.

Made with Python 3.11 and torch==2.13.0 transformers==4.57.6 adapters==1.3.0: `python make_adapterhub.py` writes
adapterhub/<name>/, each as `save_adapter` leaves it, plus logits.safetensors: input_ids, attention_mask and the logits.
Dropout is off; every checkpoint is trained for a few steps.
"""

import json
import shutil
from pathlib import Path

import adapters
import torch
from adapters import ConfigUnion, DiReftConfig, LoRAConfig, LoReftConfig, NoReftConfig
from safetensors.torch import save_file
from transformers import LlamaForCausalLM, LlamaModel, RobertaForSequenceClassification

HERE = Path(__file__).parent
OUT = HERE / "adapterhub"
KINDS = {"loreft": LoReftConfig, "noreft": NoReftConfig, "direft": DiReftConfig}


def rows(*lengths):
    """Random rows padded on the right."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in zip(ids, lengths):
        row[:length] = torch.randint(3, 40, (length,), generator=generator)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def outputs(model, batch):
    output = model(**batch)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def make(name, base, config, *lengths, safe=False):
    batch = rows(*(lengths or (6, 9)))
    adapters.init(base)
    base.add_adapter("told", config=config)
    base.train_adapter("told")
    base.set_active_adapters("told")
    base.eval()
    optimizer = torch.optim.AdamW([p for p in base.parameters() if p.requires_grad], lr=0.05, weight_decay=0.0)
    target = torch.randn_like(outputs(base, batch))
    for _ in range(8):
        loss = (outputs(base, batch) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    directory = OUT / name
    shutil.rmtree(directory, ignore_errors=True)
    OUT.mkdir(exist_ok=True)
    base.save_adapter(str(directory), "told", use_safetensors=safe)
    for file in directory.glob("*_config.json"):
        told = json.loads(file.read_text())
        told["model_name"] = "base"  # not where this machine had it
        file.write_text(json.dumps(told, indent=2, sort_keys=True) + "\n")
    with torch.no_grad():
        logits = outputs(base, batch)
    save_file({**batch, "logits": logits.contiguous()}, str(directory / "logits.safetensors"))


def llama(cls=LlamaForCausalLM):
    return cls.from_pretrained(HERE / "base" / "llama")


def main():
    torch.manual_seed(0)
    settings = {"prefix_positions": 2, "suffix_positions": 2, "r": 3, "dropout": 0.0}
    for kind, config in KINDS.items():
        for name, tied in {"shared": True, "separate": False}.items():
            make(f"{kind}-{name}", llama(), config(layers=[0, 2], tied_weights=tied, **settings))
    make("loreft-default", llama(), LoReftConfig(dropout=0.0))
    make("loreft-suffix", llama(), LoReftConfig(**{**settings, "prefix_positions": 0}))
    make("loreft-safetensors", llama(), LoReftConfig(layers=[1], **settings), safe=True)
    make("noreft-leakyrelu", llama(), NoReftConfig(layers=[1], non_linearity="leakyrelu", **settings))
    make("loreft-bare", llama(LlamaModel), LoReftConfig(layers=[1], **settings))
    make("loreft-short", llama(), LoReftConfig(layers=[0, 2], **settings), 2, 3, 4, 5)
    make("loreft-square", llama(), LoReftConfig(layers=[1], **{**settings, "r": 16}))
    make("union", llama(), ConfigUnion(LoReftConfig(layers=[1], **settings), LoRAConfig(r=2)))
    roberta = RobertaForSequenceClassification.from_pretrained(HERE / "base" / "roberta")
    make("loreft-roberta", roberta, LoReftConfig(layers=[0, 2], **settings))


if __name__ == "__main__":
    main()
