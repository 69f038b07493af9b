"""Weights of one adapter do not take the place of another's where a setting gives them another meaning."""

import pytest

from peft_reft import ReftConfig
from peft_reft.tuner.checkpoint import MEANING, other_meaning

CHANGES = {
    "intervention": "direft",
    "positions": "l1",
    "share_weights": False,
    "share_layers": True,
    "subspaces": {"german": 2, "formal": 2},
    "prompt_end": [7],
    "turns": "all",
    "act_fn": "gelu",
    "trainable_token_indices": [5],
    "modules_to_save": ["lm_head"],
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_setting_that_says_what_weights_mean_is_compared(name):
    said = other_meaning(ReftConfig(**{name: CHANGES[name]}), ReftConfig())
    assert said is not None and said.startswith(f"{name} is {CHANGES[name]!r}")
    assert CHANGES.keys() == {*MEANING}


def test_modules_in_another_order_mean_the_same():
    one, other = (ReftConfig(modules_to_save=names) for names in (["lm_head", "norm"], ["norm", "lm_head"]))
    assert other_meaning(one, other) is None


def test_subspaces_in_another_order_mean_other_rows_of_r():
    one, other = (ReftConfig(subspaces=dict.fromkeys(names, 2)) for names in (["a", "b"], ["b", "a"]))
    assert other_meaning(one, one) is None
    assert other_meaning(one, other).startswith("subspaces is [('a', 2), ('b', 2)] in the new adapter")
