"""Adapters on any nn.Module: networks without a config, blocks in a sequence, and what is refused."""

from __future__ import annotations

import pytest
import reference
import torch
from conftest import randomize
from peft import get_peft_model
from torch import nn

from peft_reft import ReftConfig, get_interventions


class Net(nn.Module):
    """Two linear layers on the last dimension; no config, no blocks in a list."""

    def __init__(self, d=6):
        super().__init__()
        self.first, self.second = nn.Linear(4, d), nn.Linear(d, 3)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class TupleNet(nn.Module):
    """A block whose output is a tuple, then a head."""

    class Block(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.linear = nn.Linear(d, d)

        def forward(self, x):
            return self.linear(x), "something else"

    def __init__(self, d=6):
        super().__init__()
        self.block, self.head = self.Block(d), nn.Linear(d, 3)

    def forward(self, x):
        return self.head(self.block(x)[0])


@pytest.mark.parametrize("intervention", ["loreft", "direft", "lobireft"])
@pytest.mark.parametrize("shape", [(5,), (5, 7), (5, 2, 7), (5, 2, 3, 2), (1,), ()], ids=str)
def test_a_plain_module_is_edited_at_every_vector_of_its_target(shape, intervention):
    torch.manual_seed(0)
    net = Net().eval()
    x = torch.randn(*shape, 4)
    hidden, before = net.first(x).detach(), net(x).detach()
    config = ReftConfig(target_modules=["first"], positions="all", intervention=intervention, r=2)
    model = randomize(get_peft_model(net, config).eval())
    (module,) = get_interventions(model)["first"]
    with torch.no_grad():
        expected = net.second(torch.tanh(reference.edit_vectors(intervention, module, hidden).float()))
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(model(x), before)


def test_a_plain_module_with_a_tuple_output_is_edited():
    torch.manual_seed(0)
    net = TupleNet().eval()
    x = torch.randn(5, 6)
    hidden = net.block(x)[0].detach()
    model = randomize(get_peft_model(net, ReftConfig(target_modules=["block"], positions="all", r=2)).eval())
    (module,) = get_interventions(model)["block"]
    with torch.no_grad():
        expected = net.head(reference.edit_vectors("loreft", module, hidden).float())
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(net.head(hidden), expected)


def test_a_plain_module_trains_and_unloads():
    torch.manual_seed(0)
    net = Net()
    x, target = torch.randn(20, 4), torch.randn(20, 3)
    before = net(x).detach()
    model = get_peft_model(net, ReftConfig(target_modules=["first"], positions="all", r=2))
    torch.testing.assert_close(model(x), before)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(30):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    assert torch.equal(model.unload()(x), before)


class Tower(nn.Module):
    """Blocks in an nn.Sequential, as timm's models have them; the convolutions in front are no blocks to edit."""

    class Block(nn.Module):
        def __init__(self, part: nn.Module):
            super().__init__()
            self.part, self.act = part, nn.Tanh()

        def forward(self, x):
            return self.act(self.part(x))

    def __init__(self, blocks: int = 3):
        super().__init__()
        self.stem = nn.Sequential(*[self.Block(nn.Conv1d(6, 6, 3, padding=1)) for _ in range(4)])
        self.trunk = nn.Sequential(*[self.Block(nn.Linear(6, 6)) for _ in range(blocks)])

    def forward(self, x):
        return self.trunk(self.stem(x.transpose(1, 2)).transpose(1, 2))


def test_blocks_may_be_in_a_sequence_of_modules():
    model = randomize(get_peft_model(Tower(), ReftConfig(positions="f1+l1", r=2)).eval())
    assert list(get_interventions(model)) == ["trunk.0", "trunk.1", "trunk.2"]
    x = torch.randn(2, 5, 6)
    with torch.no_grad(), model.disable_adapter():
        before = model(x)
    changed = (model(x) != before).any(-1)
    assert changed.tolist() == [[True, False, False, False, True]] * 2


def test_convolutions_are_no_blocks():
    with pytest.raises(ValueError, match="No list of blocks was found in Tower"):
        get_peft_model(Tower(blocks=0), ReftConfig())


def test_a_model_without_blocks_is_rejected_with_what_could_be_named_instead():
    with pytest.raises(
        ValueError, match=r"No list of blocks was found in Net.*target_modules.*candidates.*first, second"
    ):
        get_peft_model(Net(), ReftConfig(positions="all"))


def test_a_model_without_parameters_is_rejected():
    with pytest.raises(ValueError, match="no parameters"):
        get_peft_model(nn.Sequential(nn.ReLU()), ReftConfig(positions="all"))


def test_a_module_whose_width_nothing_tells_is_refused_with_the_way_out():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Tanh()

        def forward(self, x):
            return self.block(x)

    config = ReftConfig(target_modules=["block"], positions="all", r=2)
    with pytest.raises(ValueError, match=r"'block' \(Tanh\) returns cannot be told: .*set model.config.hidden_size"):
        get_peft_model(Plain(), config)
