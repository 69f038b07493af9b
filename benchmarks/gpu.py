"""What ReFT costs on a GPU, next to LoRA: a Llama of 7B shape in bfloat16 with random weights.

    python benchmarks/gpu.py                                   # one GPU with 40 GB or more
    python benchmarks/gpu.py --device cpu --hidden 64 --blocks 2 --rounds 2 --no-write   # does it run

The work: 4 x 512 tokens with labels on the last half; LoReFT r=4, f4+l4, weights shared, on all blocks. Base, floor
(one vector trained behind the first block) and the methods share one set of base weights. Times are ratios in a round,
as in overhead.py; peak memory is torch's; kernels are what the profiler sees on the device (on a CPU: operations).
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable
from typing import Any

import common
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

COLUMNS = ("reft", "lora_qv", "lora_all")


def training_step(model: nn.Module, inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
    """Forward, backward, AdamW on what is trained."""
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def run() -> None:
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def prefill(model: nn.Module, inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
    """A forward without gradients over the prompt, logits of its last token only."""
    prompt = {name: tensor for name, tensor in inputs.items() if name != "labels"}

    @torch.no_grad()
    def run() -> None:
        model.eval()
        model(**prompt, logits_to_keep=1)

    return run


def generation(model: nn.Module, inputs: dict[str, torch.Tensor], tokens: int) -> Callable[[], None]:
    """A prompt of 16 tokens and so many generated ones: nearly all of it decode steps."""
    prompt = {name: inputs[name][:, :16] for name in ("input_ids", "attention_mask")}
    length = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}

    def run() -> None:
        model.eval()
        model.generate(**prompt, **length)

    return run


def kernels(function: Callable[[], None], device: str) -> int:
    """How many kernels one call starts on a GPU; on a CPU, how many operations it runs."""
    on_gpu = device == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        function()
        common.synchronize()
    wanted = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    return sum(event.device_type == wanted for event in profiler.events())


def peak(function: Callable[[], None], device: str) -> int | None:
    """The most memory that torch held during a call, in bytes; None where it does not count."""
    if device != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    function()
    common.synchronize()
    return torch.cuda.max_memory_allocated()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--columns", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64, help="generated tokens")
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; --device cpu with a small --hidden shows that the benchmark runs")
    base = common.llama(
        hidden=arguments.hidden,
        blocks=arguments.blocks,
        intermediate=arguments.hidden * 43 // 16,
        vocab=32000,
        num_attention_heads=max(1, arguments.hidden // 128),
        num_key_value_heads=max(1, arguments.hidden // 128),
        device=arguments.device,
        dtype=torch.bfloat16,
    )
    inputs = common.batch(4, arguments.columns, 32000, device=arguments.device)
    works: dict[str, Callable[[nn.Module], Callable[[], None]]] = {
        "training step": lambda model: training_step(model, inputs),
        "prefill": lambda model: prefill(model, inputs),
        "generation": lambda model: generation(model, inputs, arguments.tokens),
    }
    found: dict[str, Any] = {}
    for work, function in works.items():
        reference = "floor" if work == "training step" else "base"
        names = [reference, *COLUMNS]
        functions = {name: function(model) for name, model in common.variants(base, names).items()}
        times = common.interleaved(functions, arguments.rounds, warmup=4)
        found[work] = {
            "reference": reference,
            "ratio": {name: times.ratio(name, reference) for name in names},
            "milliseconds": {name: times.milliseconds(name) for name in names},
            "kernels": {name: kernels(functions[name], arguments.device) for name in names},
            "peak memory": {name: peak(functions[name], arguments.device) for name in names},
        }
        del functions
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
    record = {**common.environment(), "arguments": vars(arguments), "found": found}
    text = f"# What ReFT costs on a GPU\n\n{table(found, arguments.blocks)}\n\n{common.heading(record)}\n"
    print(text)
    if not arguments.no_write:
        common.result_path("gpu", "json").write_text(json.dumps(record, indent=1) + "\n")
        common.result_path("gpu", "md").write_text(text)


def table(found: dict[str, Any], blocks: int) -> str:
    """The figures as Markdown."""
    lines = ["| figure | LoReFT | LoRA r=8 q,v | LoRA r=8 all linear |", "|---|---|---|---|"]
    for work, values in found.items():
        reference = values["reference"]
        cells = [f"{r['median']:.3f} ({r['low']:.3f}-{r['high']:.3f})" for r in map(values["ratio"].get, COLUMNS)]
        lines.append(f"| {work} / {reference} | {' | '.join(cells)} |")
        more = [(values["kernels"][name] - values["kernels"][reference]) / blocks for name in COLUMNS]
        lines.append(f"| {work}: kernels more than {reference}'s, per block | {' | '.join(f'{n:.1f}' for n in more)} |")
        with contextlib.suppress(TypeError):  # no count of memory on a CPU
            held = [(values["peak memory"][name] - values["peak memory"][reference]) / 2**20 for name in COLUMNS]
            lines.append(
                f"| {work}: peak memory more than {reference}'s, MiB | {' | '.join(f'{n:.0f}' for n in held)} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
