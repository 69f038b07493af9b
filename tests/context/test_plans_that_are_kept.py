"""Plans are kept from call to call: not too many, not of what has changed, and no graph of a call with them."""

import gc

import pytest
import torch
import torch.nn.utils.prune
from conftest import batch, logits, randomize, reft_model, tiny_model
from peft import get_peft_model

from peft_reft import ReftConfig, get_interventions, set_strength
from peft_reft.context.kept import MOST_PLANS

CONFIG = {"task_type": "CAUSAL_LM", "r": 2, "positions": "f1+l1"}


def plans(model):
    return model.get_base_model().forward.state.plans


def two_adapters(**settings):
    model = get_peft_model(tiny_model("llama"), ReftConfig(**CONFIG, **settings), adapter_name="one")
    model.add_adapter("two", ReftConfig(**CONFIG, **settings))
    for seed, name in enumerate(("one", "two")):
        randomize(model, name, seed=seed)
    return model.eval()


def test_a_few_plans_are_kept_of_any_number_of_strengths():
    model, inputs = two_adapters(), batch(5)
    for step in range(2 * MOST_PLANS):
        set_strength(model, 1 + step / 8, "one")
        with torch.no_grad():
            model(**inputs)
        assert 1 <= len(plans(model)) <= MOST_PLANS
    assert len(plans(model)) == MOST_PLANS


def test_a_plan_is_made_once_for_adapters_that_stay_as_they_are():
    """Also for two sets of adapters by turns, as of a policy and its reference."""
    model, inputs = two_adapters(), batch(5, 5)
    found = []
    with torch.no_grad():
        for _ in range(3):
            for names in (["one", "two"], ["two", "one"], None):
                model(**inputs) if names is None else model(**inputs, adapter_names=names)
            found.append(list(plans(model)))
    assert len(found[0]) == 3
    assert found[1] == found[2] == found[0]


def test_adapters_that_are_switched_on_in_place_are_noticed():
    """`_active_adapter` is a list that somebody may hold, and change."""
    model, inputs = two_adapters(), batch(5)
    model.base_model.set_adapter(["one"])
    before = logits(model, inputs)
    for layer in model.get_base_model().forward.state.layers:
        layer._active_adapter.append("two")
    assert not torch.allclose(logits(model, inputs), before, atol=1e-3)


def test_groups_of_an_adapter_that_are_not_alike_are_each_worked_out_as_they_are():
    def found(change):
        model = reft_model(tiny_model("llama"), share_weights=False, **CONFIG).train()
        for _, last in get_interventions(model).values():
            change(last)
        return logits(model, batch(5))

    dropped = found(lambda last: setattr(last, "dropout", 1 - 1e-7))  # nothing is left of its edits
    torch.testing.assert_close(dropped, found(lambda last: last.erase()))
    assert not torch.allclose(dropped, found(lambda last: None))


CHANGES = {
    "dropout": lambda groups: [setattr(one, "dropout", 1 - 1e-7) for one in groups],
    "activation": lambda groups: [one.__dict__.update(act_fn="tanh", activation=torch.tanh) for one in groups],
    "another intervention": lambda groups: groups.__setitem__(1, groups[0]),
    "pruning": lambda groups: torch.nn.utils.prune.l1_unstructured(groups[1], "weight", 0.5),
    "a hook": lambda groups: [one.register_forward_hook(lambda module, args, output: args[0] + 1) for one in groups],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_changed_between_two_calls_is_changed(change):
    """A call's result does not depend on the call before it."""

    def found(runs_before, changes):
        model = reft_model(tiny_model("llama"), share_weights=False, **CONFIG).train()
        if runs_before:
            logits(model, batch(5))
        for groups in get_interventions(model).values():
            changes(groups)
        return logits(model, batch(5))

    changed = found(True, change)
    torch.testing.assert_close(changed, found(False, change))
    assert not torch.allclose(changed, found(True, lambda groups: None), atol=1e-3)


def test_a_model_that_moved_to_another_device_edits_there():
    """Its modules are the same objects; what a plan remembers of their parameters is not."""
    model, ids = reft_model(tiny_model("llama"), **CONFIG), batch(5)["input_ids"]
    with torch.no_grad():
        model(input_ids=ids)
        assert model.to("meta")(input_ids=ids.to("meta")).logits.is_meta


def recorded():
    gc.collect()
    return [one for one in gc.get_objects() if isinstance(one, torch.Tensor) and one.grad_fn is not None]


def test_no_graph_of_a_call_is_kept():
    """Rows with adapters of their own have factors that are put together for one call."""
    model, inputs = two_adapters(), batch(5, 5)
    for parameter in (p for name, p in model.named_parameters() if "reft_" in name):
        parameter.requires_grad_()
    before = {id(one) for one in recorded()}
    for names in (["one", "two"], ["two", "__base__"]):
        loss = model(**inputs, adapter_names=names).logits.sum()
        assert len(recorded()) > len(before)
        del loss
    assert [one.shape for one in recorded() if id(one) not in before] == []


def test_dropout_in_rows_with_adapters_of_their_own_drops_entries_of_each_rows_edit():
    """The first block's edit, of which each entry is gone or doubled."""
    model, inputs = two_adapters(dropout=0.5, layers_to_transform=0), batch(5, 5)
    seen = []
    block = model.get_base_model().model.layers[0]
    block.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        for training, names in ((False, ["one", "two"]), (True, ["one", "two"]), (False, ["__base__"] * 2)):
            model.train(training).get_base_model()(**inputs, adapter_names=names)  # PEFT's own class: not in training
    edited, dropped, plain = seen
    whole, found = (edited - plain)[:, [0, 4]], (dropped - plain)[:, [0, 4]]
    gone, doubled = found.abs() < 1e-6, (found - 2 * whole).abs() < 1e-4
    assert (gone | doubled).all()
    for row in range(2):
        assert 0.2 < gone[row].float().mean() < 0.8
