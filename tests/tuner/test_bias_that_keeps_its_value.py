"""`train_bias=False`: b keeps its value, whatever PEFT switches on and off, and counts in no gradient norm."""

import pytest
import torch
from conftest import batch, logits, randomize, tiny_model
from datasets import Dataset
from peft import PeftModel, get_peft_model
from trainer_kit import QUIET, word_tokenizer

from peft_reft import ReftConfig, get_interventions

KINDS = ("loreft", "noreft", "direft", "odireft")
CONFIG = {"positions": "f1+l1", "r": 2, "task_type": "CAUSAL_LM", "train_bias": False}


def fixed(**settings):
    model = get_peft_model(tiny_model("llama"), ReftConfig(**{**CONFIG, **settings}))
    return randomize(model)


def biases(model, adapter=None):
    return [intervention.bias for group in get_interventions(model, adapter).values() for intervention in group]


def values(model, adapter=None):
    return [bias.detach().clone() for bias in biases(model, adapter)]


def labelled():
    inputs = batch(8, 6)
    answer = (torch.arange(8) >= 3) & inputs["attention_mask"].bool()
    return {**inputs, "labels": inputs["input_ids"].masked_fill(~answer, -100)}


def train(model, steps=3):
    """A few steps of an optimizer over all that asks for a gradient; the gradient norms of the steps."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    norms = []
    for _ in range(steps):
        optimizer.zero_grad()
        model.train()(**labelled()).loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9))
        optimizer.step()
    return norms


def assert_kept(model, before, adapter=None):
    for bias, value in zip(biases(model, adapter), before):
        assert not bias.requires_grad
        assert bias.grad is None
        assert torch.equal(bias, value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share_weights", [True, False])
def test_training_leaves_the_bias_alone_and_moves_the_rest(kind, share_weights):
    model = fixed(intervention=kind, share_weights=share_weights)
    before, expected = values(model), logits(model, batch(6, 6))
    train(model)
    assert_kept(model, before)
    assert (logits(model.eval(), batch(6, 6)) - expected).abs().max() > 1e-3


def test_with_train_bias_the_bias_is_trained():
    model = fixed(train_bias=True)
    before = values(model)
    train(model)
    assert all((bias - value).abs().max() > 1e-3 for bias, value in zip(biases(model), before))


def use_set_adapter(model):
    model.add_adapter("other", ReftConfig(**{**CONFIG, "train_bias": True}))
    model.set_adapter("other")
    model.set_adapter("default")
    model.base_model.set_adapter(["default", "other"])
    model.set_adapter("default")


def use_disable_adapter(model):
    with model.disable_adapter():
        model(**labelled())
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()


def use_requires_grad(model):
    model.set_requires_grad("default", requires_grad=False)
    model.set_requires_grad("default", requires_grad=True)


def use_eval(model):
    model.eval()
    model.train()


def use_deletion(model):
    model.add_adapter("other", ReftConfig(**CONFIG))
    model.set_adapter("other")
    model.delete_adapter("other")
    model.set_adapter("default")


SWITCHES = [use_set_adapter, use_disable_adapter, use_requires_grad, use_eval, use_deletion]


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda switch: switch.__name__.removeprefix("use_"))
def test_the_bias_keeps_its_value_through(switch):
    model = fixed()
    before = values(model)
    switch(model)
    train(model)
    assert_kept(model, before)


def test_the_bias_keeps_its_value_in_a_loaded_adapter_that_is_trained_on(tmp_path):
    model = fixed()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path, is_trainable=True)
    assert loaded.peft_config["default"].train_bias is False
    before = values(loaded)
    assert all(torch.equal(one, other) for one, other in zip(before, values(model)))
    train(loaded)
    assert_kept(loaded, before)
    loaded.load_adapter(tmp_path, "second", is_trainable=True)
    loaded.set_adapter("second")
    before = values(loaded, "second")
    train(loaded)
    assert_kept(loaded, before, "second")


def test_the_bias_keeps_its_value_by_transformers_methods(tmp_path):
    fixed().save_pretrained(tmp_path)
    model = tiny_model("llama")
    model.load_adapter(str(tmp_path), adapter_name="first", is_trainable=True)
    model.add_adapter(ReftConfig(**CONFIG), "second")
    model.set_adapter("second")
    model.set_adapter("first")
    before = values(model, "first")
    train(model)
    assert_kept(model, before, "first")


def test_the_bias_counts_in_no_gradient_norm():
    """The norm is that of the other parameters' gradients, which an adapter that trains b has, too."""
    model, free = fixed(), fixed(train_bias=True)
    (norm,), (free_norm,) = train(model, steps=1), train(free, steps=1)
    others = [
        parameter.grad for name, parameter in free.named_parameters() if parameter.requires_grad and "bias" not in name
    ]
    torch.testing.assert_close(norm, torch.stack([gradient.norm() for gradient in others]).norm())
    assert (free_norm - norm).abs() > 1e-4
    assert model.get_nb_trainable_parameters()[0] < free.get_nb_trainable_parameters()[0]


def test_the_bias_keeps_its_value_in_dpo_and_its_reference_copy(tmp_path):
    trl = pytest.importorskip("trl")
    rows = [{"prompt": f"w{i} w{i + 1}", "chosen": f" w{i + 2} w5", "rejected": " w7 w8"} for i in range(3, 11)]
    args = trl.DPOConfig(str(tmp_path), max_steps=2, **{**QUIET, "learning_rate": 0.1})
    trainer = trl.DPOTrainer(
        model=fixed(),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=word_tokenizer(),
    )
    model = trainer.model
    before = {name: values(model, name) for name in model.peft_config}
    trainer.train()
    for name, value in before.items():
        assert_kept(model, value, name)
    if "ref" in before:
        assert all(torch.equal(one, other) for one, other in zip(before["ref"], before["default"]))


@pytest.mark.parametrize("kind", ["consreft", "lobireft"])
def test_kinds_whose_vector_is_all_that_they_learn_beside_r_keep_it_and_train_r(kind):
    """The vector in b's place, which these two call `weight`."""
    model = fixed(intervention=kind)
    modules = [module for group in get_interventions(model).values() for module in group]
    vectors, bases = ([getattr(module, name).detach().clone() for module in modules] for name in ("weight", "basis"))
    train(model)
    assert all(torch.equal(module.weight, vector) for module, vector in zip(modules, vectors))
    assert not any(module.weight.requires_grad for module in modules)
    assert not any(torch.allclose(module.basis, basis) for module, basis in zip(modules, bases))
