"""Where all places of a call are edited, on a CPU, no block multiplies with a factor for those that only fill up."""

import pytest
import torch
from conftest import batch, logits, randomize, reft_model, tiny_model

from peft_reft import ReftConfig, set_strength
from peft_reft.context import plan
from peft_reft.context.edit import Edit

CONFIG = {"task_type": "CAUSAL_LM", "r": 2, "positions": "f2+l1"}
WAYS = {
    "one for all": {},
    "one per term": {"share_weights": False, "positions": "f1+l1"},
    "one per position": {"share_weights": "position"},
    "all tokens": {"positions": "all"},
    "dropout": {"dropout": 1 - 1e-7},
    **{name: {"intervention": name} for name in ("noreft", "direft", "odireft", "consreft", "lobireft")},
}


@pytest.fixture
def factors(monkeypatch):
    """`Edit.keep` of every edit that is made."""
    found, add = [], Edit.add

    def noted(self, *args):
        found.append(self.keep)
        return add(self, *args)

    monkeypatch.setattr(Edit, "add", noted)
    return found


def outcome(model, inputs):
    """Logits in evaluation, and a loss and its gradients in training."""
    evaluated = logits(model, inputs)
    torch.manual_seed(0)
    loss = model.train()(**inputs, labels=inputs["input_ids"].clone().index_fill_(1, torch.arange(3), -100)).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.eval()
    return {"logits": evaluated, "loss": loss.detach(), **gradients}


@pytest.mark.parametrize("way", WAYS)
def test_no_factor_and_a_factor_of_ones_give_the_same(way, factors, monkeypatch):
    model, inputs = reft_model(tiny_model("llama"), **{**CONFIG, **WAYS[way]}), batch(6, 6)
    without = outcome(model, inputs)
    is_constant = way == "lobireft"  # which has nothing of the vector that would give the edit its shape
    evaluated, trained = factors[:3], factors[3:]
    assert len(trained) == 3
    assert all((keep is None) is not is_constant for keep in evaluated)
    assert all((keep is None) is not (is_constant or way == "all tokens") for keep in trained)  # not those of answers
    factors.clear()
    monkeypatch.setattr(plan, "values_can_be_read", lambda tensor: False)
    with_ones = outcome(model, inputs)
    assert len(factors) == 2 * 3
    assert None not in factors
    assert without.keys() == with_ones.keys()
    for name, found in without.items():
        assert torch.equal(found, with_ones[name]), name
    assert not torch.equal(without["logits"], logits(tiny_model("llama"), inputs))


def test_rows_with_adapters_of_their_own(factors, monkeypatch):
    model = reft_model(tiny_model("llama"), **CONFIG)
    model.add_adapter("other", ReftConfig(**CONFIG))
    randomize(model, "other", seed=1)
    inputs = {**batch(6, 6, 6), "adapter_names": ["default", "other", "__base__"]}
    without = logits(model, inputs)
    assert factors
    assert all(keep is None for keep in factors)
    monkeypatch.setattr(plan, "values_can_be_read", lambda tensor: False)
    assert torch.equal(without, logits(model, inputs))
    assert factors[-1] is not None


@pytest.mark.parametrize("why", ["a short row", "a strength"])
def test_the_factor_is_there_where_it_is_needed(why, factors):
    model, inputs = reft_model(tiny_model("llama"), **CONFIG), batch(6, 2)
    if why == "a strength":
        set_strength(model, 0.5)
        inputs = batch(6, 6)
    logits(model, inputs)
    assert sorted(factors[0].unique().tolist()) == ([0, 1] if why == "a short row" else [0.5])


def test_a_graph_traced_with_long_prompts_is_right_for_short_ones():
    """A trace has no values to look at, other than those of its example."""
    base = tiny_model("llama", attn_implementation="eager", use_cache=False)
    model = reft_model(base, **CONFIG)

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids, mask):
            return self.model(input_ids=ids, attention_mask=mask).logits

    long, short = batch(6, 6), batch(6, 2, side="left")
    with torch.no_grad():
        traced = torch.jit.trace(Logits(), (long["input_ids"], long["attention_mask"]), check_trace=False)
        found = traced(short["input_ids"], short["attention_mask"])
    torch.testing.assert_close(found, logits(model, short))
    assert not torch.allclose(found, logits(tiny_model("llama", attn_implementation="eager"), short), atol=1e-3)
