"""What the benchmarks share: the models they compare, interleaved timing, counting of operations, the machine's record.

Imported by the other programs of this folder; nothing to run here.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from peft_reft import ReftConfig

transformers.logging.set_verbosity_error()
RESULTS = Path(__file__).parent / "results"

# The models.

Q_V = ["q_proj", "v_proj"]
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(
    hidden: int = 768,
    blocks: int = 12,
    intermediate: int = 2048,
    vocab: int = 32000,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> nn.Module:
    """A Llama with seeded random weights, frozen, in eval mode."""
    torch.manual_seed(0)
    settings = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64, **changes}
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=blocks, intermediate_size=intermediate, vocab_size=vocab, **settings
    )
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def with_same_weights(model: nn.Module) -> nn.Module:
    """A copy of the model that shares its parameters and buffers: variants then differ in nothing but the method."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


class Floor(nn.Module):
    """The least that trains anything at that depth: one vector, added to the output of the first edited block.

    The vector is found as `model.floor`; the backward pass runs through all blocks behind it.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        weight = next(model.parameters())
        self.vector = nn.Parameter(torch.zeros(model.config.hidden_size, device=weight.device, dtype=weight.dtype))
        model.model.layers[0].register_forward_hook(self._add)

    def _add(self, block: nn.Module, args: Any, output: Any) -> Any:
        return output + self.vector if isinstance(output, Tensor) else (output[0] + self.vector, *output[1:])

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


def reft_config(**changes: Any) -> ReftConfig:
    return ReftConfig(**{"r": 4, "positions": "f4+l4", "task_type": "CAUSAL_LM", **changes})


def lora_config(targets: list[str]) -> LoraConfig:
    return LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM")


def variants(base: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The methods that are compared, all on the base model's own weights: base, floor, reft, lora_qv, lora_all."""
    make: dict[str, Callable[[], nn.Module]] = {
        "base": lambda: base,
        "floor": lambda: Floor(with_same_weights(base)),
        "reft": lambda: get_peft_model(with_same_weights(base), reft_config()),
        "lora_qv": lambda: get_peft_model(with_same_weights(base), lora_config(Q_V)),
        "lora_all": lambda: get_peft_model(with_same_weights(base), lora_config(ALL_LINEAR)),
    }
    return {name: make[name]() for name in names}


def batch(
    rows: int, columns: int, vocab: int, device: str = "cpu", seed: int = 0, labelled: bool = True
) -> dict[str, Tensor]:
    """Random tokens without padding, the second half of each row labelled."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab, (rows, columns), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if labelled:
        inputs["labels"] = torch.where(torch.arange(columns) < columns // 2, -100, ids)
    return {name: tensor.to(device) for name, tensor in inputs.items()}


# Time.


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Times:
    """Seconds of several functions, by round: `wall` and `cpu` (of all threads of this process)."""

    def __init__(self, names: Iterable[str]):
        self.wall: dict[str, list[float]] = {name: [] for name in names}
        self.cpu: dict[str, list[float]] = {name: [] for name in names}

    def ratio(self, name: str, reference: str, clock: str = "wall") -> dict[str, float]:
        """Median and quartiles of the per-round ratios: what slows a whole round down drops out."""
        times = getattr(self, clock)
        return spread([a / b for a, b in zip(times[name], times[reference])])

    def milliseconds(self, name: str, clock: str = "wall") -> dict[str, float]:
        return spread([1e3 * seconds for seconds in getattr(self, clock)[name]])


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) < 2:
        return {"median": values[0], "low": values[0], "high": values[0], "n": len(values)}
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": statistics.median(values), "low": low, "high": high, "n": len(values)}


def interleaved(functions: dict[str, Callable[[], Any]], rounds: int, warmup: int = 2) -> Times:
    """Run every function once per round, each round in another order, after `warmup` rounds that do not count."""
    names = list(functions)
    times = Times(names)
    collecting = gc.isenabled()
    for number in range(-warmup, rounds):
        shift = number % len(names)
        gc.collect()
        gc.disable()
        for name in names[shift:] + names[:shift]:
            synchronize()
            wall, cpu = time.perf_counter(), time.process_time()
            functions[name]()
            synchronize()
            if number >= 0:
                times.wall[name].append(time.perf_counter() - wall)
                times.cpu[name].append(time.process_time() - cpu)
        if collecting:
            gc.enable()
    return times


def import_milliseconds(runs: int) -> dict[str, dict[str, float]]:
    """How long `import peft_reft` takes after `import peft`, each time in a fresh process: spreads by clock.

    Python keeps the compiled modules, as it does for users, whatever this process was told; a first run compiles them.
    """
    code = (
        "import time, peft; wall, cpu = time.perf_counter(), time.process_time(); import peft_reft; "
        "print(time.perf_counter() - wall, time.process_time() - cpu)"
    )
    found = []
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": folder}
        for _ in range(runs + 1):
            output = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", code],
                capture_output=True,
                text=True,
                check=True,
                env=environment,
            )
            found.append([1e3 * float(value) for value in output.stdout.split()])
    return {clock: spread([run[i] for run in found[1:]]) for i, clock in enumerate(("wall", "cpu"))}


# Operations.

# Views by another name: they only rename dimensions of a fresh result.
_VIEWS = {"aten._unsafe_view.default", "aten.detach.default", "aten.lift_fresh.default"}


class OperationCounter(TorchDispatchMode):
    """Counts the tensor operations that run, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = str(function)
        if not function.is_view and name not in _VIEWS and _takes_or_gives_tensors(function):
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


def _takes_or_gives_tensors(function: Any) -> bool:
    """False for what only handles dtypes and the like (`aten.promote_types`)."""
    schema = function._schema
    return any("Tensor" in str(value.type) for value in (*schema.arguments, *schema.returns))


def operations(function: Callable[[], Any]) -> Counter[str]:
    """The operations of one call."""
    with OperationCounter() as counter:
        function()
    return counter.counts


def difference(counts: Counter[str], reference: Counter[str]) -> dict[str, int]:
    """What `counts` has more (or, negative, less) of."""
    return {n: counts[n] - reference[n] for n in sorted({*counts, *reference}) if counts[n] != reference[n]}


def added_operations(inputs: dict[str, Tensor], vocab: int, training: bool) -> dict[int, dict[str, int]]:
    """What ReFT adds to a forward of models of 2 and of 6 blocks: blocks -> operation -> count.

    Counted on the fifth forward: the first ones hold checks, and the first one of inference fills a cache.
    """
    added = {}
    for blocks in (2, 6):
        counts = {}
        base = llama(hidden=64, blocks=blocks, intermediate=64, vocab=vocab)
        for name, model in variants(base, ("base", "reft")).items():
            model.train(training)
            if not training:
                model.requires_grad_(False)
            with torch.set_grad_enabled(training):
                for _ in range(4):
                    model(**inputs)
                counts[name] = operations(lambda m=model: m(**inputs))
        added[blocks] = difference(counts["reft"], counts["base"])
    return added


def per_block_and_once(added: dict[int, dict[str, int]]) -> tuple[float, float]:
    """How many operations each block adds, and how many are left at zero blocks."""
    totals = {blocks: sum(counts.values()) for blocks, counts in added.items()}
    per_block = (totals[6] - totals[2]) / 4
    return per_block, totals[2] - 2 * per_block


# What makes the host wait for a device. `aten.equal` would, too; the package calls it for weights on the CPU only.
SYNCHRONIZING = ("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.masked_select")


def synchronizing(counts: dict[str, int]) -> int:
    """How many of the operations make the host wait for the device."""
    return sum(count for name, count in counts.items() if name.startswith(SYNCHRONIZING))


# Memory.


class SavedBytes:
    """Bytes of the tensors that autograd keeps for the backward pass, each storage counted once.

    Args:
        model: its parameters and buffers are not counted: they are there anyway.
    """

    def __init__(self, model: nn.Module):
        self.ignored = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        self.storages: dict[int, int] = {}

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.ignored:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def total(self) -> int:
        return sum(self.storages.values())

    def hooks(self) -> contextlib.AbstractContextManager:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)


def tensors_alive() -> dict[int, int]:
    """Storages of all tensors that Python knows: data pointer -> bytes."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor) and thing.layout == torch.strided and not thing.is_meta:
            storage = thing.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()
    return found


# The record.


def hardware() -> str:
    """The processor or accelerator in a few words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        name = match[1] if match else name
    return f"{name}, {os.cpu_count()} cores"


def environment() -> dict[str, Any]:
    """Machine, versions and load, for the record."""
    versions = {}
    for package in ("peft-reft", "peft", "transformers", "torch"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    commit = ""
    with contextlib.suppress(FileNotFoundError):  # a machine without git
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
        ).stdout.strip()
    return {
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "load": [round(value, 1) for value in os.getloadavg()],
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit,
    }


def result_path(topic: str, suffix: str) -> Path:
    """benchmarks/results/<topic>_<hardware>_<date>.<suffix>"""
    RESULTS.mkdir(exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", hardware().lower())).strip("-")
    return RESULTS / f"{topic}_{slug}_{datetime.date.today().isoformat()}.{suffix}"


def heading(record: dict[str, Any]) -> str:
    """One line that says where numbers come from."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return (
        f"{record['hardware']}; {record['threads']} threads, load {record['load'][0]} at the start; Python "
        f"{record['python']}, {versions}; commit {record['commit']}; {record['date']}."
    )


def show(value: Any) -> str:
    """A number of a table; of a spread the median, with the quartiles in brackets."""
    if value is None:
        return "-"
    if isinstance(value, dict):
        digits = 3 if value["median"] < 10 else 1
        return f"{value['median']:.{digits}f} ({value['low']:.{digits}f}-{value['high']:.{digits}f})"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def met_or_not(met: bool | None) -> str:
    return {True: "yes", False: "**no**", None: ""}[met]


def keep(path: Path, name: str, part: dict[str, Any], order: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Write one part of a benchmark into its JSON file, beside the parts that were measured earlier the same day.

    Args:
        part: {"run": `environment()` and the command, "seconds", "rows"}.
        order: the names of all parts.

    Returns:
        All parts of the file, in that order.
    """
    parts = json.loads(path.read_text())["parts"] if path.exists() else {}
    parts[name] = part
    path.write_text(json.dumps({"parts": parts}, indent=1) + "\n")
    return {key: parts[key] for key in order if key in parts}


def origins(parts: dict[str, dict[str, Any]]) -> str:
    """Which run each part comes from, as a list in Markdown."""
    runs: dict[str, list[str]] = {}
    for name, part in parts.items():
        runs.setdefault(f"`{part['run']['command']}`: {heading(part['run'])}", []).append(name)
    return "\n".join(f"- {', '.join(names)}: {run}" for run, names in runs.items())
