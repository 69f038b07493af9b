"""Times and memory of one shape: forward, training step, prefill, generation."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import StoppingCriteria, StoppingCriteriaList

from benchmarks import common
from benchmarks.gpu import models
from benchmarks.gpu.deadline import FEWEST_ROUNDS
from benchmarks.gpu.record import Figure
from benchmarks.gpu.work import Work, forward, ratios, training_step

COMPARED = ("reft", "lora_qv", "lora_qv_bf16", "lora_all", "hooks")
LARGEST_DIFFERENCE = 0.1  # of the plain hooks' edit and the adapter's, in the size of the edit; bfloat16 has 8 bits


def time_forward(work: Work) -> Iterator[Figure]:
    """A forward without gradients and labels, the logits of all tokens."""
    inputs = work.batch()
    compared = models.methods(work.base, ("base", *COMPARED), models.places_of(inputs))
    functions = {name: forward(model, inputs) for name, model in compared.items()}
    base, reft, hooks = (functions[name]().logits.float() for name in ("base", "reft", "hooks"))
    error = float((reft - hooks).abs().max() / (reft - base).abs().max())
    del base, reft, hooks
    if error > LARGEST_DIFFERENCE:
        raise RuntimeError(
            f"The plain hooks do not make the adapter's edit: logits differ by {error:.3g} of its effect."
        )
    yield ratios("forward", work.time(functions), "base")
    yield Figure("largest difference to plain hooks / largest effect", {"reft": error})
    if (peak := work.peak_memory(functions, "base")) is not None:
        yield peak


def time_training(work: Work) -> Iterator[Figure]:
    """A training step; the floor is one trained vector behind the first block."""
    inputs = work.batch(labelled=True)
    compared = models.methods(work.base, ("floor", *COMPARED), models.places_of(inputs))
    functions = {name: training_step(model, inputs) for name, model in compared.items()}
    yield ratios("training step", work.time(functions, warmup=4), "floor")
    if (peak := work.peak_memory(functions, "floor")) is not None:
        yield peak


def time_prefill(work: Work) -> Iterator[Figure]:
    """A forward over the prompt that fills a cache, with the logits of the last token only."""
    inputs = work.batch()
    compared = models.methods(work.base, ("base", "reft", "lora_qv", "lora_all"))
    functions = {name: forward(m, inputs, logits_to_keep=1, use_cache=True) for name, m in compared.items()}
    yield ratios("prefill", work.time(functions), "base")


class _Clock(StoppingCriteria):
    """Notes the time after every generated token."""

    def __init__(self) -> None:
        common.synchronize()
        self.times = [time.perf_counter()]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        common.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def generate(model: nn.Module, inputs: dict[str, torch.Tensor], tokens: int, *criteria: StoppingCriteria) -> None:
    """Greedy generation of exactly so many tokens."""
    settings = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    model.generate(**inputs, **settings, stopping_criteria=StoppingCriteriaList(criteria))


def time_generation(work: Work) -> Iterator[Figure]:
    """`generate`: the first token, with the prompt, and each one after it."""
    inputs = work.batch()
    compared = models.methods(work.base, ("base", "reft", "lora_qv", "lora_all"))
    names = list(compared)
    first, step, whole = (common.Times(compared) for _ in range(3))
    for model in compared.values():
        generate(model.eval(), inputs, 3)
    begin = time.monotonic()
    for number in range(work.rounds):
        if number >= FEWEST_ROUNDS and time.monotonic() - begin > work.seconds:
            break
        work.deadline.check()
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            clock = _Clock()
            generate(compared[name], inputs, work.tokens, clock)
            gaps = [after - before for before, after in zip(clock.times, clock.times[1:])]
            first.wall[name].append(gaps[0])
            step.wall[name] += gaps[1:]
            whole.wall[name].append(sum(gaps))
    yield ratios("decode step", step, "base")
    yield ratios("generate: first token", first, "base")
    yield ratios(f"generate {work.tokens} tokens", whole, "base")
