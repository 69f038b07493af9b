"""What stands in for a block's forward stays in force, whatever else is put in its place, and costs no hook."""

import copy
import functools
import gc
import inspect
import pickle
import types
import weakref

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from conftest import batch, logits, reft_model, tiny_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

from peft_reft import ReftConfig
from peft_reft.context.block import BlockEntry

CONFIG = {"positions": "f1+l1", "r": 2, "task_type": "CAUSAL_LM"}


@pytest.fixture
def model():
    return reft_model(tiny_model("llama", eos_token_id=None), **CONFIG).eval()


def blocks_of(model):
    return model.get_base_model().model.layers


def edited(model, inputs):
    """The model's logits, which are not those of the model without its adapter."""
    found = logits(model, inputs)
    with model.disable_adapter():
        assert not torch.allclose(found, logits(model, inputs), atol=1e-3)
    return found


def wraps_around(block):
    add_hook_to_module(block, ModelHook())


def wraps_around_twice(block):
    wraps_around(block)
    wraps_around(block)


def wraps_around_and_goes(block):
    wraps_around(block)
    remove_hook_from_module(block)


def forgets_what_was_there(block):
    block.__dict__.pop("forward")


WAYS = [wraps_around, wraps_around_twice, wraps_around_and_goes, forgets_what_was_there]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_block_is_edited_once_whatever_is_put_in_place_of_its_forward(model, way):
    inputs = batch(6, 4, seed=2)
    wanted = edited(model, inputs)
    for block in blocks_of(model):
        way(block)
    torch.testing.assert_close(logits(model, inputs), wanted, rtol=0, atol=0)
    torch.testing.assert_close(logits(model, inputs), wanted, rtol=0, atol=0)


def test_accelerate_may_put_its_own_there_before_and_after(model):
    inputs, base = batch(6, 4, seed=2), tiny_model("llama", eos_token_id=None)
    wanted = edited(model, inputs)
    for block in base.model.layers:
        wraps_around(block)
    late = reft_model(base, **CONFIG).eval()
    torch.testing.assert_close(logits(late, inputs), wanted, rtol=0, atol=0)
    for block in blocks_of(late):
        wraps_around(block)  # which forgets what was put there since it did so first
    torch.testing.assert_close(logits(late, inputs), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("way", [None, *WAYS], ids=lambda way: "nothing" if way is None else way.__name__)
def test_an_unloaded_model_computes_what_its_base_does(model, way):
    inputs = batch(6, 4, seed=2)
    with model.disable_adapter():
        wanted = logits(model, inputs)
    assert not torch.allclose(logits(model, inputs), wanted, atol=1e-3)
    for block in blocks_of(model):
        if way is not None:
            way(block)
    logits(model, inputs)
    base = model.unload()
    torch.testing.assert_close(logits(base, inputs), wanted, rtol=0, atol=0)
    if way is None:
        assert not any("forward" in block.__dict__ for block in base.model.layers)


def test_blocks_get_no_hook_and_keep_their_signature(model):
    for block in blocks_of(model):
        assert not (block._forward_hooks or block._forward_pre_hooks)
        assert isinstance(block.forward, BlockEntry)
    signatures = [
        inspect.signature(block.forward) for block in (blocks_of(model)[0], tiny_model("llama").model.layers[0])
    ]
    assert signatures[0] == signatures[1]


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copied_model_runs_its_own_blocks(model, copied):
    inputs = batch(6, 4, seed=2)
    wanted = edited(model, inputs)
    other = copied(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(logits(other, inputs), wanted, rtol=0, atol=0)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda block: pickle.loads(pickle.dumps(block))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("positions", ["all", "f1+l1"])
def test_a_copied_block_leaves_its_model_behind_and_edits_by_its_own_weights(positions, copied):
    model = reft_model(tiny_model("llama"), **{**CONFIG, "positions": positions}).eval()
    block, base = blocks_of(model)[1], model.get_base_model()
    hidden = torch.randn(2, 5, base.config.hidden_size)
    turned = base.model.rotary_emb(hidden, torch.arange(5)[None])
    other, left = copied(block), weakref.ref(base)
    with torch.no_grad():
        if positions == "all":
            wanted = block(hidden, position_embeddings=turned)
            torch.testing.assert_close(other(hidden, position_embeddings=turned), wanted, rtol=0, atol=0)
            other.reft.requires_grad_(False).apply(lambda part: [p.zero_() for p in part._parameters.values()])
            assert not torch.allclose(other(hidden, position_embeddings=turned), wanted, atol=1e-3)
            torch.testing.assert_close(block(hidden, position_embeddings=turned), wanted, rtol=0, atol=0)
        else:
            with pytest.raises(ValueError, match=r"outside of its model's forward.*del block\.reft"):
                other(hidden, position_embeddings=turned)
        del other.reft
        with model.disable_adapter():
            plain = block(hidden, position_embeddings=turned)
        torch.testing.assert_close(other(hidden, position_embeddings=turned), plain, rtol=0, atol=0)
    held, seen = [copied(block)], set()
    while held:  # whatever a copy refers to
        one = held.pop()
        if id(one) not in seen and not isinstance(one, (type, types.ModuleType, types.FunctionType)):
            seen.add(id(one))
            assert not isinstance(one, type(base)) and one is not left()
            held += gc.get_referents(one)


@pytest.mark.parametrize("whole", ["first", "last"])
def test_parts_that_are_copied_with_their_model_belong_to_the_copy(model, whole):
    base, inputs = model.get_base_model(), batch(6, 4, seed=2)
    wanted = edited(model, inputs)
    parts = [base.model.layers[1], base.model]
    found = copy.deepcopy([model, *parts] if whole == "first" else [*parts, model])
    other = found[0 if whole == "first" else -1]
    torch.testing.assert_close(edited(other, inputs), wanted, rtol=0, atol=0)
    other.add_adapter("second", ReftConfig(**CONFIG))
    torch.testing.assert_close(logits(other, inputs, adapter_names=["default"] * 2), wanted, rtol=0, atol=0)
    other.delete_adapter("default")
    other.set_adapter("second")
    with model.disable_adapter():
        torch.testing.assert_close(logits(other, inputs), logits(model, inputs), rtol=0, atol=0)


def replica_of(module):
    """What torch.nn.parallel.replicate makes of a module for one more device."""
    replicas = {id(part): part._replicate_for_data_parallel() for part in module.modules()}
    for part in module.modules():
        replica = replicas[id(part)]
        for name, child in part._modules.items():
            replica._modules[name] = None if child is None else replicas[id(child)]
        for name, parameter in part._parameters.items():
            setattr(replica, name, None if parameter is None else parameter.detach().clone())
        for name, buffer in part._buffers.items():
            replica._buffers[name] = None if buffer is None else buffer.clone()
    return replicas[id(module)]


def test_the_replica_of_a_model_runs_its_own_blocks(model):
    inputs = batch(6, 4, seed=2)
    wanted = edited(model, inputs)
    replica = replica_of(model.get_base_model())
    with torch.no_grad():
        for parameter in blocks_of(model).parameters():
            parameter.zero_()
        found = replica(**inputs).logits
    torch.testing.assert_close(found[inputs["attention_mask"].bool()], wanted[inputs["attention_mask"].bool()])


def test_offloaded_blocks_are_edited(model):
    inputs = batch(6, 4, seed=2)
    wanted = edited(model, inputs)
    offloaded = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    torch.testing.assert_close(logits(offloaded, inputs), wanted)


def test_the_replica_of_a_model_that_continues_a_cache_runs_its_own_modules(model):
    inputs = batch(6, 6, seed=2)
    following = {"input_ids": torch.tensor([[5], [6]]), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        wanted = model(**following, past_key_values=copy.deepcopy(cache)).logits
        replica = replica_of(model.get_base_model())
        for parameter in model.parameters():
            parameter.zero_()
        found = replica(**following, past_key_values=cache).logits
    torch.testing.assert_close(found, wanted)


def test_the_replica_of_a_model_is_freed_after_its_call(model):
    replica = replica_of(model.get_base_model())
    logits(replica, batch(6, 4, seed=2))
    kept = weakref.ref(replica.model.layers[0].reft)
    del replica
    gc.collect()
    assert kept() is None
    assert blocks_of(model)[0].reft.state.running.replica is None


@pytest.mark.parametrize("inside", ["self_attn", "linear1", "linear2", "norm2"])
def test_modules_of_torchs_own_layer_are_edited_at_inference_as_in_training(inside):
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    model = reft_model(nn.Sequential(layer), target_modules=[inside], positions="all")
    x = torch.randn(2, 5, 16)
    trained = model.train()(x).detach()
    with torch.no_grad(), model.disable_adapter():
        assert not torch.allclose(model(x), trained, atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), trained)
    model.unload()
    assert not any(module._forward_pre_hooks for module in layer.modules())


def test_the_projection_of_torchs_own_attention_is_refused():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    with pytest.raises(ValueError, match="never called"):
        reft_model(nn.Sequential(layer), target_modules=["out_proj"], positions="all")


@pytest.mark.parametrize("positions", ["f1+l1", "all"])
@pytest.mark.parametrize("kind", CheckpointImpl, ids=lambda kind: kind.name)
def test_the_first_step_after_something_took_the_place_of_forward_replays_its_call(kind, positions):
    def gradients(changed):
        model = reft_model(tiny_model("llama"), positions=positions, r=2, task_type="CAUSAL_LM").train()
        model.enable_input_require_grads()
        base = model.get_base_model()
        if changed:
            wrapper = functools.partial(checkpoint_wrapper, checkpoint_impl=kind)
            apply_activation_checkpointing(
                base, checkpoint_wrapper_fn=wrapper, check_fn=lambda module: module in set(base.model.layers)
            )
            base.forward = functools.partial(base.forward)
        inputs = batch(6, 4, seed=2)
        model(
            **inputs, labels=inputs["input_ids"].index_fill(1, torch.arange(3), -100), use_cache=False
        ).loss.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    wanted = gradients(changed=False)
    assert len(wanted) == 9
    torch.testing.assert_close(gradients(changed=True), wanted)
