"""`python -m peft_reft inspect`: chat templates, and machines where something is not installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from conftest import BLOCKS, reft_model, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from peft_reft.inspect import command, inspect_adapter, main

WORDS = ["[PAD]", "<eos>", "<unk>", "<user>", "<answer>", "one", "two", "three", "four", "five", "six"]
TEMPLATE = (
    "{% for m in messages %}<user> {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
)


@pytest.fixture
def tokenizer():
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "[PAD]", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE, **special)


@pytest.fixture
def argv(tmp_path, tokenizer):
    """The command line for a saved chat model with an adapter, up to its options."""
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    reft_model(tiny_model("llama"), positions="f1+l1", task_type="CAUSAL_LM").save_pretrained(tmp_path / "adapter")
    adapter, base = str(tmp_path / "adapter"), str(tmp_path / "base")
    return [adapter, "--model", base, "--device", "cpu", "--prompt", "one two", "--csv", str(tmp_path / "table.csv")]


def tokens_in(path: Path) -> list[str]:
    """The tokens of the first block in a table of edits."""
    header, *rows = [line.split(",") for line in path.read_text(encoding="utf-8").splitlines()]
    return [row[header.index("token")] for row in rows if row[header.index("depth")] == "0"]


def test_a_prompt_is_encoded_by_the_chat_template_unless_it_is_raw(argv, tmp_path):
    assert main(argv) == 0
    assert tokens_in(tmp_path / "table.csv") == ["<user>", "one", "two", "<answer>"]
    assert main([*argv, "--raw"]) == 0
    assert tokens_in(tmp_path / "table.csv") == ["one", "two"]
    assert main([*argv, "--answer", "five six"]) == 0
    assert tokens_in(tmp_path / "table.csv") == ["<user>", "one", "two", "<answer>", "five", "six"]


def test_conversations_are_prompts_too(tokenizer):
    model = reft_model(tiny_model("llama"), positions="f1+l1", task_type="CAUSAL_LM")
    chat = [{"role": "user", "content": "one two"}]
    for prompts, count in ((chat, 1), ([chat, chat], 2), ([chat, "five"], 2)):
        found = inspect_adapter(model, prompts, tokenizer, effects=False)
        assert {row["prompt"] for row in found.edits} == set(range(count))
        first = [row["token"] for row in found.edits if row["prompt"] == 0 and row["depth"] == 0]
        assert first == ["<user>", "one", "two", "<answer>"]
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="chat template"):
        inspect_adapter(model, chat, tokenizer)


def test_what_is_missing_is_said_before_loading_and_tables_are_written_all_the_same(
    argv, tmp_path, monkeypatch, capsys
):
    find, load, said = importlib.util.find_spec, command.load_adapters, []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    monkeypatch.setattr(command, "load_adapters", lambda *given: said.append(capsys.readouterr().err) or load(*given))
    assert main([*argv, "--out", str(tmp_path / "plot.png")]) == 1
    assert "matplotlib" in said[0] and ".[inspect]" in said[0]
    assert not (tmp_path / "plot.png").exists()
    assert tokens_in(tmp_path / "table.csv") == ["<user>", "one", "two", "<answer>"]
    assert capsys.readouterr().out.count("model.layers.") == BLOCKS
    assert main(argv) == 0, "without a picture nothing is missing"
    assert said[1] == ""


def test_a_name_that_is_no_picture_s_is_refused_before_loading(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "load_adapters", lambda *given: pytest.fail("loaded"))
    assert main([*argv, "--out", str(tmp_path / "plot.jpeg2")]) == 2
    assert ".png" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--answer", "one", "--answer", "two"], "There are 2 answers for 1 prompts"),
        (["--prompt", "\udce9"], r"'\udce9' holds bytes that are no text in UTF-8"),
        (["--csv", "{folder}"], "is a folder; give the name of a file in it"),
        (["--csv", ""], "--csv '' is a folder"),
        (["--out", "{folder}/a.svg", "--csv", "{folder}/a.svg"], "would replace a table of --csv"),
        (["--out", "{folder}/a-effects.svg", "--csv", "{folder}/a.svg"], "would replace a table of --csv"),
    ],
    ids=str,
)
def test_mistakes_are_told_before_loading(more, said, argv, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "load_adapters", lambda *given: pytest.fail("loaded"))
    assert main([*argv, *(text.format(folder=tmp_path) for text in more)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_values_of_a_trace_and_prompts_that_are_too_long_are_refused_in_words(argv, tmp_path, tokenizer, capsys):
    with pytest.raises(SystemExit):
        main([*argv, "--value", "restored"])
    assert "invalid choice: 'restored'" in capsys.readouterr().err
    model = reft_model(tiny_model("gpt2"), positions="f1+l1", task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="value='restored' cannot be drawn; use one of relative, "):
        inspect_adapter(model, "one two", tokenizer, effects=False).plot(value="restored")
    model.save_pretrained(tmp_path / "adapter")
    tiny_model("gpt2").save_pretrained(tmp_path / "base")
    most = model.config.max_position_embeddings
    assert main([*argv, "--prompt", "one " * most]) == 2
    assert f"The model takes at most {most:,} tokens (max_position_embeddings" in capsys.readouterr().err
