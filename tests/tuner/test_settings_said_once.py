"""Settings that do nothing, or harm, are said once, with the way out."""

import warnings

import pytest
import torch
from conftest import batch, logits, randomize, reft_model, tiny_model
from edit_spy import warnings_of
from peft import LoraConfig, get_peft_model

from peft_reft import ReftConfig, get_interventions, set_strength

CONFIG = {"positions": "f1+l1", "r": 2, "task_type": "CAUSAL_LM"}


# Ranks.


def said_of_ranks(**settings):
    """The model, and what is said of its `rank_pattern`: by PEFT, as for its own methods."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = reft_model(tiny_model("llama"), **CONFIG, **settings)
    return model, [str(warning.message) for warning in caught if "rank_pattern" in str(warning.message)]


@pytest.mark.parametrize("pattern", ["layers.9", "layer.1", "model.decoder.layers.0", r"layers\.[7-9]", "q_proj"])
def test_a_rank_pattern_that_matches_no_block_is_said(pattern):
    _, told = said_of_ranks(rank_pattern={"layers.1": 3, pattern: 5})
    assert len(told) == 1
    assert repr(pattern) in told[0]
    assert "'layers.1'" not in told[0]  # only the key that does nothing


def test_a_rank_pattern_of_a_block_that_is_not_edited_is_said():
    _, told = said_of_ranks(rank_pattern={"layers.1": 3}, layers_to_transform=[0, 2])
    assert len(told) == 1
    assert "layers.1" in told[0]


def test_a_rank_pattern_that_matches_says_nothing():
    model, told = said_of_ranks(rank_pattern={"layers.1": 3, r".*\.2": 4})
    assert told == []
    assert [group[0].subspace.shape[0] for group in get_interventions(model).values()] == [2, 3, 4]


# Modules that are trained beside.


@pytest.mark.parametrize(("names", "found"), [(["scores"], False), (["score", "lm_head"], True), (["head"], True)])
def test_modules_to_save_of_which_none_is_in_the_model_are_said(names, found):
    """Classes of PEFT's for a task name several, of which a model has one."""
    told = warnings_of(lambda: reft_model(tiny_model("llama"), **CONFIG, modules_to_save=names))
    assert len(told) == (0 if found else 1)
    assert found or repr(names) in told[0]


# Targets.


@pytest.mark.parametrize(
    "targets", ["all-linear", ["q_proj", "v_proj"], ["q_proj"], ".*(q|v)_proj", ["gate_proj", "up_proj", "down_proj"]]
)
def test_projections_as_targets_are_said_to_be_loras_habit(targets):
    told = warnings_of(lambda: reft_model(tiny_model("llama"), **CONFIG, target_modules=targets))
    assert len(told) == 1
    assert "target_modules" in told[0]
    assert "block" in told[0]


@pytest.mark.parametrize("targets", [None, ["layers.0", "layers.2"], ["mlp"], ["self_attn"], r".*\.mlp"])
def test_blocks_and_parts_of_blocks_as_targets_say_nothing(targets):
    assert warnings_of(lambda: reft_model(tiny_model("llama"), **CONFIG, target_modules=targets)) == []


def test_a_plain_modules_linear_layer_as_target_says_nothing():
    """There it may well be what is meant: the module has no blocks."""
    plain = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    assert warnings_of(lambda: reft_model(plain, positions="all", r=2, target_modules=["0"])) == []


# Strength.


@pytest.mark.parametrize("make", ["base", "lora"])
def test_the_strength_of_a_model_without_adapters_is_refused(make):
    model = tiny_model("llama")
    if make == "lora":
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for name in (None, "default", "*"):
        with pytest.raises(ValueError, match="no ReFT adapter"):
            set_strength(model, 0.5, name)


def two_adapters():
    model = reft_model(tiny_model("llama"), adapter="one", **CONFIG)
    model.add_adapter("two", ReftConfig(**{**CONFIG, "positions": "all"}))
    return randomize(model, "two", seed=5).eval()


def test_a_star_sets_the_strength_of_all_adapters():
    model = two_adapters()
    inputs = batch(6, 6, 6)
    names = ["one", "two", "__base__"]
    plain = logits(tiny_model("llama"), inputs)
    full = logits(model, inputs, adapter_names=names)
    set_strength(model, 0.0, adapter_name="*")
    torch.testing.assert_close(logits(model, inputs, adapter_names=names), plain)
    set_strength(model, 0.5, adapter_name="*")
    half = logits(model, inputs, adapter_names=names)
    assert (half - full)[:2].abs().amax((1, 2)).min() > 1e-3
    assert (half - plain)[:2].abs().amax((1, 2)).min() > 1e-3
    set_strength(model, 1.0, adapter_name="*")
    torch.testing.assert_close(logits(model, inputs, adapter_names=names), full)


def test_without_a_name_the_strength_is_that_of_the_active_adapters():
    model = two_adapters()
    inputs = batch(6, 6)
    set_strength(model, 0.0)
    rows = logits(model, inputs, adapter_names=["one", "two"])
    plain = logits(tiny_model("llama"), inputs)
    torch.testing.assert_close(rows[0], plain[0])
    assert (rows[1] - plain[1]).abs().max() > 1e-3


def test_an_unknown_adapters_strength_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match=r"'three'.*\['one', 'two'\]"):
        set_strength(two_adapters(), 0.5, "three")
