"""An edit as one Triton kernel (gather, two small products, scatter), beside the five operations of the package.

    python -m benchmarks.gpu.kernel --seconds 40       # on a GPU
    TRITON_INTERPRET=1 python -m benchmarks.gpu.kernel --device cpu --hidden 64 --no-write   # is it right, on a CPU

The edit of a block is h + keep (h down + bias) up at some tokens, h in bfloat16 and the factors in float32. *Plain* is
the package's own `Edit.add`, *kernel* the same with one launch forward and two backward (the second of them fills the
gradients' sums with zeros). Both return a new tensor. Which rows are edited is a map over all rows, made once for all
blocks, so that one launch copies the rows that are not edited and edits those that are.

Shape letters: B rows, S columns, N edited tokens, D hidden size, R rank.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from benchmarks import common
from benchmarks.gpu import models
from benchmarks.gpu.deadline import Deadline, OutOfTime, interleaved
from benchmarks.gpu.work import forward, training_step
from peft_reft.context.edit import Edit
from peft_reft.interventions.equations import Factors

BATCHES = ((8, 128), (4, 512))
# Of differences, in the size of what is compared. The edit is out - h in bfloat16: one step of `out`, 2^-7 of an entry,
# is up to 4 % of an edit whose entries are a fifth of those of `out`, and the plain way rounds twice, the kernel once.
TOLERANCE = 0.04


@triton.jit
def forward_kernel(h, out, slots, keep, down, bias, up, D: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr):
    """One row of `out` [B * S, D]: that of `h`, and its edit if `slots` [B * S] has a place for it (-1: none)."""
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    own = tl.load(h + row * D + columns, mask=inside, other=0.0)
    slot = tl.load(slots + row)
    if slot >= 0:
        x = own.to(tl.float32)
        factor = tl.load(keep + slot)
        edit = tl.zeros_like(x)
        for r in tl.static_range(R):
            value = tl.sum(x * tl.load(down + columns * R + r, mask=inside, other=0.0)) + tl.load(bias + r)
            edit += value * tl.load(up + r * D + columns, mask=inside, other=0.0)
        tl.store(out + row * D + columns, (x + factor * edit).to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(out + row * D + columns, own, mask=inside)


@triton.jit
def backward_kernel(
    g, h, grad_h, slots, keep, down, bias, up, sums, D: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr
):
    """One row of the gradient of h, and its part of those of the factors, added to `sums`: down, up, bias in a row."""
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    own = tl.load(g + row * D + columns, mask=inside, other=0.0)
    slot = tl.load(slots + row)
    if slot >= 0:
        grad = own.to(tl.float32)
        x = tl.load(h + row * D + columns, mask=inside, other=0.0).to(tl.float32)
        factor = tl.load(keep + slot)
        more = tl.zeros_like(grad)
        for r in tl.static_range(R):
            down_r = tl.load(down + columns * R + r, mask=inside, other=0.0)
            up_r = tl.load(up + r * D + columns, mask=inside, other=0.0)
            value = (tl.sum(x * down_r) + tl.load(bias + r)) * factor
            inner = tl.sum(grad * up_r) * factor
            more += inner * down_r
            tl.atomic_add(sums + columns * R + r, inner * x, mask=inside)
            tl.atomic_add(sums + D * R + r * D + columns, value * grad, mask=inside)
            tl.atomic_add(sums + 2 * D * R + r, inner)
        tl.store(grad_h + row * D + columns, (grad + more).to(grad_h.dtype.element_ty), mask=inside)
    else:
        tl.store(grad_h + row * D + columns, own, mask=inside)


class OneLaunch(torch.autograd.Function):
    """The edit by the kernels: of h [B, S, D], with `slots` int32 [B * S], keep [N], and the factors in float32."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, slots: Tensor, keep: Tensor, down: Tensor, bias: Tensor, up: Tensor) -> Tensor:
        for tensor in (h, down, bias, up):
            if not tensor.is_contiguous():  # the kernels reckon addresses from the shape alone
                raise ValueError(f"the kernel reads contiguous tensors, got strides {tensor.stride()}; copy it first")
        out = torch.empty_like(h)
        r, d = up.shape
        forward_kernel[(slots.shape[0],)](h, out, slots, keep, down, bias, up, d, r, triton.next_power_of_2(d))
        ctx.save_for_backward(h, slots, keep, down, bias, up)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        h, slots, keep, down, bias, up = ctx.saved_tensors
        r, d = up.shape
        g = g.contiguous()
        grad_h, sums = torch.empty_like(g), torch.zeros(2 * d * r + r, device=g.device)
        grid = (slots.shape[0],)
        block = triton.next_power_of_2(d)
        backward_kernel[grid](g, h, grad_h, slots, keep, down, bias, up, sums, d, r, block)
        return grad_h, None, None, sums[: d * r].view(d, r), sums[2 * d * r :], sums[d * r : 2 * d * r].view(r, d)


class KernelHooks(models.PlainHooks):
    """`PlainHooks` with the kernel in place of its operations; the same arguments."""

    @staticmethod
    def _hook(down: Tensor, bias: Tensor, up: Tensor, places: Tensor) -> Any:
        made: dict[int, tuple[Tensor, Tensor]] = {}
        up = up.contiguous()  # the orthonormal rows are a transposed view

        def edit(block: nn.Module, args: Any, h: Tensor) -> Tensor:
            rows = h.shape[0] * h.shape[1]
            if rows not in made:
                made[rows] = slots_of(places, rows), torch.ones(len(places), device=h.device)
            return OneLaunch.apply(h, *made[rows], down, bias, up)

        return edit


def slots_of(places: Tensor, rows: int) -> Tensor:
    """int32 [rows]: which of the places each row is, -1 for none."""
    slots = torch.full((rows,), -1, dtype=torch.int32, device=places.device)
    slots[places] = torch.arange(len(places), dtype=torch.int32, device=places.device)
    return slots


def edits(
    hidden: int, batch: tuple[int, int], device: str, dtype: torch.dtype = torch.bfloat16, r: int = 4
) -> tuple[dict[str, Callable[[Tensor], Tensor]], Tensor, list[Tensor]]:
    """The two ways of one edit, a hidden state for them, and the factors, which require gradients."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    rows, columns = batch
    places = models.places_of({"input_ids": torch.zeros(rows, columns, device=device)})
    up = torch.linalg.qr(random(hidden, r)).Q.mT.contiguous()
    factors = [(random(hidden, r) / hidden**0.5).requires_grad_(), random(r).requires_grad_(), up.requires_grad_()]
    keep = torch.rand(len(places), generator=generator).add_(0.5).to(device)
    edit = Edit(places, keep[:, None], {0: Factors(*factors)})
    slots = slots_of(places, rows * columns)
    functions = {
        "plain": lambda h: edit.add(h, h, edit.blocks[0]),
        "kernel": lambda h: OneLaunch.apply(h, slots, keep, *factors),
    }
    return functions, random(rows, columns, hidden).to(dtype), factors


def difference(one: Tensor, other: Tensor) -> float:
    """The largest difference, in the size of the largest entry."""
    return float((one.float() - other.float()).abs().max() / other.float().abs().max())


def check(functions: dict[str, Callable[[Tensor], Tensor]], h: Tensor, factors: list[Tensor]) -> dict[str, float]:
    """Differences of outputs and gradients between the ways.

    Raises:
        RuntimeError: for one that rounding does not explain, and for a row that is not edited and changed.
    """
    found: dict[str, list[Tensor]] = {}
    direction = torch.randn(h.shape, generator=torch.Generator().manual_seed(2)).to(h)
    for name, function in functions.items():
        state = h.clone().requires_grad_()
        out = function(state)
        found[name] = [out.detach() - h, out.detach(), *torch.autograd.grad(out, [state, *factors], direction)]
    names = ("edit", "output", "grad h", "grad down", "grad bias", "grad up")
    differences = {n: difference(a, b) for n, a, b in zip(names, found["kernel"], found["plain"])}
    kept = found["plain"][0].abs().amax(-1) == 0
    if max(differences.values()) > TOLERANCE or not torch.equal(found["kernel"][1][kept], h[kept]):
        raise RuntimeError(f"The kernel is not the package's edit: differences {differences}")
    if kept.all():
        raise RuntimeError("nothing was edited")
    return differences


def with_backward(function: Callable[[Tensor], Tensor], h: Tensor, factors: list[Tensor]) -> Callable[[], None]:
    state = h.clone().requires_grad_()
    direction = torch.ones_like(h)

    def run() -> None:
        torch.autograd.grad(function(state), [state, *factors], direction)

    return run


def repeated(function: Callable[[], Any], times: int) -> Callable[[], None]:
    """The function many times over: one call is shorter than the clock's own noise."""

    def run() -> None:
        for _ in range(times):
            function()

    return run


def one_edit(device: str, hidden: int, batch: tuple[int, int], deadline: Deadline, calls: int) -> dict[str, Any]:
    """Times of one edit, forward and with backward: eager, and in a CUDA graph, where the host is no limit."""
    functions, h, factors = edits(hidden, batch, device)
    row: dict[str, Any] = {"hidden": hidden, "batch": list(batch), "differences": check(functions, h, factors)}
    forwards = {name: torch.no_grad()(lambda f=f: f(h)) for name, f in functions.items()}
    backwards = {name: with_backward(f, h, factors) for name, f in functions.items()}
    for kind, runs in (("forward", forwards), ("forward and backward", backwards)):
        times = interleaved({name: repeated(run, calls) for name, run in runs.items()}, deadline, 9, 1.0)
        row[kind] = summary(times, calls)
    if device == "cuda":
        graphs = {name: captured(repeated(run, calls)) for name, run in forwards.items()}
        times = interleaved({name: graph.replay for name, graph in graphs.items()}, deadline, 9, 1.0)
        row["forward in a CUDA graph"] = summary(times, calls)
    return row


def summary(times: common.Times, calls: int) -> dict[str, Any]:
    micro = {name: 1e3 * times.milliseconds(name)["median"] / calls for name in ("plain", "kernel")}
    return {"kernel / plain": times.ratio("kernel", "plain"), "microseconds": micro}


def captured(run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def whole_model(device: str, shape: models.Shape, deadline: Deadline) -> dict[str, Any]:
    """A model with the edit as plain hooks, as kernel hooks, and as the adapter; ratios to the base or the floor."""
    found: dict[str, Any] = {}
    base = models.build(shape, device)
    for kind, reference in (("forward", "base"), ("training step", "floor")):
        inputs = common.batch(shape.rows, shape.columns, shape.vocab, device=device, labelled=reference == "floor")
        places = models.places_of(inputs)
        compared = models.methods(base, (reference, "reft", "hooks", "lora_qv"), places)
        compared["kernel"] = KernelHooks(common.with_same_weights(base), compared["reft"], places)
        run = training_step if reference == "floor" else forward
        functions = {name: run(model, inputs) for name, model in compared.items()}
        if reference == "base":
            logits = {name: functions[name]().logits for name in ("base", "hooks", "kernel")}
            effect = difference(logits["base"], logits["hooks"])
            found["differences of logits"] = {"of kernel hooks": difference(logits["kernel"], logits["hooks"])}
            found["differences of logits"]["of the base model"] = effect
            if found["differences of logits"]["of kernel hooks"] > 0.1 * effect:
                raise RuntimeError(f"the kernel hooks make another edit: {found}")
        times = interleaved(functions, deadline, 9, 3.0, warmup=3)
        found[kind] = {
            "reference": reference,
            "ratios": {name: times.ratio(name, reference) for name in functions},
            "milliseconds": {name: times.milliseconds(name)["median"] for name in functions},
            "kernel hooks / plain hooks": times.ratio("kernel", "hooks"),
        }
    return found


def main() -> None:
    begin = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--hidden", default="576,1536,4096", help="widths, separated by commas")
    parser.add_argument("--shape", choices=models.SHAPES, help="of the whole model (default 135M; tiny on a CPU)")
    parser.add_argument("--calls", type=int, help="of an edit in a row (default 100; 1 on a CPU)")
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--output", type=Path, help="the JSON file (default: in benchmarks/results)")
    parser.add_argument("--commit", default="", help="written into the file where git cannot tell it")
    parser.add_argument("--no-write", action="store_true", help="print only")
    given = parser.parse_args()
    on_gpu = given.device == "cuda"
    deadline = Deadline(given.seconds / 60, begin)
    run = common.environment() | {"command": " ".join(["python", "-m", "benchmarks.gpu.kernel", *sys.argv[1:]])}
    run["commit"] = run["commit"] or given.commit
    record: dict[str, Any] = {"run": run | {"triton": triton.__version__}, "edits": []}
    path = given.output or common.result_path("gpu-kernel", "json")

    def keep(line: str) -> None:
        print(f"[{deadline.elapsed():5.1f} s] {line}", flush=True)
        if not given.no_write:
            path.write_text(json.dumps(record, indent=1) + "\n")

    try:
        with deadline.alarm():
            shape = models.SHAPES[given.shape or ("135M" if on_gpu else "tiny")]
            for number, hidden in enumerate(map(int, given.hidden.split(","))):
                for batch in BATCHES if on_gpu else ((2, 10),):
                    row = one_edit(given.device, hidden, batch, deadline, given.calls or (100 if on_gpu else 1))
                    record["edits"].append(row)
                    keep(json.dumps(row))
                if not number:
                    record["model"] = whole_model(given.device, shape, deadline)
                    keep(json.dumps(record["model"]))
    except OutOfTime:
        print(f"[{deadline.elapsed():5.1f} s] {given.seconds:g} seconds are over", flush=True)


if __name__ == "__main__":
    main()
