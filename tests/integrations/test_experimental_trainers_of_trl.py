"""TRL's experimental trainers hide the prompt: that is told, and a marker in the config makes it right."""

import pytest
import torch
from conftest import PAD, tiny_model
from datasets import Dataset
from edit_spy import EditSpy, warnings_of
from trainer_kit import QUIET, word_tokenizer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from peft_reft import ReftConfig

FIRST, LAST = 3, 90  # "w3" begins every prompt, "user" ends it, and neither is anywhere else
SETTINGS = {**QUIET, "max_steps": 1, "per_device_train_batch_size": 2, "gradient_checkpointing": False}
NUMBERS = range(8)
PAIRS = Dataset.from_list(
    [{"prompt": "w3 w4 user", "chosen": f" w{10 + n} w{11 + n}", "rejected": f" w{20 + n}"} for n in NUMBERS]
)


def orpo(model, tokenizer, folder, config):
    arguments = ORPOConfig(folder, max_length=32, **SETTINGS)
    return ORPOTrainer(model, args=arguments, train_dataset=PAIRS, processing_class=tokenizer, peft_config=config)


def cpo(model, tokenizer, folder, config):
    arguments = CPOConfig(folder, max_length=32, **SETTINGS)
    return CPOTrainer(model, args=arguments, train_dataset=PAIRS, processing_class=tokenizer, peft_config=config)


def gkd(model, tokenizer, folder, config):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{{ ' user ' if m.role == 'user' else '' }}{% endfor %}"
    )
    chats = [
        {"messages": [{"role": "user", "content": "w3 w4"}, {"role": "assistant", "content": f"w{10 + n} w{11 + n}"}]}
        for n in NUMBERS
    ]
    arguments = GKDConfig(folder, lmbda=0.0, max_new_tokens=4, max_length=32, **SETTINGS)
    return GKDTrainer(
        model, teacher_model=tiny_model("llama"), args=arguments, train_dataset=Dataset.from_list(chats),
        processing_class=tokenizer, peft_config=config,
    )  # fmt: skip


def online_dpo(model, tokenizer, folder, config):
    prompts = PAIRS.select_columns("prompt")
    arguments = OnlineDPOConfig(folder, max_new_tokens=4, **SETTINGS)
    return OnlineDPOTrainer(
        model, reward_funcs=lambda completions, **_: [float(len(text)) for text in completions], args=arguments,
        train_dataset=prompts, processing_class=tokenizer, peft_config=config,
    )  # fmt: skip


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("make", [orpo, cpo, gkd, online_dpo], ids=lambda make: make.__name__)
def test_the_prompts_ends_are_told_or_edited_by_the_marker(make, marked, tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    config = ReftConfig(
        r=2, positions="f1+l1", init_weights=False, task_type="CAUSAL_LM", prompt_end=[LAST] if marked else None
    )
    trainer = make(tiny_model("llama"), word_tokenizer(), str(tmp_path), config)
    spy, tokens = EditSpy(trainer.model, tiny_model("llama")), []

    def record(module, args, kwargs):
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        tokens.append(ids.tolist() if torch.is_grad_enabled() else None)

    trainer.model.get_base_model().register_forward_pre_hook(record, with_kwargs=True)
    told = [message for message in warnings_of(trainer.train) if "prompt_end" in message]
    trained = [(call, rows) for call, rows in zip(spy.calls, tokens) if rows is not None]
    assert trained
    found = [[[c for c in columns if row[c] != PAD] for columns, row in zip(call, rows)] for call, rows in trained]
    wanted = [[[c for c, token in enumerate(row) if token in (FIRST, LAST)] for row in rows] for _, rows in trained]
    assert all(len(columns) == 2 for rows in wanted for columns in rows)
    assert (found == wanted) is marked
    assert len(told) == (0 if marked else 1)
