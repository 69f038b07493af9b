"""The examples run as a user runs them: in a process of their own, in a folder of their own, without a network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def run_example(name: str, *arguments: str, folder: Path) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The quickstart's folder and output after a run with a few steps."""
    folder = tmp_path_factory.mktemp("quickstart")
    return folder, run_example("quickstart.py", "--smoke", folder=folder)


def test_quickstart_saves_a_base_model_and_an_adapter(smoke):
    folder, _ = smoke
    output = folder / "quickstart-output"
    assert (output / "base" / "model.safetensors").is_file()
    assert {file.name for file in (output / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_quickstart_prints_what_it_promises(smoke):
    _, output = smoke
    assert "trainable parameters: 4,112 of 1," in output  # 4 blocks x (2 x 4 x 128 + 4)
    assert "LoRA of rank 8 has 16,384" in output  # 4 blocks x 2 projections x 2 x 8 x 128
    before, after = output.split("loss: ")[1].split("\n")[0].split(" -> ")
    assert float(after) < float(before)
    assert "before: " in output and "after: " in output
    assert "of the reloaded model are equal" in output


def test_quickstart_takes_a_model_without_and_with_a_chat_template(smoke, tmp_path):
    folder, _ = smoke
    base = folder / "quickstart-output" / "base"
    output = run_example("quickstart.py", "--smoke", "--model", str(base), "--output", "plain", folder=tmp_path)
    assert "of the reloaded model are equal" in output
    assert not (tmp_path / "plain" / "base").exists()
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(base)
    output = run_example("quickstart.py", "--smoke", "--model", str(base), "--output", "chat", folder=tmp_path)
    assert "of the reloaded model are equal" in output


def test_custom_intervention_example_runs(tmp_path):
    assert "loaded into a fresh model, and equal" in run_example("custom_intervention.py", folder=tmp_path)
