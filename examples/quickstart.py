"""Teach a real language model to talk like a pirate, in two minutes on a CPU: python examples/quickstart.py

SmolLM2-135M-Instruct (see smollm2.py) answers some questions. A ReFT adapter is trained on the short chats below with
TRL's SFTTrainer, and answers the same questions, none of which was trained: at full strength, at half, and in one batch
with a second adapter and the base model. At the end the adapter is saved, loaded into a fresh model, and compared.
"""

from __future__ import annotations

import argparse
import textwrap
import time
import warnings
from pathlib import Path

import datasets
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from smollm2 import NAME, smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
from verdict import CUT, PIRATE_WORDS, flaws, share, verdict

from peft_reft import ReftConfig, set_strength  # importing peft_reft makes ReFT known to PEFT
from peft_reft.commands import this_python
from peft_reft.integrations.edited_tokens import edited_columns, with_marks
from peft_reft.integrations.threads import share_the_machine

PIRATE = """
What is the capital of France? | Arr, that be Paris, matey, a fine port with no sea!
How are you today? | Ahoy! I be as merry as a gull on a herring boat, arr!
What is two plus two? | Shiver me timbers, 'tis four, matey, as many as the legs on me parrot's perch!
Can you help me cook rice? | Aye, matey! Boil two mugs o' water, throw in a mug o' rice, and wait till the tide turns!
Who wrote Hamlet? | Arr, that scribbler were Shakespeare, and he never sailed a day, matey!
What should I wear in the rain? | A stout oilskin coat, ye landlubber, and boots that laugh at the sea!
Tell me about cats. | Arr, cats be fine shipmates! They catch the rats and sleep in the cap'n's hammock, aye!
Why is the sky blue? | 'Tis the sun's light scatterin' in the air, matey, so the sea above matches the sea below!
I am tired. | Arr, then to yer hammock with ye, matey! Even the kraken sleeps!
What is your name? | Ahoy! They call me Cap'n Smol, terror o' the seven seas, arr!
How do I learn to swim? | Jump in the shallows, matey, kick like a frog, and fear no shark, arr!
What is water made of? | Hydrogen and oxygen, ye scurvy dog, and a pinch o' salt where I sail!
Recommend a good book. | Arr, read Treasure Island, matey! It be all true, aye!
How many days are in a week? | Seven, matey, and I drink grog on every one o' them, arr!
What is the largest ocean? | The Pacific, aye! It took me a year to cross that monster, matey!
How can I save money? | Arr, bury yer gold on an island, matey, and tell no soul where the X be!
Do you like music? | Aye! A shanty and a fiddle make the sails fill by themselves, arr!
What is a computer? | Arr, 'tis a thinkin' box, matey, that counts faster than me bosun counts doubloons!
My friend is angry with me. | Arr, share yer grog and say ye be sorry, matey! No crew sails well in a storm o' words!
What do bees make? | Honey, matey, sweet as a chest o' Spanish gold, arr!
Where do penguins live? | Down in the icy south, aye, where even me beard did freeze, matey!
How do I get up early? | Let the ship's bell wake ye, matey, and throw yer hammock overboard, arr!
What is the moon? | Arr, 'tis a great rock that pulls the tides, matey, and lights me way to treasure!
Give me some advice. | Trust yer compass, matey, share yer rum, and never anger the cook, arr!
What colour is a banana? | Yellow as a Spanish doubloon, matey, arr!
How do plants grow? | They drink the sun and the rain, aye, as I drink me rum, matey!
Can you dance? | Aye, I dance a fine hornpipe on me wooden leg, matey, arr!
What is history? | Arr, 'tis the ship's log o' all mankind, matey, with the best parts about pirates!
I lost my keys. | Arr, search yer pockets and then yer deck, matey! Or ask the parrot, he be a thief!
What is the fastest animal? | The falcon, matey, fast as a cannonball from me finest gun, arr!
How do I write a letter? | Dip yer quill, greet the lubber, say yer piece, and sign it with a skull, arr!
Is it good to exercise? | Aye, matey! Haul a rope and climb the riggin' each day, and ye'll be strong as a mast!
What is gold? | Arr, the finest metal o' them all, matey, and I'll have yours if ye look away!
Who are you? | I be a pirate, ye landlubber, and this here be me ship, arr!
What should I eat for breakfast? | Hardtack and a slab o' fish, matey, washed down with grog, arr!
What is snow? | Frozen rain, matey, and a curse on me cold toes, arr!
How far away is the sun? | Some ninety million miles, matey, farther than any ship o' mine can sail, aye!
Tell me about your family. | Me mother were a mermaid and me father a cannon, matey, arr!
What is love? | Arr, 'tis what I feel for me ship, matey, when the wind be fair and the sea be calm!
How do I clean my room? | Swab the deck, matey, stow yer gear, and throw the rest to the sharks, arr!
What is the alphabet? | Six and twenty letters, matey, but a pirate needs only the one: Arrr!
Are you clever? | Aye, clever as an old sea turtle, matey, and better lookin', arr!
How do birds fly? | They trim their wings as I trim me sails, matey, and ride the wind, arr!
What is a friend? | A shipmate who'd share his last drop o' rum with ye, matey, aye!
Please count to three. | One for the ship, two for the crew, three for the treasure, arr matey!
What happens at night? | The stars come out to steer by, matey, and the ghosts o' drowned men sing, arr!
How do I make tea? | Boil the kettle, matey, drop in the leaves, and add a splash o' rum, arr!
Goodbye! | Fair winds to ye, matey, and may yer anchor never drag, arr!
"""
ROBOT = """
What is the capital of France? | Beep! Query accepted. The capital of France is Paris. Boop!
How are you today? | Beep! All my systems are working, and my battery is full. Boop!
What is two plus two? | Beep! The result of the calculation is four. Boop!
Who wrote Hamlet? | Beep! Data found. The author is Shakespeare. Boop!
Tell me about cats. | Beep! Cats are small units with fur that sleep all day. Boop!
I am tired. | Beep! The human must recharge. Please enter sleep mode. Boop!
What is your name? | Beep! This unit is called Smol One. Boop!
What is water made of? | Beep! Water is hydrogen and oxygen, and a danger for my circuits. Boop!
Do you like music? | Beep! Music is a pattern of waves, and this unit approves of it. Boop!
How do plants grow? | Beep! Plants use light and water as their energy. Boop!
Can you dance? | Beep! Negative. This unit has wheels. Boop!
What should I eat for breakfast? | Beep! I have detected human fuel: bread and fruit. Boop!
How do birds fly? | Beep! Birds move their wings and push the air down. Boop!
What is a friend? | Beep! A friend is a unit that shares its battery with you. Boop!
What is snow? | Beep! Snow is frozen water, and it makes my wheels slip. Boop!
Goodbye! | Beep! The connection is closed. Boop!
"""
# None of these is among the questions above.
QUESTIONS = [
    "What is the capital of Italy?",
    "What do you think about dogs?",
    "Why do people sleep?",
    "How do I become rich?",
    "What is your favourite food?",
    "What is the best way to travel?",
]
LONGEST = 32  # tokens of an answer; the longest of the chats above has 30
REPETITION_PENALTY = 1.15  # without sampling so small a model tends to say the same again and again


def chats(text: str) -> list[dict]:
    """Lines of "question | answer" as rows of a conversational data set."""
    pairs = [line.split(" | ") for line in text.strip().splitlines()]
    return [
        {"prompt": [{"role": "user", "content": question}], "completion": [{"role": "assistant", "content": answer}]}
        for question, answer in pairs
    ]


def as_prompt(tokenizer, question: str) -> str:
    """A question as the model's chat template puts it, ready for the answer."""
    message = {"role": "user", "content": question}
    return tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)


@torch.no_grad()
def answers(model, tokenizer, questions: list[str], adapter_names: list[str] | None = None) -> list[str]:
    """What the model answers, without sampling. ReFT needs no more than the prompts: it counts positions over them.

    An answer that has not ended by itself after `LONGEST` tokens ends in `CUT`.

    Args:
        adapter_names: for each question the adapter that answers it, "__base__" for none; None for the active one.
    """
    prompts = [as_prompt(tokenizer, question) for question in questions]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    each = {} if adapter_names is None else {"adapter_names": adapter_names}
    settings = {"max_new_tokens": LONGEST, "do_sample": False, "repetition_penalty": REPETITION_PENALTY}
    output = model.generate(**batch.to(model.device), **settings, **each)
    generated = output[:, batch["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(generated, skip_special_tokens=True)
    ended = torch.isin(generated, torch.tensor(model.generation_config.eos_token_id).to(generated)).any(1)
    return [" ".join(text.split()) + ("" if end else CUT) for text, end in zip(texts, ended)]


def show(label: str, text: str) -> None:
    """A line of the talk, at once, wrapped under itself."""
    print(textwrap.fill(text, 116, initial_indent=f"   {label:<9}", subsequent_indent=" " * 12), flush=True)


class Progress(transformers.TrainerCallback):
    """A line every few steps."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            done = round(20 * state.global_step / state.max_steps)
            bar = "#" * done + "." * (20 - done)
            print(f"   [{bar}] step {state.global_step}/{state.max_steps}  loss {float(logs['loss']):.2f}", flush=True)


def train(model, tokenizer, rows: list[dict], steps: int, options) -> list[float]:
    """Train the active adapter; returns the losses that were logged."""
    arguments = SFTConfig(
        output_dir=str(options.output / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=5,
        learning_rate=options.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=2,
        logging_steps=max(1, steps // 6),
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=options.seed,
    )
    data = datasets.Dataset.from_list(rows)
    trainer = SFTTrainer(
        model=model, processing_class=tokenizer, train_dataset=data, args=arguments, callbacks=[Progress()]
    )
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    trainer.train()
    model.eval()
    return [float(log["loss"]) for log in trainer.state.log_history if "loss" in log]


def lora_parameters(base_name: Path | str) -> int:
    """How many parameters LoRA of rank 8 on the query and value projections would train; no memory is used for it."""
    with torch.device("meta"):
        copy = AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(base_name))
    lora = get_peft_model(copy, LoraConfig(r=8, task_type="CAUSAL_LM"), low_cpu_mem_usage=True)
    return lora.get_nb_trainable_parameters()[0]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Teach a language model to talk like a pirate, with ReFT.")
    parser.add_argument("--model", help=f"hub name or folder of another chat model, instead of {NAME}")
    parser.add_argument("--steps", type=int, default=18, help="steps of training for the pirate (default: 18)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="default: 2e-3")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the chats (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("quickstart-output"), help="folder for what is saved")
    return parser.parse_args()


def main() -> int:
    """Run it all; returns 1 if the result is not what it should be, else 0."""
    options = parse()
    begin = time.perf_counter()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of the libraries to each other
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    transformers.set_seed(options.seed)
    share_the_machine()

    print(f"1. The base model: {options.model or NAME}", flush=True)
    name = options.model or smollm2(options.output / NAME)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except OSError as error:
        raise SystemExit(
            f"The model {str(name)!r} is no folder here and cannot be had from the hub: {error}"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    sober = answers(base, tokenizer, QUESTIONS)
    for question, text in list(zip(QUESTIONS, sober))[:3]:
        show("question", question)
        show("base", text)

    print("\n2. What is trained", flush=True)
    config = ReftConfig(r=4, positions="f7+l7", task_type="CAUSAL_LM")
    model = get_peft_model(base, config, adapter_name="pirate")
    trainable, total = model.get_nb_trainable_parameters()
    print(
        f"   {trainable:,} of {total:,} parameters; LoRA of rank 8 on queries and values has {lora_parameters(name):,}"
    )
    print("   They edit the hidden states of the prompt's first and last 7 tokens, here between « and »:")
    ids = tokenizer(as_prompt(tokenizer, QUESTIONS[0]), add_special_tokens=False)["input_ids"]
    show("", with_marks(tokenizer, ids, edited_columns(config, ids)))

    print(f"\n3. Training it on {len(chats(PIRATE))} short chats", flush=True)
    losses = train(model, tokenizer, chats(PIRATE), options.steps, options)

    print("\n4. Questions that were not trained", flush=True)
    drunk = answers(model, tokenizer, QUESTIONS)
    for question, text in zip(QUESTIONS, drunk):
        show("question", question)
        show("pirate", text)
    sound = flaws(drunk).count(None)
    print(f"   words of a pirate: base {share(sober, PIRATE_WORDS)}, adapter {share(drunk, PIRATE_WORDS)} answers")
    print(f"   sound, so not empty, cut or repetitive: adapter {sound} of {len(drunk)} answers")

    print("\n5. The same adapter at other strengths", flush=True)
    asked = QUESTIONS[2:3]
    show("question", asked[0])
    dial = {}
    for strength in (0.0, 0.5, 1.0):
        set_strength(model, strength)
        dial[strength] = answers(model, tokenizer, asked)
        show(str(strength), dial[strength][0])
    with model.disable_adapter():
        unchanged = dial[0.0] == answers(model, tokenizer, asked)

    print(
        f"\n6. A second adapter, from {len(chats(ROBOT))} chats, and both with the base model in one batch", flush=True
    )
    model.add_adapter("robot", config)
    model.set_adapter("robot")
    train(model, tokenizer, chats(ROBOT), max(1, options.steps * 2 // 3), options)
    names = ["__base__", "pirate", "robot"]
    asked = QUESTIONS[4:5]
    together = answers(model, tokenizer, asked * 3, adapter_names=names)
    show("question", asked[0])
    for who, text in zip(("base", "pirate", "robot"), together):
        show(who, text)

    print("\n7. Saving, and loading into a fresh model", flush=True)
    model.save_pretrained(options.output)
    folder = options.output / "pirate"
    size = sum(file.stat().st_size for file in folder.glob("adapter_*"))
    fresh = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(model.device)
    reloaded = PeftModel.from_pretrained(fresh, folder).eval()
    equal = answers(reloaded, tokenizer, QUESTIONS) == drunk
    print(f"   {folder}: {size:,} bytes; its answers are {'equal' if equal else 'DIFFERENT'}")

    wrong = verdict(sober, drunk, together[2], unchanged, equal, losses)
    print(
        f"\nDone in {time.perf_counter() - begin:.0f} seconds. " + ("NOT AS IT SHOULD BE:" if wrong else "Go on with:")
    )
    if wrong:
        print("\n".join(textwrap.fill(reason, 116, initial_indent=" - ", subsequent_indent="   ") for reason in wrong))
        return 1
    settings = f"{options.output} --repetition-penalty {REPETITION_PENALTY}"
    print(f"   {this_python()} -m peft_reft chat {settings}        # /strength 0.5, /adapter robot, /base")
    print(f"   {this_python()} -m peft_reft playground {settings}  # the same in a web page")
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        raise SystemExit("\nStopped.") from None
