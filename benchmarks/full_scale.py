"""The paper's models at full size, without their weights: share of parameters, and extra FLOPs per token.

    python benchmarks/full_scale.py

Everything happens on torch's meta device (shapes, no data), with torch's FLOP counter: a few minutes on any machine, no
download. The paper (https://arxiv.org/abs/2404.03592) gives its percentages in its tables of results.
"""

from __future__ import annotations

import json
from typing import Any

import common
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedConfig,
    RobertaConfig,
)

from peft_reft import ReftConfig

LLAMA_2_7B = LlamaConfig(
    hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=11008, vocab_size=32000
)
LLAMA_3_8B = LlamaConfig(
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    intermediate_size=14336,
    vocab_size=128256,
)
ROBERTA_BASE = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)

# name, model, ReFT's settings, the percentage in the paper, LoRA's targets beside it
SETTINGS: list[tuple[str, PreTrainedConfig, dict[str, Any], str, list[str]]] = [
    ("Llama-2-7B, r=8, all blocks, shared", LLAMA_2_7B, {"r": 8, "positions": "f7+l7"}, "0.031", common.Q_V),
    (
        "Llama-2-7B, blocks 3, 9, 18, 24, r=4, f5+l5, separate",
        LLAMA_2_7B,
        {"r": 4, "positions": "f5+l5", "share_weights": False, "layers_to_transform": [3, 9, 18, 24]},
        "0.0039",
        common.Q_V,
    ),
    ("RoBERTa-base, r=1, f1, all blocks", ROBERTA_BASE, {"r": 1, "positions": "f1"}, "0.015", ["query", "value"]),
    ("Llama-3-8B, r=8, all blocks, shared", LLAMA_3_8B, {"r": 8, "positions": "f7+l7"}, "0.026", common.Q_V),
]
# As in the paper's baseline for Llama (LLM-Adapters): r=32 on five of the seven projections.
PAPER_LORA = {"r": 32, "target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]}


def on_meta(config: PreTrainedConfig) -> nn.Module:
    """The model without data; a RoBERTa without classification head, whose size the paper does not count."""
    classifier = isinstance(config, RobertaConfig)
    auto = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config, attn_implementation="eager").eval()
    if classifier:
        model.classifier = nn.Identity()
    return model


def percentage(config: PreTrainedConfig, adapter: Any) -> tuple[int, float]:
    """Trained parameters, and their share of the base model's in percent."""
    model = on_meta(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    with torch.device("meta"):
        adapted = get_peft_model(model, adapter)
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    return trained, 100 * trained / total


def same_digits(value: float, printed: str) -> bool:
    """Whether a value, rounded to the digits that the paper prints, is what it prints."""
    return f"{value:.{len(printed.partition('.')[2])}f}" == printed


def flops(model: nn.Module, columns: int) -> int:
    """Of one forward over a prompt."""
    ids = torch.zeros(1, columns, dtype=torch.long, device="meta")
    mask = torch.zeros(1, 1, columns, columns, device="meta")  # any other mask is looked into, and there is no data
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    return counter.get_total_flops()


def extra_flops(positions: str, columns: int) -> dict[str, float]:
    """FLOPs that an adapter adds to a prompt on Llama-2-7B, in percent of the base model's.

    On the meta device interventions run one by one, as their equation is written (three products per edited vector).
    With data W - R is formed once and two remain, so these are upper bounds.
    """
    base = flops(on_meta(LLAMA_2_7B), columns)
    adapters = {
        "reft": ReftConfig(r=8, positions=positions),
        "lora_qv": LoraConfig(r=8, target_modules=common.Q_V),
        "lora_paper": LoraConfig(**PAPER_LORA),
    }
    added = {}
    for name, adapter in adapters.items():
        model = on_meta(LLAMA_2_7B)
        with torch.device("meta"):
            adapted = get_peft_model(model, adapter).eval()
        added[name] = 100 * (flops(adapted, columns) - base) / base
    return added


def main() -> None:
    record: dict[str, Any] = {**common.environment(), "parameters": [], "flops": []}
    lines = [
        "| setting | trained | percent | paper | equal | LoRA r=8 q,v | LoRA r=32 q,k,v,up,down |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, config, settings, printed, targets in SETTINGS:
        trained, percent = percentage(config, ReftConfig(**settings))
        lora = percentage(config, LoraConfig(r=8, target_modules=targets))[1]
        paper_lora = percentage(config, LoraConfig(**PAPER_LORA))[1] if isinstance(config, LlamaConfig) else None
        equal = same_digits(percent, printed)
        record["parameters"].append(
            {"setting": name, "trained": trained, "percent": percent, "paper": printed, "equal": equal}
            | {"lora_qv": lora, "lora_paper": paper_lora}
        )
        verdict = "yes" if equal else "**no**"
        shown = "-" if paper_lora is None else f"{paper_lora:.3f} %"
        lines.append(f"| {name} | {trained:,} | {percent:.5f} % | {printed} % | {verdict} | {lora:.3f} % | {shown} |")
    lines += [
        "",
        "| extra FLOPs of a prompt, Llama-2-7B | LoReFT r=8 | goal | met | LoRA r=8 q,v | LoRA r=32 q,k,v,up,down |",
        "|---|---|---|---|---|---|",
    ]
    for positions, columns in (("f7+l7", 32), ("f7+l7", 256), ("all", 256)):
        added = extra_flops(positions, columns)
        record["flops"].append({"positions": positions, "columns": columns, **added})
        lines.append(
            f"| {positions}, prompt of {columns} tokens | {added['reft']:.4f} % | < 0.15 % | "
            f"{'yes' if added['reft'] < 0.15 else '**no**'} | {added['lora_qv']:.3f} % | {added['lora_paper']:.3f} % |"
        )
    text = common.heading(record) + "\n\n" + "\n".join(lines) + "\n"
    print(text)
    common.result_path("full-scale", "json").write_text(json.dumps(record, indent=1) + "\n")
    common.result_path("full-scale", "md").write_text(text)


if __name__ == "__main__":
    main()
