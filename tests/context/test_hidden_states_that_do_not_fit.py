"""Hidden states whose shape is not that of the call's tokens are refused in words, in whatever way they differ."""

import pytest
import torch
from conftest import VOCAB, batch, randomize, reft_model, tiny_model
from peft import get_peft_model
from torch import Tensor, nn
from transformers import FunnelBaseModel, FunnelConfig, XLNetConfig, XLNetLMHeadModel

from peft_reft import ReftConfig

TINY = {"vocab_size": VOCAB}
CONFIG = {"task_type": "CAUSAL_LM", "r": 2, "positions": "f1+l1"}


class Block(nn.Module):
    """Returns the hidden state, or what its test cuts out of it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.cut = ...

    def forward(self, h):
        return self.linear(h)[self.cut]


class OnTokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.block = nn.Embedding(20, 8), Block()

    def forward(self, input_ids, attention_mask=None):
        return self.block(self.embed(input_ids))


def edited(model, **settings):
    settings = {"target_modules": ["block"], "r": 2, "positions": "f1+l1", **settings}
    return randomize(get_peft_model(model, ReftConfig(**settings)).eval())


CUTS = {
    "another width": ((..., slice(4)), r"vectors of width 4, but its ReFT adapter was made for width 8"),
    "fewer tokens": ((slice(None), slice(3)), r"shape \(2, 3, 8\) for a batch of 2 rows and 6 columns .*'f1\+l1'"),
    "fewer rows": ((slice(1),), r"shape \(1, 6, 8\) for a batch of 2 rows and 6 columns"),
    "one token": ((slice(None), 0), r"counts the call's 6 tokens, but a targeted module returned .* \(2, 8\)"),
}


@pytest.mark.parametrize("how", CUTS)
def test_a_block_that_returns_something_else_than_before_is_refused(how):
    cut, message = CUTS[how]
    model, ids = edited(OnTokens()), {"input_ids": torch.randint(20, (2, 6))}
    before = model(**ids)
    model.base_model.model.block.cut = cut
    with pytest.raises(ValueError, match=message):
        model(**ids)
    model.base_model.model.block.cut = ...
    assert torch.equal(model(**ids), before)


def test_positions_that_count_need_an_axis_of_tokens():
    class Grid(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, x):
            return self.block(x)

    x, grid = torch.randn(2, 3, 4, 8), Grid()
    plain = grid(x)
    with pytest.raises(ValueError, match=r"'f1\+l1' counts the vectors of a sequence .* shape \(2, 3, 4, 8\)"):
        edited(Grid())(x)
    assert (edited(grid, positions="all")(x) != plain).any(-1).all()


class InSequence(nn.Module):
    """A block that is a container, which runs all of its children."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

    def forward(self, x):
        return self.block(x)


def test_a_container_that_is_edited_runs_its_layer_among_its_children_to_no_effect():
    torch.manual_seed(0)
    base, x = InSequence(), torch.randn(2, 5, 8)
    plain = base(x)
    model = edited(base)
    out = model(x)
    assert torch.equal(out[:, 1:4], plain[:, 1:4])
    for column in (0, 4):
        assert (out[:, column] - plain[:, column]).abs().max() > 1e-3
    assert torch.equal(base.block.reft(x), x)


def test_a_generate_of_rows_that_no_prompt_has_is_refused():
    """Steps of three rows for places in two: it is unknown whose they are."""
    base = tiny_model("llama", eos_token_id=None)
    prepare = type(base).prepare_inputs_for_generation

    class ThreeRows(type(base)):
        def prepare_inputs_for_generation(self, *args, **kwargs):
            inputs = prepare(self, *args, **kwargs)
            tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
            return {**inputs, **{name: value[[0, 1, 1]] for name, value in tensors.items() if len(value) == 2}}

    base.__class__ = ThreeRows
    places = torch.tensor([[0], [4]])
    with pytest.raises(ValueError, match="given 2 prompts but runs a batch of 3 rows"):
        reft_model(base, **CONFIG).generate(**batch(5, 5), intervention_locations=places, max_new_tokens=2)


def test_a_memory_that_is_too_short_is_refused():
    """XLNet keeps the last `mem_len` columns only, and does not say how many there were."""
    base = XLNetLMHeadModel(XLNetConfig(**TINY, n_layer=2, d_model=16, n_head=2, d_inner=32, mem_len=3)).eval()
    model = reft_model(base, **CONFIG)
    prompt = {"input_ids": torch.randint(3, 90, (1, 8))}
    with pytest.raises(ValueError, match=r"keeps \d of \d columns.*Set model.config.mem_len"):
        model.generate(**prompt, max_new_tokens=4, do_sample=False, eos_token_id=None)


def test_locations_of_tokens_are_refused_by_blocks_that_have_fewer_vectors():
    config = FunnelConfig(**TINY, block_sizes=[1, 1], num_decoder_layers=1, d_model=16, n_head=2, d_head=8, d_inner=32)
    base, inputs = FunnelBaseModel(config).eval(), batch(8, 8)
    plain = base(**inputs).last_hidden_state
    model = reft_model(base, r=2, positions="f1+l1")
    assert not torch.equal(model(**inputs).last_hidden_state, plain)
    with pytest.raises(ValueError, match=r"blocks that return fewer vectors than tokens \(\d for 8\)"):
        model(**inputs, intervention_locations=torch.tensor([[0], [1]]))
