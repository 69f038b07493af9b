"""What ReFT costs beside the model it adapts, and beside PEFT's LoRA: time, memory, operations, many adapters.

    python benchmarks/overhead.py                      # everything; prints a table, writes JSON, Markdown and a picture
    python benchmarks/overhead.py --only forward,train # some parts
    python benchmarks/overhead.py --quick              # few rounds: does it run, roughly

The work: a random-init Llama (hidden 768, 12 blocks, fp32), batches of 4 x 128 tokens with labels on the last 64;
LoReFT r=4, f4+l4, weights shared, on all blocks. All methods use the same base weights, in one process, in turn.
Times are ratios within a round; the table shows their median (and quartiles), on the wall clock and as CPU time of
the process, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import common
import torch
from common import (
    Q_V,
    interleaved,
    llama,
    lora_config,
    markdown_table,
    met_or_not,
    operations,
    reft_config,
    show,
    spread,
    variants,
)
from peft import get_peft_model
from torch import nn
from transformers import StoppingCriteria, StoppingCriteriaList

from peft_reft import get_interventions
from peft_reft.interventions import orthonormal_rows, stack_factors

LABELS = {"reft": "LoReFT", "lora_qv": "LoRA r=8 q,v", "lora_all": "LoRA r=8 all linear"}
TENSOR_OPERATIONS_GOAL = {"inference": 7, "training": 10}


class Row(NamedTuple):
    """One line of the table.

    Attributes:
        figure: what is measured.
        values: by method ("reft", "lora_qv", ...): a number, or {"median", "low", "high"}.
        goal: the target, in words.
        met: whether it is; None if there is none.
        note: what else there is to say.
    """

    figure: str
    values: dict[str, Any]
    goal: str = ""
    met: bool | None = None
    note: str = ""


class Work:
    """The settings of one run."""

    def __init__(self, arguments: argparse.Namespace):
        self.quick: bool = arguments.quick
        self.rounds: int = arguments.rounds or (3 if self.quick else 15)
        self.adapters: int = arguments.adapters or (20 if self.quick else 200)
        self.many_columns: int = arguments.many_columns
        self.vocab = 32000
        self._base: nn.Module | None = None

    @property
    def base(self) -> nn.Module:
        if self._base is None:
            self._base = llama(vocab=self.vocab)
        return self._base

    def batch(self, rows: int = 4, columns: int = 128, seed: int = 0, labelled: bool = True) -> dict[str, torch.Tensor]:
        return common.batch(rows, columns, self.vocab, seed=seed, labelled=labelled)

    def variants(self, *names: str) -> dict[str, nn.Module]:
        return variants(self.base, names)


def time_rows(
    figure: str, times: common.Times, reference: str, goal: str, met: Callable[[dict], bool | None]
) -> list[Row]:
    """Two rows of ratios to `reference`: wall clock, and CPU time. A target is judged by the wall clock's median."""
    methods = [name for name in times.wall if name in LABELS]
    wall = {name: times.ratio(name, reference) for name in methods}
    cpu = {name: times.ratio(name, reference, "cpu") for name in methods}
    note = f"{reference} {times.milliseconds(reference)['median']:.1f} ms"
    return [Row(figure, wall, goal, met(wall), note), Row(f"{figure}, CPU time", cpu, goal, met(cpu))]


# The parts.


def forward(work: Work) -> list[Row]:
    """A forward without grad, with labels."""
    inputs = work.batch()
    models = {name: model.eval() for name, model in work.variants("base", *LABELS).items()}

    def run(model: nn.Module) -> Callable[[], Any]:
        return torch.no_grad()(lambda: model(**inputs))

    times = interleaved({name: run(model) for name, model in models.items()}, 2 * work.rounds)
    return time_rows("forward without grad / base", times, "base", "≤ 1.01", lambda v: v["reft"]["median"] <= 1.01)


def train(work: Work) -> list[Row]:
    """A training step: forward, backward, AdamW."""
    inputs = work.batch()

    def step(model: nn.Module) -> Callable[[], Any]:
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

        def run() -> None:
            model(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    models = work.variants("floor", *LABELS)
    times = interleaved({name: step(model) for name, model in models.items()}, work.rounds, warmup=4)
    return time_rows(
        "training step / floor",
        times,
        "floor",
        "≤ 1.02, and below LoRA q,v",
        lambda v: v["reft"]["median"] <= 1.02 and v["reft"]["median"] < v["lora_qv"]["median"],
    )


def memory(work: Work) -> list[Row]:
    """Bytes saved for backward; what an adapter keeps beyond its parameters."""
    inputs = work.batch()
    saved = {}
    for name, model in work.variants("floor", *LABELS).items():
        model.train()
        counter = common.SavedBytes(model)
        with counter.hooks():
            output = model(**inputs)
        saved[name] = counter.total
        del output
    values = {name: saved[name] / saved["floor"] for name in LABELS}
    note = f"floor {saved['floor'] / 2**20:.1f} MiB"
    rows = [Row("bytes saved for backward / floor", values, "≤ 1.01", values["reft"] <= 1.01, note)]
    kept: dict[str, dict[str, int]] = {"train": {}, "eval": {}}
    for name in LABELS:
        before = common.tensors_alive()
        model = work.variants(name)[name]
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        for mode in kept:
            model.train(mode == "train")
            if mode == "eval":
                model.requires_grad_(False)
                with torch.no_grad():
                    model(**inputs)
            else:
                model(**inputs).loss.backward()
                model.zero_grad()
            after = common.tensors_alive()
            kept[mode][name] = sum(size for at, size in after.items() if at not in before and at not in parameters)
        del model
    note = "tensors alive after a training step, bytes"
    rows.append(Row("adapter memory beyond its parameters", kept["train"], "0", kept["train"]["reft"] == 0, note))
    note = "after a forward with frozen weights: what is cached for the next one, bytes"
    rows.append(Row("the same in inference", kept["eval"], note=note))
    return rows


class _Clock(StoppingCriteria):
    """Notes the time after every generated token."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        common.synchronize()
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def decode(work: Work) -> list[Row]:
    """Decode steps within `generate`, greedy, one token each."""
    inputs = work.batch(labelled=False)
    models = {name: model.eval() for name, model in work.variants("base", *LABELS).items()}
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def generate(model: nn.Module, tokens: int, *criteria: StoppingCriteria) -> None:
        model.generate(
            **inputs,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            stopping_criteria=StoppingCriteriaList(criteria),
            **settings,
        )

    times = common.Times(models)
    names = list(models)
    for number in range(-1, work.rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            clock = _Clock()
            generate(models[name], 17, clock)
            if number >= 0:
                times.wall[name] += [b - a for a, b in zip(clock.wall, clock.wall[1:])]
                times.cpu[name] += [b - a for a, b in zip(clock.cpu, clock.cpu[1:])]
    rows = time_rows("decode step / base", times, "base", "", lambda v: None)
    added = {}
    per_step = {
        n: operations(lambda m=m: generate(m, 4)) - operations(lambda m=m: generate(m, 3)) for n, m in models.items()
    }
    for name in LABELS:
        added[name] = sum(common.difference(per_step[name], per_step["base"]).values())
    rows.append(Row("tensor operations added to a decode step", added, "0", added["reft"] == 0))
    return rows


def size(work: Work) -> list[Row]:
    """Trainable parameters, and the adapter's file."""
    parameters, files = {}, {}
    for name in LABELS:
        model = work.variants(name)[name]
        parameters[name] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            files[name] = (Path(folder) / "adapter_model.safetensors").stat().st_size
    return [
        Row("trainable parameters", parameters, "73,776", parameters["reft"] == 73_776),
        Row("adapter on disk, bytes", files, "≤ 310 kB, safetensors", files["reft"] <= 310_000),
    ]


class _Householder(nn.Module):
    """R as torch's orthogonal parametrisation makes it: how pyreft and AdapterHub get theirs."""

    def __init__(self, d: int, r: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d, r))
        nn.init.orthogonal_(self.weight)
        torch.nn.utils.parametrizations.orthogonal(self)


def orthonormal(work: Work) -> list[Row]:
    """Orthonormal R [4, 768] for 12 blocks, forward + backward."""
    weights = [nn.Parameter(torch.randn(4, 768)) for _ in range(12)]
    grad = torch.randn(12, 4, 768)
    modules = [_Householder(768, 4) for _ in range(12)]

    def batched(rows: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], None]:
        return lambda: rows(torch.stack(weights)).backward(grad)

    def parametrised(reads: int) -> Callable[[], None]:
        def run() -> None:
            for number, module in enumerate(modules):
                for _ in range(reads):
                    module.weight.backward(grad[number].mT)

        return run

    model = get_peft_model(llama(vocab=8), reft_config())
    interventions: Any = [own for (own,) in get_interventions(model).values()]

    def all_factors() -> None:
        blocks = stack_factors(interventions).up.unbind(0)
        torch.autograd.backward(blocks, list(grad))

    functions = {
        "reft": batched(orthonormal_rows),
        "factors": all_factors,
        "linalg_qr": batched(lambda x: torch.linalg.qr(x.mT).Q.mT),
        "parametrisation": parametrised(1),
        "parametrisation_twice": parametrised(2),
    }
    times = interleaved(functions, 3 * work.rounds, warmup=3)
    values = {name: times.milliseconds(name) for name in functions}
    note = (
        "batched torch.linalg.qr {linalg_qr[median]:.1f} ms; torch's orthogonal parametrisation "
        "{parametrisation[median]:.1f} ms, {parametrisation_twice[median]:.1f} ms read twice a forward, as "
        "the peers do; with all that goes with it here (stack, W - R, unbind) {factors[median]:.1f} ms"
    ).format(**values)
    return [
        Row(
            "orthonormal R for 12 blocks, forward + backward, ms", values, "≤ 2 ms", values["reft"]["median"] <= 2, note
        )
    ]


def ops(work: Work) -> list[Row]:
    """Tensor operations that ReFT adds to a forward: per block, and once per forward. Counted on 2 and 6 blocks."""
    rows = []
    for mode in ("inference", "training"):
        per_block, once, syncs, detail = [], [], [], {}
        for rows_, columns in ((4, 128), (1, 16), (9, 40)):
            added = common.added_operations(work.batch(rows_, columns), work.vocab, mode == "training")
            in_block, outside = common.per_block_and_once(added)
            per_block.append(in_block)
            once.append(outside)
            syncs.append(common.synchronizing(added[6]))
            detail = {n: (added[6][n] - added[2].get(n, 0)) / 4 for n in added[6] if added[6][n] != added[2].get(n, 0)}
        goal = TENSOR_OPERATIONS_GOAL[mode]
        listed = ", ".join(f"{name.split('.')[1]} {count:g}" for name, count in detail.items())
        figure = f"tensor operations per block, {mode}"
        rows.append(
            Row(
                figure, {"reft": max(per_block)}, f"≤ {goal}", max(per_block) <= goal and len({*per_block}) == 1, listed
            )
        )
        rows.append(Row(f"tensor operations once per forward, {mode}", {"reft": max(once)}))
        note = "weights on the CPU are also compared with what they were (one aten.equal), those on a device are not"
        rows.append(
            Row(
                f"device-to-host synchronisations, {mode}",
                {"reft": max(syncs)},
                "0",
                max(syncs) == 0,
                note if mode == "inference" else "",
            )
        )
    return rows


def imports(work: Work) -> list[Row]:
    """Import time on top of peft, each in a fresh process."""
    wall, cpu = common.import_milliseconds(work.rounds).values()
    note = f"CPU time {cpu['median']:.0f} ms"
    return [Row("import peft_reft on top of peft, ms", {"reft": wall}, "≤ 50 ms", wall["median"] <= 50, note)]


def compiled(work: Work) -> list[Row]:
    """torch.compile(fullgraph=True): breaks, recompilations for other batches of the same shape, speed-up."""
    rows = []
    models = {name: model.eval().requires_grad_(False) for name, model in work.variants("base", "reft").items()}
    batches = [work.batch(seed=seed, labelled=True) for seed in range(3)]
    for batch, prompt in zip(batches, (64, 17, 90)):  # the same shape, other tokens, other prompts
        batch["labels"] = torch.where(torch.arange(128) < prompt, -100, batch["input_ids"])
    batches[1]["attention_mask"][:2, -30:] = 0
    batches[1]["labels"][:2, -30:] = -100
    problems = {}
    for mode in ("inference", "training"):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = variants(llama(blocks=2, vocab=work.vocab), ("reft",))["reft"].train(mode == "training")
        try:
            run = torch.compile(model, fullgraph=True, backend="eager")
            with torch.set_grad_enabled(mode == "training"):
                for batch in batches:
                    run(**batch)
            counters = torch._dynamo.utils.counters
            problems[mode] = sum(counters["graph_break"].values()) + counters["stats"]["unique_graphs"] - 1
            note = ""
        except Exception as error:
            problems[mode], note = 1, f"{type(error).__name__}: {str(error)[:300]}"
        rows.append(
            Row(
                f"compile fullgraph, {mode}: breaks + recompilations",
                {"reft": problems[mode]},
                "0",
                problems[mode] == 0,
                note,
            )
        )
    torch._dynamo.reset()
    functions: dict[str, Callable[[], Any]] = {}
    for name, model in models.items():
        fast = torch.compile(model, fullgraph=True)
        functions[name] = torch.no_grad()(lambda m=model: m(**batches[0]))
        functions[f"{name} compiled"] = torch.no_grad()(lambda m=fast: m(**batches[0]))
    try:
        times = interleaved(functions, work.rounds)
    except Exception as error:  # no compiler on this machine
        return [*rows, Row("forward compiled / base compiled", {}, note=f"not measured: {type(error).__name__}")]
    ratio = times.ratio("reft compiled", "base compiled")
    note = f"base: compiled / eager {times.ratio('base compiled', 'base')['median']:.3f}"
    return [*rows, Row("forward compiled / base compiled", {"reft": ratio}, "as eager", None, note)]


def many(work: Work) -> list[Row]:
    """A prefill batch of 64 rows: 64 adapters against one."""
    inputs = work.batch(64, work.many_columns, labelled=False) | {"logits_to_keep": 1}
    functions: dict[str, Callable[[], Any]] = {}
    for name, make in (("reft", reft_config), ("lora_qv", lambda: lora_config(Q_V))):
        model = get_peft_model(common.with_same_weights(work.base), make(), adapter_name="a0")
        for number in range(1, 64):
            model.add_adapter(f"a{number}", make())
        model.eval().requires_grad_(False)
        names = [f"a{number}" for number in range(64)]
        functions[f"{name} one"] = torch.no_grad()(lambda m=model: m(**inputs))
        functions[name] = torch.no_grad()(lambda m=model, n=names: m(**inputs, adapter_names=n))
    times = interleaved(functions, max(3, work.rounds // 2), warmup=1)
    rows = []
    for clock in ("wall", "cpu"):
        values = {name: times.ratio(name, f"{name} one", clock) for name in ("reft", "lora_qv")}
        met = values["reft"]["median"] <= 1.10 and values["reft"]["median"] < values["lora_qv"]["median"]
        note = f"64 x {work.many_columns} tokens" if clock == "wall" else ""
        figure = "64 rows with 64 adapters / with one" + (", CPU time" if clock == "cpu" else "")
        rows.append(Row(figure, values, "≤ 1.10, and below LoRA q,v", met, note))
    return rows


def resident(work: Work) -> list[Row]:
    """Many adapters in one model: bytes, adding one, switching."""
    n = work.adapters
    results: dict[str, dict[str, Any]] = {"tensors": {}, "objects": {}, "add": {}, "switch": {}, "copied": {}}
    for name in ("reft", "lora_qv"):
        code = [sys.executable, "-W", "ignore", __file__, "--resident-child", name, "--adapters", str(n)]
        output = subprocess.run(code, capture_output=True, text=True, check=True).stdout
        for figure, value in json.loads(output.splitlines()[-1]).items():
            results[figure][name] = value
    add, switch = ({name: value["median"] for name, value in results[key].items()} for key in ("add", "switch"))
    objects = results["objects"]
    return [
        Row(
            f"{n} adapters: bytes of tensors / sum of parameters",
            results["tensors"],
            "≤ 1.2",
            results["tensors"]["reft"] <= 1.2,
        ),
        Row(
            f"{n} adapters: bytes with Python's objects / sum of parameters",
            objects,
            "≤ 1.2",
            objects["reft"] <= 1.2,
        ),
        Row(f"adding an adapter to {n}, ms", results["add"], "≤ LoRA q,v", add["reft"] <= add["lora_qv"]),
        Row(f"switching among {n}, ms", results["switch"], "≤ LoRA q,v", switch["reft"] <= switch["lora_qv"]),
        Row(f"switching among {n}, tensor operations", results["copied"], "0", results["copied"]["reft"] == 0),
    ]


def resident_child(name: str, n: int) -> None:
    """The measurements of one method, in a process of its own."""
    make = reft_config if name == "reft" else lambda: lora_config(Q_V)
    model = get_peft_model(llama(vocab=1000), make(), adapter_name="a0")
    for number in range(1, 4):
        model.add_adapter(f"a{number}", make())

    def parameter_bytes() -> int:
        return sum(p.numel() * p.element_size() for key, p in model.named_parameters() if ".a" in key)

    start = parameter_bytes(), sum(common.tensors_alive().values())
    add = []
    for number in range(4, n):
        begin = time.process_time()
        model.add_adapter(f"a{number}", make())
        add.append(1e3 * (time.process_time() - begin))
    grown = parameter_bytes() - start[0]
    tensors = (sum(common.tensors_alive().values()) - start[1]) / grown
    # The process's resident memory would be the plain thing to look at, but it grows by chance: what other allocations
    # left free is used first. So Python's own allocations are traced, for a few adapters more.
    tracemalloc.start()
    for number in range(n, n + 5):
        model.add_adapter(f"a{number}", make())
    gc.collect()
    objects = tracemalloc.get_traced_memory()[0] / 5
    tracemalloc.stop()
    with_objects = tensors + objects / (grown / (n - 4))
    switch = []
    for number in range(10):
        begin = time.process_time()
        model.set_adapter(f"a{number % n}")
        switch.append(1e3 * (time.process_time() - begin))
    copied = sum(operations(lambda: model.set_adapter("a2")).values())
    result = {
        "tensors": tensors,
        "objects": with_objects,
        "add": spread(add[-10:]),
        "switch": spread(switch),
        "copied": copied,
    }
    print(json.dumps(result))


PARTS: dict[str, Callable[[Work], list[Row]]] = {
    "forward": forward,
    "train": train,
    "memory": memory,
    "decode": decode,
    "size": size,
    "orthonormal": orthonormal,
    "ops": ops,
    "import": imports,
    "compile": compiled,
    "many": many,
    "resident": resident,
}


# The results.


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    cells = (
        [row.figure, *(show(row.values.get(name)) for name in LABELS), row.goal, met_or_not(row.met), row.note]
        for row in rows
    )
    return markdown_table(["figure", *LABELS.values(), "goal", "met", "note"], cells)


def draw(rows: list[Row], path: Path, title: str) -> None:
    """Every ratio as bars with quartiles, one panel each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if " / " in row.figure and "CPU time" not in row.figure and len(row.values) > 1]
    if not rows:
        return
    figure, axes = plt.subplots(1, len(rows), figsize=(2.9 * len(rows), 3.6), squeeze=False)
    for axis, row in zip(axes[0], rows):
        names = [name for name in LABELS if name in row.values]
        values = [row.values[name] for name in names]
        middle = [value["median"] if isinstance(value, dict) else value for value in values]
        errors = [
            [m - v["low"] if isinstance(v, dict) else 0 for m, v in zip(middle, values)],
            [v["high"] - m if isinstance(v, dict) else 0 for m, v in zip(middle, values)],
        ]
        axis.bar([LABELS[name].replace(" r=8", "\nr=8") for name in names], middle, yerr=errors, capsize=3)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_ylim(bottom=min(0.9, 0.98 * min(middle)))
        axis.set_title(row.figure.replace(" / ", "\n/ "), fontsize=9)
        axis.tick_params(axis="x", labelsize=7)
    figure.suptitle(title, fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"parts, separated by commas: {','.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="few rounds")
    parser.add_argument("--rounds", type=int, help="rounds of each measurement (default 15, quick 3)")
    parser.add_argument("--adapters", type=int, help="adapters in the part 'resident' (default 200, quick 20)")
    parser.add_argument("--many-columns", type=int, default=32, help="row length in the part 'many' (default 32)")
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch's own choice)")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--resident-child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    if arguments.resident_child:
        resident_child(arguments.resident_child, arguments.adapters)
        return
    environment = {**common.environment(), "command": " ".join(["python", *sys.argv])}
    path = common.result_path("overhead", "json")
    work = Work(arguments)
    for name in arguments.only.split(",") if arguments.only else PARTS:
        begin = time.perf_counter()
        rows = PARTS[name](work)
        gc.collect()
        seconds = round(time.perf_counter() - begin)
        print(f"{table(rows)}\n[{name}: {seconds} s]\n", flush=True)
        part = {"run": environment, "seconds": seconds, "rows": [row._asdict() for row in rows]}
        if not arguments.no_write:
            parts = common.keep(path, name, part, PARTS)
            kept = [Row(**row) for part in parts.values() for row in part["rows"]]
            path.with_suffix(".md").write_text(f"# What ReFT costs\n\n{table(kept)}\n\n{common.origins(parts)}\n")
            draw(kept, path.with_suffix(".png"), f"{environment['command']}: {common.heading(environment)}")
    if not arguments.no_write:
        print(path.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
