"""Two processes train what one does: through `accelerate launch`, on CPUs with gloo, with the adapter whole afterwards.

Starting processes takes far longer than these models train, so all scenarios of a kind of parallelism run in one
launch (distributed_program.py), and the tests look at what it left behind.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import batch, logits, reft_model, tiny_model
from distributed_program import SCENARIOS, train
from peft import PeftModel
from safetensors.torch import load_file

TESTS = Path(__file__).parent
PROCESSES = ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
DDP = ["--multi_gpu"]  # without GPUs the processes find each other through gloo all the same
FSDP2 = ["--use_fsdp", "--fsdp_version", "2", "--fsdp_state_dict_type", "FULL_STATE_DICT"]
BY_BLOCK = ["--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
FSDP1 = ["--use_fsdp", "--fsdp_version", "1", "--fsdp_state_dict_type", "FULL_STATE_DICT", *BY_BLOCK]
FSDP1 += ["--fsdp_sync_module_states", "false", "--fsdp_cpu_ram_efficient_loading", "false"]  # they need a GPU
ZERO = ["--use_deepspeed", "--zero_stage"]
MORE = pytest.mark.skipif(
    "REFT_ALL_LAUNCHES" not in os.environ, reason="a launch takes 20 seconds: REFT_ALL_LAUNCHES=1 runs this one too"
)
SHARDED = ["plain", "checkpointing", "no edit on one rank", "own weights per position", "classifier"]


def start(options: list[str], program: Path, *arguments: str, seconds: int = 240) -> str:
    """Run a program in two processes; what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, *PROCESSES, "--main_process_port", "0"]
    done = subprocess.run(
        [*command, str(program), *arguments], env=environment, capture_output=True, text=True, timeout=seconds
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def launch(folder: Path, options: list[str], scenarios: list[str], seconds: int = 240) -> Path:
    """Run scenarios in two processes; the folder with their results."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    start(options, TESTS / "distributed_program.py", str(folder), *scenarios, seconds=seconds)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder with what one process makes of each scenario."""
    folder = tmp_path_factory.mktemp("alone")
    for name in SCENARIOS:
        train(name, folder)
    return folder


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("ddp"), DDP, list(SCENARIOS))


@pytest.fixture(scope="module")
def fsdp2(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("fsdp2"), [*FSDP2, *BY_BLOCK], SHARDED)


def assert_as_one_process(folder: Path, alone: Path, name: str, kind: str) -> None:
    """The saved adapter holds the weights that one process gets, and loads to the logits of the trained model."""
    result = torch.load(folder / f"{name}.pt")
    assert result["kind"] == kind and result["processes"] == 2
    got, expected = (load_file(path / name / "adapter_model.safetensors") for path in (folder, alone))
    assert got.keys() == expected.keys()
    for key, tensor in got.items():
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-6, msg=key)
    fresh = tiny_model("llama", SCENARIOS[name].get("head"))
    loaded = PeftModel.from_pretrained(fresh, folder / name).eval()
    inputs = batch(7, 4)
    torch.testing.assert_close(logits(loaded, inputs), result["logits"], rtol=1e-5, atol=1e-5)
    with loaded.disable_adapter():  # training must have changed something
        assert (logits(loaded, inputs) - result["logits"]).abs().max() > 1e-3


@pytest.mark.parametrize("name", SCENARIOS)
def test_ddp_equals_one_process(name, ddp, alone):
    assert_as_one_process(ddp, alone, name, "DistributedType.MULTI_CPU")


@pytest.mark.parametrize("name", SHARDED)
def test_fsdp2_equals_one_process(name, fsdp2, alone):
    assert_as_one_process(fsdp2, alone, name, "DistributedType.FSDP")


def test_other_rows_on_the_second_process_would_be_noticed(alone, tmp_path):
    train("no edit on one rank", tmp_path, per_device_train_batch_size=4)
    got, expected = (
        load_file(path / "no edit on one rank" / "adapter_model.safetensors") for path in (tmp_path, alone)
    )
    assert max(float((got[key] - expected[key]).abs().max()) for key in got) > 1e-4


class Wrapped(torch.nn.Module):
    """A block as FSDP1 wraps it: one level further in by its name, and in state dicts where it was."""

    def __init__(self, block):
        super().__init__()
        self._fsdp_wrapped_module = block


def test_a_state_dict_gathered_from_wrapped_blocks_is_saved_whole(tmp_path):
    model = reft_model(tiny_model("llama"), task_type="CAUSAL_LM")
    inputs = batch(7, 4)
    expected, state_dict = logits(model, inputs), model.state_dict()
    blocks = model.get_base_model().model.layers
    for number, block in enumerate(blocks):
        blocks[number] = Wrapped(block)
    model.save_pretrained(tmp_path, state_dict=state_dict)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path).eval()
    assert torch.equal(logits(loaded, inputs), expected)


@MORE
@pytest.mark.parametrize("use_orig_params", ["true", "false"])
def test_fsdp1_equals_one_process(use_orig_params, alone, tmp_path):
    folder = launch(tmp_path / "fsdp1", [*FSDP1, "--fsdp_use_orig_params", use_orig_params], SHARDED)
    for name in SHARDED:
        assert_as_one_process(folder, alone, name, "DistributedType.FSDP")


@MORE
def test_layers_that_share_weights_train_under_fsdp2_without_wrapping_each_block(alone, tmp_path):
    folder = launch(tmp_path / "whole", [*FSDP2, "--fsdp_auto_wrap_policy", "NO_WRAP"], ["shared layers"])
    assert_as_one_process(folder, alone, "shared layers", "DistributedType.FSDP")


@MORE
@pytest.mark.parametrize("stage", ["2", "3"])
def test_deepspeed_equals_one_process(stage, alone, tmp_path, monkeypatch):
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    tiny_model("llama").save_pretrained(tmp_path / "base")
    monkeypatch.setenv("REFT_BASE", str(tmp_path / "base"))
    folder = launch(tmp_path / "zero", [*ZERO, stage], ["plain"], seconds=600)  # it compiles a part of itself first
    assert_as_one_process(folder, alone, "plain", "DistributedType.DEEPSPEED")


@MORE
def test_an_example_runs_in_two_processes(tmp_path):
    example = TESTS.parent / "examples" / "trainers" / "sft.py"
    shown = start(DDP, example, "--steps", "5", "--output", str(tmp_path / "new" / "folder"))
    assert shown.count("reloaded: ") == 2
    adapter = load_file(tmp_path / "new" / "folder" / "sft-adapter" / "adapter_model.safetensors")
    assert len({key.split(".layers.")[1].split(".")[0] for key in adapter}) == 3
