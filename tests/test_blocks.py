"""Finding a model's blocks, choosing among modules, and reading the hidden state out of what a block returns."""

from __future__ import annotations

from collections import namedtuple
from functools import partial
from types import MethodType

import architectures
import pytest
import reference
import torch
from conftest import BLOCKS, HIDDEN, inputs_of, logits, randomize, tiny_model
from peft import get_peft_model
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from peft_reft import ReftConfig, get_interventions
from peft_reft.blocks.survey import Survey, block_width, edit_hidden_state, find_blocks

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


# layers_to_transform.


@pytest.mark.parametrize("family", [family for family in STACKS if family != "t5"])
@pytest.mark.parametrize(("layers", "numbers"), [(1, [1]), (-1, [2]), ([0, -1], [0, 2]), ([-2, -3], [0, 1])])
def test_layers_to_transform_count_the_blocks(family, layers, numbers):
    assert targets(tiny_model(family), layers_to_transform=layers) == numbered(*STACKS[family], blocks=numbers)[0]


@pytest.mark.parametrize(
    ("layers", "encoder", "decoder"),
    [(0, [0], [0]), (-1, [2], [1]), ([1, -3], [0, 1], [1]), (2, [2], []), ([0, -1], [0, 2], [0, 1])],
)
def test_layers_to_transform_count_the_blocks_of_each_stack(layers, encoder, decoder):
    model = tiny_model("t5", num_decoder_layers=2)
    expected = numbered("encoder.block", blocks=encoder)[0] + numbered("decoder.block", blocks=decoder)[0]
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


# Any nn.Module.


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


# Width.


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


# What a block returns.

Pair = namedtuple("Pair", "hidden rest")


@pytest.mark.parametrize(
    "make",
    [
        lambda h: h,
        lambda h: (h,),
        lambda h: (h, "rest", None),
        lambda h: [h, "rest"],
        lambda h: Pair(h, "rest"),
        lambda h: BaseModelOutput(last_hidden_state=h, attentions=(torch.ones(1),)),
    ],
    ids=["tensor", "tuple of one", "tuple", "list", "named tuple", "ModelOutput"],
)
def test_the_hidden_state_is_edited_and_the_rest_of_an_output_kept(make):
    h = torch.zeros(2, 3)
    output = make(h)
    edited = edit_hidden_state(output, lambda hidden: hidden + 1)
    assert type(edited) is type(output)
    if isinstance(output, torch.Tensor):
        assert torch.equal(edited, h + 1)
        return
    parts, before = (list(o.values() if isinstance(o, dict) else o) for o in (edited, output))
    assert torch.equal(parts[0], h + 1)
    assert len(parts) == len(before)
    assert all(part is kept for part, kept in zip(parts[1:], before[1:]))
    assert torch.equal(before[0], torch.zeros(2, 3))  # what the block returned is not changed itself


@pytest.mark.parametrize("output", [None, "text", (), [None], {}, 3])
def test_an_output_without_a_hidden_state_is_rejected(output):
    with pytest.raises(TypeError, match=type(output).__name__):
        edit_hidden_state(output, lambda hidden: hidden + 1)


# Vision towers.


@pytest.mark.parametrize(
    ("model_type", "mapping", "pattern"),
    [
        ("llava", "image-text", r".*vision_tower.*layers\.\d+"),
        ("qwen2_vl", "image-text", r".*visual\.blocks\.\d+"),
        ("paligemma", "image-text", r".*vision_tower.*layers\.\d+"),
    ],
)
def test_a_vision_tower_is_edited_at_every_patch(model_type, mapping, pattern):
    """Run by itself, since text is no part of it: against hooks that edit one vector at a time."""
    model, base = (architectures.tiny_model(model_type, mapping) for _ in range(2))
    model = randomize(get_peft_model(model, ReftConfig(target_modules=pattern, positions="all")).eval())
    interventions = get_interventions(model)
    assert len(interventions) == architectures.DEPTH

    def features(whole: nn.Module) -> torch.Tensor:
        tower = whole.get_submodule(next(iter(interventions)).rsplit(".", 2)[0])
        generator = torch.Generator().manual_seed(0)
        size = architectures.PATCH
        if model_type == "qwen2_vl":  # patches of an image of 1 x 4 x 4 of them, one after the other
            channels = tower.patch_embed.proj.weight[0].numel()
            arguments = torch.randn(16, channels, generator=generator), torch.tensor([[1, 4, 4]])
        else:
            tower = whole.get_submodule(next(iter(interventions)).split(".vision_tower.")[0] + ".vision_tower")
            arguments = (torch.randn(2, 3, 4 * size, 4 * size, generator=generator),)
        with torch.no_grad():
            output = tower(*arguments)
        return output if isinstance(output, torch.Tensor) else output.last_hidden_state

    def edit(module, args, output, intervention):
        h = output if isinstance(output, torch.Tensor) else output[0]
        edited = h.clone()
        for index in torch.cartesian_prod(*(torch.arange(size) for size in h.shape[:-1])).tolist():
            at = tuple(index) if isinstance(index, list) else (index,)
            edited[at] = reference.edit_vectors("loreft", intervention, h[at]).to(h)
        return edited if isinstance(output, torch.Tensor) else (edited, *output[1:])

    before = features(base)
    for name, modules in interventions.items():
        hook = lambda m, a, o, one=modules[0]: edit(m, a, o, one)  # noqa: E731
        base.get_submodule(name).register_forward_hook(hook)
    got, expected = features(model.get_base_model()), features(base)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert (got - before).abs().max() > 1e-2


def test_a_model_with_methods_of_any_callable_is_traced(llama):
    """torchao gives its layers such a method."""
    projection = llama.model.layers[0].mlp.up_proj
    projection.extra_repr = MethodType(
        partial(lambda prefix, module: f"{prefix}{module.in_features}", "of "), projection
    )
    survey = Survey(llama)
    assert len(survey.runs) == 2 and survey.stacks() == numbered(*STACKS["llama"])


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
