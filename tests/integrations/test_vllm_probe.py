"""How blocks return the residual stream, found out on toy stacks of every form that engines have."""

import pytest
import torch
from torch import nn

from peft_reft.integrations.vllm.probe import Convention, UnknownConvention, find_conventions
from peft_reft.integrations.vllm.worker import find_blocks

WIDTH = 16


class Form(nn.Module):
    """A block that computes the same stream in one of several forms."""

    def __init__(self, form: str, scale: float = 1.0):
        super().__init__()
        self.form, self.scale = form, scale
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, positions, hidden, residual=None, **kwargs):
        if self.form == "stream":
            return hidden + self.linear(self.norm(hidden)) * self.scale
        if self.form == "tuple of one":
            return (hidden + self.linear(self.norm(hidden)),)
        if self.form == "sum":
            residual = hidden if residual is None else hidden + residual
            return self.linear(self.norm(residual)) * self.scale, residual
        if self.form == "unused second":
            return hidden + self.linear(self.norm(hidden)), hidden
        if self.form == "difference":
            residual = hidden if residual is None else residual - hidden
            return self.linear(self.norm(residual)), residual
        if self.form == "in place":
            residual = hidden.clone() if residual is None else residual.add_(hidden)
            return self.linear(self.norm(residual)), residual
        if self.form == "constant":
            return torch.ones_like(hidden)
        raise AssertionError(self.form)


class Model(nn.Module):
    def __init__(self, *forms, scale=1.0, between=None):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Form(form, scale) for form in forms)
        self.head, self.between = nn.Linear(WIDTH, 3), between

    def forward(self, hidden):
        residual = None
        for layer in self.layers:
            out = layer(torch.arange(len(hidden)), hidden, residual=residual)
            hidden, residual = (out[0], out[1] if len(out) > 1 else None) if isinstance(out, tuple) else (out, None)
            hidden = hidden if self.between is None else self.between(hidden)
        return self.head(hidden if residual is None else hidden + residual)


def conventions(model, **kwargs):
    return [
        found.stream for found in find_conventions(list(model.layers), lambda: model(torch.randn(4, WIDTH)), **kwargs)
    ]


@pytest.mark.parametrize(
    "form, stream",
    [("stream", "first"), ("tuple of one", "first"), ("sum", "sum"), ("in place", "sum"), ("unused second", "first")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_the_form_of_a_block_is_found(form, stream, dtype, scale):
    model = Model(form, form, form, scale=scale).to(dtype)
    found = find_conventions(list(model.layers), lambda: model(torch.randn(4, WIDTH, dtype=dtype)))
    assert [convention.stream for convention in found] == [stream] * 3
    assert not model.layers[0]._forward_hooks and not model.layers[0]._forward_pre_hooks


@pytest.mark.parametrize(
    "model, said",
    [
        (Model("difference", "difference", "difference"), "in an unknown way"),
        (Model("constant", "constant", "constant"), "does not depend"),
        (Model("stream", "stream", between=lambda hidden: 2 * hidden), "is not what the next block gets"),
        (Model("stream"), "has no block of its class before it"),
    ],
)
def test_what_cannot_be_made_out_is_said(model, said):
    with pytest.raises(UnknownConvention, match=said):
        conventions(model)


def test_vectors_of_another_width_than_the_models_are_said():
    with pytest.raises(UnknownConvention, match="width 16, and the model's width is 64"):
        conventions(Model("stream", "stream"), width=64)


class Attention(nn.Module):
    """Without its cache it returns whatever the memory held, as an engine's does."""

    def forward(self, hidden):
        return torch.randn_like(hidden) * 1e3


def test_attention_without_a_cache_does_not_disturb_the_trial():
    class Block(Form):
        def __init__(self):
            super().__init__("stream")
            self.attention = Attention()

        def forward(self, positions, hidden, residual=None):
            return hidden + self.attention.forward(hidden) + self.linear(self.norm(hidden))

    model = Model()
    model.layers.extend(Block() for _ in range(3))
    silence = [block.attention for block in model.layers]
    assert conventions(model, silence=silence) == ["first"] * 3
    assert all("forward" not in vars(module) for module in silence)


def test_the_parts_of_an_output():
    one, other = torch.randn(4, WIDTH), torch.randn(4, WIDTH)
    assert Convention("sum").parts((one, other)) == (one, other)
    assert Convention("first").parts((one, other)) == (one, None) == Convention("first").parts(one)


def test_blocks_are_the_one_list_of_the_right_length():
    model = nn.Module()
    model.backbone = Model("stream", "stream", "stream")
    model.backbone.layers[1] = nn.Identity()  # stands for another worker's block
    model.backbone.layers[0].experts = nn.ModuleList(
        nn.Linear(2, 2) for _ in range(3)
    )  # as many, but inside of a block
    blocks = find_blocks(model, 3, (nn.Identity,))
    assert list(blocks) == [0, 2] and blocks.names == ["backbone.layers.0", "backbone.layers.1", "backbone.layers.2"]
    model.tower = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    with pytest.raises(UnknownConvention, match="2 lists of 3 modules"):
        find_blocks(model, 3, ())
