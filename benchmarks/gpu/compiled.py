"""Without the host between operations: CUDA graphs, and torch.compile on a few blocks, since compiling takes long."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu import models
from benchmarks.gpu.record import Figure
from benchmarks.gpu.work import Run, Work, forward, ratios

COMPARED = ("base", "reft", "lora_qv")
BLOCKS = 2
LARGEST_DIFFERENCE = 0.02  # of a replayed graph's logits, in the size of the logits


def capture(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A forward as a CUDA graph, and its logits, which each replay overwrites."""
    run = forward(model, inputs, use_cache=False)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        logits = run().logits
    torch.cuda.synchronize()
    return graph, logits


def capturable(model: nn.Module, ids: Tensor) -> tuple[dict[str, Tensor], str]:
    """Arguments with which the base model's own forward can be captured, and what they are, in words.

    A graph holds no wait for the device. With a mask [B, S], transformers looks whether it hides anything, and in some
    versions without a mask, too; a mask [B, 1, S, S] is taken as it is.
    """
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
    masks: dict[str, dict[str, Tensor]] = {
        "without a mask": {},
        "with a mask [B, 1, S, S]": {"attention_mask": causal.expand(ids.shape[0], 1, -1, -1)},
    }
    problems = []
    for words, mask in masks.items():
        try:
            capture(model, {"input_ids": ids, **mask})
            return mask, words
        except Exception as error:
            torch.cuda.synchronize()
            problems.append(f"{words}: {type(error).__name__}: {str(error)[:300]}")
    raise RuntimeError(f"the base model itself is not captured. {'; '.join(problems)}")


def graphs(work: Work) -> Iterator[Figure]:
    """A forward captured once and replayed on other tokens: equal to an eager one, and how long it takes."""
    functions: dict[str, Run] = {}
    kept: list[Any] = []
    differences, effects, logits_of = {}, {}, {}
    ids = work.batch()["input_ids"]
    other = ids.roll(1, 0).flip(1).contiguous()
    mask, words = capturable(work.base, ids)
    for name, model in models.methods(work.base, COMPARED).items():
        model.requires_grad_(False)
        inputs = {"input_ids": ids.clone(), **mask}
        try:
            graph, logits = capture(model, inputs)
        except Exception as error:
            torch.cuda.synchronize()
            note = f"not captured: {type(error).__name__}: {str(error)[:300]}"
            yield Figure("forward as a CUDA graph", {name: None}, note=note)
            continue
        inputs["input_ids"].copy_(other)
        graph.replay()
        torch.cuda.synchronize()
        logits_of[name] = logits.float()
        eager = forward(model, {"input_ids": other, **mask}, use_cache=False)
        expected = eager().logits.float()
        differences[name] = float((logits_of[name] - expected).abs().max() / expected.abs().max())
        effects[name] = float((expected - logits_of["base"]).abs().max() / expected.abs().max())
        functions[name] = graph.replay
        functions[f"{name} eager"] = eager
        kept.append((graph, inputs, logits))
        del expected
    equal = all(value < LARGEST_DIFFERENCE for value in differences.values())
    note = "equal" if equal else "**not equal**"
    yield Figure("replayed on other tokens: largest difference to eager / largest logit", differences, note=note)
    yield Figure("largest effect of the adapter / largest logit", effects)
    times = work.time(functions)
    yield ratios("forward as a CUDA graph", times, "base", words)
    by_eager = {name: times.ratio(name, f"{name} eager") for name in differences}
    yield Figure("forward as a CUDA graph / the same eager", by_eager)


def compiled(work: Work) -> Iterator[Figure]:
    """torch.compile of a few blocks, in one graph; seconds to compile, then a forward."""
    inputs = work.batch()
    base = models.build(work.shape, work.device, BLOCKS)
    functions: dict[str, Run] = {}
    for name, model in models.methods(base, COMPARED).items():
        model.requires_grad_(False)
        run = forward(torch.compile(model, fullgraph=True), inputs, use_cache=False)
        begin = time.monotonic()
        try:
            run()
        except Exception as error:
            note = f"{type(error).__name__}: {str(error)[:300]}"
            yield Figure("compiled: seconds of the first call", {name: None}, note=note)
            continue
        seconds = round(time.monotonic() - begin, 1)
        yield Figure("compiled: seconds of the first call", {name: seconds}, note=f"{BLOCKS} blocks")
        functions[name] = run
        functions[f"{name} eager"] = forward(model, inputs, use_cache=False)
        if name != "base" and "base" in functions:
            pair = {other: functions[other] for other in ("base", name)}
            yield ratios("forward compiled", work.time(pair), "base", f"{BLOCKS} blocks")
    if functions:
        times = work.time(functions)
        by_eager = {name: times.ratio(name, f"{name} eager") for name in COMPARED if name in functions}
        yield Figure("forward compiled / the same eager", by_eager, note=f"{BLOCKS} blocks")
