"""Draws the pictures of docs/inspect.md: python docs/images/make.py [DIRECTORY]

No network: the model and the task are those of examples/quickstart.py (sentences are to be answered with the emoji of
their subject), the adapter is LoReFT at the first and the last four tokens. Takes about three minutes; what was trained
is kept in DIRECTORY (default: pictures-output) and used again.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

IMAGES = Path(__file__).parent
sys.path.insert(0, str(IMAGES.parents[1] / "examples"))

from quickstart import (  # noqa: E402
    emoji_examples,
    emoji_lines,
    standard_library_docstrings,
    train_base_model,
    train_tokenizer,
)

from peft_reft import ReftConfig  # noqa: E402
from peft_reft.inspect import inspect_adapter  # noqa: E402
from peft_reft.inspect.batch import padded  # noqa: E402
from peft_reft.inspect.command import summary  # noqa: E402


def make_base(directory: Path, docstrings: list[str]) -> None:
    """The quickstart's language model and tokenizer."""
    texts = docstrings + emoji_lines(6000)
    random.Random(0).shuffle(texts)
    tokenizer = train_tokenizer(texts)
    train_base_model(texts, tokenizer, steps=1000).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def make_adapter(base: Path, directory: Path, examples: list[dict]) -> None:
    """An adapter that answers with emoji."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), ReftConfig(r=4, positions="f4+l4", task_type="CAUSAL_LM")
    )
    steps = 400
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    rng = random.Random(0)
    for step in range(steps):
        rows = rng.sample(examples, 16)
        prompts = [tokenizer(row["prompt"])["input_ids"] for row in rows]
        answers = [tokenizer(row["completion"])["input_ids"] for row in rows]
        ids = padded([[*p, *a] for p, a in zip(prompts, answers)], tokenizer.pad_token_id)
        mask = padded([[1] * len([*p, *a]) for p, a in zip(prompts, answers)], 0)
        labels = padded([[-100] * len(p) + a for p, a in zip(prompts, answers)], -100)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"   step {step:3d}/{steps}  loss {loss.item():.2f}", flush=True)
    model.save_pretrained(directory)


def main() -> None:
    """Train what is not there yet, and draw."""
    directory = Path(sys.argv[1] if len(sys.argv) > 1 else "pictures-output")
    base, adapter = directory / "base", directory / "adapter"
    torch.set_num_threads(1)
    set_seed(0)
    docstrings = standard_library_docstrings()
    train, _ = emoji_examples(docstrings)
    if not (base / "config.json").exists():
        make_base(base, docstrings)
    if not (adapter / "adapter_config.json").exists():
        make_adapter(base, adapter, train)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    prompts = ["Return the name of the directory.\n", "Set the turtle's heading to the given angle.\n"]
    found = inspect_adapter(model, prompts, tokenizer)
    print(summary(found))
    for value in ("relative", "angle_after"):
        found.plot(value=value).savefig(IMAGES / f"inspect-{value.replace('_', '-')}.png", dpi=100)


if __name__ == "__main__":
    main()
