"""What the checks of vLLM stand on: tiny models, random adapters, and answers by transformers and peft_reft."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 512
JSON = ['{"a": "', '", "b": "', '", "c": "', '"}', "red", "green", "blue", "grey", "white", "black"]  # tokens, too
SIZES = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "vocab_size": VOCABULARY}
LLAMA = {**SIZES, "intermediate_size": 128, "num_key_value_heads": 1, "max_position_embeddings": 512, "head_dim": 32}
# By name: the class of transformers' config, and its settings.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", LLAMA),
    "qwen2": ("Qwen2Config", {k: v for k, v in LLAMA.items() if k != "head_dim"}),
    "qwen3": ("Qwen3Config", LLAMA),
    "mistral": ("MistralConfig", {**LLAMA, "sliding_window": None}),
    "gemma": ("GemmaConfig", LLAMA),
    "gemma2": ("Gemma2Config", {**LLAMA, "query_pre_attn_scalar": 32}),
    "gemma3": ("Gemma3TextConfig", {**LLAMA, "query_pre_attn_scalar": 32}),
    "phi3": ("Phi3Config", {**{k: v for k, v in LLAMA.items() if k != "head_dim"}, "pad_token_id": 0}),
    "phi": ("PhiConfig", {k: v for k, v in LLAMA.items() if k not in ("head_dim", "num_key_value_heads")}),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 4, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": 512}),
    "opt": (
        "OPTConfig",
        {
            **SIZES,
            "ffn_dim": 128,
            "max_position_embeddings": 512,
            "word_embed_proj_dim": 64,
            "activation_function": "relu",
        },
    ),
}


@functools.cache
def make_model(name: str, parent: Path) -> Path:
    """A tiny model with random weights, large enough for answers that differ; and a tokenizer of numbered words."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    directory = parent / name
    kind, settings = MODELS[name]
    config = getattr(transformers, kind)(**settings, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    model.generation_config.eos_token_id = None  # answers of one length
    model.save_pretrained(directory)
    vocabulary = {f"w{number}": number for number in range(VOCABULARY - len(JSON))}
    vocabulary |= {word: len(vocabulary) + number for number, word in enumerate(JSON)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="w1", eos_token="w2", pad_token="w0"
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} w3 {% endfor %}"
    tokenizer.save_pretrained(directory)
    return directory


def make_adapter(base: Path, directory: Path, seed: int = 0, scale: float = 0.4, **settings: Any) -> Path:
    """A random adapter of a model, saved in a directory."""
    import transformers
    from peft import get_peft_model

    from peft_reft import ReftConfig

    torch.manual_seed(seed)
    model = get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(base),
        ReftConfig(task_type="CAUSAL_LM", init_weights=False, **settings),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "reft_" in name:
                parameter.normal_(std=scale)
    model.save_pretrained(directory)
    return directory


@dataclass(frozen=True)
class Answer:
    """A greedy answer: its tokens, the log-probability of each, and by how much it is ahead of the second best."""

    tokens: list[int]
    logprobs: list[float]
    margins: list[float]


class Truth:
    """Greedy answers by transformers and peft_reft, one prompt at a time.

    Args:
        base: directory of the model.
        adapters: directories by name.
    """

    def __init__(self, base: Path, adapters: dict[str, Path]):
        import transformers
        from peft import PeftModel

        self.base = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
        self.model: Any = None
        for name, directory in adapters.items():
            if self.model is None:
                self.model = PeftModel.from_pretrained(self.base, directory, adapter_name=name)
            else:
                self.model.load_adapter(directory, adapter_name=name)
        self.known: dict[Any, Answer] = {}

    @torch.no_grad()
    def answer(
        self, name: str | None, prompt: Sequence[int], new: int = 8, strength: float = 1.0, **options: Any
    ) -> Answer:
        """The answer of an adapter; None for the base model. Options are those of `generate`."""
        key = (name, tuple(prompt), new, strength, *options.items())
        if key not in self.known:
            self.known[key] = self._generate(name, prompt, new, strength, options)
        return self.known[key]

    def _generate(
        self, name: str | None, prompt: Sequence[int], new: int, strength: float, options: dict[str, Any]
    ) -> Answer:
        from peft_reft import set_strength

        with self.adapter(name) as model:
            if name is not None:
                set_strength(self.model, strength, adapter_name=name)
            ids = torch.tensor([list(prompt)])
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_logits=True,
                **{"eos_token_id": None, **options},
            )
            if name is not None:
                set_strength(self.model, 1.0, adapter_name=name)
        tokens = out.sequences[0, len(prompt) :].tolist()
        scores = torch.cat(out.logits).log_softmax(-1)
        best = scores.topk(2).values
        chosen = scores.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        return Answer(tokens, chosen.tolist(), (best[:, 0] - best[:, 1]).tolist())

    def forced(self, name: str | None, prompt: Sequence[int], tokens: Sequence[int]) -> list[float]:
        """The log-probability of each token of an answer that somebody else chose."""
        given = list(tokens)
        found = self.answer(
            name, prompt, len(given), prefix_allowed_tokens_fn=lambda row, ids: [given[len(ids) - len(prompt)]]
        )
        assert found.tokens == given
        return found.logprobs

    @torch.no_grad()
    def hidden(self, name: str | None, prompt: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a prompt: log-probabilities of the next token behind each of its tokens, and the last hidden states."""
        with self.adapter(name) as model:
            out = model(input_ids=torch.tensor([list(prompt)]), output_hidden_states=True)
        return out.logits[0].log_softmax(-1), out.hidden_states[-1][0]

    @contextmanager
    def adapter(self, name: str | None) -> Iterator[Any]:
        if name is None:
            with self.model.disable_adapter():
                yield self.model
        else:
            self.model.set_adapter(name)
            yield self.model


def prompts(count: int = 12, longest: int = 90, seed: int = 0) -> list[list[int]]:
    """Prompts of many lengths, from one token on; every second one is the beginning of one text."""
    draw = torch.Generator().manual_seed(seed)
    text = torch.randint(4, VOCABULARY, (longest,), generator=draw).tolist()
    found = []
    for number in range(count):
        length = 1 + (longest - 1) * number // max(1, count - 1)
        own = torch.randint(4, VOCABULARY, (length,), generator=draw).tolist()
        found.append(text[:length] if number % 2 else own)
    return found


@dataclass
class Comparison:
    """How many answers are equal, and how far log-probabilities are apart where they are."""

    equal: int = 0
    total: int = 0
    worst: float = 0.0
    wrong: list[str] = None  # type: ignore[assignment]

    def add(self, label: str, tokens: Sequence[int], logprobs: Sequence[float] | None, truth: Answer) -> None:
        """Compare an answer with the true one; they may part at a tie, where the true margin is within rounding."""
        self.wrong = self.wrong or []
        self.total += 1
        parted = next(
            (i for i, (one, other) in enumerate(zip(tokens, truth.tokens)) if one != other), len(truth.tokens)
        )
        right = len(tokens) == len(truth.tokens) and (
            parted == len(truth.tokens) or (bool(truth.margins) and truth.margins[parted] < 2e-3)
        )
        self.equal += right
        if not right:
            self.wrong.append(f"{label}: {list(tokens)} instead of {truth.tokens}")
        for one, other in zip((logprobs or [])[:parted], truth.logprobs):
            self.worst = max(self.worst, abs(one - other))
