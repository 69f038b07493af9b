"""`layers_to_transform`, `target_modules` and `exclude_modules`: choosing among a model's modules."""

from __future__ import annotations

import pytest
from conftest import BLOCKS, tiny_model
from peft import get_peft_model

from peft_reft import ReftConfig, get_interventions

STACKS = {
    "llama": "model.layers",
    "qwen2": "model.layers",
    "mistral": "model.layers",
    "gpt2": "transformer.h",
    "opt": "model.decoder.layers",
    "bert": "bert.encoder.layer",
    "roberta": "roberta.encoder.layer",
}


def numbered(stack, blocks):
    return [f"{stack}.{number}" for number in blocks]


def targets(model, **settings):
    return list(get_interventions(get_peft_model(model, ReftConfig(**settings))))


# layers_to_transform.


@pytest.mark.parametrize("family", STACKS)
@pytest.mark.parametrize(("layers", "numbers"), [(1, [1]), (-1, [2]), ([0, -1], [0, 2]), ([-2, -3], [0, 1])])
def test_layers_to_transform_count_the_blocks(family, layers, numbers):
    assert targets(tiny_model(family), layers_to_transform=layers) == numbered(STACKS[family], numbers)


@pytest.mark.parametrize(
    ("layers", "encoder", "decoder"),
    [(0, [0], [0]), (-1, [2], [1]), ([1, -3], [0, 1], [1]), (2, [2], []), ([0, -1], [0, 2], [0, 1])],
)
def test_layers_to_transform_count_the_blocks_of_each_stack(layers, encoder, decoder):
    model = tiny_model("t5", num_decoder_layers=2)
    expected = numbered("encoder.block", encoder) + numbered("decoder.block", decoder)
    assert targets(model, layers_to_transform=layers) == expected


def test_a_number_that_no_stack_has_is_rejected():
    with pytest.raises(ValueError, match=r"layers_to_transform=3 .*\[3\].*3 and 2 block.*0 to 2"):
        get_peft_model(tiny_model("t5", num_decoder_layers=2), ReftConfig(layers_to_transform=3))


# target_modules and exclude_modules.


@pytest.mark.parametrize(
    ("target_modules", "expected"),
    [
        (["model.layers.1"], ["model.layers.1"]),
        (["layers.1"], ["model.layers.1"]),
        (["layers.0", "layers.2"], ["model.layers.0", "model.layers.2"]),
        (["mlp"], [f"model.layers.{number}.mlp" for number in range(BLOCKS)]),
        (["o_proj"], [f"model.layers.{number}.self_attn.o_proj" for number in range(BLOCKS)]),
        (r"model\.layers\.[01]", ["model.layers.0", "model.layers.1"]),
        (r".*\.[02]\.mlp", ["model.layers.0.mlp", "model.layers.2.mlp"]),
        (["embed_tokens", "norm"], ["model.embed_tokens", "model.norm"]),
    ],
    ids=str,
)
def test_target_modules_name_modules_by_suffix_or_regular_expression(target_modules, expected, llama):
    assert targets(llama, target_modules=target_modules) == expected


@pytest.mark.parametrize("target_modules", [["mlp"], r".*\.mlp"], ids=str)
@pytest.mark.parametrize(("layers", "numbers"), [(0, [0]), (-1, [2]), ([0, -1], [0, 2])])
def test_layers_to_transform_pick_among_target_modules(target_modules, layers, numbers, llama):
    expected = [f"model.layers.{number}.mlp" for number in numbers]
    assert targets(llama, target_modules=target_modules, layers_to_transform=layers) == expected


@pytest.mark.parametrize("exclude", [["layers.1"], ["model.layers.1"], r".*\.1"], ids=str)
def test_exclude_modules_are_not_edited(exclude, llama):
    assert targets(llama, exclude_modules=exclude) == ["model.layers.0", "model.layers.2"]


def test_exclude_modules_take_away_from_target_modules(llama):
    got = targets(llama, target_modules=["mlp", "o_proj"], exclude_modules=["o_proj", "layers.0.mlp"])
    assert got == ["model.layers.1.mlp", "model.layers.2.mlp"]


def test_target_modules_reach_what_is_edited_already(llama):
    model = get_peft_model(llama, ReftConfig())
    model.add_adapter("other", ReftConfig(target_modules=r"model\.layers\.1.*"))
    found = list(get_interventions(model, "other"))
    assert "model.layers.1" in found
    assert not [name for name in found if "reft" in name]


def test_target_modules_that_match_nothing_are_rejected(llama):
    with pytest.raises(ValueError, match=r"no_such_module.*not found"):
        get_peft_model(llama, ReftConfig(target_modules=["no_such_module"]))


def test_excluding_every_block_is_rejected(llama):
    with pytest.raises(ValueError, match="excluded"):
        get_peft_model(llama, ReftConfig(exclude_modules=r".*layers.*"))
