"""SFTTrainer: the right columns of every packed document, or a word; and what its defaults do with `messages`."""

import pytest
import torch
from conftest import PAD, tiny_model
from datasets import Dataset
from edit_spy import EditSpy, warnings_of
from trainer_kit import QUIET, word_tokenizer
from trl import SFTConfig, SFTTrainer

import peft_reft
from peft_reft import ReftConfig

FIRST, LAST = 3, 90  # "w3" begins every prompt, "user" ends it, and neither is anywhere else


def documents(rows=8, answer=14):
    """Prompts of four tokens, and answers of that many or a little less."""
    words = [" ".join(f"w{10 + (row + number) % 70}" for number in range(answer - row % 3)) for row in range(rows)]
    return Dataset.from_list([{"prompt": "w3 w4 w5 user", "completion": f" {text}"} for text in words])


def watched(tmp_path, data, config=None, tokenizer=None, **settings):
    """A trainer whose model's edits and tokens are recorded: (trainer, spy, tokens of each forward)."""
    torch.manual_seed(0)
    config = config or ReftConfig(r=2, positions="f1+l1", init_weights=False, task_type="CAUSAL_LM")
    arguments = {**QUIET, "max_steps": 2, "per_device_train_batch_size": 2, "gradient_checkpointing": False, **settings}
    trainer = SFTTrainer(
        model=tiny_model("llama"),
        args=SFTConfig(str(tmp_path), **arguments),
        train_dataset=data,
        processing_class=tokenizer or word_tokenizer(),
        peft_config=config,
    )
    tokens: list[torch.Tensor] = []

    def record(module, args, kwargs):
        tokens.append(kwargs["input_ids"] if "input_ids" in kwargs else args[0])

    trainer.model.get_base_model().register_forward_pre_hook(record, with_kwargs=True)
    return trainer, EditSpy(trainer.model, tiny_model("llama")), tokens


def edits_and_wanted(spy, tokens, wanted=(FIRST, LAST)):
    """For each forward, the edited columns of its rows without padding, and those of the wanted tokens."""
    pairs = []
    for call, ids in zip(spy.calls, tokens):
        rows = ids.tolist()
        edited = [[column for column in columns if row[column] != PAD] for columns, row in zip(call, rows)]
        pairs.append((edited, [[column for column, token in enumerate(row) if token in wanted] for row in rows]))
    assert pairs
    return pairs


RIGHT = {
    "no packing": {"max_length": 64},
    "padding-free": {"padding_free": True, "max_length": None},
    "bfd": {"packing": True, "packing_strategy": "bfd", "max_length": 40},
    "bfd, answers cut off": {"packing": True, "packing_strategy": "bfd", "max_length": 10},
    "bfd, padding to a multiple": {
        "packing": True,
        "packing_strategy": "bfd",
        "max_length": 40,
        "pad_to_multiple_of": 16,
    },
}


@pytest.mark.parametrize("how", RIGHT)
def test_every_document_of_a_batch_has_its_own_prompt_edited(how, tmp_path):
    trainer, spy, tokens = watched(tmp_path, documents(), completion_only_loss=True, **RIGHT[how])
    told = warnings_of(trainer.train)
    for edited, wanted in edits_and_wanted(spy, tokens):
        assert edited == wanted
    assert told == []


TOLD = {
    "bfd_split": {"packing": True, "packing_strategy": "bfd_split", "max_length": 10},
    "bfd_split, long rows": {"packing": True, "packing_strategy": "bfd_split", "max_length": 24},
    "wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 10},
    "wrapped, long rows": {"packing": True, "packing_strategy": "wrapped", "max_length": 40},
}


@pytest.mark.parametrize("how", TOLD)
def test_documents_that_were_cut_are_edited_rightly_or_it_is_told_once(how, tmp_path):
    """A piece that begins inside an answer has no prompt; a row without position_ids does not tell its documents."""
    trainer, spy, tokens = watched(tmp_path, documents(), completion_only_loss=True, **TOLD[how])
    told = warnings_of(trainer.train)
    if all(edited == wanted for edited, wanted in edits_and_wanted(spy, tokens)):
        return
    assert len(told) == 1
    assert "pack" in told[0].lower()


def test_rows_that_are_cut_anywhere_are_told_of_where_no_label_shows_it(tmp_path):
    data = documents(rows=8, answer=4).map(lambda row: {"prompt": "w3 w4 w5 w6 w7 w8 w9 w4 w5 w6 w7 user"})
    trainer, spy, tokens = watched(tmp_path, data, packing=True, packing_strategy="wrapped", max_length=32)
    told = warnings_of(trainer.train)
    assert any(edited != wanted for edited, wanted in edits_and_wanted(spy, tokens))
    assert len(told) == 1
    assert "packing_strategy='wrapped' cuts the data into rows anywhere" in told[0]


# Chats as `messages`.


CHAT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}assistant {% generation %}{{ m['content'] }} <eos> "
    "{% endgeneration %}{% else %}user {{ m['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def chat_tokenizer():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


def chats(form, rows=8):
    data = []
    for row in range(rows):
        question = {"role": "user", "content": " ".join(f"w{5 + (row + n) % 30}" for n in range(2 + row % 4))}
        answer = {"role": "assistant", "content": f"w{40 + row} w{50 + row}"}
        data.append(
            {"messages": [question, answer]} if form == "messages" else {"prompt": [question], "completion": [answer]}
        )
    return Dataset.from_list(data)


def ends_of_prompts(tokens):
    """[0, column of the token "assistant"] of each row: the prompt's first and last token."""
    return [[[0, row.index(91)] for row in ids.tolist()] for ids in tokens]


def test_messages_with_trls_defaults_warn_once_with_the_ways_out(tmp_path):
    trainer, spy, tokens = watched(tmp_path, chats("messages"), tokenizer=chat_tokenizer(), max_length=64)
    told = warnings_of(trainer.train)
    assert spy.calls != ends_of_prompts(tokens)  # the loss covers the prompts, which are one token long
    assert len(told) == 1
    for way_out in (
        "prompt",
        "completion",
        "completion_only_loss",
        "assistant_only_loss",
        "prompt_end",
        "chat_prompt_end",
    ):
        assert way_out in told[0]


def test_a_second_run_is_told_again(tmp_path):
    for run in range(2):
        trainer, _, _ = watched(tmp_path / str(run), chats("messages"), tokenizer=chat_tokenizer(), max_length=64)
        assert len(warnings_of(trainer.train)) == 1


WAYS_OUT = {
    "prompt and completion": ("prompt and completion", {}),
    "completion_only_loss": ("prompt and completion", {"completion_only_loss": True}),
    "assistant_only_loss": ("messages", {"assistant_only_loss": True}),
}


@pytest.mark.parametrize("way", WAYS_OUT)
def test_each_way_out_trains_at_the_prompts_end_and_says_nothing(way, tmp_path):
    form, settings = WAYS_OUT[way]
    trainer, spy, tokens = watched(tmp_path, chats(form), tokenizer=chat_tokenizer(), max_length=64, **settings)
    assert warnings_of(trainer.train) == []
    assert spy.calls == ends_of_prompts(tokens)


def test_a_marker_from_the_chat_template_trains_at_the_prompts_end_and_says_nothing(tmp_path):
    tokenizer = chat_tokenizer()
    marker = peft_reft.chat_prompt_end(tokenizer)
    assert list(marker) == [91]
    config = ReftConfig(r=2, positions="f1+l1", init_weights=False, prompt_end=list(marker), task_type="CAUSAL_LM")
    trainer, spy, tokens = watched(tmp_path, chats("messages"), config, tokenizer, max_length=64)
    assert warnings_of(trainer.train) == []
    assert spy.calls == ends_of_prompts(tokens)
