"""`python -m peft_reft export`: what it writes, what it says, and what it refuses."""

import json
from types import SimpleNamespace

import pytest
from conftest import reft_model, tiny_model
from test_tools import word_tokenizer

from peft_reft.export import BackboneDescription, command, load_adapter_tensors, programs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model of one block, and an adapter."""
    folder = tmp_path_factory.mktemp("export")
    base = tiny_model("llama", num_hidden_layers=1)
    base.generation_config.repetition_penalty = 5.0  # is no part of a graph, and so none of the comparison
    base.save_pretrained(folder / "base")
    word_tokenizer().save_pretrained(folder / "base")
    base.name_or_path = str(folder / "base")
    reft_model(base, task_type="CAUSAL_LM", positions="f1+l2", r=3).save_pretrained(folder / "loud")
    return folder


@pytest.mark.filterwarnings("ignore")
def test_a_backbone_is_written_and_compared(folder, tmp_path, capsys):
    argv = [str(folder / "base"), str(tmp_path / "out"), "--format", "pt2", "--no-cache", "--max-columns", "7"]
    assert command.main(argv) == 0
    said = capsys.readouterr().out
    # Behind a prompt of four; the last token of the answer is not run.
    assert said.count("4 of 4 tokens equal") == 2 and "does not change the answer" not in said
    assert "backbone.pt2: " in said and " bytes" in said
    found = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"backbone.pt2", "backbone.json", "tokenizer.json", "chat_template.jinja"} <= found
    description = BackboneDescription.load(tmp_path / "out")
    assert (description.base_model, description.blocks) == ("base", ["model.layers.0"])
    for file in ("backbone.json", "tokenizer_config.json"):
        assert str(folder) not in (tmp_path / "out" / file).read_text()


@pytest.mark.filterwarnings("ignore")
def test_a_file_that_answers_otherwise_ends_with_status_1(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "export_backbone", lambda *_, **__: SimpleNamespace(file="backbone.pt2"))
    monkeypatch.setattr(command, "check_backbone", lambda *_: (["3 of 4 tokens equal"], False))
    argv = [str(folder / "base"), str(tmp_path / "out"), "--format", "pt2", "--no-cache"]
    assert command.main(argv) == 1
    assert "does not answer as the model does" in capsys.readouterr().out


def test_an_adapter_becomes_one_small_file(folder, tmp_path, capsys):
    assert command.main(["--adapter", str(folder / "loud"), str(tmp_path)]) == 0
    file = tmp_path / "loud.safetensors"
    assert f"{file}: {file.stat().st_size:,} bytes" in capsys.readouterr().out
    found = load_adapter_tensors(file)
    assert (found.positions, found.base_model, found.up.shape) == ("f1+l2", "base", (1, 1, 3, 32))
    named = tmp_path / "other.safetensors"
    argv = ["--adapter", str(folder / "loud"), str(named), "--base-model", "a/b", "--dtype", "float32"]
    assert command.main(argv) == 0
    assert load_adapter_tensors(named).base_model == "b" and named.stat().st_size > file.stat().st_size


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["--adapter", "{folder}/base", "{out}"], "no saved adapter"),
        (["--adapter", "{folder}/loud", "{out}", "--dtype", "int8"], "stay in floating point"),
        (["{folder}/nowhere", "{out}"], "nowhere"),
        (["{folder}/base", "{out}", "--format", "pt2", "--dtype", "int8"], "--dtype int8 is none for --format pt2"),
        (["{folder}/base", "{out}", "--format", "pt2", "--bake", "{folder}/base"], "adapter_config.json"),
        (["{folder}/loud", "{out}", "--format", "pt2"], "is a saved adapter, and BASE is a base model"),
        (["{folder}/base", "{folder}/base/config.json", "--format", "pt2"], "config.json' takes no files"),
        (["--adapter", "{folder}/loud", "{folder}/base/config.json"], "config.json' takes no files"),
    ],
)
def test_mistakes_get_one_line(argv, why, folder, tmp_path, capsys):
    filled = [text.format(folder=folder, out=tmp_path / "out") for text in argv]
    assert command.main(filled) == 2
    error = capsys.readouterr().err
    assert why in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_packages_that_are_missing_are_named_before_the_model_is_loaded(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(programs, "find_spec", lambda name: None if name == "onnxscript" else name)
    monkeypatch.setattr(command.AutoModelForCausalLM, "from_pretrained", None)
    assert command.main([str(folder / "base"), str(tmp_path / "out")]) == 2
    assert "pip install peft-reft[export]. 'onnxscript' is not installed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--no-cache"], "--no-cache is for backbones"),
        (["--max-rank", "4"], "--max-rank is for backbones"),
        (["--max-rank", "0"], "--max-rank: '0' is not an integer of at least 1"),
        (["--tokens", "-1"], "--tokens: '-1' is not an integer of at least 1"),
        (["--formt", "pt2"], "Did you mean --format?"),
    ],
)
def test_options_that_say_nothing_are_refused(options, why, folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main(["--adapter", str(folder / "loud"), str(tmp_path / "out"), *options])
    error = capsys.readouterr().err
    assert why in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_both_paths_are_needed(capsys):
    with pytest.raises(SystemExit):
        command.main(["base"])
    assert "give BASE and OUT" in capsys.readouterr().err


def test_a_folder_of_edits_says_what_the_files_are(folder, tmp_path):
    config = json.loads((folder / "loud" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"].startswith(str(folder))  # which the small file does not tell
    command.main(["--adapter", str(folder / "loud"), str(tmp_path)])
    assert str(folder).encode() not in (tmp_path / "loud.safetensors").read_bytes()
