"""An adapter whose numbers are none (NaN, inf) reaches no row but its own, in a forward and in `generate`."""

import itertools

import pytest
import torch
from conftest import batch, logits, randomize, reft_model, tiny_model

from peft_reft import ReftConfig, get_interventions, set_strength


@torch.no_grad()
def spoil(model, name: str, value: float) -> None:
    for interventions in get_interventions(model, name).values():
        for parameter in interventions.parameters():
            parameter.fill_(value)


PAIRS = {
    "the same kind": {"bad": {}, "good": {}},
    "other positions": {"bad": {"positions": "l2"}, "good": {}},
    "another rank": {"bad": {"r": 3}, "good": {"positions": "l2"}},
    "another kind": {"bad": {"intervention": "direft", "positions": "l2"}, "good": {"r": 3}},
    "a constant beside a projection": {"bad": {"intervention": "consreft"}, "good": {}},
    "unbounded": {"bad": {"positions": "all"}, "good": {"positions": "f1+l1+d"}},
    "both unbounded": {"bad": {"positions": "all+d"}, "good": {"positions": "e2"}},
    "no token of a short prompt": {"bad": {"positions": "e9"}, "good": {"positions": "all"}},
    "an activation": {"bad": {"act_fn": "relu"}, "good": {"act_fn": "tanh"}},
    "a group per term": {"bad": {"share_weights": False}, "good": {"share_weights": False, "positions": "f1+l2"}},
    "other blocks": {"bad": {"layers_to_transform": [0]}, "good": {"layers_to_transform": [1]}},
}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("pair", PAIRS)
def test_numbers_that_are_none_in_one_adapter_reach_no_other_row(pair, value):
    model = reft_model(
        tiny_model("llama", eos_token_id=None), **{"positions": "f1+l1", "r": 2, **PAIRS[pair]["good"]}, adapter="good"
    )
    model.add_adapter(
        "bad", ReftConfig(**{"positions": "f1+l1", "r": 2, "task_type": "CAUSAL_LM", **PAIRS[pair]["bad"]})
    )
    model.eval()
    randomize(model, "bad", seed=4)
    inputs = batch(6, 4, 6, side="left")
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    orders = list(itertools.permutations(["good", "__base__", "bad"]))
    expected = [
        (
            logits(model, inputs, adapter_names=list(names)),
            model.generate(**inputs, adapter_names=list(names), **settings),
        )
        for names in orders
    ]
    spoil(model, "bad", value)
    reached_own_row = False
    for names, (want, want_tokens) in zip(orders, expected):
        got = logits(model, inputs, adapter_names=list(names))
        tokens = model.generate(**inputs, adapter_names=list(names), **settings)
        for row, name in enumerate(names):
            own = inputs["attention_mask"][row].bool()
            if name == "bad":
                reached_own_row |= not torch.isfinite(got[row, own]).all()
            else:
                message = f"row {row} ({name}) of a forward with {names}"
                torch.testing.assert_close(got[row, own], want[row, own], msg=message)
                assert torch.equal(tokens[row], want_tokens[row]), f"row {row} ({name}) of generate with {names}"
    assert reached_own_row or pair == "no token of a short prompt"


@pytest.mark.parametrize("positions", ["f1+l1", "all"])
def test_numbers_that_are_none_in_an_adapter_of_strength_zero_beside_another_reach_no_other_row(positions):
    model = reft_model(tiny_model("llama"), positions="f1+l1", r=2, task_type="CAUSAL_LM", adapter="good")
    model.add_adapter("bad", ReftConfig(positions=positions, r=2, task_type="CAUSAL_LM"))
    model.eval()
    inputs = batch(6, 6)
    want = logits(model, inputs, adapter_names=["good", "__base__"])
    spoil(model, "bad", float("nan"))
    set_strength(model, 0.0, "bad")
    torch.testing.assert_close(logits(model, inputs, adapter_names=["good", "bad"])[0], want[0])
    torch.testing.assert_close(logits(model, inputs, adapter_names=["good", "__base__"]), want)
