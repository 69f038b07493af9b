"""What is compared: methods, the learning rates that are tried for them, and what is varied of LoReFT.

Names and settings only; cells.py makes cells of them.
"""

from __future__ import annotations

from typing import Any

from benchmarks.study.methods import Method

# Four learning rates for each kind, a factor of three apart, the likeliest first: a run that is cut has these.
RATES = {
    "reft": (4e-3, 1.3e-3, 1.2e-2, 4e-4),
    "lora": (1e-3, 3e-3, 3e-4, 1e-2),
    "ia3": (1e-2, 3e-2, 3e-3, 1e-1),
    "full": (3e-5, 1e-4, 1e-5, 3e-4),
}
# On instructions a factor of three lower: the base model answers chats already, and LoReFT at 4e-3 made it worse.
CHAT_RATES = {
    "reft": (1.3e-3, 4e-4, 4e-3, 1.3e-4),
    "lora": (1e-3, 3e-4, 3e-3, 1e-4),
    "ia3": (1e-2, 3e-3, 3e-2, 1e-3),
    "full": (3e-5, 1e-5, 1e-4, 3e-6),
}
FIRST = 2  # so many rates of every method before any gets the others

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def reft(intervention: str, r: int, positions: str, **settings: Any) -> Method:
    return Method("reft", {"intervention": intervention, "r": r, "positions": positions, **settings})


def lora(r: int, *targets: str, **settings: Any) -> Method:
    """LoRA on all blocks, alpha = 2r, no dropout."""
    return Method("lora", {"r": r, "lora_alpha": 2 * r, "target_modules": list(targets), **settings})


# The comparison, in the order in which it is run.
MAIN = {
    "LoReFT r8 all": reft("loreft", 8, "all"),
    "LoRA r8 q,v": lora(8, "q_proj", "v_proj"),
    "LoReFT r8 f7+l7": reft("loreft", 8, "f7+l7"),
    "LoRA r8 all linear": lora(8, *LINEAR),
    "DiReFT r8 all": reft("direft", 8, "all"),
    "LoRA r1 q,v": lora(1, "q_proj", "v_proj"),
    "LoReFT r1 all": reft("loreft", 1, "all"),
    "IA3": Method("ia3"),
    "full finetuning": Method("full"),
    "NoReFT r8 all": reft("noreft", 8, "all"),
    "DoRA r8 q,v": lora(8, "q_proj", "v_proj", use_dora=True),
    "LoReFT r32 all": reft("loreft", 32, "all"),
}
CORE = tuple(MAIN)[:9]  # has its seeds before the others begin

# What f7+l7 needs to learn what all learns, and what a newcomer's first config does.
BASIS = "LoReFT r8 f7+l7"
MORE = {
    "LoReFT r4 f1+l1": reft("loreft", 4, "f1+l1"),
    "LoReFT r8 l7": reft("loreft", 8, "l7"),
    "LoReFT r8 f1+l1": reft("loreft", 8, "f1+l1"),
    "LoReFT r8 e2+l1": reft("loreft", 8, "e2+l1"),
    "LoReFT r8 f7+l7, random start": reft("loreft", 8, "f7+l7", init_weights=False),
    "LoReFT r8 f7+l7, prefix and suffix apart": reft("loreft", 8, "f7+l7", share_weights=False),
    "LoReFT r32 f7+l7": reft("loreft", 32, "f7+l7"),
    "LoReFT r8 all, random start": reft("loreft", 8, "all", init_weights=False),
    "LoReFT r8 all, every third block": reft("loreft", 8, "all", layers_to_transform=list(range(1, 30, 3))),
    "LoReFT r8 all, lower half": reft("loreft", 8, "all", layers_to_transform=list(range(15))),
    "LoReFT r8 all, four blocks": reft("loreft", 8, "all", layers_to_transform=[3, 9, 18, 24]),
    "DiReFT r8 f7+l7": reft("direft", 8, "f7+l7"),
    "LoRA r1 all linear": lora(1, *LINEAR),
}
LONGER = 3  # times as many steps, for the BASIS, at its best rate
EVERYTHING = {**MAIN, **MORE}
