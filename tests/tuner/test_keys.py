"""The names of an adapter's parameters, as PEFT and transformers ask for them."""

import pytest
from conftest import reft_model, tiny_model
from peft.utils.save_and_load import get_peft_model_state_dict

from peft_reft.tuner.keys import CHILD, PEFT_PREFIX, PREFIX, blocks_of, is_intervention, parse_file_key, without_adapter


def test_every_key_of_a_file_is_taken_apart_and_put_together_again():
    model = reft_model(tiny_model("llama"), positions="f1+l1", share_weights=False)
    keys = list(get_peft_model_state_dict(model))
    parts = [parse_file_key(key) for key in keys]
    assert [str(part) for part in parts] == keys
    assert {part.block for part in parts} == {f"model.layers.{number}" for number in range(3)}
    assert {part.group for part in parts} == {0, 1}
    assert {part.parameter for part in parts} == {"basis", "weight", "bias"}


def test_a_model_s_key_without_the_adapter_s_name_is_a_file_s_key():
    model = reft_model(tiny_model("llama"), adapter="french")
    of_the_model = [key for key in model.state_dict() if is_intervention(key, "french")]
    assert of_the_model and not any(is_intervention(key, "german") for key in of_the_model)
    assert [without_adapter(key, "french") for key in of_the_model] == list(
        get_peft_model_state_dict(model, adapter_name="french")
    )


@pytest.mark.parametrize(
    "key", ["lm_head.weight", "a.reft.reft_interventions.x.basis", "reft.reft_interventions.0.b", ""]
)
def test_other_keys_have_no_parts(key):
    assert parse_file_key(key) is None


def test_blocks_keep_peft_s_prefix_and_their_order():
    keys = [
        f"{PEFT_PREFIX}h.{number}.reft.reft_interventions.0.{name}" for number in (10, 9) for name in ("basis", "bias")
    ]
    assert blocks_of(keys) == [f"{PEFT_PREFIX}h.10", f"{PEFT_PREFIX}h.9"]
    assert blocks_of(keys[:1]) == [f"{PEFT_PREFIX}h.10"]


def test_exactly_one_component_of_a_key_starts_with_peft_s_prefix():
    """PEFT skips modules with the prefix in their names, and transformers puts the adapter's name behind it."""
    assert not CHILD.startswith(PREFIX)
    for key in get_peft_model_state_dict(reft_model(tiny_model("llama"))):
        assert sum(part.startswith(PREFIX) for part in key.split(".")) == 1
