"""The example of subspaces runs to its end, on a model of two blocks, and prints a line for each adapter."""

import sys
from pathlib import Path

import datasets
import pytest
import transformers
from smollm2_stand_in import save_stand_in

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import quickstart
import subspaces


@pytest.fixture
def loud_again():
    """What the example switches off in its process."""
    verbosity = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()
    datasets.enable_progress_bars()


def test_it_runs_to_its_end(tmp_path, monkeypatch, capsys, loud_again):
    save_stand_in(tmp_path / "tiny", [quickstart.PIRATE, quickstart.ROBOT, subspaces.POLITE], blocks=2)
    monkeypatch.chdir(tmp_path)
    for name, value in {"QUESTIONS": quickstart.QUESTIONS[:2], "LONGEST": 4, "HELD_OUT": 1}.items():
        monkeypatch.setattr(subspaces, name, value)
    monkeypatch.setattr(sys, "argv", ["subspaces.py", "--model", "tiny", "--steps", "2", "--output", "out"])
    assert subspaces.main() == 0
    output = capsys.readouterr().out
    assert "the first two are what they were: yes, bit for bit" in output
    head, *lines = [line for line in output.splitlines() if len(line) > 80]
    assert head.split()[3:11] == ["pirate", "robot", "polite", "sound", "loss", "pirate", "loss", "robot"]
    assert len(lines) == 16
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
