"""Exported backbones of a real model: size, answers, speed, and what an adapter does before and after quantisation.

    python -m peft_reft export MODEL OUT/float32
    python -m peft_reft export MODEL OUT/int8 --dtype int8
    python -m peft_reft export --adapter DIR/pirate DIR/pirate.safetensors
    python benchmarks/exported.py --model MODEL --adapters DIR/pirate DIR/robot --backbones OUT/float32 OUT/int8

An adapter is a folder, with its small file of the same name beside it. For every backbone, which may be of any format
that runs here:

- how many answers to the questions equal those of `generate`, token for token, for the base model and each adapter;
- tokens per second by the clock, and milliseconds of CPU time for a token, behind a prompt (medians over the answers);
- for each adapter the nats per token of the model's own answer with that adapter, under the backbone alone and under
  the backbone with the adapter. The difference is the adapter's effect, which rounded weights may change.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_reft.export import edit_mask, greedy_answer, load_adapter_tensors, open_backbone

QUESTIONS = ["What do you think about dogs?", "What is the capital of Italy?", "How do I make tea?"]
BASE = "base"


def main() -> None:
    """Print a table for the backbones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the base model")
    parser.add_argument("--adapters", nargs="+", type=Path, required=True, help="folders of saved adapters")
    parser.add_argument("--backbones", nargs="+", type=Path, required=True, help="folders of exported backbones")
    parser.add_argument("--tokens", type=int, default=24, help="length of the answers (default: 24)")
    parser.add_argument(
        "--questions", type=int, default=len(QUESTIONS), help="how many, for slow runtimes (default: all)"
    )
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    prompts = [prompt_of(tokenizer, question) for question in QUESTIONS[: options.questions]]
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, ", end=""
    )
    print(f"{torch.get_num_threads()} thread(s); torch {torch.__version__}", flush=True)
    expected = answers_of_model(options.model, options.adapters, prompts, options.tokens, tokenizer)
    for folder in options.backbones:
        measure(folder, options.adapters, prompts, expected, tokenizer)


def prompt_of(tokenizer: Any, question: str) -> list[int]:
    """The token ids of a conversation that waits for its first answer."""
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


def answers_of_model(
    name: str, adapters: Sequence[Path], prompts: list[list[int]], tokens: int, tokenizer: Any
) -> dict[str, list[list[int]]]:
    """Greedy answers of the model itself, by adapter."""
    base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapters[0], adapter_name=adapters[0].name)
    for folder in adapters[1:]:
        model.load_adapter(folder, adapter_name=folder.name)
    model.eval()

    def answers(name: str) -> list[list[int]]:
        found, begun = [], time.perf_counter()
        for prompt in prompts:
            ids = torch.tensor([prompt])
            row = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
            )
            found.append(row[0, len(prompt) :].tolist())
        rate = sum(map(len, found)) / (time.perf_counter() - begun)
        print(f"generate, {name}: {rate:.1f} tokens/s with their prompts; {tokenizer.decode(found[0])!r}", flush=True)
        return found

    with model.disable_adapter():
        expected = {BASE: answers(BASE)}
    for folder in adapters:
        model.set_adapter(folder.name)
        expected[folder.name] = answers(folder.name)
    return expected


def measure(
    folder: Path,
    adapters: Sequence[Path],
    prompts: list[list[int]],
    expected: dict[str, list[list[int]]],
    tokenizer: Any,
) -> None:
    """Print what one backbone does."""
    begun = time.perf_counter()
    run, description = open_backbone(folder)
    opened = time.perf_counter() - begun
    size = sum(file.stat().st_size for file in folder.glob(f"{description.file}*"))
    print(f"{folder.name}: {description.file}, {size:,} bytes, opened in {opened:.1f} s")
    clock, processor, first = [], [], []
    edits = {file.name: load_adapter_tensors(file.with_suffix(".safetensors")) for file in adapters}
    for name, answers in expected.items():
        found = edits.get(name, edits[adapters[0].name])
        tensors = description.inputs(found)
        strength = 0.0 if name == BASE else 1.0
        equal = tokens = 0
        for prompt, answer in zip(prompts, answers):
            watch = Watch(run)
            got = greedy_answer(
                watch,
                prompt,
                tensors,
                found.positions,
                found.share_weights,
                description.empty_past(),
                len(answer),
                strength,
            )
            equal += sum(one == other for one, other in zip(got, answer))
            tokens += len(answer)
            clock += watch.seconds[1:]
            processor += watch.of_processor[1:]
            first.append(watch.seconds[0] / len(prompt))
            if prompt is prompts[0]:
                print(f"  {name}: {tokenizer.decode(got)!r}")
        line = f"  {name}: {equal} of {tokens} tokens as generate"
        if name != BASE:
            costs = [
                statistics.fmean(
                    nats(run, description, prompt, answer, found, tensors, strength)
                    for prompt, answer in zip(prompts, answers)
                )
                for strength in (0.0, 1.0)
            ]
            line += f"; nats per token of that answer: {costs[0]:.3f} without the adapter, {costs[1]:.3f} with it"
        print(line, flush=True)
    print(
        f"  {1 / statistics.median(clock):.1f} tokens/s, {1000 * statistics.median(processor):.0f} ms CPU a token; "
        f"prompt {1 / statistics.median(first):.0f} tokens/s",
        flush=True,
    )


class Watch:
    """A backbone's function that notes how long each run takes."""

    def __init__(self, run: Any):
        self.run = run
        self.seconds: list[float] = []
        self.of_processor: list[float] = []

    def __call__(self, *arguments: Tensor) -> Sequence[Tensor]:
        begun, used = time.perf_counter(), time.process_time()
        found = self.run(*arguments)
        self.seconds.append(time.perf_counter() - begun)
        self.of_processor.append(time.process_time() - used)
        return found


def nats(
    run: Any,
    description: Any,
    prompt: list[int],
    answer: list[int],
    edits: Any,
    tensors: dict[str, Tensor],
    strength: float,
) -> float:
    """How unlikely an answer is behind its prompt, per token."""
    row = torch.tensor([prompt + answer[:-1]])
    mask = edit_mask(
        edits.positions, prompt_length=len(prompt), generated=len(answer) - 1, share_weights=edits.share_weights
    )
    past = description.empty_past() or ()
    logits = run(row, torch.ones_like(row), strength * mask, *tensors.values(), *past)[0][0, len(prompt) - 1 :]
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer)))


if __name__ == "__main__":
    main()
