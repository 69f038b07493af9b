"""A refused name and a failed load leave a model that is what it was, into which other adapters load."""

import shutil

import pytest
import torch
import transformers.modeling_utils
from conftest import batch, logits, reft_model, tiny_model
from model_state import assert_as_before, state_of
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_reft import ReftConfig

CONFIG = {"positions": "f1+l1", "r": 2, "task_type": "CAUSAL_LM"}


BAD_NAMES = ["v1.0", "training", "", "qwen3-0.6b", "a.b.c", "train", "*", "/tmp/name"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_no_module_can_have_is_refused_by_get_peft_model(name):
    model = tiny_model("llama")
    before, expected = state_of(model), logits(model, batch(6, 4))
    with pytest.raises(ValueError, match="adapter") as refused:
        get_peft_model(model, ReftConfig(**CONFIG), adapter_name=name)
    assert repr(name) in str(refused.value)
    assert_as_before(model, before)
    assert torch.equal(logits(model, batch(6, 4)), expected)
    assert reft_model(model, **CONFIG).peft_config.keys() == {"default"}  # and another name works


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("how", ["add_adapter", "load_adapter"])
def test_a_name_that_no_module_can_have_is_refused_beside_other_adapters(how, name, tmp_path):
    model = reft_model(tiny_model("llama"), **CONFIG)
    model.save_pretrained(tmp_path)
    before, expected = state_of(model), logits(model, batch(6, 4))
    with pytest.raises(ValueError, match="adapter") as refused:
        if how == "add_adapter":
            model.add_adapter(name, ReftConfig(**CONFIG))
        else:
            model.load_adapter(tmp_path, name)
    assert repr(name) in str(refused.value)
    assert_as_before(model, before)
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model, batch(6, 4)), expected)
    model.add_adapter("v1_0", ReftConfig(**CONFIG))
    model.set_adapter("v1_0")
    logits(model, batch(6, 4))
    model.set_adapter("default")
    model.delete_adapter("v1_0")
    assert torch.equal(logits(model, batch(6, 4)), expected)


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("how", ["add_adapter", "load_adapter"])
def test_a_name_that_no_module_can_have_is_refused_by_transformers_methods(how, name, tmp_path):
    if not name and how == "add_adapter":
        pytest.skip("transformers takes an empty name for 'default'")
    reft_model(tiny_model("llama"), **CONFIG).save_pretrained(tmp_path)
    model = tiny_model("llama")
    before, expected = state_of(model), logits(model, batch(6, 4))
    with pytest.raises(ValueError, match="adapter"):
        if how == "add_adapter":
            model.add_adapter(ReftConfig(**CONFIG), name)
        else:
            model.load_adapter(str(tmp_path), adapter_name=name)
    # transformers itself remembers that there once was a configuration of adapters.
    own = {"_hf_peft_config_loaded", "peft_config"}
    now = state_of(model)
    now["attributes"][""] = [attribute for attribute in now["attributes"][""] if attribute not in own]
    before["attributes"][""] = [attribute for attribute in before["attributes"][""] if attribute not in own]
    assert now == before
    assert torch.equal(logits(model, batch(6, 4)), expected)


def test_names_that_look_odd_but_are_fine_work(tmp_path):
    for name in ("v1_0", "my adapter", "ünïcode", "0", "reft", "a-b"):
        model = reft_model(tiny_model("llama"), adapter=name, **CONFIG)
        model.save_pretrained(tmp_path / "saved")
        folder = tmp_path / "saved" / name
        loaded = PeftModel.from_pretrained(tiny_model("llama"), folder, adapter_name=name)
        torch.testing.assert_close(logits(loaded, batch(6, 4)), logits(model, batch(6, 4)))
        shutil.rmtree(tmp_path / "saved")


# Failed loads.


def truncated(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])


def without_a_tensor(folder):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, file)


def empty(folder):
    (folder / "adapter_model.safetensors").write_bytes(b"")


def missing(folder):
    (folder / "adapter_model.safetensors").unlink()


def of_another_shape(folder):
    file = folder / "adapter_model.safetensors"
    save_file({name: torch.cat([tensor, tensor]) for name, tensor in load_file(file).items()}, file)


FAULTS = [truncated, without_a_tensor, empty, missing, of_another_shape]


@pytest.fixture
def saved(tmp_path):
    """Folders of a ReFT adapter whose fresh weights edit at once, and of a LoRA adapter."""
    settings = {**CONFIG, "intervention": "consreft"}
    reft_model(tiny_model("llama"), **settings).save_pretrained(tmp_path / "reft")
    lora = get_peft_model(
        tiny_model("llama"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    )
    lora.save_pretrained(tmp_path / "lora")
    return tmp_path


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_failed_from_pretrained_leaves_a_model_that_computes_what_it_computed(fault, saved):
    fault(saved / "reft")
    base = tiny_model("llama")
    expected = logits(base, batch(6, 4))
    with pytest.raises(Exception):  # noqa: B017 (safetensors, PEFT and we have errors of our own)
        PeftModel.from_pretrained(base, saved / "reft")
    torch.testing.assert_close(logits(base, batch(6, 4)), expected)
    weights = tiny_model("llama").state_dict()
    assert all(torch.equal(base.state_dict()[name], weight) for name, weight in weights.items())
    lora = PeftModel.from_pretrained(base, saved / "lora")
    wanted = PeftModel.from_pretrained(tiny_model("llama"), saved / "lora")
    torch.testing.assert_close(logits(lora, batch(6, 4)), logits(wanted, batch(6, 4)))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_failed_load_adapter_leaves_the_adapters_that_are_there(fault, saved):
    model = reft_model(tiny_model("llama"), **CONFIG)
    expected = logits(model, batch(6, 4))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fault(saved / "reft")
    with pytest.raises(Exception):  # noqa: B017
        model.load_adapter(saved / "reft", "second")
    torch.testing.assert_close(logits(model, batch(6, 4)), expected)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in weights.items())
    if "second" in model.peft_config:  # then it must not edit by half
        model.set_adapter("second")
        torch.testing.assert_close(logits(model, batch(6, 4)), logits(tiny_model("llama"), batch(6, 4)))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_failed_load_by_transformers_leaves_a_model_into_which_lora_loads(fault, saved):
    fault(saved / "reft")
    assert_failed_native_load(saved)


def test_a_connection_lost_during_a_load_by_transformers_leaves_a_model_into_which_lora_loads(saved, monkeypatch):
    def gone(*args, **kwargs):
        raise OSError("adapter_model.safetensors: connection lost")

    with monkeypatch.context() as patch:
        patch.setattr(transformers.modeling_utils, "_get_resolved_checkpoint_files", gone)
        model = tiny_model("llama")
        expected = logits(model, batch(6, 4))
        with pytest.raises(OSError, match="connection lost"):
            model.load_adapter(str(saved / "reft"), adapter_name="first")
    assert_usable(model, expected, saved)


def assert_failed_native_load(saved):
    model = tiny_model("llama")
    expected = logits(model, batch(6, 4))
    try:
        model.load_adapter(str(saved / "reft"), adapter_name="first")
    except Exception:
        pass
    else:
        pytest.fail("the fault was not noticed")
    assert_usable(model, expected, saved)


def assert_usable(model, expected, saved):
    torch.testing.assert_close(logits(model, batch(6, 4)), expected)
    model.load_adapter(str(saved / "lora"), adapter_name="second")
    model.set_adapter("second")
    wanted = tiny_model("llama")
    wanted.load_adapter(str(saved / "lora"), adapter_name="second")
    torch.testing.assert_close(logits(model, batch(6, 4)), logits(wanted, batch(6, 4)))
