"""`overwrite=True` replaces an adapter's own files, and nothing else that lies in the directory."""

from __future__ import annotations

import importlib
import itertools
import json
import os
from pathlib import Path

import pytest
from conftest import tiny_model
from peft import LoraConfig, get_peft_model

from peft_reft.convert import ConversionError, from_adapterhub, from_pyreft, to_pyreft

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
SHARED, DEFAULT = (CHECKPOINTS / "adapterhub" / name for name in ("loreft-shared", "loreft-default"))
OURS = {"README.md", "adapter_config.json", "adapter_model.safetensors"}


def positions(directory):
    return json.loads((directory / "adapter_config.json").read_text())["positions"]


def contents(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_empty_directory_stays_the_same_one(overwrite, tmp_path, monkeypatch):
    """It may be where somebody works, who would be left in a directory that is gone."""
    monkeypatch.chdir(tmp_path)
    from_adapterhub(SHARED, ".", overwrite=overwrite)
    assert set(os.listdir(".")) == OURS
    with pytest.raises(ConversionError, match="exists"):
        from_adapterhub(SHARED, ".")


def test_a_user_s_other_files_stay(tmp_path):
    from_adapterhub(SHARED, tmp_path / "a")
    mine = {"thesis.txt": "years", "checkpoint-5/optimizer.pt": "a", "tokenizer.json": "{}", "training_args.bin": "x"}
    for name, text in mine.items():
        (tmp_path / "a" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "a" / name).write_text(text)
    (tmp_path / "a" / "adapter_model.bin").write_text("an older file of the same adapter")
    from_adapterhub(DEFAULT, tmp_path / "a", overwrite=True)
    assert positions(tmp_path / "a") == "f3"
    assert set(contents(tmp_path / "a")) == {*mine, *OURS}, "the older weights are gone, nothing temporary is left"
    assert all((tmp_path / "a" / name).read_text() == text for name, text in mine.items())


def test_a_card_that_the_user_wrote_stays_and_ours_is_written_anew(tmp_path):
    from_adapterhub(SHARED, tmp_path / "a")
    from_adapterhub(DEFAULT, tmp_path / "a", overwrite=True)
    card = (tmp_path / "a" / "README.md").read_text()
    assert card.count("## Converted from AdapterHub") == 1 and "`f3`" in card and "`f2+l2`" not in card
    (tmp_path / "a" / "README.md").write_text("# Mine\n\nWords.\n")
    from_adapterhub(SHARED, tmp_path / "a", overwrite=True)
    card = (tmp_path / "a" / "README.md").read_text()
    assert card.startswith("# Mine\n\nWords.\n") and "`f2+l2`" in card and "Converted from" not in card


def test_another_method_s_adapter_is_not_replaced(tmp_path):
    get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    before = contents(tmp_path / "lora")
    with pytest.raises(ConversionError, match=r"holds no adapter of ReFT's, and is not replaced"):
        from_adapterhub(SHARED, tmp_path / "lora", overwrite=True)
    assert contents(tmp_path / "lora") == before and before


def test_a_model_s_own_files_are_not_replaced(tmp_path):
    """An adapter that was saved beside its base model, whose files are named as pyreft's are."""
    from_adapterhub(SHARED, tmp_path / "a")
    from_adapterhub(DEFAULT, tmp_path / "b")
    (tmp_path / "a" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "a" / "pytorch_model.bin").write_text("weights")
    before = contents(tmp_path / "a")
    with pytest.raises(ConversionError, match=r"config\.json belongs to something else, and is not replaced"):
        to_pyreft(tmp_path / "b", tmp_path / "a", overwrite=True)
    assert contents(tmp_path / "a") == before
    from_adapterhub(DEFAULT, tmp_path / "a", overwrite=True)
    assert positions(tmp_path / "a") == "f3" and (tmp_path / "a" / "pytorch_model.bin").read_text() == "weights"


def test_a_checkpoint_in_pyreft_s_form_is_replaced_with_all_its_files(tmp_path):
    base = CHECKPOINTS / "base" / "roberta"
    from_pyreft(CHECKPOINTS / "pyreft" / "loreft-roberta", tmp_path / "large", positions="f2+l2", model=base)
    from_adapterhub(DEFAULT, tmp_path / "small")
    to_pyreft(tmp_path / "large", tmp_path / "dst")
    assert (tmp_path / "dst" / "pytorch_model.bin").exists()
    (tmp_path / "dst" / "intkey_of_mine.bin").write_text("not in the config")
    to_pyreft(tmp_path / "small", tmp_path / "dst", overwrite=True)
    to_pyreft(tmp_path / "small", tmp_path / "wanted")
    assert set(contents(tmp_path / "dst")) == {*contents(tmp_path / "wanted"), "intkey_of_mine.bin"}


def test_a_config_that_cannot_be_read_is_not_replaced(tmp_path):
    from_adapterhub(SHARED, tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text("{")
    with pytest.raises(ConversionError, match=r"is not replaced: .*cannot be read as JSON.*remove that file"):
        from_adapterhub(DEFAULT, tmp_path / "a", overwrite=True)
    assert (tmp_path / "a" / "adapter_config.json").read_text() == "{"


def broken(monkeypatch, name, nth):
    """The nth call of a function, and of no other, finds the disk full."""
    module, _, attribute = name.rpartition(".")
    whole, calls = getattr(importlib.import_module(module), attribute), itertools.count()

    def call(*args, **kwargs):
        if next(calls) == nth:
            raise OSError("the disk is full")
        return whole(*args, **kwargs)

    monkeypatch.setattr(name, call)
    return calls


def renames_of_a_conversion(src, tmp_path, monkeypatch):
    from_adapterhub(SHARED, tmp_path)
    with monkeypatch.context() as patched:
        calls = broken(patched, "os.replace", -1)
        from_adapterhub(src, tmp_path, overwrite=True)
    return next(calls)


@pytest.mark.parametrize("nth", [0, 2, 3, 4])  # the other is of the section in README.md, which may be missing
def test_a_write_that_fails_replaces_nothing(nth, tmp_path, monkeypatch):
    """Whichever file it is that cannot take its place, those before it get back what they were."""
    assert renames_of_a_conversion(DEFAULT, tmp_path / "count", monkeypatch) == 5
    from_adapterhub(SHARED, tmp_path / "a")
    before = contents(tmp_path / "a")
    with monkeypatch.context() as patched, pytest.raises(OSError, match="full"):
        broken(patched, "os.replace", nth)
        from_adapterhub(DEFAULT, tmp_path / "a", overwrite=True)
    assert contents(tmp_path / "a") == before
    assert set(os.listdir(tmp_path / "a")) == OURS, "nothing temporary is left"
    from_adapterhub(DEFAULT, tmp_path / "a", overwrite=True)
    assert positions(tmp_path / "a") == "f3"


def test_weights_that_cannot_be_written_replace_nothing(tmp_path, monkeypatch):
    from_adapterhub(SHARED, tmp_path / "a")
    before = contents(tmp_path / "a")
    with monkeypatch.context() as patched, pytest.raises(OSError, match="full"):
        broken(patched, "peft_reft.convert.writing.save_file", 0)
        from_adapterhub(DEFAULT, tmp_path / "a", overwrite=True)
    assert contents(tmp_path / "a") == before
    assert set(os.listdir(tmp_path / "a")) == OURS, "nothing temporary is left"
