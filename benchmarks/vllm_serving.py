"""What ReFT adapters cost in vLLM: throughput with one adapter, with sixteen, and with none, next to vLLM alone.

    python tests/vllm_engine/run.py --environment ENV --only test_kernel.py   # makes an environment with vLLM, once
    ENV/bin/python benchmarks/vllm_serving.py [--rounds 7] [--positions ends] [--quick]

Two engines live in processes of their own: one in which the plugin is not loaded, and one in which it is. They have the
same options and the same random weights in the shape of SmolLM2-135M (float32, 30 blocks of width 576), wrap no linear
layer for LoRA, and keep no prefix cache, so that every round does the same work: 16 prompts of 32 to 160 tokens, 32
tokens each. A round asks all of them in turn, in rotating order; the table shows medians of the ratios within a round,
of CPU time of the engine's process and of the clock. 1.00 is vLLM alone, 0.95 is one twentieth less throughput.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CONFIG = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
CONFIG |= {"num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 2048, "tie_word_embeddings": True}
SLOTS, NEW_TOKENS = 16, 32
POSITIONS = {"ends": "f7+l7", "all": "all", "answers": "l1+d"}
GOALS = {"no adapter, plugin loaded": 0.99, "f7+l7, one adapter": 0.95, "f7+l7, 16 adapters": 0.93}


def make(directory: Path, blocks: int) -> tuple[Path, dict[str, list[Path]]]:
    """A model's config, and 16 random adapters for each of `POSITIONS`."""
    import torch
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from peft_reft import ReftConfig

    config = LlamaConfig(**{**CONFIG, "num_hidden_layers": blocks})
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory / "base")
    adapters: dict[str, list[Path]] = {}
    for name, positions in POSITIONS.items():
        with torch.device("meta"):
            base = LlamaForCausalLM(config)
        model = get_peft_model(base, ReftConfig(r=4, positions=positions, init_weights=False, task_type="CAUSAL_LM"))
        for number in range(SLOTS):
            torch.manual_seed(number)
            for parameter_name, parameter in list(model.named_parameters()):
                if "reft_" in parameter_name:
                    owner = model.get_submodule(parameter_name.rpartition(".")[0])
                    setattr(
                        owner,
                        parameter_name.rpartition(".")[2],
                        torch.nn.Parameter(torch.randn(parameter.shape) * 0.02),
                    )
            adapters.setdefault(name, []).append(directory / f"{name}-{number}")
            model.save_pretrained(adapters[name][-1])
    return directory / "base", adapters


def serve() -> None:
    """The engine's process: reads orders, answers with seconds of CPU time and of the clock."""
    order = json.loads(sys.stdin.readline())
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(
        order["base"],
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        enable_lora=True,
        max_loras=SLOTS,
        max_cpu_loras=4 * SLOTS,
        lora_target_modules=["none"],
        enable_prefix_caching=False,
        max_model_len=512,
        max_num_batched_tokens=512,
        seed=0,
    )
    print("READY", flush=True)
    for line in sys.stdin:
        directories = json.loads(line)
        prompts = [{"prompt_token_ids": [100 + (7 * n + k) % 4000 for k in range(32 + 8 * n)]} for n in range(16)]
        params = SamplingParams(
            temperature=0, max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False
        )
        requests = [None] * len(prompts)
        if directories:
            chosen = [directories[n % len(directories)] for n in range(len(prompts))]
            requests = [LoRARequest(path, 1 + sorted(order["known"]).index(path), path) for path in chosen]
        start, used = time.perf_counter(), time.process_time()
        llm.generate(prompts, params, lora_request=requests, use_tqdm=False)
        print("TOOK", json.dumps([time.process_time() - used, time.perf_counter() - start]), flush=True)


class Engine:
    """An engine in a process of its own."""

    def __init__(self, base: Path, known: list[str], plugin: bool):
        settings = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "OMP_NUM_THREADS": "1",
            "VLLM_PLUGINS": "peft_reft" if plugin else "none",
        }
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **settings},
        )
        self.send({"base": str(base), "known": known})
        self.read("READY")

    def send(self, order: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def read(self, word: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(word):
                return line.removeprefix(word)
        raise SystemExit("An engine ended; its messages stand above.")

    def time(self, adapters: list[Path]) -> tuple[float, float]:
        """Seconds of CPU time and of the clock that the 16 requests took."""
        self.send([str(path) for path in adapters])
        cpu, clock = json.loads(self.read("TOOK"))
        return cpu, clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="at least 2")
    parser.add_argument("--positions", nargs="+", choices=POSITIONS, default=list(POSITIONS), help="those to measure")
    parser.add_argument("--quick", action="store_true", help="a model of 4 blocks: does it run")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
        return
    with tempfile.TemporaryDirectory() as directory:
        base, adapters = make(Path(directory), 4 if arguments.quick else CONFIG["num_hidden_layers"])
        known = sorted(str(path) for paths in adapters.values() for path in paths)
        alone, plugin = (Engine(base, known, loaded) for loaded in (False, True))
        work: dict[str, tuple[Engine, list[Path]]] = {
            "vLLM alone": (alone, []),
            "no adapter, plugin loaded": (plugin, []),
        }
        for name in arguments.positions:
            positions = POSITIONS[name]
            work[f"{positions}, one adapter"] = plugin, adapters[name][:1]
            work[f"{positions}, 16 adapters"] = plugin, adapters[name]
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
        names = list(work)
        for number in range(max(2, arguments.rounds) + 1):  # the first one warms up
            for name in names[number % len(names) :] + names[: number % len(names)]:
                engine, chosen = work[name]
                seconds = engine.time(chosen)
                if number:
                    taken[name].append(seconds)
        for engine in (alone, plugin):
            engine.process.kill()
    print(f"{'throughput, of vLLM alone':<28} {'CPU time':>9} {'quartiles':>12} {'clock':>6}  goal")
    for name in names[1:]:
        cpu, clock = ([a[kind] / b[kind] for a, b in zip(taken[names[0]], taken[name])] for kind in (0, 1))
        low, middle, high = statistics.quantiles(cpu, n=4, method="inclusive")
        goal = GOALS.get(name, "")
        print(f"{name:<28} {middle:>9.3f} {low:>6.2f}-{high:.2f} {statistics.median(clock):>6.3f}  {goal}")


if __name__ == "__main__":
    main()
