"""Interventions against slow reference code: values, gradients, precision, initialisation, size, and one's own."""

from __future__ import annotations

import copy
import warnings

import pytest
import reference
import torch
from conftest import HIDDEN, batch, inputs_of, logits, randomize, reft_model, tiny_model
from peft import PeftModel, get_peft_model
from torch import nn

import peft_reft.interventions.registry
from peft_reft import Intervention, ReftConfig, get_interventions, register_intervention
from peft_reft.interventions import (
    FactorMemo,
    build_intervention,
    kind_of,
    low_rank_edit,
    orthonormal_rows,
    stack_factors,
)

KINDS = list(reference.EQUATIONS)
WITH_R = list(reference.ORTHONORMAL)
FREE = [kind for kind in KINDS if kind not in WITH_R]
SIZES = [(8, 1), (16, 4), (24, 8), (5, 5)]  # (d, r)
CAN_START_AT_ZERO = ["loreft", "noreft", "direft", "odireft"]


def random_intervention(kind, d=16, r=4, seed=0, **settings):
    torch.manual_seed(seed)
    module = build_intervention(kind, d, r, init_weights=False, **settings)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.7)
        if kind in reference.CONSTANT:  # so that an activation lets something through
            module.weight.abs_()
    return module


def orthonormality_error(rows):
    rows = rows.double()
    return (rows @ rows.mT - torch.eye(rows.shape[-2], dtype=torch.float64)).abs().max().item()


def random_group(kind, groups, seed, **settings):
    """The interventions of one block: one per position group."""
    return [random_intervention(kind, seed=10 * seed + group, **settings) for group in range(groups)]


# Values.


@pytest.mark.parametrize("act_fn", [None, "relu", "tanh", "gelu"])
@pytest.mark.parametrize(("d", "r"), SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_each_equation_matches_the_reference_in_double_precision(kind, d, r, act_fn):
    module = random_intervention(kind, d, r, act_fn=act_fn).double()
    h = torch.randn(3, d, dtype=torch.float64)
    out = module(h)
    torch.testing.assert_close(out, reference.edit_vectors(kind, module, h, act_fn), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(out, h)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (2, 2, 3), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_vector_is_edited_whatever_the_leading_shape(kind, shape):
    module = random_intervention(kind)
    h = torch.randn(*shape, 16)
    out = module(h)
    assert out.shape == h.shape
    expected = reference.edit_vectors(kind, module, h).float() if h.numel() else h
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("h_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_edit_is_exact_to_the_precision_of_h_and_keeps_its_dtype(kind, weight_dtype, h_dtype):
    module = random_intervention(kind).to(weight_dtype)
    h = torch.randn(5, 16).to(h_dtype)
    out = module(h)
    assert out.dtype == h_dtype
    # One rounding of the edit and one of the sum; inside, at least single precision.
    tolerance = 4 * max(torch.finfo(h_dtype).eps, 2e-6)
    expected = reference.edit_vectors(kind, module, h)
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("act_fn", [None, "gelu"])
@pytest.mark.parametrize("kind", KINDS)
def test_stacked_factors_give_the_edits_of_the_modules(kind, act_fn):
    modules = random_group(kind, 3, 1, act_fn=act_fn)
    h = torch.randn(3, 5, 16)
    edit = low_rank_edit(h, stack_factors(modules), torch.ones(3, 5, 1))
    for module, vectors, got in zip(modules, h, edit):
        torch.testing.assert_close(got, module.edit(vectors), rtol=1e-5, atol=1e-5)
        expected = reference.edit_vectors(kind, module, vectors, act_fn) - vectors
        torch.testing.assert_close(got.double(), expected.double(), rtol=1e-5, atol=1e-5)


def test_unlike_interventions_are_of_different_kinds():
    modules = [
        random_intervention("loreft"),
        random_intervention("loreft", r=2),
        random_intervention("loreft", d=8),
        random_intervention("noreft"),
        random_intervention("odireft"),
        random_intervention("loreft", act_fn="relu"),
        random_intervention("loreft", dropout=0.5),
        random_intervention("loreft", train_bias=False),
        random_intervention("consreft"),
        random_intervention("loreft").double(),
    ]
    assert len({kind_of(module) for module in modules}) == len(modules)
    assert kind_of(modules[0]) == kind_of(random_intervention("loreft", seed=1))
    assert kind_of(torch.nn.Linear(3, 3)) is None


@pytest.mark.parametrize("kind", KINDS)
def test_stacked_factors_give_the_gradients_of_the_modules(kind):
    module = random_intervention(kind, act_fn="tanh")
    h, weight = torch.randn(5, 16), torch.randn(5, 16)
    edit = low_rank_edit(h[None], stack_factors([module]), torch.ones(1, 5, 1))
    (edit * weight).sum().backward()
    fused = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    module.zero_grad()
    (module.edit(h) * weight).sum().backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(fused[name], parameter.grad, rtol=1e-4, atol=1e-5)
        assert parameter.grad.abs().max() > 0


def test_remembered_factors_are_those_of_the_values_that_the_parameters_have_now():
    memo, modules = FactorMemo(), random_group("loreft", 2, 1)
    with torch.no_grad():
        first = memo(modules)
        assert memo(modules).up is first.up
        modules[1].bias.data.add_(1.0)  # a write that leaves no trace in the parameter
        torch.testing.assert_close(memo(modules).bias, stack_factors(modules).bias)
        assert not torch.equal(memo(modules).bias, first.bias)


@pytest.mark.parametrize("positions", ["f2+l1", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_gives_the_same_logits_with_and_without_batched_factors(kind, positions, llama, monkeypatch):
    settings = {"intervention": kind, "positions": positions}
    model, twin, inputs = reft_model(llama, **settings), reft_model(tiny_model("llama"), **settings), inputs_of(llama)
    fused = logits(model, inputs)
    with model.disable_adapter():
        assert not torch.allclose(logits(model, inputs), fused)
    asked = []  # the twin has made no plan yet; interventions of no known kind are called as modules
    monkeypatch.setattr("peft_reft.context.plan.kind_of", lambda intervention: asked.append(intervention))
    torch.testing.assert_close(logits(twin, inputs), fused, rtol=1e-4, atol=1e-4)
    assert asked == [module for (module,) in get_interventions(twin).values()]


@pytest.mark.parametrize(
    "change",
    [
        lambda parameter: parameter.mul_(2),
        lambda parameter: parameter.data.mul_(2),
        lambda parameter: setattr(parameter, "data", parameter.data * 2),
        lambda parameter: parameter.copy_(parameter + 1),
    ],
    ids=["in place", "in place through .data", "new .data", "copy_"],
)
def test_a_frozen_adapter_whose_weights_are_written_to_does_not_go_on_with_the_old_ones(change, llama):
    model = reft_model(llama).requires_grad_(False)
    inputs = inputs_of(llama)
    before = logits(model, inputs)
    assert torch.equal(logits(model, inputs), before)
    with torch.no_grad():
        for (module,) in get_interventions(model).values():
            change(module.bias)
    after = logits(model, inputs)
    assert not torch.allclose(after, before)
    twin = reft_model(tiny_model("llama"))
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(after, logits(twin, inputs))


@pytest.mark.parametrize(
    "change", [lambda model: model.double(), lambda model: model.bfloat16().float()], ids=["double", "bf16"]
)
def test_a_frozen_adapter_that_is_cast_does_not_go_on_with_the_old_weights(change, llama):
    model = reft_model(llama).requires_grad_(False)
    inputs = inputs_of(llama)
    logits(model, inputs)
    after = logits(change(model), inputs)
    twin = reft_model(tiny_model("llama"))
    torch.testing.assert_close(after, logits(change(twin), inputs))


# Gradients.


def test_a_cast_back_and_forth_leaves_a_models_logits_what_they_were(llama):
    model = reft_model(llama.double(), positions="f1+l1", r=2)
    before = logits(model, batch(6, 4))
    model.float()
    torch.testing.assert_close(logits(model, batch(6, 4)).double(), before, rtol=1e-3, atol=1e-4)


def test_activations_with_weights_of_their_own_are_each_their_interventions_own(llama):
    model = reft_model(llama, positions="all", act_fn="prelu")
    inputs = {"input_ids": batch(6)["input_ids"]}
    inputs["labels"] = inputs["input_ids"].masked_fill(torch.arange(6) < 3, -100)
    model.train()(**inputs).loss.backward()
    weights = [one.activation.weight for groups in get_interventions(model).values() for one in groups]
    assert len(weights) == 3
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in weights)


@pytest.mark.parametrize("act_fn", [None, "tanh"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_those_of_the_reference(kind, act_fn):
    module = random_intervention(kind, act_fn=act_fn).double()
    h = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 16, dtype=torch.float64)
    wanted = [h, *module.parameters()]
    got = torch.autograd.grad((module(h) * weight).sum(), wanted)
    expected = torch.autograd.grad((reference.edit_vectors(kind, module, h, act_fn) * weight).sum(), wanted)
    for name, one, other in zip(["h", *dict(module.named_parameters())], got, expected):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
        assert one.abs().max() > 0


@pytest.mark.parametrize("shape", [(1, 6), (3, 7), (4, 4), (2, 3, 5)], ids=str)
def test_orthonormal_rows_pass_gradcheck(shape):
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(orthonormal_rows, (weight,))


@pytest.mark.parametrize(("d", "r"), SIZES)
def test_orthonormal_rows_are_those_of_gram_schmidt(d, r):
    weight = torch.randn(3, r, d, dtype=torch.float64)
    for got, rows in zip(orthonormal_rows(weight), weight):
        torch.testing.assert_close(got, reference.gram_schmidt(rows), rtol=1e-10, atol=1e-10)


# Precision.


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5])
@pytest.mark.parametrize(("d", "r"), [(8, 2), (64, 8), (768, 16)])
def test_rows_are_orthonormal_and_span_the_same_space_for_any_condition(d, r, condition):
    left, right = torch.linalg.qr(torch.randn(r, r))[0], torch.linalg.qr(torch.randn(d, r))[0]
    weight = (left * torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), r)) @ right.T
    weight.requires_grad_()
    rows = orthonormal_rows(weight)
    assert rows.dtype == torch.float32
    assert orthonormality_error(rows) <= 1e-5
    # In its own (single precision) rows nothing of the weight is outside of their span.
    outside = weight.double() - weight.double() @ rows.double().mT @ rows.double()
    assert outside.abs().max() <= 1e-6
    rows.backward(torch.randn_like(rows))
    assert weight.grad.isfinite().all()
    assert weight.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(3, 6),
        torch.tensor([[1.0, 2, 3, 4], [0, 0, 0, 0], [4, 3, 2, 2]]),
        torch.tensor([[1.0, 2, 3, 4], [1, 2, 3, 4], [4, 3, 2, 2]]),
        torch.full((2, 4), 1e-20),
    ],
    ids=["all rows zero", "one row zero", "rows twice", "vanishing rows"],
)
def test_dependent_rows_give_no_nan(weight, dtype):
    weight = weight.to(dtype, copy=True).requires_grad_()
    rows = orthonormal_rows(weight)
    rows.sum().backward()
    assert rows.isfinite().all()
    assert weight.grad.isfinite().all()
    assert rows.abs().max() <= 1 + 1e-5  # shorter than 1 perhaps, never longer


@pytest.mark.parametrize("kind", WITH_R)
def test_r_stays_orthonormal_through_200_steps_of_adamw_with_weight_decay(kind):
    module = build_intervention(kind, 32, 4)
    before = module.subspace.detach().clone()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1)
    h = torch.randn(64, 32)
    target = h + torch.randn(4) @ torch.randn(4, 32)
    losses = []
    for _ in range(200):
        loss = (module(h) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    rows = module.subspace.detach()
    assert orthonormality_error(rows) <= 1e-5
    assert (rows - before).abs().max() > 0.1  # it was trained
    assert losses[-1] < 0.9 * losses[0]
    rounded = copy.deepcopy(module).bfloat16()
    assert orthonormality_error(rounded.subspace) <= 1e-2
    assert orthonormality_error(rounded.subspace.bfloat16()) <= 1e-2
    assert orthonormality_error(rounded.float().subspace) <= 1e-2
    assert (rounded.subspace - rows).abs().max() < 0.05  # and they are still the same rows


@pytest.mark.parametrize("kind", KINDS)
def test_interventions_are_differentiable_in_bfloat16(kind):
    module = random_intervention(kind).bfloat16()
    h = torch.randn(5, 16).bfloat16().requires_grad_()
    out = module(h)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    for name, tensor in [("h", h), *module.named_parameters()]:
        assert tensor.grad.isfinite().all(), name
        assert tensor.grad.abs().max() > 0, name


@pytest.mark.parametrize("h_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_autocast_changes_nothing_and_is_differentiable(kind, h_dtype):
    module = random_intervention(kind)
    h = torch.randn(5, 16).to(h_dtype)
    expected = module(h)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(h)
        loss = out.float().square().sum()
    loss.backward()
    assert torch.equal(out, expected)
    for name, parameter in module.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("setting", ["bf16 model", "bf16 model and adapter", "autocast"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_trains_in_bfloat16(kind, setting, llama):
    config = ReftConfig(intervention=kind, init_weights=False)
    if setting != "autocast":
        llama.bfloat16()
    model = get_peft_model(llama, config, autocast_adapter_dtype=setting != "bf16 model and adapter").train()
    inputs = inputs_of(llama)
    with torch.autocast("cpu", torch.bfloat16, enabled=setting == "autocast"):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in parameters.values()} == {
        torch.bfloat16 if setting == "bf16 model and adapter" else torch.float32
    }
    for name, parameter in parameters.items():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


# Size.


@pytest.mark.parametrize(("d", "r"), [(64, 4), (48, 1), (16, 16)])
@pytest.mark.parametrize("kind", KINDS)
def test_only_what_the_equation_needs_is_stored(kind, d, r):
    module = build_intervention(kind, d, r)
    wanted = r * d + r if kind in reference.CONSTANT else 2 * r * d + r
    assert sum(parameter.numel() for parameter in module.parameters()) == wanted
    assert sum(tensor.numel() for tensor in module.state_dict().values()) == wanted
    assert all(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_no_d_by_d_tensor_exists_in_memory(kind):
    d = 64
    module = build_intervention(kind, d, 4, dropout=0.1)
    module(torch.randn(2, d)).sum().backward()
    assert list(module.buffers()) == []
    tensors = [value for part in module.modules() for value in vars(part).values() if isinstance(value, torch.Tensor)]
    assert max([tensor.numel() for tensor in [*tensors, *module.parameters()]]) <= 4 * d


def test_trainable_parameters_of_a_model_are_those_of_its_interventions(llama):
    model = get_peft_model(llama, ReftConfig(r=2, positions="f1+l1", share_weights=False, layers_to_transform=[0, 2]))
    trainable, _ = model.get_nb_trainable_parameters()
    assert trainable == 2 * 2 * (2 * 2 * HIDDEN + 2)  # blocks, groups, each 2rd + r


# Initialisation.


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [*CAN_START_AT_ZERO, "lobireft", "interchange", "boundless"])
def test_an_adapter_is_made_in_single_precision_where_torchs_default_is_a_half(kind, default, llama):
    inputs = inputs_of(llama)
    base = logits(llama, inputs)
    torch.set_default_dtype(default)
    try:
        model = get_peft_model(llama, ReftConfig(intervention=kind, r=4, task_type="CAUSAL_LM")).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    weights = [parameter for groups in get_interventions(model).values() for parameter in groups.parameters()]
    assert {parameter.dtype for parameter in weights} == {torch.float32}
    assert torch.equal(logits(model, inputs), base)
    assert (
        all(orthonormality_error(one.subspace) < 1e-6 for (one,) in get_interventions(model).values()) or kind in FREE
    )


@pytest.mark.parametrize("share_weights", [True, False])
@pytest.mark.parametrize("kind", [*CAN_START_AT_ZERO, "lobireft"])
def test_a_fresh_adapter_leaves_logits_unchanged_and_can_be_trained(kind, share_weights, llama):
    inputs = inputs_of(llama)
    before = logits(llama, inputs)
    model = get_peft_model(llama, ReftConfig(intervention=kind, share_weights=share_weights)).eval()
    torch.testing.assert_close(logits(model, inputs), before, rtol=0, atol=2e-6)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter, grad in zip(parameters, torch.autograd.grad(model(**inputs).logits.square().sum(), parameters)):
        with torch.no_grad():
            parameter -= 0.1 * grad.sign()
    assert not torch.allclose(logits(model, inputs), before, atol=1e-3)


@pytest.mark.parametrize("positions", ["f2+l1", "all"])
@pytest.mark.parametrize("kind", [*CAN_START_AT_ZERO, "lobireft"])
def test_a_fresh_adapter_leaves_the_logits_of_a_bfloat16_model_unchanged(kind, positions, llama):
    inputs = inputs_of(llama.bfloat16())
    before = logits(llama, inputs)
    model = get_peft_model(llama, ReftConfig(intervention=kind, positions=positions)).eval()
    assert torch.equal(logits(model, inputs), before)
    assert not torch.equal(logits(randomize(model), inputs), before)


@pytest.mark.parametrize(
    ("kind", "act_fn"),
    [
        *((kind, act_fn) for kind in ("noreft", "direft") for act_fn in ("relu", "tanh", "gelu", "silu")),
        # relu has no slope at zero: an edit that starts there could not leave it again
        *((kind, act_fn) for kind in ("odireft", "lobireft") for act_fn in ("tanh", "gelu", "silu")),
    ],
)
def test_a_fresh_edit_with_an_activation_is_zero_where_it_can_be_and_receives_gradients(kind, act_fn):
    module = build_intervention(kind, 16, 4, act_fn=act_fn)
    h = torch.randn(5, 16)
    torch.testing.assert_close(module(h), h, rtol=0, atol=1e-6)
    (module(h) * torch.randn(5, 16)).sum().backward()
    assert max(parameter.grad.abs().max().item() for parameter in module.parameters()) > 0


@pytest.mark.parametrize(
    ("kind", "act_fn"), [("loreft", "relu"), ("odireft", "relu"), ("lobireft", "relu"), ("odireft", "sigmoid")]
)
def test_an_activation_that_rules_out_a_zero_start_is_said(kind, act_fn):
    with pytest.warns(UserWarning, match="act_fn=None"):
        module = build_intervention(kind, 16, 4, act_fn=act_fn)
    h = torch.randn(5, 16)
    assert not torch.allclose(module(h), h)
    (module(h) * torch.randn(5, 16)).sum().backward()
    assert max(parameter.grad.abs().max().item() for parameter in module.parameters()) > 0


@pytest.mark.parametrize("init_weights", [True, False])
def test_consreft_starts_from_a_random_constant_in_the_unit_interval_as_in_pyreft(init_weights):
    module = build_intervention("consreft", 64, 32, init_weights=init_weights)
    constant = module.weight
    assert 0 <= constant.min() < 0.25 < 0.75 < constant.max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_init_weights_false_draws_random_weights(kind):
    def draw(seed):
        torch.manual_seed(seed)
        return build_intervention(kind, 16, 4, init_weights=False)

    h = torch.randn(5, 16)
    first, again, other = draw(0)(h), draw(0)(h), draw(1)(h)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert (first - h).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_known_weights_draw_no_warning(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_intervention(kind, 16, 4)


@pytest.mark.parametrize("r", [0, -1, 17])
def test_a_rank_that_the_width_does_not_allow_is_rejected(r):
    with pytest.raises(ValueError, match=f"r={r} .*width 16.*between 1 and 16"):
        build_intervention("loreft", 16, r)


# Dropout.


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_drops_entries_of_the_edit_and_never_of_h(kind):
    module = random_intervention(kind, d=64, dropout=0.4).train()
    h = torch.randn(200, 64)
    out = module(h)
    full_edit = module.eval()(h) - h
    kept = ~torch.isclose(out, h, rtol=0, atol=1e-7)
    torch.testing.assert_close((out - h)[kept], (full_edit / 0.6)[kept], rtol=1e-4, atol=1e-4)
    assert torch.equal(out[~kept], h[~kept])
    assert 0.57 < kept.float().mean() < 0.63


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_off_in_eval(kind):
    module, plain = random_intervention(kind, dropout=0.9).eval(), random_intervention(kind)
    h = torch.randn(5, 16)
    assert torch.equal(module(h), plain(h))
    assert not torch.equal(module.train()(h), plain(h))


@pytest.mark.parametrize("positions", ["f3", "all"])
def test_dropout_of_a_model_drops_entries_of_the_edit_and_never_of_h(positions, llama):
    inputs = inputs_of(llama, 7, 7)
    with torch.no_grad():
        base = llama(**inputs, output_hidden_states=True).hidden_states[1]
    model = reft_model(llama, positions=positions, dropout=0.5, layers_to_transform=0)

    def first_block():
        with torch.no_grad():
            return model(**inputs, labels=inputs["input_ids"] * 0 - 100, output_hidden_states=True).hidden_states[1]

    full_edit = first_block() - base
    edited = full_edit.abs().sum(-1) > 0
    assert edited.sum() == 2 * (3 if positions == "f3" else 7)
    edit = torch.stack([model.train() and first_block() - base for _ in range(20)])
    dropped = edit == 0
    torch.testing.assert_close(edit[~dropped], (2 * full_edit).expand_as(edit)[~dropped], rtol=1e-3, atol=1e-4)
    assert 0.45 < dropped[:, edited].float().mean() < 0.55
    assert dropped[:, ~edited].all()


# The subspace.


@pytest.mark.parametrize("kind", KINDS)
def test_subspace_holds_the_edited_directions(kind):
    module = random_intervention(kind)
    subspace = module.subspace.detach()
    assert subspace.shape == (4, 16)
    if kind in WITH_R:
        assert orthonormality_error(subspace) <= 1e-6
    else:
        assert torch.equal(subspace, module.basis)
    h = torch.randn(5, 16)
    edit = (module(h) - h).detach()
    projection = torch.linalg.pinv(subspace) @ subspace
    torch.testing.assert_close(edit @ projection, edit, rtol=1e-4, atol=1e-5)
    assert torch.linalg.matrix_rank(edit) <= 4


@pytest.mark.parametrize("kind", ["loreft", "consreft"])
def test_an_edit_that_replaces_leaves_what_is_orthogonal_to_the_subspace(kind):
    module = random_intervention(kind)
    h, R = torch.randn(5, 16), module.subspace.detach()
    out = module(h).detach()
    complement = torch.eye(16) - R.T @ R
    torch.testing.assert_close(out @ complement, h @ complement, rtol=1e-5, atol=1e-5)
    constant = module.weight if module.bias is None else h @ module.weight.T + module.bias
    learned = constant.detach().expand(5, 4)
    torch.testing.assert_close(out @ R.T, learned, rtol=1e-4, atol=1e-5)


def test_get_interventions_gives_the_modules_that_the_model_runs(llama):
    model = reft_model(llama, positions="all", layers_to_transform=1)
    ((name, (module,)),) = get_interventions(model).items()
    assert name == "model.layers.1"
    inputs = inputs_of(llama, 6)
    with torch.no_grad():
        after = model(**inputs, output_hidden_states=True).hidden_states[2]
        with model.disable_adapter():
            before = model(**inputs, output_hidden_states=True).hidden_states[2]
        torch.testing.assert_close(module(before), after, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, after)


# Interventions of one's own.


class Minimal(nn.Module):
    """Only what `register_intervention` asks for: a constructor (d, r), a forward."""

    def __init__(self, d, r):
        super().__init__()
        self.down, self.up = nn.Linear(d, r), nn.Linear(r, d)

    def forward(self, h):
        return h + self.up(torch.tanh(self.down(h)))


class WithKeywords(Minimal):
    def __init__(self, d, r, init_weights=True, dropout=0.0):
        super().__init__(d, r)
        self.seen = {"init_weights": init_weights, "dropout": dropout}


class WithAnyKeywords(Minimal):
    def __init__(self, d, r, **kwargs):
        super().__init__(d, r)
        self.seen = kwargs


class FreeConstant(Intervention):
    """Choices among the built-in equations that none of the six makes: h + W2ᵀ(b - W2 h)."""

    orthonormal = False
    has_source = False


class HalfEdit(Intervention):
    def edit(self, h):
        return 0.5 * super().edit(h)


class HalfForward(Intervention):
    def forward(self, h):
        return h + 0.5 * (super().forward(h) - h)


class DeepSource(Intervention):
    """The learned value is a small network's."""

    def __init__(self, d, r, **kwargs):
        super().__init__(d, r, **kwargs)
        self.network = nn.Sequential(nn.Linear(d, r), nn.Tanh(), nn.Linear(r, r))

    def edit(self, h):
        return super().edit(h) + self.network(h.to(self.basis.dtype)) @ self.subspace.to(self.basis.dtype)


class NormedDirections(Intervention):
    """Rows of unit length instead of orthonormal ones."""

    def directions(self, basis):
        return nn.functional.normalize(basis, dim=-1)


OWN = [Minimal, WithKeywords, WithAnyKeywords, FreeConstant, HalfEdit, HalfForward, DeepSource, NormedDirections]


@pytest.fixture
def registry(monkeypatch):
    """The registry, put back as it was afterwards."""
    monkeypatch.setattr(peft_reft.interventions.registry, "REGISTRY", dict(peft_reft.interventions.registry.REGISTRY))


@pytest.mark.parametrize("positions", ["f2+l1", "all"])
@pytest.mark.parametrize("share_weights", [True, False])
@pytest.mark.parametrize("cls", OWN, ids=lambda cls: cls.__name__)
def test_a_model_does_what_the_registered_module_does(cls, share_weights, positions, registry, llama):
    register_intervention("own", cls)
    config = ReftConfig(intervention="own", positions=positions, share_weights=share_weights, init_weights=False)
    model = randomize(get_peft_model(llama, config).eval())
    inputs = inputs_of(llama, 6, 4)
    got = logits(model, inputs)
    base = tiny_model("llama")
    with torch.no_grad():
        expected = reference.forward(base, get_interventions(model), config, inputs).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, logits(base, inputs))


@pytest.mark.parametrize("cls", OWN, ids=lambda cls: cls.__name__)
def test_a_registered_module_trains_in_a_bfloat16_model(cls, registry, llama):
    register_intervention("own", cls)
    model = get_peft_model(llama.bfloat16(), ReftConfig(intervention="own", init_weights=False)).train()
    inputs = inputs_of(llama)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    grads = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(grad.isfinite().all() for grad in grads)
    assert max(grad.abs().max() for grad in grads) > 0


def test_a_registered_module_gets_the_keywords_that_it_names(registry):
    register_intervention("some", WithKeywords)
    register_intervention("all_of_them", WithAnyKeywords)
    settings = {"dropout": 0.25, "act_fn": "relu", "init_weights": False, "train_bias": True}
    assert build_intervention("some", 8, 2, **settings).seen == {"dropout": 0.25, "init_weights": False}
    assert build_intervention("all_of_them", 8, 2, **settings).seen == settings


def test_a_registered_name_is_valid_in_a_config_and_may_be_registered_again(registry):
    with pytest.raises(ValueError, match="intervention='own' is unknown"):
        ReftConfig(intervention="own")
    register_intervention("own", Minimal)
    assert ReftConfig(intervention="own").intervention == "own"
    register_intervention("own", WithKeywords)
    assert type(build_intervention("own", 8, 2)) is WithKeywords


def test_an_adapter_with_a_registered_module_is_saved_and_loaded(registry, llama, tmp_path):
    register_intervention("own", Minimal)
    model = randomize(get_peft_model(llama, ReftConfig(intervention="own")).eval())
    inputs = inputs_of(llama)
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    assert torch.equal(logits(loaded, inputs), expected)
    assert not torch.allclose(logits(tiny_model("llama"), inputs), expected)


@pytest.mark.parametrize("name", ["", "Own", "my-reft", "1st", "two words", None, 3])
def test_a_name_that_is_no_lower_case_identifier_is_rejected(name, registry):
    with pytest.raises(ValueError, match="cannot name an intervention: use a lower-case identifier"):
        register_intervention(name, Minimal)


@pytest.mark.parametrize("name", KINDS)
def test_a_built_in_name_cannot_be_taken(name, registry):
    with pytest.raises(ValueError, match=f"'{name}' is a built-in"):
        register_intervention(name, Minimal)


@pytest.mark.parametrize(
    "cls",
    [Minimal(4, 2), dict, "Minimal", None, lambda d, r: Minimal(d, r)],
    ids=["instance", "dict", "name", "None", "function"],
)
def test_what_is_no_class_of_modules_is_rejected(cls, registry):
    with pytest.raises(TypeError, match=r"not a subclass of torch\.nn\.Module"):
        register_intervention("own", cls)
