"""Compiled blocks, per-sample gradients, checkpoints around and inside of blocks, a base used twice."""

import functools

import pytest
import torch
import torch.utils.checkpoint
from accelerate.utils import compile_regions
from conftest import batch, logits, randomize, reft_model, tiny_model
from edit_spy import edited_columns, warnings_of
from peft import PeftModel, get_peft_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.func import functional_call, grad, vmap

from peft_reft import ReftConfig, get_interventions

CONFIG = {"positions": "f1+l1", "r": 2, "task_type": "CAUSAL_LM"}


def llama():
    return tiny_model("llama", eos_token_id=None, attn_implementation="eager")


def labelled(*lengths, prompt=3, seed=0):
    inputs = batch(*lengths, seed=seed)
    answer = (torch.arange(max(lengths)) >= prompt) & inputs["attention_mask"].bool()
    return {**inputs, "labels": inputs["input_ids"].masked_fill(~answer, -100)}


# Compiled blocks.


@pytest.fixture
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def blocks_compiled(model):
    for number, block in enumerate(model.model.layers):
        model.model.layers[number] = torch.compile(block, backend="eager")
    return model


def compiled_in_place(model):
    for block in model.model.layers:
        block.compile(backend="eager")
    return model


COMPILED = {
    "compile_regions before": lambda: reft_model(compile_regions(llama(), backend="eager"), **CONFIG),
    "compile_regions after": lambda: compile_regions(reft_model(llama(), **CONFIG), backend="eager"),
    "torch.compile of each block before": lambda: reft_model(blocks_compiled(llama()), **CONFIG),
    "block.compile() before": lambda: reft_model(compiled_in_place(llama()), **CONFIG),
}


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("how", COMPILED)
def test_an_adapter_on_compiled_blocks_edits_the_same(how):
    plain, model = reft_model(llama(), **CONFIG), COMPILED[how]()
    for inputs in (labelled(8, 5), batch(8, 5), batch(6, 6, seed=3)):
        torch.testing.assert_close(logits(model, inputs), logits(plain, inputs), rtol=1e-4, atol=1e-5)
    settings = {"max_new_tokens": 3, "do_sample": False}
    prompt = batch(6, 4, side="left")
    assert torch.equal(model.generate(**prompt, **settings), plain.generate(**prompt, **settings))
    assert (logits(plain, batch(6, 6)) - logits(llama(), batch(6, 6))).abs().max() > 1e-3


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("how", [name for name in COMPILED if "before" in name])
def test_an_adapter_trained_on_compiled_blocks_is_saved_for_plain_ones(how, tmp_path):
    model = COMPILED[how]()
    model.train()(**labelled(8, 5)).loss.backward()
    grads = [p.grad for name, p in model.named_parameters() if "reft_" in name]
    assert grads
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in grads)
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    torch.testing.assert_close(logits(loaded, batch(8, 5)), logits(model, batch(8, 5)), rtol=1e-4, atol=1e-5)


# torch.func.


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def loss_of(model, parameters, ids, labels):
    arguments = {"input_ids": ids[None], "labels": labels[None], "use_cache": False}
    return functional_call(model, parameters, args=(), kwargs=arguments).loss


@pytest.mark.parametrize("settings", [{}, {"positions": "all"}, {"intervention": "direft"}], ids=str)
@pytest.mark.parametrize("how", ["functional_call", "grad", "vmap of grad"])
def test_gradients_per_sample_are_those_of_each_sample_alone(how, settings):
    model = reft_model(llama(), **{**CONFIG, **settings})
    inputs = labelled(8, 8, 8)
    rows = list(zip(inputs["input_ids"], inputs["labels"]))
    parameters = trained(model)
    expected = {name: [] for name in parameters}
    for ids, labels in rows:
        model.zero_grad()
        model(input_ids=ids[None], labels=labels[None]).loss.backward()
        for name, parameter in parameters.items():
            expected[name].append(parameter.grad.clone())
    model.zero_grad()
    loss = functools.partial(loss_of, model)
    if how == "functional_call":
        single = [torch.autograd.grad(loss(parameters, *row), list(parameters.values())) for row in rows]
        found = {name: torch.stack(column) for name, column in zip(parameters, zip(*single))}
    elif how == "grad":
        single = [grad(loss)(parameters, *row) for row in rows]
        found = {name: torch.stack([row[name] for row in single]) for name in parameters}
    else:
        found = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, inputs["input_ids"], inputs["labels"])
    for name, gradients in expected.items():
        torch.testing.assert_close(found[name], torch.stack(gradients), rtol=1e-3, atol=1e-5)
    assert max(gradient.abs().max() for gradients in expected.values() for gradient in gradients) > 1e-3


def test_functional_call_uses_the_parameters_it_is_given():
    model = reft_model(llama(), **CONFIG)
    other = {name: torch.randn_like(parameter) for name, parameter in trained(model).items()}
    inputs = batch(7, 7)
    before = logits(model, inputs)
    with torch.no_grad():
        got = functional_call(model, other, args=(), kwargs={**inputs, "use_cache": False}).logits
    torch.testing.assert_close(logits(model, inputs), before)
    with torch.no_grad():
        for name, parameter in trained(model).items():
            parameter.copy_(other[name])
    torch.testing.assert_close(got, logits(model, inputs))
    assert (got - before).abs().max() > 1e-3


@pytest.mark.parametrize("part", ["basis", "weight", "bias"])
def test_vmap_runs_many_values_of_a_part_of_the_parameters(part):
    model, inputs = reft_model(llama(), **CONFIG).requires_grad_(False), {**batch(5, 5), "use_cache": False}
    name, parameter = next((n, p) for n, p in model.named_parameters() if ".reft." in n and n.endswith(part))

    def run(value):
        return functional_call(model, {name: value}, args=(), kwargs=inputs).logits

    values = torch.stack([parameter, torch.randn_like(parameter), -parameter])
    expected = torch.stack([run(value) for value in values])
    torch.testing.assert_close(vmap(run)(values), expected)
    assert (expected[0] - expected[1]).abs().max() > 1e-3


@pytest.mark.parametrize("how", ["functional_call", "tensors in the place of parameters"])
def test_forward_mode_derivatives_are_not_those_of_factors_that_are_remembered(how):
    model, inputs = reft_model(llama(), **CONFIG).requires_grad_(False), batch(6, 4)
    weights = {n: p for n, p in model.named_parameters() if ".reft." in n and n.endswith("weight")}
    along = {name: torch.randn_like(weight) for name, weight in weights.items()}

    def moved(step):
        return functional_call(model, {n: w + step * along[n] for n, w in weights.items()}, (), inputs).logits

    wanted = (moved(1e-3) - moved(-1e-3)) / 2e-3
    moved(0.0)  # whose factors have no derivative
    with torch.autograd.forward_ad.dual_level():
        duals = {n: torch.autograd.forward_ad.make_dual(w.clone(), along[n]) for n, w in weights.items()}
        if how == "functional_call":
            output = functional_call(model, duals, (), inputs).logits
        else:
            for name, dual in duals.items():
                intervention = model.get_submodule(name.rpartition(".")[0])
                del intervention.weight
                intervention.weight = dual
            output = model(**inputs).logits
        found = torch.autograd.forward_ad.unpack_dual(output).tangent
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)
    assert wanted.abs().max() > 1


# Checkpoints.


def gradients(model, batches):
    loss = sum((-1) ** number * model(**inputs, use_cache=False).loss for number, inputs in enumerate(batches))
    loss.backward()
    return {
        name.replace("_checkpoint_wrapped_module.", ""): parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


TARGETS = {"blocks": {}, "mlp": {"target_modules": ["mlp"]}, "inside the mlp": {"target_modules": ["down_proj"]}}


@pytest.mark.parametrize("positions", ["f2+l2", "all", "l1+d2"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("how", ["transformers", "transformers reentrant", *CheckpointImpl], ids=str)
def test_two_forwards_before_one_backward_give_exact_gradients_of_checkpointed_blocks(how, target, positions):
    settings = {**CONFIG, **TARGETS[target], "positions": positions}
    batches = [labelled(9, 6, prompt=5), labelled(4, 7, 3, prompt=2, seed=4)]

    def fresh():
        return randomize(get_peft_model(tiny_model("llama"), ReftConfig(**settings)))

    expected = gradients(fresh().train(), batches)
    model = fresh()
    model.enable_input_require_grads()
    if isinstance(how, CheckpointImpl):
        block = type(model.get_base_model().model.layers[0])
        apply_activation_checkpointing(
            model,
            checkpoint_wrapper_fn=functools.partial(checkpoint_wrapper, checkpoint_impl=how),
            check_fn=lambda module: isinstance(module, block),
        )
    else:
        model.gradient_checkpointing_enable({"use_reentrant": "reentrant" in how})
    found = gradients(model.train(), batches)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        assert gradient.abs().max() > 0
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-3


@pytest.mark.parametrize("how", [CheckpointImpl.REENTRANT, CheckpointImpl.NO_REENTRANT])
def test_interventions_that_blocks_share_get_the_gradients_of_all_when_blocks_are_checkpointed(how):
    gradients_of = []
    for checkpointed in (False, True):
        model = reft_model(llama(), **CONFIG, share_layers=True).train()
        model.enable_input_require_grads()
        if checkpointed:
            apply_activation_checkpointing(
                model.get_base_model(),
                checkpoint_wrapper_fn=functools.partial(checkpoint_wrapper, checkpoint_impl=how),
                check_fn=lambda module: type(module).__name__ == "LlamaDecoderLayer",
            )
        model(**labelled(8, 5), use_cache=False).loss.backward()
        gradients_of.append([p.grad for name, p in model.named_parameters() if "reft_" in name])
    assert len(gradients_of[0]) == 3
    for one, other in zip(*gradients_of):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)
        assert one.abs().max() > 0


@pytest.mark.parametrize("target", TARGETS)
def test_a_forward_between_a_checkpointed_forward_and_its_backward_changes_no_gradient(target):
    settings = {**CONFIG, **TARGETS[target]}

    def step(between):
        model = randomize(get_peft_model(tiny_model("llama"), ReftConfig(**settings))).train()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = model(**labelled(9, 6)).loss
        if between:
            with torch.no_grad():
                model(**labelled(5, 8, 3, prompt=1, seed=2))
                model.eval().generate(**batch(4, 4), max_new_tokens=2)
        loss.backward()
        return [parameter.grad for parameter in trained(model).values()]

    for one, other in zip(step(True), step(False)):
        torch.testing.assert_close(one, other)


# A base that already has an adapter.


class OwnCheckpoint(torch.nn.Module):
    """A checkpoint of a user's own around a block, which nothing of ours sees."""

    def __init__(self, block, reentrant):
        super().__init__()
        self.block, self.reentrant = block, reentrant

    def forward(self, hidden_states, **kwargs):
        run = functools.partial(self.block, **kwargs)
        return torch.utils.checkpoint.checkpoint(run, hidden_states, use_reentrant=self.reentrant)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_users_own_checkpoint_around_blocks_of_positions_all_raises_in_training_and_warns_otherwise(
    reentrant, training
):
    """Its second run knows no padding; torch sees by itself that it saves other tensors, if it is not reentrant."""
    model = reft_model(llama(), **{**CONFIG, "positions": "all"}).train(training)
    model.enable_input_require_grads()
    layers = model.get_base_model().model.layers
    for number, block in enumerate(layers):
        layers[number] = OwnCheckpoint(block, reentrant)
    loss = model(**labelled(8, 5), use_cache=False).loss
    told = "outside of its model's forward.*gradient_checkpointing_enable"
    if training:
        with pytest.raises(ValueError, match=told):
            loss.backward()
        return
    with pytest.warns(UserWarning, match=told):
        try:
            loss.backward()
        except torch.utils.checkpoint.CheckpointError:
            assert not reentrant


@pytest.mark.parametrize("training", [True, False])
def test_a_block_of_a_module_without_ids_runs_by_itself_in_training(training):
    """There is no padding that could be edited."""
    model = reft_model(
        torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)), positions="all", target_modules=["0", "1"]
    )
    block, h = model.get_base_model()[0].train(training), torch.randn(2, 5, 8)
    assert warnings_of(lambda: block(h).sum().backward()) == []
    (edit,) = get_interventions(model)["0"]
    assert edit.bias.grad.abs().max() > 0


def test_a_block_that_is_called_by_itself_without_gradients_edits_all_and_says_nothing():
    model = reft_model(llama(), **{**CONFIG, "positions": "all"})
    base = model.get_base_model()
    hidden = torch.randn(2, 5, 32)
    states = {"position_embeddings": base.model.rotary_emb(hidden, torch.arange(5)[None])}
    found = []
    with torch.no_grad():
        assert warnings_of(lambda: found.append(base.model.layers[0](hidden, **states))) == []
    plain = llama().model.layers[0](hidden, **states)
    (edit,) = get_interventions(model)["model.layers.0"]
    torch.testing.assert_close(found[0], edit(plain), rtol=1e-4, atol=1e-5)
    assert (found[0] - plain).abs().max() > 1e-2


def test_a_second_get_peft_model_on_one_base_leaves_one_adapter(tmp_path):
    """As a cell of a notebook that is run twice; PEFT warns, as for LoRA, and what is saved loads again."""
    base = tiny_model("llama")
    reft_model(base, **CONFIG)
    second = ReftConfig(**{**CONFIG, "positions": "l1", "layers_to_transform": [0], "init_weights": False})
    with pytest.warns(UserWarning, match="modify a model with PEFT for a second time"):
        model = get_peft_model(base, second).eval()
    assert list(get_interventions(model)) == ["model.layers.0"]
    assert edited_columns(model, tiny_model("llama"), **batch(6, 4)) == [[5], [3]]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path).eval()
    torch.testing.assert_close(logits(loaded, batch(6, 4)), logits(model, batch(6, 4)))


def test_the_same_get_peft_model_twice_computes_one_edit():
    base = tiny_model("llama")
    reft_model(base, **CONFIG)
    with pytest.warns(UserWarning, match="modify a model with PEFT for a second time"):
        model = get_peft_model(base, ReftConfig(**CONFIG)).eval()
    randomize(model, seed=5)
    expected = reft_model(tiny_model("llama"), seed=5, **CONFIG)
    torch.testing.assert_close(logits(model, batch(6, 4)), logits(expected, batch(6, 4)))
    assert (logits(model, batch(6, 4)) - logits(tiny_model("llama"), batch(6, 4))).abs().max() > 1e-3
