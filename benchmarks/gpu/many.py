"""Many adapters: 64 in one batch, a thousand in one model."""

from __future__ import annotations

import time
from collections.abc import Iterator

from torch import nn

from benchmarks import common
from benchmarks.gpu import models
from benchmarks.gpu.record import Figure
from benchmarks.gpu.work import Run, Work, forward, ratios

IN_A_BATCH = 64
COLUMNS = 32
ADDING = 15.0  # seconds for each method
CONFIGS = {"reft": common.reft_config, "lora_qv": lambda: common.lora_config(common.Q_V)}


def names(number: int) -> list[str]:
    return [f"a{place}" for place in range(number)]


def with_adapters(work: Work, method: str, number: int) -> tuple[nn.Module, int]:
    """A frozen model with copies of one adapter, and how many there are: adding stops after some seconds."""
    model = models.adapted(work.base, CONFIGS[method](), "a0")
    added = models.add_copies(model, names(number)[1:], min(ADDING, work.deadline.left()))
    work.deadline.check()
    return model.eval().requires_grad_(False), added + 1


def one_batch(work: Work) -> Iterator[Figure]:
    """A prefill of 64 rows with an adapter each, against the same rows with one adapter."""
    inputs = work.batch(rows=IN_A_BATCH, columns=COLUMNS)
    functions: dict[str, Run] = {"base": forward(work.base, inputs, logits_to_keep=1)}
    for method in CONFIGS:
        model, number = with_adapters(work, method, IN_A_BATCH)
        if number < IN_A_BATCH:
            raise RuntimeError(f"only {number} adapters were added in {ADDING:g} s")
        functions[f"{method} one"] = forward(model, inputs, logits_to_keep=1)
        functions[method] = forward(model, inputs, logits_to_keep=1, adapter_names=names(IN_A_BATCH))
    times = work.time(functions)
    by_one = {method: times.ratio(method, f"{method} one") for method in CONFIGS}
    milliseconds = {name: times.milliseconds(name) for name in functions}
    yield Figure(f"{IN_A_BATCH} adapters in one batch / one", by_one, milliseconds, f"{IN_A_BATCH} × {COLUMNS} tokens")
    by_base = {method: times.ratio(method, "base") for method in CONFIGS}
    yield Figure(f"{IN_A_BATCH} adapters in one batch / base", by_base)
    by_lora = {"reft": times.ratio("reft", "lora_qv")}
    yield Figure(f"{IN_A_BATCH} adapters in one batch / LoRA's", by_lora)


def resident(work: Work) -> Iterator[Figure]:
    """Memory of many adapters, and what those that are not asked for cost a batch of 64."""
    inputs = work.batch(rows=IN_A_BATCH, columns=COLUMNS)
    for method in CONFIGS:
        work.free()
        one, _ = with_adapters(work, method, 1)
        before, begin = work.memory(), time.monotonic()
        model, number = with_adapters(work, method, work.adapters)
        seconds = time.monotonic() - begin
        work.free()
        held = work.memory() - before
        own = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if any_adapter(name))
        note = f"{number} adapters"
        yield Figure("resident: MiB on the device", {method: round(held / 2**20, 2)}, note=note)
        yield Figure("resident: bytes / those of the parameters", {method: held / own}, note=note)
        yield Figure("resident: ms to copy one into the model", {method: 1e3 * seconds / number}, note=note)
        few, _ = with_adapters(work, method, min(IN_A_BATCH, number))
        rows = (names(min(IN_A_BATCH, number)) * IN_A_BATCH)[:IN_A_BATCH]
        functions = {
            "few": forward(few, inputs, logits_to_keep=1, adapter_names=rows),
            method: forward(model, inputs, logits_to_keep=1, adapter_names=rows),
        }
        yield ratios(f"{len(set(rows))} of the resident adapters in one batch", work.time(functions), "few", note)
        del functions, few, model, one


def any_adapter(name: str) -> bool:
    """Whether a parameter is one of an adapter's (a0, a1, ...), by its name."""
    return any(part[0] == "a" and part[1:].isdigit() for part in name.split("."))
