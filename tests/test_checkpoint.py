"""Adapters on disk and on models: saved and loaded with equal logits, refused where they do not fit, taken off."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys

import pytest
import reference
import torch
from conftest import BLOCKS, HIDDEN, inputs_of, logits, randomize, reft_model, tiny_model
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from peft_reft import ReftConfig, get_interventions

KINDS = ["loreft", "noreft", "direft", "odireft", "consreft", "lobireft"]
CAUSAL = {"task_type": "CAUSAL_LM"}


def fingerprint(model):
    """Everything that an adapter could leave behind on a model, but for its numbers."""
    return {
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "state dict": list(model.state_dict()),
        "hooks": [
            (name, len(module._forward_hooks), len(module._forward_pre_hooks)) for name, module in model.named_modules()
        ],
        "attributes": sorted(vars(model)),
    }


def changed(model, inputs):
    """Logits of a model with an adapter, after a check that the adapter does something."""
    got = logits(model, inputs)
    with model.disable_adapter():
        assert not torch.allclose(logits(model, inputs), got, atol=1e-2)
    return got


@pytest.fixture
def inputs(llama):
    return inputs_of(llama, 7, 4, side="left")


@pytest.fixture
def saved(tmp_path, inputs):
    """A directory with an adapter of the tiny llama, and the logits that it gives."""
    model = reft_model(tiny_model("llama"), positions="f2+l1", share_weights=False, r=3, **CAUSAL)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", changed(model, inputs)


# Saving and loading.


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_adapter_gives_equal_logits(kind, dtype, low_cpu_mem_usage, inputs, tmp_path):
    model = reft_model(tiny_model("llama").to(dtype), intervention=kind, positions="f2+l1", **CAUSAL)
    expected = changed(model, inputs)
    assert expected.dtype == dtype
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama").to(dtype), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded, inputs), expected)
    assert not any(p.is_meta or p.requires_grad for p in loaded.parameters())
    assert not loaded.training


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_in_bfloat16_gives_equal_logits_after_loading(kind, inputs, tmp_path):
    model = reft_model(tiny_model("llama"), intervention=kind, **CAUSAL).bfloat16()
    expected = changed(model, inputs)
    model.save_pretrained(tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.bfloat16}
    for autocast in (True, False):
        loaded = PeftModel.from_pretrained(tiny_model("llama").bfloat16(), tmp_path, autocast_adapter_dtype=autocast)
        torch.testing.assert_close(logits(loaded, inputs), expected, rtol=5e-2, atol=1e-1)
    assert torch.equal(logits(loaded.bfloat16(), inputs), expected)


@pytest.mark.parametrize("family", ["qwen2", "mistral", "gpt2", "opt", "bert", "roberta", "t5"])
def test_a_loaded_adapter_gives_equal_logits_for_every_family(family, tmp_path):
    model = reft_model(tiny_model(family), positions="f2+l1")
    inputs = inputs_of(model)
    expected = changed(model, inputs)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(family), tmp_path), inputs), expected)


def test_a_loaded_adapter_generates_the_same_text(llama, tmp_path):
    model = reft_model(llama, positions="f2+l1", **CAUSAL)
    prompt = inputs_of(llama, 6, 3, side="left")
    settings = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(**prompt, **settings)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    assert torch.equal(loaded.generate(**prompt, **settings), expected)
    with model.disable_adapter():
        assert not torch.equal(model.generate(**prompt, **settings), expected)


def test_auto_peft_model_loads_base_and_adapter(inputs, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = reft_model(base, **CAUSAL)
    expected = changed(model, inputs)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded, inputs), expected)
    assert loaded.active_peft_config.base_model_name_or_path == str(tmp_path / "base")


@pytest.mark.parametrize("name", ["other", "my-adapter", "0", "reft", "basis"])
def test_an_adapter_can_be_loaded_under_another_name(name, saved, inputs):
    path, expected = saved
    loaded = PeftModel.from_pretrained(tiny_model("llama"), path, adapter_name=name)
    assert list(loaded.peft_config) == [name]
    assert torch.equal(logits(loaded, inputs), expected)


@pytest.mark.parametrize("name", ["other", "my-adapter", "0", "reft", "basis"])
def test_what_is_saved_does_not_depend_on_the_adapters_name(name, saved, inputs, tmp_path):
    path, expected = saved
    loaded = PeftModel.from_pretrained(tiny_model("llama"), path, adapter_name=name)
    loaded.save_pretrained(tmp_path / "again")
    directory = tmp_path / "again" / name
    first, second = (load_file(where / "adapter_model.safetensors") for where in (path, directory))
    assert list(first) == list(second)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model("llama"), directory), inputs), expected)


def test_only_safetensors_and_json_are_written_and_only_what_the_equation_needs(saved):
    path, _ = saved
    assert {p.name for p in path.iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    tensors = load_file(path / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == BLOCKS * 2 * (2 * 3 * HIDDEN + 3)
    for key in tensors:
        assert re.fullmatch(
            r"base_model\.model\.model\.layers\.[012]\.reft\.reft_interventions\.[01]\.(weight|bias|basis)", key
        )
        assert "default" not in key
    assert len({key.split(".reft.")[0] for key in tensors}) == BLOCKS


def test_several_adapters_are_saved_and_loaded_side_by_side(inputs, tmp_path):
    model = reft_model(tiny_model("llama"), positions="f2", **CAUSAL)
    model.add_adapter("other", ReftConfig(positions="all", r=2, intervention="direft", layers_to_transform=[1]))
    randomize(model, "other", seed=5)
    expected = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        expected[name] = changed(model, inputs)
    assert not torch.allclose(expected["default"], expected["other"])
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "other" / "adapter_model.safetensors")) == 3
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    loaded.load_adapter(tmp_path / "other", "second")
    assert torch.equal(logits(loaded, inputs), expected["default"])
    loaded.set_adapter("second")
    assert torch.equal(logits(loaded, inputs), expected["other"])


def test_llama_2_7b_with_rank_4_at_block_15_trains_32772_parameters_in_at_most_70_kilobytes(tmp_path):
    with torch.device("meta"):  # LlamaConfig's defaults are those of Llama-2-7B
        base = AutoModelForCausalLM.from_config(LlamaConfig(), dtype=torch.bfloat16)
    assert (base.config.hidden_size, base.config.num_hidden_layers) == (4096, 32)
    model = get_peft_model(base, ReftConfig(r=4, layers_to_transform=15, **CAUSAL))
    assert model.get_nb_trainable_parameters()[0] == 32_772
    (name,) = get_interventions(model)
    assert name == "model.layers.15"
    tensors = get_peft_model_state_dict(model)
    assert sum(tensor.numel() for tensor in tensors.values()) == 32_772
    real = {key: torch.randn(tensor.shape).bfloat16() for key, tensor in tensors.items()}
    named = {key.replace("reft_interventions.", "reft_interventions.default."): value for key, value in real.items()}
    model.save_pretrained(tmp_path, state_dict=named)
    file = tmp_path / "adapter_model.safetensors"
    assert 2 * 32_772 <= file.stat().st_size <= 70_000
    written = load_file(file)
    assert {key: tensor.dtype for key, tensor in written.items()} == dict.fromkeys(real, torch.bfloat16)
    assert all(torch.equal(written[key], real[key]) for key in real)


def test_a_loaded_adapter_is_frozen_unless_it_is_to_be_trained(saved, inputs):
    path, expected = saved
    frozen = PeftModel.from_pretrained(tiny_model("llama"), path)
    assert frozen.get_nb_trainable_parameters()[0] == 0
    trainable = PeftModel.from_pretrained(tiny_model("llama"), path, is_trainable=True)
    assert trainable.get_nb_trainable_parameters()[0] == BLOCKS * 2 * (2 * 3 * HIDDEN + 3)
    assert torch.equal(logits(trainable, inputs), expected)
    trainable(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in trainable.parameters() if p.requires_grad)


def test_loading_onto_an_existing_adapter_replaces_its_weights(saved, inputs):
    path, expected = saved
    model = reft_model(tiny_model("llama"), seed=9, positions="f2+l1", share_weights=False, r=3, **CAUSAL)
    assert not torch.allclose(changed(model, inputs), expected)
    model.load_adapter(path, "default", is_trainable=True)
    assert torch.equal(logits(model, inputs), expected)
    assert model.get_nb_trainable_parameters()[0] > 0


def test_training_resumes_from_a_checkpoint_as_if_it_had_not_stopped(inputs, tmp_path):
    def train(model, steps):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(steps):
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    straight = reft_model(tiny_model("llama"), **CAUSAL)
    start = logits(straight, inputs)
    train(straight, 2)
    straight.save_pretrained(tmp_path)
    train(straight, 2)
    resumed = PeftModel.from_pretrained(tiny_model("llama"), tmp_path, is_trainable=True)
    train(resumed, 2)
    assert torch.equal(logits(resumed, inputs), logits(straight, inputs))
    assert not torch.allclose(logits(straight, inputs), start)


def test_the_state_dict_can_be_taken_and_set(inputs, llama):
    model = reft_model(tiny_model("llama"), **CAUSAL)
    other = reft_model(llama, seed=7, adapter="other", **CAUSAL)
    assert not torch.allclose(logits(other, inputs), changed(model, inputs))
    state = get_peft_model_state_dict(model)
    result = set_peft_model_state_dict(other, state, adapter_name="other")
    assert not result.unexpected_keys
    assert torch.equal(logits(other, inputs), logits(model, inputs))
    assert all(
        torch.equal(a, b)
        for a, b in zip(state.values(), get_peft_model_state_dict(other, adapter_name="other").values())
    )


@pytest.mark.parametrize("head", ["causal", "classifier"])
def test_modules_to_save_are_saved_and_loaded(head, tmp_path):
    def model_of(seed):
        return tiny_model("llama", head=head, seed=seed)

    settings = {"task_type": "SEQ_CLS"} if head == "classifier" else {"modules_to_save": ["lm_head"], **CAUSAL}
    model = reft_model(model_of(0), **settings)
    part = "score" if head == "classifier" else "lm_head"
    with torch.no_grad():
        getattr(model.base_model.model, part).modules_to_save["default"].weight.normal_()
    inputs = inputs_of(model, 5, 5)
    expected = changed(model, inputs)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(model_of(0), tmp_path), inputs), expected)


def test_trainable_token_indices_are_saved_and_loaded(inputs, tmp_path):
    model = reft_model(tiny_model("llama"), trainable_token_indices=[5, 6], **CAUSAL)
    inputs["input_ids"][0, -1] = 5
    before = logits(model, inputs)
    with torch.no_grad():
        model.base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta["default"].normal_()
    expected = changed(model, inputs)
    assert not torch.allclose(before, expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model("llama"), tmp_path), inputs), expected)


# What does not fit is refused, and the base model stays as it was.


def edit_saved(path, config=None, tensors=None):
    """Change a saved adapter: fields of its config, or its tensors by a function."""
    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **(config or {})}))
    if tensors is not None:
        file = path / "adapter_model.safetensors"
        save_file(tensors(load_file(file)), file)


def drop_first(tensors):
    return dict(list(tensors.items())[1:])


def drop_biases(tensors):
    return {name: tensor for name, tensor in tensors.items() if "bias" not in name}


def add_one(tensors):
    name = next(iter(tensors))
    return {**tensors, name.replace("interventions.0", "interventions.7"): tensors[name].clone()}


MISFITS = {
    "wider model": ({"hidden_size": 48}, {}, None, r"\[3, 32\] in the adapter and \[3, 48\] in this model"),
    "narrower model": ({"hidden_size": 16}, {}, None, r"\[3, 32\] in the adapter and \[3, 16\] in this model"),
    "more blocks": ({"num_hidden_layers": 5}, {}, None, r"3 edited blocks, this model 5.*lacks .*layers\.3.*layers\.4"),
    "fewer blocks": ({"num_hidden_layers": 2}, {}, None, r"3 edited blocks, this model 2; the model lacks .*layers\.2"),
    "a block that does not exist": ({}, {"layers_to_transform": [0, 7]}, None, r"layers_to_transform=.*\[7\].*0 to 2"),
    "other rank": ({}, {"r": 5}, None, r"\[3.*\] in the adapter and \[5.*\] in this model: another .*rank"),
    "other intervention": ({}, {"intervention": "lobireft"}, None, "another intervention"),
    "no bias": ({}, {}, drop_biases, "the adapter lacks .*bias"),
    "shared weights": ({}, {"share_weights": True}, None, "another intervention or share_weights"),
    "other target modules": ({}, {"target_modules": ["mlp"]}, None, r"model lacks .*layers\.0.*adapter lacks .*mlp"),
    "a tensor missing": ({}, {}, drop_first, "the adapter lacks "),
    "a tensor too many": ({}, {}, add_one, r"interventions\.7.* on top"),
    "a rank above the width": ({}, {"r": 33}, None, "r=33"),
    "an unknown intervention": ({}, {"intervention": "unheard_of"}, None, "unheard_of"),
}  # fmt: skip


# By transformers' own check of sizes, which comes before ours and shows them in a report.
OF_ANOTHER_SIZE = {"wider model", "narrower model", "other rank", "other intervention"}


def transformers_refuses(request, message):
    """What `load_adapter` of a transformers' model raises for a misfit."""
    if request.node.callspec.params["misfit"] in OF_ANOTHER_SIZE:
        return pytest.raises(RuntimeError, match="`ignore_mismatched_sizes`")
    return pytest.raises(ValueError, match=message)


@pytest.fixture(params=MISFITS)
def misfit(request, saved):
    """An adapter's directory, changes of the model that make it a wrong one, and what the error must say."""
    model_changes, config, tensors, message = MISFITS[request.param]
    edit_saved(saved[0], config, tensors)
    return saved[0], model_changes, message


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_adapter_that_does_not_fit_is_refused_and_the_base_model_is_unchanged(misfit, low_cpu_mem_usage, inputs):
    path, model_changes, message = misfit
    base = tiny_model("llama", **model_changes)
    before, before_logits = fingerprint(base), logits(base, inputs)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert fingerprint(base) == before
    assert torch.equal(logits(base, inputs), before_logits)
    usable = reft_model(base)  # and can be given an adapter
    changed(usable, inputs)


def test_an_adapter_that_is_loaded_around_a_peft_model_is_refused_with_the_way_out(saved):
    path, _ = saved
    with pytest.raises(ValueError, match=r"has adapters already: .*with model\.load_adapter"):
        PeftModel.from_pretrained(reft_model(tiny_model("llama")), path, adapter_name="second")


def test_a_failed_load_beside_an_adapter_leaves_that_one_intact(misfit, inputs):
    path, model_changes, message = misfit
    model = reft_model(tiny_model("llama", **model_changes), **CAUSAL)
    before, before_logits = fingerprint(model), changed(model, inputs)
    trainable = model.get_nb_trainable_parameters()
    with pytest.raises(ValueError, match=message):
        model.load_adapter(path, "second")
    assert list(model.peft_config) == ["default"]
    assert model.active_adapters == ["default"]
    assert fingerprint(model) == before
    assert model.get_nb_trainable_parameters() == trainable
    assert torch.equal(logits(model, inputs), before_logits)
    model.save_pretrained(path.parent / "again")
    model.load_adapter(path.parent / "again", "second")  # the name is free
    assert list(model.peft_config) == ["default", "second"]


@pytest.mark.parametrize("has_run", [True, False])
def test_a_failed_load_onto_an_adapter_leaves_it_intact(has_run, saved, inputs):
    edit_saved(saved[0], tensors=drop_first)
    model = reft_model(tiny_model("llama"), positions="f2+l1", share_weights=False, r=3, **CAUSAL)
    expected = changed(copy.deepcopy(model), inputs)
    if has_run:
        logits(model, inputs)
    with pytest.raises(ValueError, match="the adapter lacks"):
        model.load_adapter(saved[0], "default")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(changed(model, inputs), expected)


def test_a_state_dict_that_does_not_fit_is_refused_and_changes_nothing(saved, inputs):
    model = reft_model(tiny_model("llama"), **CAUSAL)
    expected = changed(model, inputs)
    with pytest.raises(ValueError, match=r"another (hidden size|rank|intervention)"):
        set_peft_model_state_dict(model, load_file(saved[0] / "adapter_model.safetensors"))
    assert torch.equal(changed(model, inputs), expected)


def test_an_adapter_of_another_family_is_refused(saved):
    base = tiny_model("gpt2")
    before = fingerprint(base)
    with pytest.raises(ValueError, match=r"does not fit GPT2LMHeadModel.*the model lacks .*model\.layers\.0"):
        PeftModel.from_pretrained(base, saved[0])
    assert fingerprint(base) == before


def test_the_error_names_the_model_that_the_adapter_was_trained_on(saved):
    edit_saved(saved[0], {"base_model_name_or_path": "some/base-model"})
    with pytest.raises(ValueError, match="base_model_name_or_path='some/base-model'"):
        PeftModel.from_pretrained(tiny_model("llama", num_hidden_layers=2), saved[0])


def test_a_head_for_another_number_of_classes_is_refused_with_the_way_out(tmp_path):
    three = reft_model(tiny_model("bert", "classifier", num_labels=3), task_type="SEQ_CLS")
    three.save_pretrained(tmp_path)
    base = tiny_model("bert", "classifier")
    before = fingerprint(base)
    message = r"does not fit BertForSequenceClassification: .*classifier.*\[3, 32\].*\[2, 32\].*num_labels=N"
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, tmp_path)
    assert fingerprint(base) == before
    with pytest.warns(UserWarning, match="not initialized from the model checkpoint"):  # PEFT's own way
        PeftModel.from_pretrained(base, tmp_path, ignore_mismatched_sizes=True)


# Copies.


def generated(model):
    return model.generate(**inputs_of(model, 6, 3, side="left"), max_new_tokens=5, do_sample=False)


@pytest.fixture(params=["deepcopy", "torch.save"])
def copied(request, tmp_path):
    """A function that makes an independent copy of a model."""

    def through_file(model):
        torch.save(model, tmp_path / "model.pt")
        return torch.load(tmp_path / "model.pt", weights_only=False)

    return copy.deepcopy if request.param == "deepcopy" else through_file


def test_a_copy_of_a_model_with_an_adapter_does_the_same_and_is_independent(copied, inputs):
    model = reft_model(tiny_model("llama"), positions="f2+l1", **CAUSAL)
    expected, text = changed(model, inputs), generated(model)
    twin = copied(model)
    assert torch.equal(changed(twin, inputs), expected)
    assert torch.equal(generated(twin), text)
    randomize(twin, seed=8)
    assert not torch.allclose(changed(twin, inputs), expected)
    assert torch.equal(logits(model, inputs), expected)
    randomize(model, seed=8)
    assert torch.equal(logits(model, inputs), logits(twin, inputs))
    with torch.no_grad():
        twin.get_base_model().lm_head.weight.zero_()
    assert generated(twin)[:, 6:].unique().numel() == 1
    assert torch.equal(generated(model), generated(model))
    assert generated(model)[:, 6:].unique().numel() > 1
    twin.unload()
    changed(model, inputs)


def test_a_saved_model_opens_in_a_process_that_has_imported_nothing(inputs, tmp_path):
    model = reft_model(tiny_model("llama"), **CAUSAL)
    torch.save(model, tmp_path / "model.pt")
    torch.save(inputs, tmp_path / "inputs.pt")
    code = f"""
import sys; sys.path[:] = {sys.path!r}
import torch
model = torch.load(sys.argv[1] + "/model.pt", weights_only=False)
with torch.no_grad():
    torch.save(model(**torch.load(sys.argv[1] + "/inputs.pt")).logits, sys.argv[1] + "/logits.pt")
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), changed(model, inputs), rtol=1e-5, atol=1e-5)


# Without PeftModel.


def test_an_adapter_can_be_injected_and_is_then_part_of_the_model(inputs, llama):
    expected = changed(reft_model(tiny_model("llama")), inputs)
    before = logits(llama, inputs)
    model = randomize(inject_adapter_in_model(ReftConfig(), llama))
    assert model is llama
    assert torch.equal(logits(model, inputs), expected)
    assert not torch.allclose(before, expected)


def test_a_state_dict_tells_where_to_inject(inputs, llama):
    source = reft_model(tiny_model("llama"), layers_to_transform=[0, 2])
    expected = changed(source, inputs)
    state = {key.removeprefix("base_model.model."): value for key, value in get_peft_model_state_dict(source).items()}
    model = inject_adapter_in_model(ReftConfig(), llama, state_dict=state)
    assert list(get_interventions(model)) == ["model.layers.0", "model.layers.2"]
    set_peft_model_state_dict(model, state)
    assert torch.equal(logits(model, inputs), expected)


def test_transformers_adds_loads_switches_and_deletes_adapters_itself(saved, inputs, llama, tmp_path):
    path, expected = saved
    before, before_logits = fingerprint(llama), logits(llama, inputs)
    llama.load_adapter(path, "loaded")
    assert torch.equal(logits(llama, inputs), expected)
    llama.add_adapter(ReftConfig(positions="all", init_weights=False), "added")
    llama.set_adapter("added")
    randomize(llama, "added", seed=4)
    added = logits(llama, inputs)
    assert not torch.allclose(added, expected)
    assert not torch.allclose(added, before_logits)
    llama.save_pretrained(tmp_path / "native")
    assert (tmp_path / "native" / "adapter_model.safetensors").exists()
    fresh = tiny_model("llama")
    fresh.load_adapter(tmp_path / "native")
    torch.testing.assert_close(logits(fresh, inputs), added)
    llama.disable_adapters()
    assert torch.equal(logits(llama, inputs), before_logits)
    llama.enable_adapters()
    llama.delete_adapter("added")
    llama.set_adapter("loaded")
    assert torch.equal(logits(llama, inputs), expected)
    llama.delete_adapter("loaded")
    assert torch.equal(logits(llama, inputs), before_logits)
    assert list(llama.state_dict()) == before["state dict"]


def test_transformers_own_loading_refuses_what_does_not_fit_as_well(misfit, inputs, request):
    path, model_changes, message = misfit
    base = tiny_model("llama", **model_changes)
    before, before_logits = fingerprint(base), logits(base, inputs)
    with transformers_refuses(request, message):
        base.load_adapter(path)
    assert {**fingerprint(base), "attributes": None} == {**before, "attributes": None}  # transformers adds some
    assert "_load_pretrained_model" not in vars(base)
    assert torch.equal(logits(base, inputs), before_logits)
    base.add_adapter(ReftConfig())  # and can be given an adapter
    randomize(base)
    assert not torch.allclose(logits(base, inputs), before_logits, atol=1e-2)


def test_transformers_own_failed_load_leaves_an_adapter_intact(misfit, inputs, request):
    path, model_changes, message = misfit
    base = tiny_model("llama", **model_changes)
    base.add_adapter(ReftConfig(target_modules=["mlp"]), "first")
    base.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False), "lora")
    randomize(base, "first")
    before, before_logits = fingerprint(base), logits(base, inputs)
    trained = [name for name, parameter in base.named_parameters() if parameter.requires_grad]
    with transformers_refuses(request, message):
        base.load_adapter(path, adapter_name="second")
    assert {**fingerprint(base), "attributes": None} == {**before, "attributes": None}
    assert list(base.peft_config) == ["first", "lora"] and base.active_adapters() == ["lora"]
    assert trained == [name for name, parameter in base.named_parameters() if parameter.requires_grad]
    assert torch.equal(logits(base, inputs), before_logits)


def test_transformers_own_loading_into_blocks_on_disk_is_refused(saved, inputs, llama, tmp_path):
    path, _ = saved
    llama.save_pretrained(tmp_path / "base")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{number}": "disk" if number else "cpu" for number in range(3)}
    base = type(llama).from_pretrained(tmp_path / "base", device_map=places, offload_folder=str(tmp_path / "disk"))
    with pytest.raises(ValueError, match=r"nothing would be edited in model\.layers\.1, model\.layers\.2"):
        base.load_adapter(path)
    torch.testing.assert_close(logits(base, inputs), logits(llama, inputs))


# Taking it off.


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("adapters", [1, 2])
def test_unload_restores_the_base_model_exactly(family, adapters):
    base = tiny_model(family)
    inputs = inputs_of(base)
    before, before_logits = fingerprint(base), logits(base, inputs)
    model = reft_model(base, positions="f2+l1")
    if adapters == 2:
        model.add_adapter("other", ReftConfig(target_modules=r".*\.1", positions="f1"))
    changed(model, inputs)
    assert fingerprint(base) != before
    unloaded = model.unload()
    assert unloaded is base
    assert fingerprint(base) == before
    assert torch.equal(logits(base, inputs), before_logits)
    assert "generate" not in vars(base)
    if base.can_generate():
        generated(base)
    changed(reft_model(base), inputs)  # and it can be given an adapter again


def test_unload_unwraps_modules_to_save_and_keeps_what_was_trained_as_peft_does():
    base = tiny_model("llama", head="classifier")
    inputs = inputs_of(base, 5, 5)
    before, twin = fingerprint(base), copy.deepcopy(base)
    model = reft_model(base, task_type="SEQ_CLS")
    with torch.no_grad():
        twin.score.weight.copy_(base.score.modules_to_save["default"].weight.normal_())
    changed(model, inputs)
    model.unload()
    assert fingerprint(base) == before
    assert torch.equal(logits(base, inputs), logits(twin, inputs))


def test_unload_keeps_hooks_and_a_generate_that_were_there_before(llama):
    calls = []
    llama.model.layers[1].register_forward_hook(lambda *args: calls.append("block"))
    llama.register_forward_pre_hook(lambda *args: calls.append("model"))
    before = fingerprint(llama)
    model = reft_model(llama)
    changed(model, inputs_of(llama))
    model.unload()
    calls.clear()
    logits(llama, inputs_of(llama))
    assert calls == ["model", "block"]
    assert fingerprint(llama) == before


@pytest.mark.parametrize("method", ["merge_and_unload", "merge_adapter"])
def test_merging_is_refused_with_the_way_out_and_changes_nothing(method, inputs):
    model = reft_model(tiny_model("llama"), **CAUSAL)
    before, expected = fingerprint(model), changed(model, inputs)
    with pytest.raises(ValueError, match=r"cannot be merged.*unload\(\)"):
        getattr(model, method)()
    assert fingerprint(model) == before
    assert torch.equal(logits(model, inputs), expected)


def test_what_was_never_merged_can_be_unmerged(inputs):
    model = reft_model(tiny_model("llama"))
    before = logits(model, inputs)
    model.unmerge_adapter()
    assert torch.equal(logits(model, inputs), before)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_a_disabled_adapter_leaves_logits_bit_for_bit(family):
    base = tiny_model(family)
    inputs = inputs_of(base)
    before = logits(base, inputs)
    model = reft_model(base, positions="f2+l1")
    after = changed(model, inputs)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), before)
    assert torch.equal(logits(model, inputs), after)


def test_a_deleted_adapter_leaves_the_other(inputs, llama):
    model = reft_model(llama, positions="f2", **CAUSAL)
    expected = changed(model, inputs)
    model.add_adapter("other", ReftConfig(positions="all"))
    randomize(model, "other", seed=3)
    model.set_adapter("other")
    assert not torch.allclose(changed(model, inputs), expected)
    model.delete_adapter("other")
    model.set_adapter("default")
    assert torch.equal(logits(model, inputs), expected)
    assert not [name for name, _ in model.named_parameters() if "other" in name]


@pytest.mark.parametrize("reft_first", [True, False])
def test_lora_inside_edited_blocks_and_reft_do_what_each_does_alone(reft_first, inputs, llama):
    lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    reft = ReftConfig(layers_to_transform=[0, 1])
    for config in [reft, lora] if reft_first else [lora, reft]:
        torch.manual_seed(3)
        inject_adapter_in_model(config, llama, "edits" if config is reft else "lora")
    randomize(llama, "edits")
    got = logits(llama, inputs)
    base = tiny_model("llama")
    plain = logits(base, inputs)
    torch.manual_seed(3)
    inject_adapter_in_model(lora, base, "lora")
    with_lora = logits(base, inputs)
    assert not torch.allclose(with_lora, plain)
    with torch.no_grad():
        expected = reference.forward(base, get_interventions(llama, "edits"), reft, inputs).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(with_lora, expected)


def test_interventions_that_all_blocks_share_are_stored_and_listed_once(tmp_path):
    model = reft_model(tiny_model("llama"), share_layers=True)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    (interventions,) = next(iter(get_interventions(model).values()))
    assert sum(tensor.numel() for tensor in stored.values()) == sum(p.numel() for p in interventions.parameters())
    assert all(".layers." in name for name in model.state_dict() if "reft_interventions" in name)
