"""What transformers' classes declare about blocks: where it is enough, it is what a trace finds, without a trace."""

from __future__ import annotations

import architectures
import pytest
import torch
from conftest import inputs_of, logits, randomize, tiny_model
from peft import get_peft_model
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from peft_reft import ReftConfig
from peft_reft.blocks import PLAIN, ModelBlocks
from peft_reft.blocks.declared import declared_stacks
from peft_reft.blocks.tracing import traced_model
from peft_reft.blocks.tracing.layouts import traced_layout
from peft_reft.blocks.tracing.stacks import traced_stacks
from peft_reft.blocks.tracing.traced_model import TracedModel

FAMILIES = ["llama", "qwen2", "mistral", "gpt2", "opt", "bert", "roberta", "t5"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", ["causal", "base"])
def test_what_is_declared_is_what_a_trace_finds(family, head):
    model = tiny_model(family) if head == "causal" else tiny_model(family, head="base")
    declared, traced = declared_stacks(model), TracedModel(model)
    assert [stack.names for stack in declared] == traced_stacks(traced)
    for stack in declared:
        for name in stack.names:
            assert (traced.shapes(name)[0][-1], traced_layout(traced, name)) == (stack.width, PLAIN)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_model_takes_an_adapter_without_a_trace(family, monkeypatch):
    def refuse(model: nn.Module) -> TracedModel:
        raise AssertionError(f"{type(model).__name__} was traced")

    model = tiny_model(family)
    before = logits(model, inputs_of(model))
    with monkeypatch.context() as context:
        context.setattr(traced_model, "TracedModel", refuse)
        adapted = randomize(get_peft_model(model, ReftConfig(r=2)).eval())
        blocks = ModelBlocks(model)
        block = blocks.stacks()[0][0]
        part = next(name for name, _ in model.get_submodule(block).named_children())
        with pytest.raises(AssertionError, match="was traced"):  # what a part of a block returns is not declared
            blocks.shape_of(f"{block}.{part}")
    assert (logits(adapted, inputs_of(model)) - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("model_type", "mapping"),
    [
        ("gemma3n_text", "causal"),  # four streams, one in front of the other
        ("qwen4_exp_text", "causal"),  # four streams, side by side
        ("git", "causal"),  # an image in front of the tokens
        ("layoutlmv3", "token"),  # an image behind them
        ("zamba", "causal"),  # records a part of its blocks
        ("hrm_text", "causal"),  # two lists that run in turn
        ("big_bird", "masked"),  # pads long inputs to a multiple of its block
        ("cpmant", "causal"),  # declares nothing
        ("albert", "masked"),  # runs one block several times
    ],
)
def test_a_declaration_that_does_not_tell_all_is_not_taken(model_type, mapping):
    assert declared_stacks(architectures.tiny_model(model_type, mapping)) == []


class OwnForward(LlamaForCausalLM):
    """A class of a user's, which may feed its blocks anything."""

    def forward(self, input_ids, attention_mask=None, **kwargs):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


class OwnBlock(LlamaDecoderLayer):
    """A block of a user's, which may return anything."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class NothingOfItsOwn(LlamaForCausalLM):
    """A class of a user's with transformers' own code."""


def test_code_that_is_not_of_transformers_is_traced():
    config = tiny_model("llama").config
    torch.manual_seed(0)
    assert len(declared_stacks(NothingOfItsOwn(config))) == 1
    model = OwnForward(config)
    assert declared_stacks(model) == []
    assert ModelBlocks(model).stacks() == ModelBlocks(tiny_model("llama")).stacks()
    model = tiny_model("llama")
    model.model.layers[1] = OwnBlock(config, 1)
    assert declared_stacks(model) == []
    assert ModelBlocks(model).stacks() == ModelBlocks(tiny_model("llama")).stacks()


def test_a_second_list_of_blocks_in_the_model_is_traced():
    model = tiny_model("llama")
    model.more = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(2)])
    assert declared_stacks(model) == []
    assert ModelBlocks(model).stacks() == ModelBlocks(tiny_model("llama")).stacks()
