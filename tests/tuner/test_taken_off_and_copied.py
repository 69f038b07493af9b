"""Memory is freed, unload leaves nothing, copies are models of their own, and kept outputs stay what they were."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from conftest import batch, logits, randomize, reft_model, tiny_model
from edit_spy import edited_columns
from model_state import assert_as_before, state_of
from peft import LoraConfig, PeftConfig, get_peft_model
from torch.nn.modules.module import register_module_forward_hook

from peft_reft import ReftConfig

CONFIG = {"positions": "f1+l1", "r": 2, "task_type": "CAUSAL_LM"}


def labelled(ids):
    return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(ids.shape[1]) < 3, -100)}


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
        del before["hooks"]  # transformers leaves one of its own on the embedding
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


LORA = {"target_modules": ["q_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}


def with_lora(how):
    """A model with a LoRA, as it is used, and what ReFT is put on next."""
    torch.manual_seed(0)
    if how == "native":
        model = tiny_model("llama")
        model.add_adapter(LoraConfig(**LORA))
        return model, model
    model = get_peft_model(tiny_model("llama"), LoraConfig(**LORA)).eval()
    return model, model if how == "around" else model.get_base_model()


@pytest.mark.parametrize("how", ["native", "around", "same base", "lora second"])
def test_unload_leaves_a_lora_of_the_same_model_at_work(how):
    lora, below = with_lora(how)
    inputs, base = batch(6, 4), tiny_model("llama")
    expected = logits(lora, inputs)
    assert (expected - logits(base, inputs)).abs().max() > 1e-3
    if how == "lora second":
        model, loras = reft_model(base, **CONFIG), lora.state_dict()
        lora = get_peft_model(base, LoraConfig(**LORA), adapter_name="second").eval()
        lora.load_state_dict({key.replace("default", "second"): tensor for key, tensor in loras.items()}, strict=False)
    else:
        model = reft_model(below, adapter="reft_one", **CONFIG)
        base = below
    assert (logits(lora, inputs) - expected).abs().max() > 1e-3
    assert model.unload() is base
    torch.testing.assert_close(logits(lora, inputs), expected)
    assert not any("reft" in name for name in lora.state_dict())


@pytest.mark.parametrize("method", ["unload", "merge_and_unload"])
def test_a_model_works_on_when_a_lora_below_it_is_taken_off(method, tmp_path):
    lora, below = with_lora("same base")
    model, inputs = reft_model(below, **CONFIG), batch(6, 4)
    with_both = logits(model, inputs)
    getattr(lora, method)()
    expected = with_both if method == "merge_and_unload" else logits(reft_model(tiny_model("llama"), **CONFIG), inputs)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-4)
    model.generate(**inputs, max_new_tokens=2)
    model.save_pretrained(tmp_path)
    model.train()(**labelled(batch(6, 6)["input_ids"])).loss.backward()
    assert PeftConfig.from_pretrained(tmp_path).positions == CONFIG["positions"]


def test_of_two_tuners_each_knows_the_adapters_that_the_other_put_on():
    base, inputs = tiny_model("llama"), batch(6, 4)
    first = reft_model(base, **CONFIG)
    reft_model(base, adapter="second", **CONFIG).unload()
    third = reft_model(base, adapter="third", seed=3, **CONFIG)
    wanted = [logits(third, inputs)[0], logits(third, inputs, adapter_names=["__base__"] * 2)[1]]
    assert (wanted[1] - logits(third, inputs)[1]).abs().max() > 1e-3
    found = logits(first, inputs, adapter_names=["third", "__base__"])
    torch.testing.assert_close([*found], wanted, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): default. The ReFT adapters .* \['third'\]"):
        logits(first, inputs, adapter_names=["default"] * 2)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "deepcopy of the base", "pickle of the base"])
@pytest.mark.parametrize("after", ["nothing", "generate", "labelled", "with gradients", "training step"])
def test_a_copy_of_a_model_computes_the_same_and_is_a_model_of_its_own(after, how):
    model = reft_model(tiny_model("llama", eos_token_id=None), **CONFIG)
    inputs = batch(6, 4, side="left")
    if after == "generate":
        model.generate(**inputs, max_new_tokens=2)
    elif after == "labelled":
        logits(model, inputs, labels=inputs["input_ids"])
    elif after == "with gradients":
        model(**inputs)
    elif after == "training step":
        model.train()(**labelled(batch(6, 6)["input_ids"])).loss.backward()
        model.eval()
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
    assert edited_columns(model, tiny_model("llama"), **inputs) == [[0, 5] if positions == "f1+l1" else [*range(6)]] * 2


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
    with torch.no_grad():
        plain = tiny_model("llama")(**batch(6, 6), output_hidden_states=True).hidden_states[1]
    assert (states[1] != plain).any(-1).tolist() == [[True, False, False, False, False, True]] * 2
