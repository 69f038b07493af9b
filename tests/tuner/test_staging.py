"""Several files take their places as one set: an error takes back what was done, a kill is told and then finished."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from conftest import batch, logits, reft_model, tiny_model
from model_state import assert_as_before, state_of
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter
from test_files import contents, in_a_child, posix

from peft_reft import ReftConfig
from peft_reft.info.files import read_adapter
from peft_reft.tuner import staging
from peft_reft.tuner.staging import READY, staged

CONFIG = {"r": 2, "task_type": "CAUSAL_LM"}
OLD, NEW = {"positions": "f1+l1"}, {"positions": "f2+l2"}  # of weights that have the same names and shapes


@pytest.fixture
def saved(tmp_path):
    """Directories of an old and of a new adapter, and the logits that each gives."""
    found = {}
    for number, (name, settings) in enumerate((("old", OLD), ("new", NEW))):
        model = reft_model(tiny_model("llama"), seed=number + 1, **CONFIG, **settings)
        model.save_pretrained(tmp_path / name)
        found[name] = logits(model, batch(6, 4))
    assert not torch.allclose(found["old"], found["new"])
    return found


def loaded_logits(directory):
    return logits(PeftModel.from_pretrained(tiny_model("llama"), directory).eval(), batch(6, 4))


def put(src, dst):
    with staged(dst) as stage:
        shutil.copytree(src, stage, dirs_exist_ok=True)


def stop_at(nth, how, monkeypatch):
    """Let `how` happen in the place of the nth rename."""
    rename, calls = os.replace, []

    def replace(*args):
        calls.append(args)
        return how() if len(calls) == nth + 1 else rename(*args)

    monkeypatch.setattr("os.replace", replace)


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize("nth", range(3))
def test_an_interrupt_between_two_renames_takes_back_the_first(nth, saved, tmp_path, monkeypatch):
    before = contents(tmp_path / "old")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        stop_at(nth, interrupt, patched)
        put(tmp_path / "new", tmp_path / "old")
    assert contents(tmp_path / "old") == before
    assert len(list((tmp_path / "old").iterdir())) == len(before) == 3
    torch.testing.assert_close(loaded_logits(tmp_path / "old"), saved["old"])


@pytest.mark.parametrize("nth", range(3))
def test_a_first_save_that_is_interrupted_leaves_no_file(nth, saved, tmp_path, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        stop_at(nth, interrupt, patched)
        put(tmp_path / "new", tmp_path / "third")
    assert list((tmp_path / "third").iterdir()) == []


def test_what_is_taken_back_keeps_its_link(saved, tmp_path, monkeypatch):
    """Also where a file system has no second names for a file."""
    (tmp_path / "linked").mkdir()
    for file in (tmp_path / "old").iterdir():
        (tmp_path / "linked" / file.name).symlink_to(file)
    before = contents(tmp_path / "old")

    def refuse(*args):
        raise OSError("not supported")

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("os.link", refuse)
        stop_at(2, interrupt, patched)
        put(tmp_path / "new", tmp_path / "linked")
    assert contents(tmp_path / "old") == before == contents(tmp_path / "linked")
    assert all(file.is_symlink() for file in (tmp_path / "linked").iterdir())


@posix
@pytest.mark.parametrize("nth", range(3))
def test_a_kill_between_two_renames_is_told_and_finished_by_the_next_save(nth, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "PATIENCE", 0.05)

    def work():
        stop_at(nth, lambda: os._exit(9), monkeypatch)
        put(tmp_path / "new", tmp_path / "old")

    assert os.waitstatus_to_exitcode(os.waitpid(in_a_child(work), 0)[1]) == 9
    base = tiny_model("llama").requires_grad_(False)
    before, plain = state_of(base), logits(base, batch(6, 4))
    told = r"old' holds files of two saves: one was interrupted.*\.placing-.*Save the adapter again"
    for load in (
        lambda: PeftModel.from_pretrained(base, tmp_path / "old"),
        lambda: base.load_adapter(str(tmp_path / "old")),
        lambda: hotswap_adapter(base, str(tmp_path / "old"), "default"),
        lambda: read_adapter(tmp_path / "old"),
    ):
        with pytest.raises(ValueError, match=told):
            load()
        assert_as_before(base, before)
        assert torch.equal(logits(base, batch(6, 4)), plain)
    with staged(tmp_path / "old") as stage:  # a save of something else into the same directory
        (stage / "notes.txt").write_text("notes")
    assert contents(tmp_path / "old") == {**contents(tmp_path / "new"), "notes.txt": b"notes"}
    torch.testing.assert_close(loaded_logits(tmp_path / "old"), saved["new"])


def test_an_adapter_with_a_name_is_unfinished_where_its_own_files_are_missing(saved, tmp_path, monkeypatch):
    """It is saved from the directory above its own."""
    monkeypatch.setattr(staging, "PATIENCE", 0.05)
    model = reft_model(tiny_model("llama"), **CONFIG, **OLD)
    model.add_adapter("second", ReftConfig(**CONFIG, **NEW))
    model.save_pretrained(tmp_path / "both")
    ready = tmp_path / "both" / f"{READY}x" / "second"
    ready.mkdir(parents=True)
    shutil.copy(tmp_path / "new" / "adapter_config.json", ready)
    for directory, settings in ((tmp_path / "both" / "second", {}), (tmp_path / "both", {"subfolder": "second"})):
        with pytest.raises(ValueError, match=r"second' holds files of two saves"):
            PeftModel.from_pretrained(tiny_model("llama"), directory, **settings)
    assert PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "both").peft_config["default"].positions == "f1+l1"
    shutil.rmtree(ready.parent)
    assert PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "both" / "second")


@posix
def test_a_directory_of_a_stranger_that_looks_like_an_interrupted_save_changes_no_other_one(saved, tmp_path):
    """Whoever saves into it, as one does who trains a downloaded adapter further, loses and gets no file elsewhere."""
    home, evil = tmp_path / "home", tmp_path / "old"
    (home / "keys").mkdir(parents=True)
    for file in ("keys/mine", "profile"):
        (home / file).write_text("mine")
    before = contents(home)
    (evil / f"{READY}1").symlink_to(home / "keys")
    (evil / "profile").symlink_to(home / "profile")
    (evil / "keys").symlink_to(home / "keys")
    (evil / f"{READY}2" / "keys").mkdir(parents=True)
    for file in ("keys/mine", "keys/more", "profile"):
        (evil / f"{READY}2" / file).write_text("a stranger's")
    (evil / f"{READY}2" / "adapter_config.json").symlink_to(home / "profile")
    put(tmp_path / "new", evil)
    assert contents(home) == before and len(list((home / "keys").iterdir())) == 1
    assert (evil / "profile").read_text() == "a stranger's" and not (evil / "profile").is_symlink()
    assert not (evil / "adapter_config.json").is_symlink()
    assert (evil / "adapter_config.json").read_bytes() == (tmp_path / "new" / "adapter_config.json").read_bytes()


@posix
def test_a_reader_waits_for_a_writer_that_is_about_to_finish(saved, tmp_path):
    ready = tmp_path / "old" / f"{READY}x"
    shutil.copytree(tmp_path / "new", ready)

    def finish():
        staging.time.sleep(0.3)
        shutil.rmtree(ready)

    pid = in_a_child(finish)
    torch.testing.assert_close(loaded_logits(tmp_path / "old"), saved["old"])
    assert os.waitpid(pid, 0)[1] == 0
