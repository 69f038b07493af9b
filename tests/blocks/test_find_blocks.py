"""Finding a model's blocks, and the width of what a block returns."""

from __future__ import annotations

from functools import partial
from types import MethodType

import architectures
import pytest
import reference
import torch
from conftest import BLOCKS, HIDDEN, batch, inputs_of, logits, randomize, tiny_model
from peft import get_peft_model

from peft_reft import ReftConfig, get_interventions
from peft_reft.blocks import ModelBlocks, block_width
from peft_reft.blocks.tracing.traced_model import TracedModel

STACKS = {
    "llama": ["model.layers"],
    "qwen2": ["model.layers"],
    "mistral": ["model.layers"],
    "gpt2": ["transformer.h"],
    "opt": ["model.decoder.layers"],
    "bert": ["bert.encoder.layer"],
    "roberta": ["roberta.encoder.layer"],
    "t5": ["encoder.block", "decoder.block"],
}


def numbered(*stacks, blocks=range(BLOCKS)):
    return [[f"{stack}.{number}" for number in blocks] for stack in stacks]


def find_blocks(model):
    return ModelBlocks(model).stacks()


def targets(model, **settings):
    return list(get_interventions(get_peft_model(model, ReftConfig(**settings))))


# The model's own blocks.


@pytest.mark.parametrize("family", STACKS)
def test_the_blocks_of_a_model_are_found(family):
    model = tiny_model(family)
    assert find_blocks(model) == numbered(*STACKS[family])
    assert targets(model) == [name for stack in numbered(*STACKS[family]) for name in stack]


@pytest.mark.parametrize("family", STACKS)
def test_the_blocks_of_a_model_without_a_head_are_found(family):
    stacks = [stack.removeprefix(stack.split(".")[0] + ".") if family != "t5" else stack for stack in STACKS[family]]
    assert find_blocks(tiny_model(family, head="base")) == numbered(*stacks)


@pytest.mark.parametrize("family", ["llama", "bert", "roberta", "gpt2", "opt"])
def test_the_blocks_of_a_classifier_are_found(family):
    assert find_blocks(tiny_model(family, head="classifier")) == numbered(*STACKS[family])


def test_the_blocks_are_found_whatever_their_number():
    assert find_blocks(tiny_model("llama", num_hidden_layers=1)) == [["model.layers.0"]]
    assert find_blocks(tiny_model("llama", num_hidden_layers=12)) == numbered("model.layers", blocks=range(12))


@pytest.mark.parametrize("family", STACKS)
def test_interventions_apply_to_the_block_output_of_each_block(family):
    model, base = tiny_model(family), tiny_model(family)
    config = ReftConfig(positions="f2+l1", share_weights=False)
    model = randomize(get_peft_model(model, config).eval())
    inputs = inputs_of(base)
    with torch.no_grad():
        expected = reference.forward(base, get_interventions(model), config, inputs).logits
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(base, inputs), expected, atol=1e-2)


@pytest.mark.parametrize("family", STACKS)
def test_the_width_of_a_block_is_that_of_its_output(family):
    model = tiny_model(family)
    for stack in find_blocks(model):
        for name in stack:
            assert block_width(model, name) == HIDDEN


@pytest.mark.parametrize(
    ("name", "width"),
    [
        ("mlp.gate_proj", 64),
        ("mlp.down_proj", HIDDEN),
        ("self_attn.k_proj", 16),
        ("mlp", HIDDEN),
        ("input_layernorm", HIDDEN),
    ],
)
def test_the_width_of_a_part_of_a_block_is_that_of_its_output(name, width, llama):
    assert block_width(llama, f"model.layers.0.{name}") == width
    model = randomize(get_peft_model(llama, ReftConfig(target_modules=[f"model.layers.0.{name}"])).eval())
    with model.disable_adapter():
        before = logits(model, inputs_of(llama))
    assert not torch.allclose(logits(model, inputs_of(llama)), before)


def test_a_rank_above_the_width_is_rejected_and_nothing_stays_behind(llama):
    before = logits(llama, inputs_of(llama))
    names = [name for name, _ in llama.named_modules()]
    with pytest.raises(ValueError, match=f"r=33 is not a rank for hidden states of width {HIDDEN}"):
        get_peft_model(llama, ReftConfig(r=HIDDEN + 1))
    assert [name for name, _ in llama.named_modules()] == names
    assert torch.equal(logits(llama, inputs_of(llama)), before)


def test_a_model_with_methods_of_any_callable_is_traced(llama):
    """torchao gives its layers such a method."""
    projection = llama.model.layers[0].mlp.up_proj
    projection.extra_repr = MethodType(
        partial(lambda prefix, module: f"{prefix}{module.in_features}", "of "), projection
    )
    assert len(TracedModel(llama).traces) == 2
    assert find_blocks(llama) == numbered(*STACKS["llama"])


def test_a_block_whose_output_nothing_reads_is_not_edited():
    """DiffusionGemma's decoder reads the keys and values of each of the encoder's blocks, not their outputs."""
    base = architectures.tiny_model("diffusion_gemma", "image-text")
    stack = "model.encoder.language_model.layers"
    assert targets(base) == [f"{stack}.{number}" for number in range(architectures.DEPTH - 1)]
    inputs = architectures.batch_for(base, "image-text", (6, 6)).inputs

    def logits_with(changed):
        handle = base.get_submodule(f"{stack}.{changed}").register_forward_hook(lambda module, args, h: h.cos())
        torch.manual_seed(0)  # of the draft that is refined
        with torch.no_grad():
            got = base(**inputs).logits
        handle.remove()
        return got

    torch.manual_seed(0)
    with torch.no_grad():
        before = base(**inputs).logits
    changed = [not torch.equal(logits_with(number), before) for number in range(architectures.DEPTH)]
    assert changed == [True] * (architectures.DEPTH - 1) + [False]


def test_a_model_that_rescales_its_hidden_states_is_refused_with_the_way_out():
    base = architectures.tiny_model("rwkv")
    base.config.rescale_every = 2
    with pytest.raises(ValueError, match=r"halves its hidden states every 2 blocks.*rescale_every = 0"):
        get_peft_model(base, ReftConfig())
    base.config.rescale_every = 0
    assert len(targets(base)) == architectures.DEPTH


@pytest.mark.parametrize("number", range(architectures.DEPTH))
def test_blocks_before_the_first_rescaling_are_edited_alike_in_training_and_at_inference(number):
    base = architectures.tiny_model("rwkv")
    base.config.rescale_every = 2
    config = ReftConfig(target_modules=[f"blocks.{number}"], positions="all", r=2, task_type="CAUSAL_LM")
    if number >= 2:
        with pytest.raises(ValueError, match="halves its hidden states every 2 blocks"):
            get_peft_model(base, config)
        return
    model = randomize(get_peft_model(base, config))
    inputs = {"input_ids": batch(5)["input_ids"]}
    at_inference, in_training = logits(model.eval(), inputs), logits(model.train(), inputs)
    torch.testing.assert_close(at_inference, in_training, rtol=1e-3, atol=1e-3)
    with model.disable_adapter():
        assert not torch.allclose(logits(model, inputs), in_training, atol=0.05)
