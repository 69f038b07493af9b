"""What test_distributed.py runs in several processes: `accelerate launch ... distributed_program.py OUT SCENARIO ...`.

Each scenario trains with transformers' Trainer, saves the adapter to OUT/SCENARIO, and what the trained model computes
for a fixed batch to OUT/SCENARIO.pt. Run by one process, the same function is what the others are compared with: the
global batch is the same whatever the number of processes.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from conftest import batch, tiny_model
from peft import get_peft_model
from torch.distributed.fsdp import FullyShardedDataParallel

from peft_reft import ReftConfig

GLOBAL_BATCH, STEPS = 8, 3
CAUSAL = {"task_type": "CAUSAL_LM", "positions": "f2+l2", "r": 3}
SCENARIOS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": {"args": {"gradient_checkpointing": True}},
    "reentrant": {"args": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}},
    "accumulation": {"args": {"gradient_accumulation_steps": 2}},
    "no edit on one rank": {"config": {"positions": "e4"}, "prompts": (5, 6, 7, 8, 1, 2, 3, 3)},
    "shared layers": {"config": {"share_layers": True}},
    "own weights": {"config": {"share_weights": False}},
    "own weights per position": {"config": {"share_weights": "position"}},
    "classifier": {"head": "classifier", "config": {"task_type": "SEQ_CLS"}},
}


def rows(prompts: tuple[int, ...], classes: bool) -> list[dict[str, Any]]:
    """Examples with prompts of these lengths, over and over, and answers of one to three tokens."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(2 * GLOBAL_BATCH * STEPS):
        prompt = prompts[number % len(prompts)]
        ids = torch.randint(3, 90, (prompt + 1 + number % 3,), generator=generator).tolist()
        labels = number % 2 if classes else [-100] * prompt + ids[prompt:]
        made.append({"input_ids": ids, "labels": labels})
    return made


def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows padded on the right."""

    def padded(values: list[list[int]], filler: int) -> torch.Tensor:
        tensors = [torch.tensor(value) for value in values]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=filler)

    ids = [example["input_ids"] for example in examples]
    labels = [example["labels"] for example in examples]
    return {
        "input_ids": padded(ids, 0),
        "attention_mask": padded([[1] * len(row) for row in ids], 0),
        "labels": padded(labels, -100) if isinstance(labels[0], list) else torch.tensor(labels),
    }


def train(name: str, folder: Path, **more: Any) -> None:
    """Train one scenario and write its results.

    Args:
        more: further settings of TrainingArguments.
    """
    scenario = SCENARIOS[name]
    processes = int(os.environ.get("WORLD_SIZE", 1))
    settings = {"per_device_train_batch_size": GLOBAL_BATCH // processes, **scenario.get("args", {}), **more}
    args = transformers.TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=STEPS,
        learning_rate=1e-2,
        adam_epsilon=1e-4,  # Adam makes whole steps of rounding errors where a gradient is next to nothing
        train_sampling_strategy="sequential",
        ddp_find_unused_parameters=False,  # so that a parameter without a gradient is an error
        use_cpu=os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true",  # which accelerate leaves out with use_cpu
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        seed=0,
        **settings,
    )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # On CPUs accelerate would quietly run DDP. With GPUs these lines are not there, and all else is the same.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        PartialState._shared_state["device"] = torch.device("cpu")
    if (
        os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    ):  # without GPUs accelerate takes each process for the only one
        ranks = {"num_processes": "WORLD_SIZE", "process_index": "RANK", "local_process_index": "LOCAL_RANK"}
        PartialState._shared_state.update({name: int(os.environ[variable]) for name, variable in ranks.items()})
    if "REFT_BASE" in os.environ:  # ZeRO-3 splits a model while it is made, and has to load its weights
        base = transformers.AutoModelForCausalLM.from_pretrained(os.environ["REFT_BASE"])
    else:
        base = tiny_model("llama", scenario.get("head"))
    transformers.set_seed(0)
    model = get_peft_model(base, ReftConfig(**{**CAUSAL, **scenario.get("config", {})}))
    trainer = transformers.Trainer(
        model=model,
        args=args,
        train_dataset=rows(scenario.get("prompts", (5, 1, 7, 3)), scenario.get("head") == "classifier"),
        data_collator=collate,
    )
    trainer.train()
    if isinstance(trainer.model_wrapped, FullyShardedDataParallel):
        save_from_fsdp1(trainer, folder / name)
    else:
        trainer.save_model(str(folder / name))
    # DeepSpeed's engine is gone by now.
    trained = (trainer.model if trainer.is_deepspeed_enabled else trainer.model_wrapped).eval()
    with torch.no_grad():
        logits = trained(**batch(7, 4)).logits
    if trainer.is_world_process_zero():
        kind, processes = str(trainer.accelerator.distributed_type), trainer.accelerator.num_processes
        torch.save({"logits": logits.cpu(), "kind": kind, "processes": processes}, folder / f"{name}.pt")


def save_from_fsdp1(trainer: transformers.Trainer, folder: Path) -> None:
    """`save_model`, but for the way to the weights: on CPUs FSDP1's state dict crashes, with any model or adapter."""
    with FullyShardedDataParallel.summon_full_params(trainer.model_wrapped, writeback=False):
        weights = {n.replace("_fsdp_wrapped_module.", ""): p.detach() for n, p in trainer.model.named_parameters()}
        if trainer.is_world_process_zero():
            trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder, state_dict=weights)


if __name__ == "__main__":
    output, *names = sys.argv[1:]
    for scenario_name in names:
        train(scenario_name, Path(output))
