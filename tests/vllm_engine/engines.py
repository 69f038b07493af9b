"""Engines of vLLM for the tests, one at a time in a process, and what is asked of them."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kit import Comparison, Truth


@contextmanager
def engine(base: Path, **settings: Any) -> Iterator[Any]:
    """An engine in this process, which is gone afterwards."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults = {"enable_lora": True, "dtype": "float32", "enforce_eager": True, "max_model_len": 256, "block_size": 32}
    llm = LLM(str(base), **{**defaults, "seed": 0, **settings})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


class Asked:
    """An engine and the adapters that are asked of it.

    Args:
        llm: the engine.
        adapters: directories by name.
    """

    def __init__(self, llm: Any, adapters: Mapping[str, Path], first_id: int = 1):
        from vllm.lora.request import LoRARequest

        self.llm = llm
        self.requests = {
            name: LoRARequest(name, number, str(directory))
            for number, (name, directory) in enumerate(adapters.items(), first_id)
        }

    def generate(
        self, asked: Sequence[tuple[str | None, list[int]]], new: int = 8, extra: Any = None, **settings: Any
    ) -> list[Any]:
        """The outputs for pairs of an adapter's name and a prompt, all in one call."""
        from vllm import SamplingParams

        defaults = {"temperature": 0, "max_tokens": new, "ignore_eos": True, "logprobs": 1}
        params = SamplingParams(**{**defaults, **settings}, extra_args=extra)
        return self.llm.generate(
            [{"prompt_token_ids": prompt} for _, prompt in asked],
            params,
            lora_request=[self.requests.get(name) for name, _ in asked],
            use_tqdm=False,
        )

    def compare(
        self,
        asked: Sequence[tuple[str | None, list[int]]],
        truth: Truth,
        strength: float = 1.0,
        new: int = 8,
        **settings: Any,
    ) -> Comparison:
        """Answers compared with the true ones."""
        extra = None if strength == 1.0 else {"reft_strength": strength}
        comparison = Comparison()
        for (name, prompt), output in zip(asked, self.generate(asked, new, extra, **settings)):
            for sample in output.outputs:
                tokens = list(sample.token_ids)
                logprobs = [by_token[token].logprob for token, by_token in zip(tokens, sample.logprobs)]
                label = f"{name or 'base'}, {len(prompt)} tokens"
                comparison.add(label, tokens, logprobs, truth.answer(name, prompt, new, strength))
        return comparison


def every_pair(names: Sequence[str | None], prompts: Sequence[list[int]]) -> list[tuple[str | None, list[int]]]:
    """Each prompt with each adapter, interleaved."""
    return [(name, prompt) for prompt in prompts for name in names]


def assert_right(comparison: Comparison, logprobs: float = 2e-4) -> None:
    """All answers are the true ones."""
    assert comparison.equal == comparison.total > 0, comparison.wrong[:3]
    assert comparison.worst < logprobs
