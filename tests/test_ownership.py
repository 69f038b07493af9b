"""An edit is put into a copy of a block's output: what somebody else holds is never written to."""

from __future__ import annotations

import pytest
import torch
from conftest import batch, randomize, reft_model, tiny_model
from peft import get_peft_model
from torch import nn

from peft_reft import ReftConfig


class Block(nn.Module):
    """A block whose output is new, unless `forward` is replaced."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.table = nn.Parameter(torch.randn(2, 5, 8))
        self.kept = []  # pairs of what the block keeps and what that was

    def forward(self, h):
        return self.linear(h) + 1


class Returns(nn.Module):
    """What a model with one block returns: the block's output, and what the caller still holds."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, h):
        return self.block(h)


def edited(block, positions="f2+l1"):
    torch.manual_seed(0)
    model = get_peft_model(Returns(block), ReftConfig(target_modules=["block"], positions=positions, r=2)).eval()
    return randomize(model)


class GivesItsInput(Block):
    def forward(self, h):
        return h


class GivesAView(Block):
    def forward(self, h):
        return h.view(h.shape)


class GivesItsParameter(Block):
    def forward(self, h):
        return self.table


class GivesAnAliasOfItsParameter(Block):
    def forward(self, h):
        return self.table.detach()


class KeepsIt(Block):
    def forward(self, h):
        out = super().forward(h)
        self.kept.append((out, out.clone()))
        return out


class KeepsAnAlias(Block):
    def forward(self, h):
        out = super().forward(h)
        self.kept.append((out.detach(), out.clone()))
        return out


class KeepsAPart(Block):
    def forward(self, h):
        out = super().forward(h)
        self.kept.append((out[:, 1:], out[:, 1:].clone()))
        return out


@pytest.mark.parametrize("positions", ["f2+l1", "all"])
@pytest.mark.parametrize(
    "cls",
    [GivesItsInput, GivesAView, GivesItsParameter, GivesAnAliasOfItsParameter, KeepsIt, KeepsAnAlias, KeepsAPart],
    ids=lambda cls: cls.__name__,
)
def test_what_somebody_else_holds_is_not_written_to(cls, positions):
    block = cls()
    model, h = edited(block, positions), torch.randn(2, 5, 8)
    before, table = h.clone(), block.table.detach().clone()

    def untouched():
        kept = all(torch.equal(now, was) for now, was in block.kept)
        return kept and torch.equal(h, before) and torch.equal(block.table, table)

    with_autograd = model(h)
    assert untouched()
    with torch.no_grad():
        out = model(h)
        assert untouched()
        with model.disable_adapter():
            plain = model(h)
    assert torch.equal(out, with_autograd)
    edited_tokens = [[True, True, positions == "all", positions == "all", True]] * 2
    assert (out != plain).any(-1).tolist() == edited_tokens
    assert len(block.kept) == (3 if cls.__name__.startswith("Keeps") else 0)


def test_a_hook_inside_a_block_keeps_what_it_saw():
    """In a post-norm block the last layer norm's output is the block's own."""
    model, inputs = reft_model(tiny_model("bert"), positions="f2+l1"), batch(6, 4)
    seen = []
    last = model.get_submodule("base_model.model.bert.encoder.layer.0.output")
    last.register_forward_hook(lambda module, args, output: seen.append(output))
    model(**inputs)
    with torch.no_grad():
        model(**inputs)
        with model.disable_adapter():
            model(**inputs)
    with_autograd, without, base = seen
    assert torch.equal(with_autograd, without) and torch.equal(without, base)
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    assert not torch.equal(states[1], base)


def test_the_edits_of_several_adapters_are_computed_on_the_blocks_own_output():
    """Not each on the output that the one before has edited."""
    model, h = edited(Block()), torch.randn(2, 5, 8)
    for name, positions in (("second", "l2"), ("third", "all")):
        model.add_adapter(name, ReftConfig(target_modules=["block"], positions=positions, r=3))
        randomize(model, name, seed=len(name))
    with torch.no_grad():
        with model.disable_adapter():
            own = model(h)
        deltas = []
        for name in ("default", "second", "third"):
            model.set_adapter(name)
            deltas.append(model(h) - own)
        model.base_model.set_adapter(["default", "second", "third"])
        torch.testing.assert_close(model(h), own + sum(deltas))
    assert all((delta[:, -1].abs() > 1e-2).any() for delta in deltas)  # all three edit the last token


def test_recorded_hidden_states_are_the_same_with_and_without_autograd():
    model, inputs = reft_model(tiny_model("llama"), positions="f2+l1"), batch(6, 4)
    with_autograd = model(**inputs, output_hidden_states=True).hidden_states
    with torch.no_grad():
        without = model(**inputs, output_hidden_states=True).hidden_states
        with model.disable_adapter():
            plain = model(**inputs, output_hidden_states=True).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(with_autograd, without))
    # What is recorded behind the first block is its edited output.
    assert [torch.equal(a, b) for a, b in zip(without[:2], plain)] == [True, False]
