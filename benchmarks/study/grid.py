"""What is compared: methods and the learning rates that are tried for them, and the ablations of one of them.

Names and settings only; cells.py makes cells of them.
"""

from __future__ import annotations

from typing import Any

from benchmarks.study.methods import Method

# Learning rates that are tried for each method, on the validation split: as many for all.
RATES = {
    "reft": (3e-4, 1e-3, 3e-3, 1e-2),
    "lora": (3e-4, 1e-3, 3e-3, 1e-2),
    "ia3": (3e-3, 1e-2, 3e-2, 1e-1),
    "bitfit": (1e-3, 3e-3, 1e-2, 3e-2),
    "head": (1e-2, 3e-2, 1e-1, 3e-1),
    "full": (1e-5, 3e-5, 1e-4, 3e-4),
}


def reft(intervention: str, r: int, positions: str, **settings: Any) -> Method:
    return Method("reft", {"intervention": intervention, "r": r, "positions": positions, **settings})


def lora(r: int, *targets: str) -> Method:
    """LoRA on all blocks, alpha = 2r, no dropout."""
    return Method("lora", {"r": r, "lora_alpha": 2 * r, "target_modules": list(targets)})


LINEAR = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")

MAIN = {
    "LoReFT r4 f1": reft("loreft", 4, "f1"),
    "LoRA r8": lora(8, "query", "value"),
    "head only": Method("head"),
    "LoReFT r1 f1": reft("loreft", 1, "f1"),
    "LoReFT r16 f1": reft("loreft", 16, "f1"),
    "LoReFT r4 f4+l4": reft("loreft", 4, "f4+l4"),
    "LoReFT r4 all": reft("loreft", 4, "all"),
    "LoReFT r1 all": reft("loreft", 1, "all"),
    "NoReFT r4 f1": reft("noreft", 4, "f1"),
    "NoReFT r4 all": reft("noreft", 4, "all"),
    "DiReFT r1 f1": reft("direft", 1, "f1"),
    "DiReFT r4 f1": reft("direft", 4, "f1"),
    "DiReFT r4 all": reft("direft", 4, "all"),
    "LoRA r1": lora(1, "query", "value"),
    "LoRA r1 all linear": lora(1, *LINEAR),
    "LoRA r8 all linear": lora(8, *LINEAR),
    "IA3": Method("ia3"),
    "BitFit": Method("bitfit"),
    "full finetuning": Method("full"),
}
WITH_CURVE = ("LoReFT r4 f1", "DiReFT r4 all", "LoRA r8", "head only", "full finetuning")
QUICK = ("LoReFT r4 f1", "LoReFT r1 f1", "DiReFT r4 all", "LoRA r8", "LoRA r1", "IA3", "BitFit", "head only")

# Everything below changes one thing of this method, at the learning rate that was found for it.
BASIS = "LoReFT r4 f1"


def changed(**settings: Any) -> Method:
    return Method("reft", {**MAIN[BASIS].settings, **settings})


ABLATIONS = {
    "rank": {"1": changed(r=1), "2": changed(r=2), "16": changed(r=16)},
    "positions": {spec: changed(positions=spec) for spec in ("f4", "l1", "l4", "f1+l1", "f4+l4", "all")},
    "blocks": {
        "0": changed(layers_to_transform=[0]),
        "5": changed(layers_to_transform=[5]),
        "0-2": changed(layers_to_transform=[0, 1, 2]),
        "3-5": changed(layers_to_transform=[3, 4, 5]),
        "1, 3, 5": changed(layers_to_transform=[1, 3, 5]),
    },
    "weights": {
        "f4+l4, per term": changed(positions="f4+l4", share_weights=False),
        "f4+l4, per position": changed(positions="f4+l4", share_weights="position"),
        "f1, one set for all blocks": changed(share_layers=True),
    },
    "initialisation": {"random": changed(init_weights=False)},
    "equation": {name: changed(intervention=name) for name in ("noreft", "direft", "odireft", "consreft", "lobireft")},
}
ABLATED_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)  # the one that was found is among them, or comes to them

# The language model: one rate for each kind, from a few trials. They are higher than the encoder's: it is narrow.
CAUSAL_RATES = {"reft": 3e-2, "lora": 6e-3, "full": 1e-3}
CAUSAL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
INSTRUCTIONS = {
    "LoReFT r4 f1+l1": reft("loreft", 4, "f1+l1"),
    "LoReFT r4 all": reft("loreft", 4, "all"),
    "LoReFT r16 all": reft("loreft", 16, "all"),
    "LoRA r1": lora(1, "q_proj", "v_proj"),
    "LoRA r8": lora(8, "q_proj", "v_proj"),
    "full finetuning": Method("full"),
}
STYLES = {
    "LoReFT r4 f1+l1": reft("loreft", 4, "f1+l1"),
    "LoReFT r4 all": reft("loreft", 4, "all"),
    "LoReFT r4 f1+l1+d": reft("loreft", 4, "f1+l1+d"),
    "LoReFT r1 f1+l1+d": reft("loreft", 1, "f1+l1+d"),
    "LoRA r1": lora(1, "q_proj", "v_proj"),
    "LoRA r8": lora(8, "q_proj", "v_proj"),
}
COMPOSED = ("LoReFT r4 f1+l1+d", "LoRA r8")  # of STYLES
MEMORY = {
    "l1, one block, r1": reft("loreft", 1, "l1", layers_to_transform=[1]),
    "l1, one block, r16": reft("loreft", 16, "l1", layers_to_transform=[1]),
    "l1, all blocks, r4": reft("loreft", 4, "l1"),
    "all, all blocks, r4": reft("loreft", 4, "all"),
    "l1+d, all blocks, r1": reft("loreft", 1, "l1+d"),
    "l1+d, all blocks, r4": reft("loreft", 4, "l1+d"),
    "l1+d, all blocks, r16": reft("loreft", 16, "l1+d"),
}
