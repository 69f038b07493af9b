"""ReftConfig: what it accepts, what it says about the rest, and that it survives being saved and copied."""

from __future__ import annotations

import copy
import json
import pickle
import re
from dataclasses import asdict, replace

import pytest
from conftest import BLOCKS, tiny_model
from peft import PeftConfig, TaskType, get_peft_model
from peft.utils.peft_types import PeftType

from peft_reft import ReftConfig, get_interventions

EVERY_FIELD = {
    "task_type": "CAUSAL_LM",
    "r": 2,
    "intervention": "noreft",
    "positions": "f3+l2",
    "share_weights": False,
    "prompt_end": [7, 8],
    "turns": "last",
    "layers_to_transform": [0, -1],
    "target_modules": ["model.layers.0", "model.layers.2"],
    "exclude_modules": ["model.layers.1"],
    "modules_to_save": ["lm_head"],
    "rank_pattern": {"layers.2": 3},
    "trainable_token_indices": [4, 5],
    "dropout": 0.25,
    "act_fn": "gelu",
    "init_weights": False,
}


def test_defaults_are_those_of_the_contract():
    config = ReftConfig()
    assert (config.r, config.intervention, config.positions, config.share_weights) == (4, "loreft", "f1+l1", True)
    assert (config.dropout, config.act_fn, config.init_weights) == (0.0, None, True)
    assert (config.share_layers, config.prompt_end, config.turns) == (False, None, None)
    for name in ("task_type", "layers_to_transform", "target_modules", "exclude_modules", "modules_to_save"):
        assert getattr(config, name) is None
    assert not config.rank_pattern
    assert config.trainable_token_indices is None
    assert config.peft_type is PeftType.REFT
    assert not config.is_prompt_learning


def test_every_field_describes_itself():
    own = set(ReftConfig.__dataclass_fields__) - set(PeftConfig.__dataclass_fields__)
    assert own >= set(EVERY_FIELD) - {"task_type"}
    for name in own:
        assert len(ReftConfig.__dataclass_fields__[name].metadata["help"]) > 20, name


# What is rejected: the message repeats the value and states the rule.


@pytest.mark.parametrize("r", [0, -1, 1.5, "4", None, True])
def test_a_rank_below_one_or_no_integer_is_rejected(r):
    with pytest.raises(ValueError, match=rf"r={re.escape(repr(r))} is not a rank.*integer of at least 1"):
        ReftConfig(r=r)


@pytest.mark.parametrize("rank", [0, -2, 2.0, "8", None, False])
def test_a_rank_pattern_with_no_rank_is_rejected(rank):
    with pytest.raises(ValueError, match=rf"rank_pattern\['layers.1'\]={re.escape(repr(rank))} is not a rank"):
        ReftConfig(rank_pattern={"layers.0": 2, "layers.1": rank})


@pytest.mark.parametrize("name", ["LoReFT", "lora", "", None, 1, ["loreft"]])
def test_an_unknown_intervention_is_rejected_with_the_known_names(name):
    known = "boundless, consreft, direft, interchange, lobireft, loreft, noreft, odireft, vanilla"
    with pytest.raises(ValueError, match=rf"intervention={re.escape(repr(name))} is unknown.*{known}.*register_int"):
        ReftConfig(intervention=name)


@pytest.mark.parametrize(
    "positions",
    ["", "7", "x3", "F1", "f1.5", "f-1", "f", "f1+", "+l1", "f1 + l1", " f1", "f1,l1", "ALL", "d-1", "mid", "f１"],
)
def test_what_is_no_position_spec_is_rejected_with_the_grammar(positions):
    with pytest.raises(ValueError, match=rf"positions={re.escape(repr(positions))}.*'f7\+l7', 'f7' or 'l7'.*'all'"):
        ReftConfig(positions=positions)


@pytest.mark.parametrize(
    ("positions", "meant"),
    [
        ("f7+17", "f7+l7"),
        ("f1+1", "f1+l1"),
        ("f7+I7", "f7+l7"),
        ("F7+L7", "f7+l7"),
        ("f7 + l7", "f7+l7"),
        ("f7,l7", "f7+l7"),
        ("f7l7", "f7+l7"),
        ("f3+", "f3"),
        ("7", "f7"),
        ("ALL", "all"),
    ],
)
def test_a_misspelt_position_spec_is_answered_with_the_one_that_was_meant(positions, meant):
    with pytest.raises(
        ValueError, match=re.escape(f"positions={positions!r}") + rf".*Did you mean {meant!r}\?".replace("+", r"\+")
    ):
        ReftConfig(positions=positions)


@pytest.mark.parametrize("positions", ["", "x3", "first", "f", "f-1", "17+f7+x"])
def test_a_position_spec_that_resembles_none_is_answered_without_a_guess(positions):
    with pytest.raises(ValueError) as error:
        ReftConfig(positions=positions)
    assert "Did you mean" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "meant"), [("lorefft", "loreft"), ("LoReFT", "loreft"), ("di-reft", "direft"), ("noref", "noreft")]
)
def test_a_misspelt_intervention_is_answered_with_the_one_that_was_meant(name, meant):
    with pytest.raises(ValueError, match=f"intervention={name!r} is unknown. Did you mean {meant!r}\\?"):
        ReftConfig(intervention=name)


def test_an_intervention_that_resembles_none_is_answered_without_a_guess():
    with pytest.raises(ValueError, match=r"intervention='houlsby' is unknown\. Use one of"):
        ReftConfig(intervention="houlsby")


@pytest.mark.parametrize("positions", [None, 7, ("f1", "l1"), ["f1"]])
def test_positions_that_are_no_string_are_rejected(positions):
    with pytest.raises(ValueError, match=rf"positions={re.escape(repr(positions))} .*must be a string"):
        ReftConfig(positions=positions)


@pytest.mark.parametrize(("positions", "term"), [("f0", "f0"), ("l0", "l0"), ("f0+l3", "f0"), ("f3+l0", "l0")])
def test_a_term_that_touches_no_token_is_rejected(positions, term):
    with pytest.raises(ValueError, match=rf"positions='{re.escape(positions)}' has the term '{term}'.*at least 1"):
        ReftConfig(positions=positions)


@pytest.mark.parametrize("positions", ["f1+f2", "l1+l1", "f1+l1+l2", "all+all", "f1+d+d2"])
def test_two_terms_of_a_kind_are_rejected(positions):
    with pytest.raises(ValueError, match=rf"positions='{re.escape(positions)}' has two terms of the same kind"):
        ReftConfig(positions=positions)


@pytest.mark.parametrize("positions", ["all+f1", "f1+all", "all+e2"])
def test_terms_beside_all_are_rejected(positions):
    with pytest.raises(
        ValueError, match=rf"positions='{re.escape(positions)}': 'all' names every prompt token already"
    ):
        ReftConfig(positions=positions)


def test_suffix_before_prefix_is_rejected_with_a_suggestion():
    with pytest.raises(ValueError, match=r"positions='l1\+f2'.*Did you mean 'f2\+l1'"):
        ReftConfig(positions="l1+f2")


@pytest.mark.parametrize("layers", [[], (), "3", 1.0, [0, "1"], [0.0], [None], True, [True], {1, 2}])
def test_layers_that_are_no_block_numbers_are_rejected(layers):
    with pytest.raises(ValueError, match=rf"layers_to_transform={re.escape(repr(layers))} .*block number"):
        ReftConfig(layers_to_transform=layers)


@pytest.mark.parametrize("dropout", [-0.1, 1, 1.0, 1.5, float("nan"), float("inf"), "0.1", None, False])
def test_a_dropout_that_is_no_probability_below_one_is_rejected(dropout):
    with pytest.raises(ValueError, match=rf"dropout={re.escape(repr(dropout))} is not a probability below 1"):
        ReftConfig(dropout=dropout)


@pytest.mark.parametrize("act_fn", ["", "RELU", "no_such", 3, False, ["relu"]])
def test_an_unknown_activation_is_rejected_with_the_known_names(act_fn):
    with pytest.raises(ValueError, match=rf"act_fn={re.escape(repr(act_fn))} is not an activation.*gelu.*relu.*None"):
        ReftConfig(act_fn=act_fn)


@pytest.mark.parametrize("name", ["share_weights", "share_layers", "init_weights"])
@pytest.mark.parametrize("value", ["yes", 1, 0, None])
def test_a_switch_that_is_neither_true_nor_false_is_rejected(name, value):
    with pytest.raises(ValueError, match=rf"{name}={re.escape(repr(value))} must be True(,| or) False"):
        ReftConfig(**{name: value})


@pytest.mark.parametrize("positions", ["all", "e2", "d", "f1+d"])
def test_weights_per_position_need_a_fixed_number_of_positions(positions):
    with pytest.raises(ValueError, match=rf"share_weights='position' .*positions='{re.escape(positions)}'"):
        ReftConfig(positions=positions, share_weights="position")
    assert ReftConfig(positions="f2+l1", share_weights="position").share_weights == "position"


def test_shared_layers_cannot_have_ranks_of_their_own():
    with pytest.raises(ValueError, match=r"share_layers=True .*rank_pattern=\{'layers.0': 2\}"):
        ReftConfig(share_layers=True, rank_pattern={"layers.0": 2})


@pytest.mark.parametrize("turns", ["", "second", 1, True])
def test_unknown_turns_are_rejected(turns):
    with pytest.raises(ValueError, match=f"turns={turns!r} must be 'first', 'last', 'all' or None"):
        ReftConfig(turns=turns)


@pytest.mark.parametrize("prompt_end", ["", [], 7, ["a"], [1.0], [True]])
def test_a_prompt_end_that_marks_nothing_is_rejected(prompt_end):
    with pytest.raises(ValueError, match=rf"prompt_end={re.escape(repr(prompt_end))} marks nothing"):
        ReftConfig(prompt_end=prompt_end)


def test_an_unknown_task_type_is_rejected():
    with pytest.raises(ValueError, match="NO_TASK"):
        ReftConfig(task_type="NO_TASK")


def test_what_is_accepted_stays_as_it_was_given():
    config = ReftConfig(**EVERY_FIELD)
    for name, value in EVERY_FIELD.items():
        assert getattr(config, name) == (set(value) if name in ("target_modules", "exclude_modules") else value), name


@pytest.mark.parametrize(
    "positions", ["f1", "l1", "f12", "l3", "f1+l1", "f10+l20", "all", "m3", "f1+m2+l1", "e4", "d", "all+d8"]
)
def test_every_form_of_positions_is_accepted(positions):
    assert ReftConfig(positions=positions).positions == positions


# Round trips.


def assert_same(config, other):
    assert type(other) is ReftConfig
    assert asdict(other) == asdict(config)
    assert other.peft_type is PeftType.REFT


@pytest.mark.parametrize(
    "read", [ReftConfig.from_pretrained, PeftConfig.from_pretrained], ids=["ReftConfig", "PeftConfig"]
)
@pytest.mark.parametrize("settings", [{}, EVERY_FIELD], ids=["defaults", "every field"])
def test_a_config_survives_save_pretrained_and_from_pretrained(settings, read, tmp_path):
    config = ReftConfig(**settings)
    config.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]
    assert_same(config, read(tmp_path))


def test_the_saved_file_is_plain_json_with_the_fields_of_the_contract(tmp_path):
    ReftConfig(**EVERY_FIELD).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "REFT"
    for name, value in EVERY_FIELD.items():
        found = sorted(saved[name]) if name in ("target_modules", "exclude_modules") else saved[name]
        assert found == value, name


@pytest.mark.parametrize("layers", [None, 0, -1, [0], [0, 2], (1, -1)])
def test_layers_to_transform_survive_a_round_trip(layers, tmp_path):
    ReftConfig(layers_to_transform=layers).save_pretrained(tmp_path)
    expected = list(layers) if isinstance(layers, tuple) else layers
    loaded = ReftConfig.from_pretrained(tmp_path).layers_to_transform
    assert loaded == expected
    assert type(loaded) is type(expected)


def test_unknown_future_keys_are_dropped_with_a_warning(tmp_path):
    ReftConfig(r=3).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "field_of_a_later_version": 1}))
    with pytest.warns(UserWarning, match="field_of_a_later_version"):
        loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is ReftConfig
    assert loaded.r == 3
    assert not hasattr(loaded, "field_of_a_later_version")


def test_a_saved_value_that_is_not_valid_is_rejected_on_loading(tmp_path):
    ReftConfig().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intervention": "somebodys_own"}))
    with pytest.raises(ValueError, match=r"intervention='somebodys_own' is unknown.*register_intervention"):
        PeftConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "make",
    [copy.copy, copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config)), lambda config: replace(config)],
    ids=["copy", "deepcopy", "pickle", "replace"],
)
def test_a_config_survives_copies(make):
    config = ReftConfig(**EVERY_FIELD)
    assert_same(config, make(config))


def test_a_deep_copy_shares_nothing():
    config = ReftConfig(**EVERY_FIELD)
    other = copy.deepcopy(config)
    other.rank_pattern["layers.0"] = 9
    other.target_modules.add("lm_head")
    assert config.rank_pattern == {"layers.2": 3}
    assert config.target_modules == {"model.layers.0", "model.layers.2"}


def test_two_configs_do_not_share_defaults():
    first, second = ReftConfig(), ReftConfig()
    first.rank_pattern["layers.0"] = 9
    assert second.rank_pattern == {}


@pytest.mark.parametrize("name", ["target_modules", "exclude_modules"])
def test_lists_of_modules_become_sets_and_regular_expressions_stay_strings(name):
    assert getattr(ReftConfig(**{name: ["a", "b", "a"]}), name) == {"a", "b"}
    assert getattr(ReftConfig(**{name: {"a"}}), name) == {"a"}
    assert getattr(ReftConfig(**{name: r".*\.1"}), name) == r".*\.1"


def test_a_config_is_not_changed_by_the_model_it_is_used_for(llama):
    config = ReftConfig(layers_to_transform=-1, task_type=TaskType.CAUSAL_LM)
    before = copy.deepcopy(config)
    model = get_peft_model(llama, config)
    for name in ("layers_to_transform", "target_modules", "exclude_modules", "positions", "r", "rank_pattern"):
        assert getattr(model.peft_config["default"], name) == getattr(before, name), name


# What only a model can tell.


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, [0, 1, 2]),
        (0, [0]),
        (2, [2]),
        (-1, [2]),
        (-3, [0]),
        ([0, 2], [0, 2]),
        ([2, 0], [0, 2]),
        ([0, -1], [0, 2]),
    ],
)
def test_layers_to_transform_choose_blocks_and_negative_ones_count_from_the_end(layers, expected, llama):
    model = get_peft_model(llama, ReftConfig(layers_to_transform=layers))
    assert list(get_interventions(model)) == [f"model.layers.{number}" for number in expected]


@pytest.mark.parametrize("layers", [BLOCKS, -BLOCKS - 1, [0, 7], [0, -9]])
def test_a_block_number_out_of_range_is_rejected_with_the_range(layers, llama):
    missing = layers if isinstance(layers, int) else layers[1]
    with pytest.raises(ValueError, match=rf"layers_to_transform={re.escape(repr(layers))}.*\[{missing}\].*0 to 2"):
        get_peft_model(llama, ReftConfig(layers_to_transform=layers))


def test_ranks_can_differ_by_block():
    model = get_peft_model(tiny_model("llama"), ReftConfig(r=4, rank_pattern={"layers.0": 1, r".*\.2": 6}))
    ranks = [modules[0].subspace.shape[0] for modules in get_interventions(model).values()]
    assert ranks == [1, 4, 6]
