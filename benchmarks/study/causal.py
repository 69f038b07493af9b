"""The small language model of the study, and finetuning it on prompts and completions.

The base is a Llama of about a million parameters with a byte-level tokenizer, trained on the standard library's
docstrings, those of the task's validation and test files left out, until it predicts text of these files far better
than a model that knows no context. It is trained once and kept in a cache folder outside the repository.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.study.methods import Method, count, parameter_groups
from benchmarks.study.task import Task, library
from benchmarks.study.training import Batch, fit, tenths

HIDDEN, BLOCKS, VOCABULARY = 128, 4, 2048
ROWS, COLUMNS, RATE = 8, 96, 2.5e-3  # of the base model's training
BATCH = 8  # of finetuning
Q_V = ["q_proj", "v_proj"]


class Pair(NamedTuple):
    """A prompt and what the model is to answer."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Base:
    """Where a trained base model lies, and what it can do."""

    path: Path
    record: dict[str, Any]

    def model(self) -> nn.Module:
        return LlamaForCausalLM.from_pretrained(self.path).requires_grad_(False)

    @functools.cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.path)


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "peft-reft-study"


def texts(task: Task) -> tuple[list[str], list[str]]:
    """Docstrings to train the base on, and those of the task's test files."""
    test, unseen = ({e.file for e in part} for part in (task.test, task.test + task.validation))
    train = dict.fromkeys(text for file, found in library().items() if file not in unseen for text in found)
    held_out = dict.fromkeys(text for file in sorted(test) for text in library()[file] if text not in train)
    return list(train), list(held_out)


def new_tokenizer(corpus: list[str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        eos_token="<eos>",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def base(task: Task, steps: int, cache: Path | None = None) -> Base:
    """The base model for a task, from the cache or trained now (minutes)."""
    known = [task.fingerprint, steps, HIDDEN, BLOCKS, VOCABULARY, ROWS, COLUMNS, RATE]
    name = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:12]
    path = (cache or cache_folder()) / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=path.parent))
        try:
            train_base(task, steps, unfinished)
            unfinished.rename(path)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return Base(path, json.loads((path / "record.json").read_text()))


def train_base(task: Task, steps: int, folder: Path) -> None:
    """Train a base model and its tokenizer, and write both and `record.json` to a folder."""
    begin = time.process_time()
    corpus, held_out = texts(task)
    tokenizer = new_tokenizer(corpus)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    random.Random(0).shuffle(corpus)
    stream, test = (token_stream(tokenizer, part) for part in (corpus, held_out))
    generator = torch.Generator().manual_seed(0)

    def epoch() -> Iterator[Batch]:
        while True:
            starts = torch.randint(len(stream) - COLUMNS, (ROWS, 1), generator=generator)
            rows = stream[starts + torch.arange(COLUMNS)]
            yield {"input_ids": rows, "labels": rows}

    groups = [{"params": list(model.parameters()), "lr": RATE}]
    losses = fit(model, groups, epoch, steps)
    frequencies = Counter(stream.tolist())
    unigram = sum(-math.log((frequencies[t] + 1) / (len(stream) + len(tokenizer))) for t in test.tolist()) / len(test)
    record = {
        "parameters": model.num_parameters(),
        "training tokens": len(stream),
        "held-out tokens": len(test),
        "held-out perplexity": round(math.exp(stream_loss(model, test)), 1),
        "unigram perplexity": round(math.exp(unigram), 1),
        "loss": tenths(losses),
        "seconds": round(time.process_time() - begin),
    }
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "record.json").write_text(json.dumps(record, indent=1) + "\n")


def token_stream(tokenizer: Any, corpus: list[str]) -> torch.Tensor:
    """All texts behind each other, with an end token after each."""
    return torch.tensor([token for ids in tokenizer(corpus)["input_ids"] for token in [*ids, tokenizer.eos_token_id]])


@torch.no_grad()
def stream_loss(model: nn.Module, stream: torch.Tensor, limit: int = 200) -> float:
    """Mean loss over windows of a stream."""
    rows = stream[: len(stream) // COLUMNS * COLUMNS].view(-1, COLUMNS)[:limit]
    model.eval()
    losses = [model(input_ids=part, labels=part).loss.item() * len(part) for part in rows.split(32)]
    return sum(losses) / len(rows)


# Prompts and completions.


def encode(tokenizer: Any, pairs: list[Pair]) -> list[tuple[list[int], list[int]]]:
    """Token ids of prompts and completions, the latter with the end token."""
    prompts, completions = (tokenizer(list(column))["input_ids"] for column in zip(*pairs))
    return [(prompt, [*ids, tokenizer.eos_token_id]) for prompt, ids in zip(prompts, completions)]


def collate(encoded: list[tuple[list[int], list[int]]]) -> Batch:
    """Rows padded on the right; only completions have labels."""
    width = max(len(prompt) + len(answer) for prompt, answer in encoded)
    ids, labels, mask = (torch.full((len(encoded), width), fill) for fill in (0, -100, 0))
    for row, (prompt, answer) in enumerate(encoded):
        length = len(prompt) + len(answer)
        ids[row, :length] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : length] = torch.tensor(answer)
        mask[row, :length] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def finetune(base: Base, method: Method, pairs: list[Pair], lr: float, seed: int, steps: int) -> tuple[nn.Module, dict]:
    """The base with a method trained on pairs; and trained numbers, seconds and the loss curve."""
    model = method.apply(base.model(), "CAUSAL_LM", seed)
    seconds, losses = train_on(model, base.tokenizer, pairs, lr, seed, steps)
    return model, {"parameters": count(model)["parameters"], "seconds": seconds, "loss": tenths(losses)}


def train_on(
    model: nn.Module, tokenizer: Any, pairs: list[Pair], lr: float, seed: int, steps: int
) -> tuple[float, list[float]]:
    """Train whatever requires gradients; seconds of CPU time and the losses."""
    encoded = encode(tokenizer, pairs)
    rng = random.Random(f"pairs {seed}")

    def epoch() -> Iterator[Batch]:
        order = rng.sample(encoded, len(encoded))
        for start in range(0, len(order), BATCH):
            yield collate(order[start : start + BATCH])

    begin = time.process_time()
    losses = fit(model, parameter_groups(model, lr, lr), epoch, steps)
    return round(time.process_time() - begin, 1), losses


@torch.no_grad()
def loss_on(model: nn.Module, tokenizer: Any, pairs: list[Pair]) -> float:
    """Mean loss per answer token."""
    model.eval()
    total = tokens = 0.0
    for start in range(0, len(pairs), 64):
        batch = collate(encode(tokenizer, pairs[start : start + 64]))
        labelled = (batch["labels"] != -100).sum().item()
        total += model(**batch).loss.item() * labelled
        tokens += labelled
    return total / tokens


@torch.no_grad()
def answers(model: nn.Module, tokenizer: Any, prompts: list[str], length: int, **options: Any) -> list[str]:
    """Greedy answers of at most so many tokens. Nothing is passed for ReFT: it finds the prompts itself."""
    model.eval()
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    output = model.generate(
        **batch, max_new_tokens=length, do_sample=False, pad_token_id=tokenizer.pad_token_id, **options
    )
    return tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
