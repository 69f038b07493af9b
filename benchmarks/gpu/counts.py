"""What is counted, not timed: kernels started, and waits of the host for the device."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import common
from benchmarks.gpu import models
from benchmarks.gpu.record import Figure
from benchmarks.gpu.times import generate
from benchmarks.gpu.work import Run, Work, forward, gradients

BLOCKS = (2, 6)
COMPARED = ("reft", "lora_qv", "lora_qv_bf16", "lora_all", "hooks")
CALLS_BEFORE = 4  # the first training forwards hold a check that anything is edited


def kernels(function: Run, on_gpu: bool) -> int:
    """How many kernels and copies one call starts on a GPU; on a CPU, how many operations it runs."""
    if not on_gpu:
        return sum(common.operations(function).values())
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        function()
        common.synchronize()
    found = sum(event.device_type == DeviceType.CUDA for event in profiler.events())
    if not found:
        raise RuntimeError("torch's profiler saw no kernel; on this machine it cannot count them.")
    return found


def waits(function: Run, on_gpu: bool) -> int:
    """How often one call makes the host wait for the device, as torch's own mode says; on a CPU, by the operations."""
    if not on_gpu:
        return common.synchronizing(common.operations(function))
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("synchroniz" in str(warning.message) for warning in caught)


def count(work: Work) -> Iterator[Figure]:
    """Per block, from models of two and of six blocks; what is left at no blocks is started once per call."""
    for kind, reference in (("forward", "base"), ("forward and backward", "floor")):
        inputs = work.batch(labelled=reference == "floor")
        started: dict[int, dict[str, int]] = {}
        waited: dict[str, int] = {}
        for blocks in BLOCKS:
            base = models.build(work.shape, work.device, blocks)
            compared = models.methods(base, (reference, *COMPARED), models.places_of(inputs))
            run = gradients if reference == "floor" else forward
            functions = {name: run(model, inputs) for name, model in compared.items()}
            for function in functions.values():
                for _ in range(CALLS_BEFORE):
                    function()
            started[blocks] = {name: kernels(function, work.on_gpu) for name, function in functions.items()}
            waited = {name: waits(function, work.on_gpu) for name, function in functions.items()}
        few, many = ({name: n - row[reference] for name, n in row.items()} for row in (started[b] for b in BLOCKS))
        per_block = {name: (many[name] - few[name]) / (BLOCKS[1] - BLOCKS[0]) for name in COMPARED}
        once = {name: few[name] - BLOCKS[0] * per_block[name] for name in COMPARED}
        what = "kernels" if work.on_gpu else "operations"
        own = (started[BLOCKS[1]][reference] - started[BLOCKS[0]][reference]) / (BLOCKS[1] - BLOCKS[0])
        yield Figure(f"{kind}: {what} per block beyond {reference}'s", per_block, note=f"{reference} {own:g}")
        yield Figure(f"{kind}: {what} once per call beyond {reference}'s", once)
        more = {name: waited[name] - waited[reference] for name in COMPARED}
        yield Figure(
            f"{kind}: waits for the device beyond {reference}'s", more, note=f"{reference} {waited[reference]}"
        )
    prompt = work.batch()
    base = models.build(work.shape, work.device, BLOCKS[0])
    steps = {}
    for name, model in models.methods(base, ("base", "reft", "lora_qv", "lora_all")).items():
        model.eval()
        generate(model, prompt, 3)
        long, short = (kernels(lambda m=model, n=n: generate(m, prompt, n), work.on_gpu) for n in (6, 5))
        steps[name] = long - short
    added = {name: (number - steps["base"]) / BLOCKS[0] for name, number in steps.items() if name != "base"}
    yield Figure(f"decode step: {what} per block beyond base's", added, note=f"base {steps['base']} in all")
