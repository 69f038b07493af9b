"""What a user can get wrong on the tools' command lines ends as one line, before a model is loaded."""

import argparse
import importlib

import pytest
import torch
from conftest import reft_model, tiny_model
from test_tools import word_tokenizer

from peft_reft import __main__ as program
from peft_reft import command_line
from peft_reft.integrations import loading
from peft_reft.integrations.loading import load_adapters

RUNS_A_MODEL = {"chat": [], "playground": [], "inspect": ["--prompt", "w3"]}  # command -> what else it needs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model, an adapter, and adapters with something missing or broken."""
    folder = tmp_path_factory.mktemp("command-lines")
    tiny_model("llama").save_pretrained(folder / "base")
    word_tokenizer().save_pretrained(folder / "base")
    for name in ("sound", "lacking", "damaged"):
        model = reft_model(tiny_model("llama"), task_type="CAUSAL_LM", positions="f1+l2")
        model.peft_config["default"].base_model_name_or_path = str(folder / "base")
        model.save_pretrained(folder / name)
    (folder / "lacking" / "adapter_model.safetensors").unlink()
    (folder / "damaged" / "adapter_model.safetensors").write_bytes(b"no tensors")
    classifier = reft_model(tiny_model("bert", "classifier"), task_type="SEQ_CLS", positions="f1")
    classifier.save_pretrained(folder / "classifier")
    return folder


def outcome(command, argv, capsys):
    """The exit status and what is on stderr."""
    main = importlib.import_module(f"peft_reft.{command}").main
    try:
        status = main(argv)
    except SystemExit as end:
        status = end.code
    return status, capsys.readouterr().err


@pytest.mark.parametrize("command", RUNS_A_MODEL)
@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("sound", ["--dtype", "foo"], "invalid choice: 'foo' (choose from 'auto', 'float32', 'bfloat16', 'float16')"),
        ("sound", ["--device", "nonsense"], "'nonsense' is no device of this machine, which has cpu"),
        ("sound", ["--nonsense"], "--nonsense"),
        ("sound", ["--modle", "x"], "unrecognized arguments: --modle x. Did you mean --model? See"),
        ("nowhere", [], "nowhere' is no directory"),
        ("souned", [], "sound'?"),
        ("lacking", [], "no adapter_model.safetensors"),
        ("damaged", [], "the file is damaged"),
    ],
)
def test_a_mistake_is_one_line_before_a_model_is_loaded(command, name, more, message, folder, monkeypatch, capsys):
    if command == "playground":
        pytest.importorskip("gradio", reason="the playground asks for gradio before anything else")
    monkeypatch.setattr(loading.PeftModel, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    status, error = outcome(command, [str(folder / name), *RUNS_A_MODEL[command], *more], capsys)
    assert status == 2
    assert message in error and error.count("\n") == 1, error


@pytest.mark.parametrize(
    ("command", "argv", "message"),
    [
        ("chat", ["x", "--temperature", "-1"], "'-1' is not a number of at least 0"),
        ("chat", ["x", "--max-new-tokens", "0"], "'0' is not an integer of at least 1"),
        ("chat", ["x", "--repetition-penalty", "0"], "'0' is not a number above 0"),
        ("chat", ["x", "--seed", "-1"], "at most 4294967295"),
        ("chat", [], "required: DIR"),
        ("info", ["one", "two"], "two"),
        ("convert", ["one", "two", "--to", "foo"], "'peft', 'pyreft'"),
        ("inspect", ["x"], "--prompt"),
        ("inspect", ["x", "--prompt", "y", "--out", "nowhere/x.png"], "there is no folder 'nowhere'"),
        ("inspect", ["x", "--prompt", "y", "--csv", "nowhere/x.csv"], "there is no folder 'nowhere'"),
    ],
)
def test_every_command_says_it_in_one_line(command, argv, message, capsys):
    status, error = outcome(command, argv, capsys)
    assert status == 2
    assert message in error and error.count("\n") == 1, error


def test_a_chat_needs_a_language_model(folder, capsys):
    status, error = outcome("chat", [str(folder / "classifier")], capsys)
    assert status == 2 and "is an adapter for SEQ_CLS" in error


@pytest.mark.parametrize("text", ["nan", "inf", "2", "0", "x", ""])
def test_a_number_is_finite_and_within_its_bounds(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a number above 0 and at most 1"):
        command_line.number(float, 0, above=True, high=1)(text)
    assert command_line.number(float, 0, above=True, high=1)("1") == 1


def test_the_devices_of_a_machine_with_gpus_are_listed(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert command_line.device("cuda:1") == "cuda:1"
    with pytest.raises(argparse.ArgumentTypeError, match=r"has cpu, cuda, cuda:0, cuda:1$"):
        command_line.device("cuda:2")


def test_a_base_model_that_does_not_exist_is_named(folder):
    with pytest.raises(ValueError, match=r"The base model '\./none' cannot be loaded; --model names another"):
        load_adapters({"default": folder / "sound"}, "./none")


def test_search_is_known_to_be_a_function(capsys):
    assert program.main(["search"]) == 2
    assert "from peft_reft.search import search" in capsys.readouterr().err
