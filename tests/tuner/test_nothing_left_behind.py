"""What ends badly, or ends, leaves the model as it was: interrupted calls, refused names, failed loads, unload."""

import copy
import gc
import pickle
import shutil
import weakref

import pytest
import torch
import transformers.modeling_utils
from conftest import batch, logits, randomize, reft_model, tiny_model
from edit_spy import edited_columns
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn.modules.module import register_module_forward_hook

from peft_reft import ReftConfig, get_interventions

CONFIG = {"positions": "f1+l1", "r": 2, "task_type": "CAUSAL_LM"}


def state_of(model) -> dict:
    """All that an adapter could leave on a model: modules, their attributes and hooks, the state dict's keys."""
    return {
        "modules": [(name, type(module).__name__) for name, module in model.named_modules()],
        "attributes": {name: sorted(module.__dict__) for name, module in model.named_modules()},
        "hooks": {
            name: [len(v) for k, v in sorted(module.__dict__.items()) if k.endswith("_hooks") and hasattr(v, "__len__")]
            for name, module in model.named_modules()
        },
        "weights": sorted(model.state_dict()),
        "trained": sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad),
    }


def assert_as_before(model, before: dict) -> None:
    now = state_of(model)
    for what, value in before.items():
        assert now[what] == value, what


# Memory.


@pytest.mark.parametrize("how", ["deleted", "unloaded"])
@pytest.mark.parametrize("call", ["forward", "labelled forward", "training step", "generate"])
def test_a_base_model_is_freed_after_any_call(call, how):
    base = tiny_model("llama")
    gone = weakref.ref(base)
    model = reft_model(base, **CONFIG)
    inputs = batch(6, 6)  # kept: what a call was given must not keep the model
    labels = inputs["input_ids"].clone()
    if call == "forward":
        logits(model, inputs)
    elif call == "labelled forward":
        logits(model, inputs, labels=labels)
    elif call == "training step":
        model.train()(**inputs, labels=labels).loss.backward()
    else:
        model.generate(**inputs, max_new_tokens=2)
    if how == "unloaded":
        del base
        model = model.unload()
    else:
        del base
    del model
    gc.collect()
    assert gone() is None
    assert labels.numel()


def test_a_forward_keeps_no_batch_alive():
    model = reft_model(tiny_model("llama"), **CONFIG)
    inputs = batch(6, 6)
    kept = {name: weakref.ref(tensor) for name, tensor in inputs.items()}
    labels = inputs["input_ids"].clone()
    kept["labels"] = weakref.ref(labels)
    logits(model, inputs, labels=labels)
    del inputs, labels
    gc.collect()
    assert [name for name, tensor in kept.items() if tensor() is not None] == []


# Interrupted calls.


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


PLACES = {
    "a block": lambda base: base.model.layers[1],
    "inside a block": lambda base: base.model.layers[0].mlp,
    "the first block": lambda base: base.model.layers[0],
    "the lm_head": lambda base: base.lm_head,
    "the embedding": lambda base: base.model.embed_tokens,
    "the last norm": lambda base: base.model.norm,
}


def labelled(ids):
    return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(ids.shape[1]) < 3, -100)}


INTERRUPTED = {
    "a labelled forward": lambda model, ids: model(**labelled(ids)),
    "a forward with locations": lambda model, ids: model(
        input_ids=ids, intervention_locations=torch.tensor([[0, 1], [2, 3]])
    ),
    "a forward with adapter names": lambda model, ids: model(input_ids=ids, adapter_names=["default", "__base__"]),
    "a call past __call__": lambda model, ids: model.get_base_model().forward(**labelled(ids)),
    "a training step": lambda model, ids: model.train()(**labelled(ids)),
    "generate": lambda model, ids: model.generate(input_ids=ids, max_new_tokens=3, do_sample=False),
    "generate with locations": lambda model, ids: model.generate(
        input_ids=ids, max_new_tokens=3, intervention_locations=torch.tensor([[0, 1], [2, 3]])
    ),
}


ENDS = [(place, call, KeyboardInterrupt) for place in PLACES for call in INTERRUPTED]
ENDS += [(place, "a labelled forward", error) for place in PLACES for error in (SystemExit, GeneratorExit)]


@pytest.mark.parametrize(("place", "call", "error"), ENDS)
def test_an_interrupted_call_leaves_nothing_to_the_next(place, call, error):
    model = reft_model(tiny_model("llama", eos_token_id=None), **CONFIG)
    base, ids = model.get_base_model(), batch(6, 6, seed=5)["input_ids"]
    others = [batch(6, 6, seed=9), batch(7, 4, 7, seed=9)]
    hidden = torch.randn(2, 6, 32)
    states = {"position_embeddings": base.model.rotary_emb(hidden, torch.arange(6)[None])}

    def block_alone():
        try:
            return base.model.layers[0](hidden, **states)
        except ValueError as told:  # a block alone has no tokens to count, which is told
            return str(told)

    def observe():
        with torch.no_grad():
            backbone = [base.model(**inputs).last_hidden_state for inputs in others]
            return [block_alone(), *backbone, *(model(**inputs).logits for inputs in others)]

    expected = observe()

    def stop(*args):
        raise error

    handle = PLACES[place](base).register_forward_pre_hook(stop)
    with pytest.raises(error):
        INTERRUPTED[call](model, ids)
    handle.remove()
    model.eval()
    for one, other in zip(observe(), expected):
        if isinstance(other, str):
            assert one == other
        else:
            torch.testing.assert_close(one, other)
    assert edited_columns(model, tiny_model("llama", eos_token_id=None), **others[0]) == [[0, 5], [0, 5]]


def test_a_generator_around_a_forward_that_is_closed_leaves_nothing():
    model = reft_model(tiny_model("llama"), **CONFIG)
    base, ids, other = model.get_base_model(), batch(6, 6)["input_ids"], batch(6, 6, seed=9)
    expected = logits(base.model, other)

    def steps():
        def give_up(*args):
            raise GeneratorExit

        handle = base.lm_head.register_forward_pre_hook(give_up)
        try:
            yield
            model(**labelled(ids))
        finally:
            handle.remove()

    generator = steps()
    next(generator)
    with pytest.raises(GeneratorExit):
        generator.send(None)
    generator.close()
    torch.testing.assert_close(logits(base.model, other), expected)


def test_an_interrupted_scope_of_adapter_names_leaves_the_active_adapter():
    model = reft_model(tiny_model("llama"), **CONFIG)
    inputs = batch(6, 6)
    expected = logits(model, inputs)
    handle = model.get_base_model().model.layers[2].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**inputs, adapter_names=["__base__", "__base__"])
    handle.remove()
    torch.testing.assert_close(logits(model, inputs), expected)


def test_an_interrupted_backward_pass_of_checkpointed_blocks_leaves_nothing():
    model = get_peft_model(tiny_model("llama"), ReftConfig(**CONFIG)).train()
    randomize(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    other = batch(7, 4, seed=9)
    expected = logits(model.eval(), other)
    loss = model.train()(**labelled(batch(6, 6)["input_ids"])).loss
    handle = model.get_base_model().model.layers[1].mlp.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        loss.backward()
    handle.remove()
    torch.testing.assert_close(logits(model.eval(), other), expected)


# Refused names.


BAD_NAMES = ["v1.0", "training", "", "qwen3-0.6b", "a.b.c", "train"]


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


# Taken off again, copied, pickled.


@pytest.mark.parametrize("call", ["nothing", "forward", "training step", "generate", "checkpointed step"])
def test_unload_leaves_no_attribute_hook_or_module(call):
    base = tiny_model("llama")
    logits(base, batch(6, 4))
    base.generate(**batch(4, 4), max_new_tokens=2)
    base.gradient_checkpointing_enable({"use_reentrant": False})
    base.gradient_checkpointing_disable()
    before, expected = state_of(base), logits(base, batch(6, 4))
    before["trained"] = []  # PEFT freezes a base model
    model = reft_model(base, **CONFIG)
    if call == "checkpointed step":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if call == "forward":
        logits(model, batch(6, 4))
    elif call == "generate":
        model.generate(**batch(4, 4), max_new_tokens=2)
    elif call != "nothing":
        model.train()(**labelled(batch(6, 6)["input_ids"])).loss.backward()
    plain = model.unload().eval()
    plain.gradient_checkpointing_disable()
    assert plain is base
    assert_as_before(plain, before)
    assert torch.equal(logits(plain, batch(6, 4)), expected)


def test_deleting_the_last_native_adapter_leaves_the_base_models_logits_and_weights():
    model = tiny_model("llama")
    expected = logits(model, batch(6, 4))
    before = sorted(model.state_dict())
    model.add_adapter(ReftConfig(**CONFIG))
    randomize(model)
    assert (logits(model, batch(6, 4)) - expected).abs().max() > 1e-3
    model.delete_adapter("default")
    assert sorted(model.state_dict()) == before
    assert torch.equal(logits(model, batch(6, 4)), expected)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "deepcopy of the base", "pickle of the base"])
@pytest.mark.parametrize("after", ["nothing", "generate", "labelled"])
def test_a_copy_of_a_model_computes_the_same_and_is_a_model_of_its_own(after, how):
    model = reft_model(tiny_model("llama", eos_token_id=None), **CONFIG)
    inputs = batch(6, 4, side="left")
    if after == "generate":
        model.generate(**inputs, max_new_tokens=2)
    elif after == "labelled":
        logits(model, inputs, labels=inputs["input_ids"])
    original = model.get_base_model() if how.endswith("base") else model
    copied = pickle.loads(pickle.dumps(original)) if how.startswith("pickle") else copy.deepcopy(original)
    expected = logits(original, inputs)
    tokens = original.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert torch.equal(logits(copied, inputs), expected)
    assert torch.equal(copied.generate(**inputs, max_new_tokens=3, do_sample=False), tokens)
    randomize(copied, seed=77)
    assert (logits(copied, inputs) - expected).abs().max() > 1e-3
    assert torch.equal(logits(original, inputs), expected)
    named = labelled(batch(6, 6)["input_ids"])
    assert edited_columns(copied, tiny_model("llama", eos_token_id=None), **named) == [[0, 2]] * 2
    del original, model
    gc.collect()  # the copy needs nothing of the model that it was made from
    logits(copied, inputs)


@pytest.mark.parametrize("positions", ["f1+l1", "all"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("warm", [False, True])
def test_a_global_hook_that_keeps_outputs_keeps_what_they_were(warm, grad, positions):
    """The edit is not written into a tensor that others hold."""
    model = reft_model(tiny_model("llama"), **{**CONFIG, "positions": positions})
    inputs = batch(6, 6)
    if warm:
        logits(model, inputs)
    kept = []
    handle = register_module_forward_hook(
        lambda module, args, output: kept.append((output, output.clone())) if isinstance(output, torch.Tensor) else None
    )
    try:
        with torch.set_grad_enabled(grad):
            model(**inputs)
    finally:
        handle.remove()
    assert len(kept) > 10
    for output, then in kept:
        assert torch.equal(output, then)


def test_hooks_of_a_users_own_see_each_block_once_and_its_output_stays():
    model = reft_model(tiny_model("llama"), **CONFIG)
    seen = []
    for layer in model.get_base_model().model.layers:
        layer.register_forward_hook(lambda module, args, output: seen.append((output, output.clone())))
    with torch.no_grad():
        states = model(**batch(6, 6), output_hidden_states=True).hidden_states
    assert len(seen) == 3
    for output, then in seen:
        assert torch.equal(output, then)
    for (output, _), state in zip(seen[:2], states[1:]):
        assert torch.equal(output, state)
    assert len(get_interventions(model)) == 3
