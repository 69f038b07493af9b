"""Blocks that `torch.compile` has wrapped are found as the modules inside, and named as in the base model."""

from __future__ import annotations

import architectures
import pytest
import torch
from accelerate.utils import compile_regions
from conftest import tiny_model
from torch import nn

from peft_reft.blocks import ModelBlocks, block_number, own_name, present_names
from peft_reft.blocks.declared import declared_stacks


def compile_blocks(model: nn.Module) -> nn.Module:
    for stack in ModelBlocks(model).stacks():
        for name in stack:
            parent = model.get_submodule(name.rpartition(".")[0])
            number = int(name.rpartition(".")[2])
            parent[number] = torch.compile(parent[number], backend="eager")
    return model


HOW = {
    "each block": compile_blocks,
    "accelerate's compile_regions": lambda model: compile_regions(model, backend="eager"),
    "the whole model": lambda model: torch.compile(model, backend="eager"),
}
KINDS = [("causal", "llama"), ("causal", "gpt2"), ("masked", "bert"), ("seq2seq", "t5")]
KINDS += [("causal", "mamba2"), ("causal", "gemma3n_text"), ("masked", "longformer"), ("causal", "qwen4_exp_text")]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(("mapping", "model_type"), KINDS)
def test_compiled_blocks_are_found(mapping, model_type, how):
    base = ModelBlocks(architectures.tiny_model(model_type, mapping))
    model = HOW[how](architectures.tiny_model(model_type, mapping))
    blocks = ModelBlocks(model)
    assert blocks.stacks() == base.stacks()
    assert bool(declared_stacks(model)) == bool(declared_stacks(base.model))
    present = present_names(model)
    for stack in blocks.stacks():
        for own in stack:
            name = present[own]
            assert "_orig_mod" in name
            assert own_name(name) == own
            block = model.get_submodule(name)
            assert type(block) is type(base.model.get_submodule(own))
            assert blocks.shape_of(name) == blocks.shape_of(own) == base.shape_of(own)
            assert block_number(name) == block_number(own)
            part = next(part for part, _ in block.named_children())
            assert blocks.shape_of(f"{name}.{part}") == base.shape_of(f"{own}.{part}")


def test_a_network_without_a_config_may_be_compiled():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, h):
            return self.linear(h)

    model = nn.Sequential(nn.Linear(6, 6), nn.ModuleList([torch.compile(Block(), backend="eager") for _ in range(2)]))
    assert ModelBlocks(model).stacks() == [["1.0", "1.1"]]
    assert present_names(model)["1.0"] == "1.0._orig_mod"
    assert ModelBlocks(model).shape_of("1.0")[0] == 6


def test_own_names_are_what_they_are_where_nothing_is_compiled():
    model = tiny_model("llama")
    assert all(own_name(name) == name for name, _ in model.named_modules())
