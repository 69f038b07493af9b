"""The trainer examples run to their end, and what they save gives the same when it is loaded again."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples" / "trainers"
EXAMPLES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "common")


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """One folder for all, so that the base model is made once."""
    return tmp_path_factory.mktemp("examples")


def test_there_is_an_example_for_each_trainer():
    assert EXAMPLES == ["classification", "dpo", "grpo", "kto", "reward", "rloo", "sft"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs_and_its_adapter_is_whole(name, output, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--output", str(output), "--steps", "3"])
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "common", raising=False)
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    shown = capsys.readouterr().out
    (after,) = re.findall(r"\d+% -> (\d+%)", shown)
    assert f"reloaded: {after}" in shown
    assert (output / f"{name}-adapter" / "adapter_model.safetensors").is_file()


def test_a_run_of_one_step_leaves_a_whole_base_model(output, monkeypatch, capsys):
    """Later runs take the base model that is there: two in three of the verdicts that it has read are right."""
    monkeypatch.setattr(sys, "argv", ["sft", "--output", str(output), "--steps", "1"])
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "common", raising=False)
    runpy.run_path(str(FOLDER / "sft.py"), run_name="__main__")
    (before,) = re.findall(r"(\d+)% -> ", capsys.readouterr().out)
    assert 60 <= int(before) <= 75


def test_an_example_takes_a_model_of_ones_own(output, tmp_path, monkeypatch, capsys):
    assert (output / "base").is_dir()
    monkeypatch.setattr(
        sys, "argv", ["sft", "--model", str(output / "base"), "--output", str(tmp_path), "--steps", "1"]
    )
    monkeypatch.syspath_prepend(str(FOLDER))
    runpy.run_path(str(FOLDER / "sft.py"), run_name="__main__")
    assert "reloaded" in capsys.readouterr().out
    assert not (tmp_path / "base").exists()
