"""How large a run is: of questions or of instructions, on a GPU or on two CPU cores.

Imports nothing, so that run.py can start its workers at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

INSTRUCTIONS = "ultrafeedback_1k"  # the one task that is no multiple choice


@dataclass(frozen=True)
class Size:
    """One kind of run.

    Args:
        folder: of the results, in benchmarks/results.
        setup: arguments of `cells.Setup`.
        methods: names of grid.py; none for all.
    """

    folder: str
    setup: dict[str, Any] = field(default_factory=dict)
    methods: tuple[str, ...] = ()


QUESTIONS = Size("real-llm")
# A training and its evaluation take two minutes of a core.
QUESTIONS_CPU = Size(
    "real-llm-cpu",
    {
        "device": "cpu",
        "tasks": ("openbookqa",),
        "steps": 20,
        "rows": 8,
        "longest": 64,
        "validation": 100,
        "test": 60,
        "size": 20,
        "seeds": (0,),
    },
    ("LoReFT r8 all", "LoRA r8 q,v", "LoReFT r8 f7+l7", "LoRA r1 q,v", "LoReFT r1 all", "IA3"),
)
# Three times over the rows. Logits of such long answers are most of the memory.
TAUGHT = Size(
    "real-llm-instructions",
    {"steps": 90, "rows": 16, "longest": 384, "validation": 100, "test": 130, "size": 32},
)
# A training and its evaluation take a minute of a core.
TAUGHT_CPU = Size(
    "real-llm-instructions-cpu",
    {"device": "cpu", "steps": 16, "rows": 4, "longest": 96, "validation": 32, "test": 50, "size": 8},
    ("LoReFT r8 all", "LoRA r8 q,v", "LoReFT r8 f7+l7", "LoReFT r8 f1+l1"),
)


def size_of(tasks: tuple[str, ...] | None, cpu: bool) -> Size:
    """The size of a run of these tasks; None for the default ones.

    Raises:
        ValueError: if instructions are asked for together with questions, whose learning rates are chosen otherwise.
    """
    if tasks is None or INSTRUCTIONS not in tasks:
        return QUESTIONS_CPU if cpu else QUESTIONS
    if tasks != (INSTRUCTIONS,):
        raise ValueError(f"{','.join(tasks)} has questions beside {INSTRUCTIONS}; run the two one after the other.")
    return TAUGHT_CPU if cpu else TAUGHT
