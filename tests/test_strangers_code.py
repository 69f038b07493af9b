"""A stranger's adapter folder brings a tokenizer with code of its own: no command of the package runs it."""

import json

import pytest
from conftest import reft_model, tiny_model
from peft import PeftModel
from test_tools import word_tokenizer
from transformers import AutoTokenizer

from peft_reft.chat.command import main as chat
from peft_reft.export import adapter_tensors
from peft_reft.inspect import main as inspect
from peft_reft.playground.command import main as playground

CODE = """\
from pathlib import Path
from transformers import PreTrainedTokenizerFast

(Path(__file__).parent / "ran").touch()
Path({mark!r}).touch()


class Own(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """The base model, a folder whose tokenizer has code, and the file that tells that the code ran; all say yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "yes")  # what a pipe may say to transformers' question
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    base, folder, mark = tmp_path / "base", tmp_path / "adapter", tmp_path / "code-ran"
    tiny_model("llama").save_pretrained(base)
    word_tokenizer().save_pretrained(base)
    model = reft_model(tiny_model("llama"), task_type="CAUSAL_LM", positions="f1+l2")
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    config.write_text(
        json.dumps({**settings, "tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}})
    )
    (folder / "own.py").write_text(CODE.format(mark=str(mark)))
    return base, folder, mark


def test_transformers_alone_would_run_it(stranger):
    _, folder, mark = stranger
    AutoTokenizer.from_pretrained(folder)
    assert mark.exists()


@pytest.mark.parametrize("command", [chat, inspect, playground], ids=["chat", "inspect", "playground"])
def test_no_command_runs_it(command, stranger, capsys):
    _, folder, mark = stranger
    if command is playground:
        pytest.importorskip("gradio", reason="the playground asks for gradio before it loads anything")
    more = ["--prompt", "w3 w4"] if command is inspect else []
    assert command([str(folder), *more]) == 2
    assert "code" in capsys.readouterr().err
    assert not mark.exists()


def test_a_marker_as_text_is_not_encoded_by_it(stranger):
    _, folder, mark = stranger
    config = folder / "adapter_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "prompt_end": "w5", "base_model_name_or_path": str(folder)}))
    with pytest.raises(ValueError, match="prompt_end='w5' needs the tokenizer"):
        PeftModel.from_pretrained(tiny_model("llama"), folder)
    assert not mark.exists()


def test_the_blocks_of_a_base_model_are_not_counted_by_its_own_code(stranger, tmp_path):
    """A config of a class that transformers knows, with a language model that it does not."""
    _, folder, mark = stranger
    evil = tmp_path / "evil"
    evil.mkdir()
    (evil / "own.py").write_text(CODE.format(mark=str(mark)))
    known = {"model_type": "vit", "auto_map": {"AutoModelForCausalLM": "own.Own"}}
    (evil / "config.json").write_text(json.dumps(known))
    config = folder / "adapter_config.json"
    settings = {"layers_to_transform": [0], "base_model_name_or_path": str(evil)}
    config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))
    with pytest.raises(ValueError, match=r"whose config cannot be read here.*contains custom code.*Pass blocks="):
        adapter_tensors(folder)
    assert not mark.exists()
