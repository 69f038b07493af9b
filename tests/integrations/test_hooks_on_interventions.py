"""What waits for an intervention to be called, as for any module: hooks of a user's own, norms, pruning, sharding."""

import pytest
import torch
import torch.distributed
import torch.nn.utils.prune
from conftest import batch, logits, reft_model, tiny_model
from torch.distributed.fsdp import fully_shard

from peft_reft import get_interventions

CONFIG = {"positions": "f1+l1", "r": 2, "task_type": "CAUSAL_LM"}


def interventions_of(model):
    return [intervention for groups in get_interventions(model).values() for intervention in groups]


def labelled():
    inputs = batch(7, 7)
    return {**inputs, "labels": inputs["input_ids"].masked_fill(torch.arange(7) < 3, -100)}


def train(model, steps=3):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**labelled()).loss.backward()
        optimizer.step()
    return model.eval()


def called_as_modules(model, inputs):
    """Logits of the base model with hooks on its blocks that call the adapter's interventions."""
    base = tiny_model("llama")

    def hook_of(intervention):
        def hook(block, args, output):
            output = output.clone()
            output[:, [0, -1]] = intervention(output[:, [0, -1]])
            return output

        return hook

    for name, (intervention,) in get_interventions(model).items():
        base.get_submodule(name).register_forward_hook(hook_of(intervention))
    return logits(base, inputs)


WITH_HOOKS = {
    "l1_unstructured": lambda module: torch.nn.utils.prune.l1_unstructured(module, "weight", amount=0.5),
    "weight_norm": lambda module: torch.nn.utils.weight_norm(module, "weight"),
    "spectral_norm": lambda module: torch.nn.utils.spectral_norm(module, "weight"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("after_a_forward", [False, True])
@pytest.mark.parametrize("how", WITH_HOOKS)
def test_weights_that_a_hook_works_out_are_worked_out_in_each_forward(how, after_a_forward):
    """Training went on with the weights of the moment at which the hook was put on, or failed."""
    model = reft_model(tiny_model("llama"), **CONFIG)
    if after_a_forward:
        logits(model, batch(7, 7))
    before = [intervention.weight.detach().clone() for intervention in interventions_of(model)]
    for intervention in interventions_of(model):
        WITH_HOOKS[how](intervention)
    train(model.train())
    inputs = batch(7, 7, seed=3)
    found = logits(model, inputs)
    torch.testing.assert_close(found, called_as_modules(model, inputs), rtol=1e-4, atol=1e-5)
    for intervention, old in zip(interventions_of(model), before):
        assert (intervention.weight - old).abs().max() > 1e-3


REGISTER = ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]


@pytest.mark.parametrize("register", REGISTER)
def test_a_hook_of_a_users_own_is_called_and_the_result_is_the_same(register):
    plain = reft_model(tiny_model("llama"), **CONFIG).train()
    plain(**labelled()).loss.backward()
    model = reft_model(tiny_model("llama"), **CONFIG).train()
    calls = []
    handles = []
    for intervention in interventions_of(model):
        handles.append(getattr(intervention, register)(lambda module, *_: calls.append(module)))
    model(**labelled()).loss.backward()
    assert {*calls} == {*interventions_of(model)}
    for one, other in zip(interventions_of(model), interventions_of(plain)):
        torch.testing.assert_close(one.weight.grad, other.weight.grad, rtol=1e-4, atol=1e-6)
    for handle in handles:
        handle.remove()
    calls.clear()
    model(**labelled())
    assert calls == []


def test_a_forward_hook_changes_what_the_intervention_returns():
    model, inputs = reft_model(tiny_model("llama"), **CONFIG), batch(7, 7)
    before = logits(model, inputs)
    for intervention in interventions_of(model):
        intervention.register_forward_hook(lambda module, args, output: args[0])
    torch.testing.assert_close(logits(model, inputs), logits(tiny_model("llama"), inputs), rtol=1e-4, atol=1e-5)
    assert (before - logits(model, inputs)).abs().max() > 1e-2


@pytest.fixture
def _one_process():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("reshard", [True, False])
def test_every_module_with_weights_may_be_sharded_by_itself(reshard):
    """As a policy does that wraps whatever has weights, with FSDP2."""
    expected = train(reft_model(tiny_model("llama"), **CONFIG).train())
    model = reft_model(tiny_model("llama"), **CONFIG).train()
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    for module in list(model.modules()):
        if any(True for _ in module.parameters(recurse=False)):
            fully_shard(module, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
    train(model)
    torch.testing.assert_close(logits(model, batch(7, 4)), logits(expected, batch(7, 4)), rtol=1e-4, atol=1e-4)
    assert (logits(expected, batch(7, 4)) - logits(tiny_model("llama"), batch(7, 4))).abs().max() > 1e-2
