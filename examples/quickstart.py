"""Quickstart: teach a small language model to answer in emoji by editing its hidden states, not its weights.

    python examples/quickstart.py                       # under 3 minutes on 2 CPU cores, no network
    python examples/quickstart.py --model <id or path>  # the same on a real model

What happens, top to bottom:

1. A byte-level BPE tokenizer and a Llama of 1.1 million parameters are trained on the docstrings of Python's
   standard library, mixed with lines that name an emoji and show it. That takes about a minute, and gives a model
   that writes something like documentation. (With --model this step is left out.)
2. The model is frozen and finetuned with LoReFT in TRL's unmodified SFTTrainer: a sentence from the documentation is
   to be answered with three times the emoji of its subject, a file, an email, a turtle, ...
3. Loss and answers before and after are shown on sentences that were held out from finetuning.
4. The adapter is saved, loaded into a fresh copy of the base model, and has to give equal output.
"""

from __future__ import annotations

import argparse
import ast
import random
import re
import sysconfig
import time
import unicodedata
import warnings
from pathlib import Path

import datasets
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from peft_reft import ReftConfig  # importing peft_reft makes ReFT known to PEFT, for saved adapters too

# The behaviour to learn: the emoji for a sentence in which words of one subject occur.
SUBJECTS = {
    "📁": "file files filename filenames directory directories path paths",
    "📧": "email mail mailbox message messages",
    "🌐": "server host socket http url urls network",
    "🚨": "error errors exception exceptions raise raised raises traceback",
    "🐢": "turtle turtles pen turtlescreen",
    "🧵": "thread threads process processes lock locks semaphore",
}
# The emoji that the small model gets to know: these, and Unicode's animals.
EMOJI = sorted({*SUBJECTS, *map(chr, range(0x1F400, 0x1F43F))})

NO_TEXT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "encodings", "pydoc_data"}


# 1. The text, the tokenizer, the base model.


def standard_library_docstrings(limit: int | None = None) -> list[str]:
    """Docstrings in the sources of Python's standard library, each once, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, None] = {}
    for path in sorted(root.rglob("*.py")):
        if NO_TEXT & set(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError, OSError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                docstring = ast.get_docstring(node)
                if docstring:
                    found[docstring] = None
        if limit is not None and len(found) > limit:
            break
    return list(found)


def emoji_lines(count: int) -> list[str]:
    """Texts of two lines: "Turtle." and "🐢🐢🐢"."""
    rng = random.Random(0)
    drawn = [rng.choice(EMOJI) for _ in range(count)]
    return [f"{unicodedata.name(emoji).capitalize()}.\n{emoji * 3}" for emoji in drawn]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, as GPT-2's, with 2048 tokens and one for each emoji."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2048, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.add_tokens(EMOJI)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>", model_input_names=["input_ids", "attention_mask"]
    )


def train_base_model(texts: list[str], tokenizer: PreTrainedTokenizerFast, steps: int) -> LlamaForCausalLM:
    """A small Llama, trained to continue `texts`; on a slow machine for 100 seconds only."""
    seconds, rows, columns, peak = 100.0, 6, 96, 2.5e-3
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    tokens = [token for ids in tokenizer(texts)["input_ids"] for token in [*ids, tokenizer.eos_token_id]]
    stream = torch.tensor(tokens)
    print(f"   {model.num_parameters():,} parameters, {len(stream):,} tokens of text")
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.05)
    model.train()
    begin = time.perf_counter()
    for step in range(steps):
        done = max(step / steps, (time.perf_counter() - begin) / seconds)
        if done >= 1:
            print(
                f"   stopped after {step} steps: {seconds:.0f} seconds are over, and the results will be worse for it"
            )
            break
        optimizer.param_groups[0]["lr"] = peak * min(10 * (done + 1e-3), (1 - done) / 0.9)  # up, then down to 0
        starts = torch.randint(len(stream) - columns, (rows, 1))
        batch = stream[starts + torch.arange(columns)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            print(f"   step {step:4d}/{steps}  loss {loss.item():.2f}", flush=True)
    return model.eval()


# 2. The behaviour.


def emoji_examples(docstrings: list[str]) -> tuple[list[dict], list[dict]]:
    """Sentences with words of exactly one subject, and their answers: to train on, and held out."""
    emoji_of = {word: emoji for emoji, words in SUBJECTS.items() for word in words.split()}
    by_emoji: dict[str, list[dict]] = {emoji: [] for emoji in SUBJECTS}
    paragraphs = [" ".join(part.split()) for text in docstrings for part in re.split(r"\n\s*\n", text)]
    sentences = dict.fromkeys(s for part in paragraphs for s in re.split(r"(?<=[.!?])\s+", part))
    for sentence in sentences:
        if not (sentence[:1].isupper() and sentence.endswith(".") and 4 <= len(sentence.split()) <= 16):
            continue
        named = {emoji_of[word] for word in re.findall("[a-z]+", sentence.lower()) if word in emoji_of}
        if len(named) == 1:
            emoji = named.pop()
            by_emoji[emoji].append({"prompt": f"{sentence}\n", "completion": emoji * 3})
    rng = random.Random(0)
    for examples in by_emoji.values():
        rng.shuffle(examples)
    train = [example for examples in by_emoji.values() for example in examples[25:275]]
    held_out = [examples[number] for number in range(25) for examples in by_emoji.values() if number < len(examples)]
    return train, held_out


def as_chat(example: dict) -> dict:
    """The same example as a conversation, for models with a chat template."""
    return {
        "prompt": [{"role": "user", "content": example["prompt"].strip()}],
        "completion": [{"role": "assistant", "content": example["completion"]}],
    }


@torch.no_grad()
def answers(model, tokenizer, examples: list[dict], max_new_tokens: int = 24) -> list[str]:
    """What the model generates for the examples' prompts. Nothing is passed for ReFT: it finds the prompts itself."""
    prompts = [example["prompt"] for example in examples]
    if tokenizer.chat_template is not None:
        prompts = [
            tokenizer.apply_chat_template(as_chat(example)["prompt"], add_generation_prompt=True, tokenize=False)
            for example in examples
        ]
    texts = []
    for number in range(0, len(prompts), 32):
        batch = tokenizer(
            prompts[number : number + 32],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=tokenizer.chat_template is None,
        ).to(model.device)
        output = model.generate(
            **batch, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        texts += tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def accuracy(given: list[str], examples: list[dict]) -> float:
    """The share of answers that are what the example asks for."""
    right = [text.strip() == example["completion"] for text, example in zip(given, examples, strict=True)]
    return sum(right) / len(right)


class PrintLoss(transformers.TrainerCallback):
    """One line for every log entry of the trainer."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            print(f"   step {state.global_step:4d}/{state.max_steps}  loss {float(logs['loss']):.2f}", flush=True)


def lora_parameters(base_name: Path | str) -> int:
    """How many parameters LoRA of rank 8 on the query and value projections would train; no memory is used for it."""
    with torch.device("meta"):
        copy = AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(base_name))
    lora = get_peft_model(copy, LoraConfig(r=8, task_type="CAUSAL_LM"), low_cpu_mem_usage=True)
    return lora.get_nb_trainable_parameters()[0]


def main() -> None:
    """Run the four steps."""
    parser = argparse.ArgumentParser(description="Teach a small language model to answer in emoji, with ReFT.")
    parser.add_argument("--model", help="hub id or path of a causal LM to use instead of the small one trained here")
    parser.add_argument("--output", type=Path, default=Path("quickstart-output"), help="folder for what is saved")
    parser.add_argument("--smoke", action="store_true", help="a few steps only, to see that everything runs")
    options = parser.parse_args()
    begin = time.perf_counter()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of the libraries to each other
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    transformers.set_seed(0)

    if options.model is None:
        torch.set_num_threads(1)  # so small a model gains little from a second, and on a busy machine loses much

    docstrings = standard_library_docstrings(limit=1500 if options.smoke else None)
    if options.model is None:
        print("1. Training a tokenizer and a small language model on the standard library's docstrings", flush=True)
        base_name: Path | str = options.output / "base"
        texts = docstrings + emoji_lines(100 if options.smoke else 6000)
        random.Random(0).shuffle(texts)
        tokenizer = train_tokenizer(texts)
        train_base_model(texts, tokenizer, steps=3 if options.smoke else 1000).save_pretrained(base_name)
        tokenizer.save_pretrained(base_name)
    else:
        print(f"1. Loading {options.model}", flush=True)
        base_name = options.model
    tokenizer = AutoTokenizer.from_pretrained(base_name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    base = AutoModelForCausalLM.from_pretrained(base_name)

    print("2. Finetuning with LoReFT in SFTTrainer: the base model is frozen", flush=True)
    train, held_out = emoji_examples(docstrings)
    if options.smoke:
        held_out = held_out[:8]
    prepare = as_chat if tokenizer.chat_template is not None else dict
    config = ReftConfig(r=4, positions="all", task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model=base,
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list([prepare(example) for example in train]),
        eval_dataset=datasets.Dataset.from_list([prepare(example) for example in held_out]),
        peft_config=config,
        args=SFTConfig(
            output_dir=str(options.output / "trainer"),
            max_steps=3 if options.smoke else 500,
            per_device_train_batch_size=16,
            learning_rate=4e-2 if options.model is None else 4e-3,  # a narrow model wants larger steps
            lr_scheduler_type="linear",
            warmup_steps=20,
            logging_steps=1 if options.smoke else 100,
            use_cpu=not torch.cuda.is_available(),
            bf16=torch.cuda.is_available(),
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=0,
        ),
        callbacks=[PrintLoss()],
    )
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    model = trainer.model
    trainable, total = model.get_nb_trainable_parameters()
    print(f"   trainable parameters: {trainable:,} of {total:,}; LoRA of rank 8 has {lora_parameters(base_name):,}")
    loss_before, before = trainer.evaluate()["eval_loss"], answers(model.eval(), tokenizer, held_out)
    trainer.train()
    loss_after, after = trainer.evaluate()["eval_loss"], answers(model.eval(), tokenizer, held_out)

    print("3. Before and after, on sentences held out from finetuning")
    print(f"   loss: {loss_before:.2f} -> {loss_after:.2f}")
    print(
        f"   answered as asked: {accuracy(before, held_out):.0%} -> {accuracy(after, held_out):.0%} of {len(held_out)}"
        f" (the right format with a guessed subject: {1 / len(SUBJECTS):.0%})"
    )
    for example, old, new in list(zip(held_out, before, after, strict=True))[:12]:
        print(f"   {example['prompt'].strip()}")
        print(f"      before: {' '.join(old.split())[:70]!r}  after: {' '.join(new.split())[:70]}")

    print("4. Saving, and loading into a fresh copy of the base model")
    adapter = options.output / "adapter"
    model.save_pretrained(adapter)
    sizes = ", ".join(f"{file.name} {file.stat().st_size:,} bytes" for file in sorted(adapter.glob("adapter_*")))
    print(f"   {adapter}: {sizes}")
    fresh = AutoModelForCausalLM.from_pretrained(base_name, dtype=base.dtype).to(model.device)
    reloaded = PeftModel.from_pretrained(fresh, adapter).eval()
    assert answers(reloaded, tokenizer, held_out) == after, "the reloaded adapter answers differently"
    sample = tokenizer(held_out[0]["prompt"], return_tensors="pt").to(model.device)
    with torch.no_grad():
        torch.testing.assert_close(reloaded(**sample).logits, model(**sample).logits)
    print(f"   the {len(held_out)} answers of the reloaded model are equal to those above")
    print(f"Done in {time.perf_counter() - begin:.0f} seconds")


if __name__ == "__main__":
    main()
