"""What is read of a saved adapter for vLLM, what is refused with which words, and patching with other versions."""

import ast
import json
import pathlib
import shutil
import sys
import types

import pytest
import torch
from conftest import HIDDEN, reft_model, tiny_model
from safetensors.torch import load_file, save_file

from peft_reft import get_interventions
from peft_reft.integrations.vllm import adapter_of, patches
from peft_reft.integrations.vllm.adapters import read_factors, served_adapter
from peft_reft.interventions import low_rank_edit

NAMES = [f"model.layers.{number}" for number in range(3)]


def saved(directory, **settings):
    model = reft_model(tiny_model("llama"), **settings)
    model.save_pretrained(directory)
    return model


def edit_config(directory, **changes):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "settings",
    [
        {"intervention": "loreft"},
        {"intervention": "loreft", "subspaces": {"one": 1, "other": 1}},  # all of them act
        {"intervention": "direft", "act_fn": "relu", "positions": "f1+l2+d", "share_weights": False},
        {"intervention": "noreft", "act_fn": "tanh", "layers_to_transform": [0, -1]},
        {"intervention": "consreft", "positions": "f2", "share_weights": "position"},
        {"intervention": "lobireft", "share_layers": True, "layers_to_transform": [1, 2]},
        {"intervention": "odireft", "rank_pattern": {"layers.1": 3}},
    ],
)
def test_factors_are_those_of_the_adapters_interventions(tmp_path, settings):
    model = saved(tmp_path, r=2, **settings)
    served = served_adapter(tmp_path)
    adapter = read_factors(served, NAMES, HIDDEN)
    truth = get_interventions(model)
    assert {NAMES[number] for number in adapter.blocks} == set(truth)
    h = torch.randn(5, HIDDEN)
    for number, groups in adapter.blocks.items():
        for factors, module in zip(groups, truth[NAMES[number]], strict=True):
            edited = h + low_rank_edit(h, factors)
            torch.testing.assert_close(edited, module(h).detach(), atol=1e-5, rtol=1e-5)
            assert not torch.allclose(edited, h)
    assert adapter.groups == len(next(iter(truth.values())))
    assert adapter.rank == max(module.basis.shape[0] for modules in truth.values() for module in modules)


def test_blocks_are_found_by_names_with_and_without_the_head(tmp_path):
    saved(tmp_path, layers_to_transform=2)
    served = served_adapter(tmp_path)
    assert list(read_factors(served, NAMES, HIDDEN).blocks) == [2]
    assert list(read_factors(served, [f"language_model.{name}" for name in NAMES], HIDDEN).blocks) == [2]
    assert list(read_factors(served, [name.removeprefix("model.") for name in NAMES], HIDDEN).blocks) == [2]
    renamed = [name.replace("model", "decoder") for name in NAMES]
    assert list(read_factors(served, renamed, HIDDEN, lambda name: name.replace("model", "decoder")).blocks) == [2]
    with pytest.raises(
        ValueError, match=r"'model\.layers\.2', which is no block of this model; .* 'decoder\.layers\.0'"
    ):
        read_factors(served, renamed, HIDDEN)


def test_an_adapter_that_was_there_and_is_gone_is_no_lora_adapter(tmp_path):
    saved(tmp_path / "gone")
    assert served_adapter(tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone")
    with pytest.raises(ValueError, match="and its files are gone"):
        served_adapter(tmp_path / "gone")


def test_an_adapter_of_another_type_is_left_to_vllm(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert served_adapter(tmp_path) is None and served_adapter(tmp_path / "missing") is None


def test_files_that_change_are_read_anew(tmp_path):
    saved(tmp_path, positions="f1")
    first = served_adapter(tmp_path)
    assert served_adapter(tmp_path) is first
    edit_config(tmp_path, positions="f2+l11")
    second = served_adapter(tmp_path)
    assert str(second.rule.spec) == "f2+l11" and second.version != first.version


def refused(tmp_path, width=HIDDEN, names=NAMES):
    with pytest.raises(ValueError) as error:
        read_factors(served_adapter(tmp_path), names, width)
    assert str(tmp_path) in str(error.value)
    return str(error.value)


def test_what_cannot_be_served_is_refused_with_the_reason_and_the_way_out(tmp_path):
    saved(tmp_path, positions="f1+l1", share_weights=False)
    assert "hidden states of width 32, and the model's are 48 wide" in refused(tmp_path, width=48)
    edit_config(tmp_path, modules_to_save=["lm_head"])
    assert "modules_to_save=['lm_head']" in refused(tmp_path) and "Train it without" in refused(tmp_path)
    edit_config(tmp_path, modules_to_save=None, trainable_token_indices=[3])
    assert "trainable_token_indices=[3]" in refused(tmp_path)
    edit_config(tmp_path, trainable_token_indices=None, turns="all", prompt_end="<|assistant|>")
    assert "vLLM's workers have no tokenizer" in refused(tmp_path)
    edit_config(tmp_path, turns=None, share_weights=True)
    assert "has 2 interventions where its settings ask for 1" in refused(tmp_path)
    edit_config(tmp_path, share_weights=False, intervention="lobireft")
    assert "are not those of 'lobireft'" in refused(tmp_path)
    edit_config(tmp_path, positions="l1+f1")
    with pytest.raises(ValueError, match="names the suffix before the prefix"):
        served_adapter(tmp_path)


@pytest.mark.parametrize("intervention", ["interchange", "vanilla"])
def test_interventions_that_take_their_values_from_another_input_are_refused(tmp_path, intervention):
    saved(tmp_path, positions="l1", intervention=intervention)
    assert "takes its values from another input" in refused(tmp_path)


def test_targets_that_are_no_blocks_are_refused(tmp_path):
    with pytest.warns(UserWarning, match="edits the outputs of linear layers"):
        saved(tmp_path, target_modules=["o_proj"])
    assert "'model.layers.0.self_attn.o_proj' (its target_modules=['o_proj'])" in refused(tmp_path)


def test_shared_interventions_whose_blocks_are_chosen_by_names_are_refused(tmp_path):
    saved(tmp_path, share_layers=True, exclude_modules=["layers.0"])
    assert "Choose them by layers_to_transform" in refused(tmp_path)


def test_damaged_files_are_refused(tmp_path):
    saved(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file({**tensors, "model.embed_tokens.weight": torch.zeros(2, 2)}, path)
    assert "tensors that are no interventions: model.embed_tokens.weight" in refused(tmp_path)
    save_file({**tensors, name: torch.full_like(tensors[name], float("nan"))}, path)
    with pytest.raises(ValueError, match=r"infinite or not a number \(NaN\)"):
        read_factors(served_adapter(tmp_path), NAMES, HIDDEN)
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="the file is damaged"):
        read_factors(served_adapter(tmp_path), NAMES, HIDDEN)
    path.unlink()
    with pytest.raises(ValueError, match=r"no adapter_model\.safetensors"):
        served_adapter(tmp_path)


# Patching.


@pytest.mark.parametrize(
    "version, tested", [("0.32.0", True), ("0.33.1+cpu", True), ("0.31.2", False), ("0.34.0", False)]
)
def test_versions(version, tested):
    reason = patches.untested(version)
    assert (reason is None) == tested
    assert tested or (f"{version} is installed" in reason and 'pip install "vllm>=0.32.0,<0.34"' in reason)


class WorkerLoRAManager:
    def _load_adapter(self, lora_request):
        return "LoRA"


@pytest.fixture
def other_vllm(monkeypatch):
    """A vLLM of which nothing but its loader of adapters is known."""

    def make(version):
        names = ("vllm", "vllm.lora", "vllm.lora.worker_manager", "vllm.lora.utils")
        modules = {name: types.ModuleType(name) for name in names}
        manager = type("WorkerLoRAManager", (WorkerLoRAManager,), dict(vars(WorkerLoRAManager)))
        modules["vllm"].__version__ = version
        modules["vllm.lora.worker_manager"].WorkerLoRAManager = manager
        modules["vllm.lora.utils"].get_adapter_absolute_path = str
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(patches, "_applied", False)
        return manager

    yield make
    adapter_of._directory.cache_clear()


@pytest.mark.parametrize(
    "version, said", [("9.9", r"9\.9 is installed"), ("0.32.0", r"has no InputProcessor\.process_inputs")]
)
def test_an_unknown_vllm_serves_lora_and_refuses_reft(tmp_path, other_vllm, caplog, version, said):
    manager = other_vllm(version)
    saved(tmp_path / "reft")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    patches.apply()
    assert "ReFT adapters cannot be served" in caplog.text
    request = types.SimpleNamespace(lora_name="formal", lora_path=str(tmp_path / "lora"))
    assert manager()._load_adapter(request) == "LoRA"
    request.lora_path = str(tmp_path / "reft")
    with pytest.raises(ValueError, match=rf"The ReFT adapter 'formal' cannot be served: .*{said}"):
        manager()._load_adapter(request)


GLUE = ("patches.py", "adapter_of.py", "engine_core.py", "front_end.py", "runner.py", "kernel.py")


def test_vllm_is_imported_by_what_register_calls_and_by_nothing_else():
    folder = pathlib.Path(patches.__file__).parent
    files = [folder.parents[1] / "vllm.py", *folder.glob("*.py")]
    assert len(files) > 8
    for file in files:
        tree = ast.parse(file.read_text())
        functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
        inside = {inner for function in functions for inner in ast.walk(function)}
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] in ("vllm", "triton") for name in names):
                assert node in inside or file.name == "kernel.py", file
                assert file.name in GLUE, file
