"""`add_weighted_adapter`: one DiReFT adapter that is exactly the weighted sum of others."""

import pytest
import torch
from conftest import batch, inputs_of, logits, randomize, tiny_model
from peft import PeftModel, get_peft_model
from torch import nn

from peft_reft import ReftConfig, get_interventions, set_strength
from peft_reft.interventions.registry import REGISTRY

CONFIG = {"r": 3, "positions": "f1+l1", "task_type": "CAUSAL_LM"}
WEIGHTS = [1.0, -0.7, 0.4]


def three(base, first=None, second=None, third=None):
    """A model with adapters `a`, `b` and `c`, whose settings differ from CONFIG by what is given."""
    model = get_peft_model(base, ReftConfig(**{**CONFIG, **(first or {})}), adapter_name="a").eval()
    for name, settings in (("b", second or {}), ("c", third or {})):
        model.add_adapter(name, ReftConfig(**{**CONFIG, **settings}))
    for seed, name in enumerate("abc"):
        randomize(model, name, seed)
    return model


def summed(model, inputs, weights=WEIGHTS):
    """Logits with all three adapters active, each at its weight: the edits of active adapters are summed."""
    model.base_model.set_adapter(["a", "b", "c"])
    for name, weight in zip("abc", weights):
        set_strength(model, weight, name)
    found = logits(model, inputs)
    set_strength(model, 1.0, "*")
    return found


MIXTURES = [
    ({}, {"r": 2}, {}),
    ({"intervention": "odireft"}, {"intervention": "lobireft"}, {"intervention": "consreft", "r": 1}),
    ({"intervention": "noreft"}, {"intervention": "direft"}, {"subspaces": {"x": 1, "y": 2}}),
    ({"share_weights": False},) * 3,
    ({"share_layers": True},) * 3,
    tuple({"share_layers": True, "layers_to_transform": blocks} for blocks in ([0, 1], [1, 2], [2])),
    ({"layers_to_transform": [0, 2]}, {"layers_to_transform": [1]}, {}),
    ({"rank_pattern": {"layers.1": 5}}, {}, {"rank_pattern": {"layers.0": 1}}),
]


@pytest.mark.parametrize("settings", MIXTURES, ids=str)
def test_the_sum_is_exact(settings):
    model, inputs = three(tiny_model("llama"), *settings), batch(7, 4)
    expected = summed(model, inputs)
    model.add_weighted_adapter(["a", "b", "c"], WEIGHTS, "sum")
    model.set_adapter("sum")
    torch.testing.assert_close(logits(model, inputs), expected, atol=2e-5, rtol=1e-4)
    assert model.peft_config["sum"].intervention == "direft"
    model.set_adapter("a")
    assert (logits(model, inputs) - expected).abs().max() > 0.1


@pytest.mark.parametrize("family", ["t5", "bert"])
def test_the_sum_is_exact_on_other_architectures(family):
    task = {"task_type": "SEQ_2_SEQ_LM" if family == "t5" else None}
    base = tiny_model(family)
    model, inputs = three(base, task, task, task), inputs_of(base)
    expected = summed(model, inputs)
    model.add_weighted_adapter(["a", "b", "c"], WEIGHTS, "sum")
    model.set_adapter("sum")
    torch.testing.assert_close(logits(model, inputs), expected, atol=2e-5, rtol=1e-4)


def test_the_sum_has_the_rank_of_all_and_is_saved_like_any_adapter(tmp_path):
    model, inputs = three(tiny_model("llama"), {"r": 1}, {"layers_to_transform": [1]}), batch(7, 4)
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "sum")
    assert model.active_adapters == ["a"]
    assert model.peft_config["sum"].r == 4
    assert list(get_interventions(model, "sum")) == [f"model.layers.{number}" for number in range(3)]
    assert not any(p.requires_grad for groups in get_interventions(model, "sum").values() for p in groups.parameters())
    model.set_adapter("sum")
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "sum").eval()
    torch.testing.assert_close(logits(loaded, inputs), expected)


def test_a_weight_of_minus_one_takes_an_adapter_away():
    model, inputs = three(tiny_model("llama")), batch(7, 4)
    model.add_weighted_adapter(["a", "a"], [1.0, -1.0], "nothing")
    model.set_adapter("nothing")
    with model.disable_adapter():
        base = logits(model, inputs)
    torch.testing.assert_close(logits(model, inputs), base, atol=1e-5, rtol=1e-4)


class Own(nn.Module):
    def __init__(self, d, r):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, h):
        return h * self.weight


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"positions": "l1"}, "different positions cannot be summed"),
        ({"share_weights": False}, "different share_weights cannot be summed"),
        ({"turns": "last", "prompt_end": [5]}, "different turns cannot be summed"),
        ({"act_fn": "relu", "init_weights": False}, "has act_fn='relu'"),
        ({"intervention": "own"}, "has the intervention Own"),
        ({"modules_to_save": ["lm_head"]}, "has modules_to_save"),
    ],
)
def test_what_is_not_one_adapter_is_refused_and_changes_nothing(second, message, monkeypatch):
    monkeypatch.setitem(REGISTRY, "own", Own)
    model = three(tiny_model("llama"), None, second)
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")
    assert [name for name, _ in model.named_parameters()] == names
    assert "sum" not in model.peft_config


@pytest.mark.parametrize(
    ("adapters", "weights", "name", "message"),
    [
        (["a", "d"], [1, 1], "sum", "Adapter d does not exist"),
        (["a"], [1, 1], "sum", "must be as many"),
        ([], [], "sum", "at least one"),
        (["a"], [float("inf")], "sum", "not a finite number"),
        (["a"], [1], "b", "is the name of an adapter already"),
        (["a"], [1], "a.b", "cannot name an adapter"),
        (["a"] * 11, [1] * 11, "sum", "r=33 is not a rank"),
    ],
)
def test_impossible_arguments_are_refused(adapters, weights, name, message):
    model = three(tiny_model("llama"))
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(adapters, weights, name)
    assert sorted(model.peft_config) == ["a", "b", "c"]


def test_the_sum_is_what_lora_calls_cat_and_its_other_combinations_are_refused():
    model, inputs = three(tiny_model("llama")), batch(7, 4)
    expected = summed(model, inputs)
    adapters = sorted(model.peft_config)
    for other in ("linear", "svd", "ties", None):
        with pytest.raises(ValueError, match=f"combination_type={other!r} is not a way to combine ReFT adapters"):
            model.add_weighted_adapter(["a", "b", "c"], WEIGHTS, "sum", combination_type=other)
    assert sorted(model.peft_config) == adapters
    model.add_weighted_adapter(["a", "b", "c"], WEIGHTS, "sum", combination_type="cat")
    model.set_adapter("sum")
    torch.testing.assert_close(logits(model, inputs), expected, atol=2e-5, rtol=1e-4)
