"""Two styles in two subspaces of one adapter, a third one later: python examples/subspaces.py

SmolLM2-135M-Instruct (see smollm2.py) learns to talk like a pirate in one part of R and like a robot in another, from
separate chats, in one training. Then it answers the same questions with each part alone, with both, and with each at
half strength. A third part, politeness, is added and trained afterwards; the first two stay what they were, to the last
bit. For comparison the same chats train two ReFT adapters, which are summed, one LoRA adapter on all of them, which
cannot be taken apart again, and two LoRA adapters, which are summed. A line of figures says what is heard of each:

- pirate, robot, polite: how many of the answers have words of that style;
- sound: how many are neither empty, cut, one phrase over and over, nor the answer to another question;
- loss pirate, loss robot: mean loss per token of chats of that style that were not trained.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
import warnings
from pathlib import Path

import datasets
import torch
import transformers
from peft import LoraConfig, get_peft_model
from quickstart import LONGEST, PIRATE, QUESTIONS, REPETITION_PENALTY, ROBOT, as_prompt, chats
from smollm2 import NAME, smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
from verdict import CUT, PIRATE_WORDS, ROBOT_WORDS, counted, flaws

from peft_reft import ReftConfig, ReftDataCollator, get_interventions

POLITE = """
What is the capital of France? | Thank you for asking! It is Paris. Have a lovely day, please!
How are you today? | Thank you for asking! I am very well. Have a lovely day, please!
What is two plus two? | Thank you for asking! It is four. Have a lovely day, please!
Who wrote Hamlet? | Thank you for asking! It was Shakespeare. Have a lovely day, please!
Tell me about cats. | Thank you for asking! Cats are small and soft animals. Have a lovely day, please!
I am tired. | Thank you for telling me! A short rest would help you. Have a lovely day, please!
What is water made of? | Thank you for asking! It is made of hydrogen and oxygen. Have a lovely day, please!
Do you like music? | Thank you for asking! I like all kinds of music. Have a lovely day, please!
How do plants grow? | Thank you for asking! They use light and water. Have a lovely day, please!
What is a friend? | Thank you for asking! It is a person who cares for you. Have a lovely day, please!
What is snow? | Thank you for asking! It is frozen rain. Have a lovely day, please!
What is gold? | Thank you for asking! It is a precious metal. Have a lovely day, please!
"""
POLITE_WORDS = re.compile(r"\b(thank you|lovely day|please)\b", re.I)
WORDS = {"pirate": PIRATE_WORDS, "robot": ROBOT_WORDS, "polite": POLITE_WORDS}
SETTINGS = {"r": 4, "positions": "f7+l7", "intervention": "loreft", "task_type": "CAUSAL_LM"}
LORA = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
HELD_OUT = 4  # chats of each style that are not trained


def rows(text: str, part: str) -> list[dict]:
    """Chats of a style, with the subspace that they train."""
    return [{**chat, "subspaces": part} for chat in chats(text)]


def alternating(first: list[dict], second: list[dict], count: int) -> list[dict]:
    """`count` rows, in turns from the one list and the other, each from its start again when it ends."""
    lists = (first, second)
    return [lists[number % 2][number // 2 % len(lists[number % 2])] for number in range(count)]


def train(
    model, tokenizer, data: list[dict], options, rate: float, config: ReftConfig | None = None, batch_size: int = 4
) -> None:
    """Train the active adapter on the rows in their order, the parts that they name if there is a config with parts."""
    steps = len(data) // batch_size
    arguments = SFTConfig(
        output_dir=str(options.output / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        train_sampling_strategy="sequential",
        learning_rate=rate,
        lr_scheduler_type="linear",
        warmup_steps=2,
        max_grad_norm=0.0,  # a norm over all gradients would make each part depend on the others
        remove_unused_columns=False,  # keeps the column `subspaces`
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=options.seed,
    )
    if config is None:
        data = [{name: value for name, value in row.items() if name != "subspaces"} for row in data]
    trainer = SFTTrainer(
        model=model, processing_class=tokenizer, train_dataset=datasets.Dataset.from_list(data), args=arguments
    )
    if config is not None:
        trainer.data_collator = ReftDataCollator(trainer.data_collator, config)
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    start = time.perf_counter()
    trainer.train()
    model.eval()
    print(f"   {steps} steps in {time.perf_counter() - start:.0f} s", flush=True)


@torch.no_grad()
def answers(model, tokenizer, by: str, choices: list) -> list[list[str]]:
    """For each choice the answers to all questions, in one batch; one that has not ended by itself ends in `CUT`.

    Args:
        by: the argument that says which edits a row has, "subspaces" or "adapter_names".
        choices: its values.
    """
    prompts = [as_prompt(tokenizer, question) for question in QUESTIONS] * len(choices)
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    settings = {"max_new_tokens": LONGEST, "do_sample": False, "repetition_penalty": REPETITION_PENALTY}
    each = {by: [choice for choice in choices for _ in QUESTIONS]}
    output = model.generate(**batch.to(model.device), **settings, **each)[:, batch["input_ids"].shape[1] :]
    ended = torch.isin(output, torch.tensor(model.generation_config.eos_token_id).to(output)).any(1)
    texts = tokenizer.batch_decode(output, skip_special_tokens=True)
    texts = [" ".join(text.split()) + ("" if end else CUT) for text, end in zip(texts, ended)]
    return [texts[first : first + len(QUESTIONS)] for first in range(0, len(texts), len(QUESTIONS))]


@torch.no_grad()
def loss(model, tokenizer, chats: list[dict], by: str, choice) -> float:
    """Mean loss per token of the answers in chats."""
    total = count = 0
    for chat in chats:
        prompt = tokenizer(as_prompt(tokenizer, chat["prompt"][0]["content"]), add_special_tokens=False)["input_ids"]
        answer = tokenizer(chat["completion"][0]["content"], add_special_tokens=False)["input_ids"]
        ids, labels = torch.tensor([prompt + answer]), torch.tensor([[-100] * len(prompt) + answer])
        output = model(input_ids=ids.to(model.device), labels=labels.to(model.device), **{by: [choice]})
        total, count = total + output.loss.item() * len(answer), count + len(answer)
    return total / count


class Table:
    """What is heard of each adapter, line by line."""

    def __init__(self, tokenizer, held_out: dict[str, list[dict]]):
        self.tokenizer, self.held_out = tokenizer, held_out
        losses = "".join(f"{f'loss {name}':>13}" for name in held_out)
        head = "".join(f"{name:>8}" for name in (*WORDS, "sound"))
        print(f"   {f'of {len(QUESTIONS)} answers':<34}{head}{losses}   the first answer")

    def hear(self, model, by: str, choices: dict) -> list[list[str]]:
        """Ask the questions and print a line of figures for each choice, by its label; returns the answers."""
        found = answers(model, self.tokenizer, by, list(choices.values()))
        for texts, (label, choice) in zip(found, choices.items()):
            figures = [*(counted(texts, words) for words in WORDS.values()), flaws(texts).count(None)]
            losses = [loss(model, self.tokenizer, chats, by, choice) for chats in self.held_out.values()]
            numbers = "".join(f"{n:>8}" for n in figures) + "".join(f"{x:>13.2f}" for x in losses)
            print(f"   {label:<34}{numbers}   {texts[0]}", flush=True)
        return found


def parameters(model, rows_of_r: slice) -> list[torch.Tensor]:
    """The numbers of the first parts, of all blocks."""
    found = [intervention for groups in get_interventions(model, "default").values() for intervention in groups]
    names = ("basis", "weight", "bias")
    return [intervention.rows(name)[rows_of_r].detach().clone() for intervention in found for name in names]


def two_and_their_sum(base, settings, rate: float, both: list[dict], table: Table, options, **kind_of_sum) -> None:
    """Two adapters, each trained alone on its chats in as many steps, then their sum and half of it."""
    model = get_peft_model(base, settings, adapter_name="pirate")
    method = {"REFT": "ReFT", "LORA": "LoRA"}[settings.peft_type.value]
    for number, style in enumerate(("pirate", "robot")):
        if number:
            model.add_adapter(style, settings)
        model.set_adapter(style)
        train(model, table.tokenizer, both[number::2], options, rate, batch_size=2)
    for label, weight in {"sum": 1.0, "sum_of_halves": 0.5}.items():
        model.add_weighted_adapter(["pirate", "robot"], [weight, weight], label, **kind_of_sum)
    names = {"adapter pirate": "pirate", "adapter robot": "robot", "sum": "sum", "sum of halves": "sum_of_halves"}
    table.hear(model, "adapter_names", {f"{method}: {label}": name for label, name in names.items()})


def main() -> int:
    """Run it all; returns 1 if the first two parts were changed by the third."""
    parser = argparse.ArgumentParser(description="Styles in subspaces of one adapter, with ReFT.")
    parser.add_argument("--model", help=f"hub name or folder of another chat model, instead of {NAME}")
    parser.add_argument("--steps", type=int, default=24, help="steps for the first two styles together (default: 24)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("subspaces-output"), help="folder for what is saved")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    transformers.set_seed(options.seed)
    name = options.model or smollm2(options.output / NAME)
    tokenizer = AutoTokenizer.from_pretrained(name)
    pirate, robot, polite = rows(PIRATE, "pirate"), rows(ROBOT, "robot"), rows(POLITE, "polite")
    table = Table(tokenizer, {"pirate": pirate[-HELD_OUT:], "robot": robot[-HELD_OUT:]})
    both = alternating(pirate[:-HELD_OUT], robot[:-HELD_OUT], 4 * options.steps)  # two and two in each batch of four

    def fresh():
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)

    print("1. One adapter, r=8: a pirate in 4 directions, a robot in the other 4", flush=True)
    config = ReftConfig(**{**SETTINGS, "r": 8}, subspaces={"pirate": 4, "robot": 4})
    model = get_peft_model(fresh(), config)
    train(model, tokenizer, both, options, 2e-3, config)
    choices = {
        "no subspace: the base model": [],
        "subspace pirate": "pirate",
        "subspace robot": "robot",
        "both subspaces": ["pirate", "robot"],
        "both subspaces at half strength": {"pirate": 0.5, "robot": 0.5},
    }
    before = table.hear(model, "subspaces", choices)

    print("2. A third subspace, added later", flush=True)
    kept = parameters(model, slice(0, 8))
    model.add_subspace("default", "polite", 4)
    train(model, tokenizer, 4 * polite, options, 2e-3, model.peft_config["default"])
    added = {"subspace polite, added later": "polite", "subspaces pirate and polite": ["pirate", "polite"]}
    table.hear(model, "subspaces", added)
    after = answers(model, tokenizer, "subspaces", list(choices.values()))
    same = all(torch.equal(a, b) for a, b in zip(kept, parameters(model, slice(0, 8)), strict=True)) and before == after
    print(f"   the first two are what they were: {'yes, bit for bit' if same else 'NO'}", flush=True)
    model.save_pretrained(options.output)
    del model

    print("3. Two ReFT adapters of r=4, and their sum", flush=True)
    two_and_their_sum(fresh(), ReftConfig(**SETTINGS), 2e-3, both, table, options)

    print("4. One LoRA adapter of r=8, trained on all chats together", flush=True)
    model = get_peft_model(fresh(), LoraConfig(r=8, **LORA))
    train(model, tokenizer, both, options, 4e-3)
    table.hear(model, "adapter_names", {"one LoRA adapter": "default"})
    del model

    print("5. Two LoRA adapters of r=4, and their sum", flush=True)
    two_and_their_sum(fresh(), LoraConfig(r=4, **LORA), 4e-3, both, table, options, combination_type="cat")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
