"""What PEFT's users do with any adapter, done with ReFT: several of them, together, by row, scaled, next to LoRA.

Saving, loading, unloading and what is refused on loading are in test_checkpoint.py.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import re
from contextlib import contextmanager

import accelerate
import peft
import pytest
import safetensors.torch
import torch
import transformers
from conftest import BLOCKS, HIDDEN, VOCAB, batch, inputs_of, logits, randomize, reft_model, tiny_model
from edit_spy import warnings_of
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import LoraLayer
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from reference import columns_to_edit, edit_vector
from torch import nn

from peft_reft import ReftConfig, get_interventions, set_strength
from peft_reft.tuner.checkpoint import MEANING

CAUSAL = {"task_type": "CAUSAL_LM"}
LORA = {"target_modules": ["q_proj", "v_proj"], "r": 2, "init_lora_weights": False}
TASKS = {
    "CAUSAL_LM": ("llama", transformers.AutoModelForCausalLM),
    "SEQ_2_SEQ_LM": ("t5", transformers.AutoModelForSeq2SeqLM),
    "SEQ_CLS": ("bert", transformers.AutoModelForSequenceClassification),
    "TOKEN_CLS": ("roberta", transformers.AutoModelForTokenClassification),
    "QUESTION_ANS": ("bert", transformers.AutoModelForQuestionAnswering),
    "FEATURE_EXTRACTION": ("bert", transformers.AutoModel),
}
HEADS = {"SEQ_CLS": "classifier", "TOKEN_CLS": "classifier", "QUESTION_ANS": "qa_outputs"}


def two_adapters(first: dict | None = None, second: dict | None = None) -> PeftModel:
    """A tiny llama with the random adapters "a" (active) and "b"."""
    model = reft_model(tiny_model("llama"), adapter="a", **CAUSAL, **(first or {}))
    model.add_adapter("b", ReftConfig(**CAUSAL, **(second or {"intervention": "direft", "positions": "all"})))
    return randomize(model, "b", seed=2).eval()


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def train(model: nn.Module, inputs: dict, steps: int = 2) -> None:
    """A few optimizer steps on the first output of the model."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        output = model(**inputs)
        output = output if isinstance(output, torch.Tensor) else next(iter(output.values()))
        output.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def inputs():
    return batch(7, 4, 5)


# Several adapters.


def test_each_of_several_adapters_does_what_it_does_alone(inputs):
    model = two_adapters()
    for name, seed, settings in (("a", 1, {}), ("b", 2, {"intervention": "direft", "positions": "all"})):
        model.set_adapter(name)
        alone = reft_model(tiny_model("llama"), seed, **CAUSAL, **settings)
        assert torch.equal(logits(model, inputs), logits(alone, inputs))
    assert not torch.allclose(logits(model, inputs), logits(tiny_model("llama"), inputs), atol=1e-2)


def test_adding_an_adapter_leaves_the_active_one_alone(inputs):
    model = reft_model(tiny_model("llama"), adapter="a", **CAUSAL)
    before, trained = logits(model, inputs), trainable(model)
    model.add_adapter("b", ReftConfig(**CAUSAL, init_weights=False))
    assert torch.equal(logits(model, inputs), before)
    assert model.active_adapters == ["a"] and trainable(model) == trained


@pytest.mark.parametrize("settings", [{}, {"intervention": "direft"}, {"share_layers": True}], ids=str)
@pytest.mark.parametrize("route", ["peft", "second", "transformers"])
def test_an_adapter_made_with_a_saved_config_can_be_trained(inputs, tmp_path, route, settings):
    reft_model(tiny_model("llama"), **CAUSAL, **settings).save_pretrained(tmp_path)
    model, name = tiny_model("llama"), "fresh"
    before = logits(model, inputs)
    config = PeftConfig.from_pretrained(tmp_path)  # whose inference_mode is True, as in every saved config
    if route == "transformers":
        model.add_adapter(config, name)
    elif route == "peft":
        model = get_peft_model(model, config, adapter_name=name)
    else:
        model = PeftModel.from_pretrained(model, tmp_path)
        model.add_adapter(name, config)
    model.set_adapter(name)
    torch.testing.assert_close(logits(model, inputs), before)
    train(model.train(), {**inputs, "labels": inputs["input_ids"]}, steps=4)
    assert not torch.allclose(logits(model.eval(), inputs), before, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_adapter_in_half_precision_made_with_a_saved_config_can_be_trained(dtype, inputs, tmp_path):
    reft_model(tiny_model("llama"), **CAUSAL).save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    model = get_peft_model(tiny_model("llama").to(dtype), config, autocast_adapter_dtype=False)
    model.set_adapter("default")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    for (intervention,) in get_interventions(model).values():
        subspace = intervention.subspace
        torch.testing.assert_close(subspace @ subspace.mT, torch.eye(4))
    before = logits(tiny_model("llama").to(dtype), inputs)
    torch.testing.assert_close(logits(model.eval(), inputs), before, rtol=0.05, atol=0.05)  # to the precision of W


def test_only_the_active_adapter_trains():
    model = two_adapters()
    assert all(".a." in name for name in trainable(model))
    model.set_adapter("b")
    assert trainable(model) and all(".b." in name for name in trainable(model))


def test_deleting_the_active_adapter_activates_the_other(inputs):
    model = two_adapters()
    model.set_adapter("b")
    only_b = logits(model, inputs)
    model.set_adapter("a")
    model.delete_adapter("a")
    assert model.active_adapters == ["b"] and list(model.peft_config) == ["b"]
    assert torch.equal(logits(model, inputs), only_b)
    assert not any(".a." in name for name in model.state_dict())
    model.delete_adapter("b")
    base = logits(tiny_model("llama"), inputs)
    assert torch.equal(logits(model.base_model, inputs), base)


@pytest.mark.parametrize("route", ["peft", "transformers"])
def test_deleting_the_active_adapter_activates_one_adapter_in_all_blocks(inputs, route):
    base, added = tiny_model("llama"), {"a": [0, 1, 2], "b": [1], "c": [2]}
    for name, blocks in added.items():
        config = ReftConfig(layers_to_transform=blocks, init_weights=False, **CAUSAL)
        if route == "transformers":
            base.add_adapter(config, name)
        elif name == "a":
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    model = base if route == "transformers" else model
    for seed, name in enumerate(added):
        randomize(model, name, seed)
    model.eval().set_adapter("b")
    only_b = logits(model, inputs)
    model.set_adapter("a")
    model.delete_adapter("a")
    assert (model.active_adapters() if route == "transformers" else model.active_adapters) == ["b"]
    assert torch.equal(logits(model, inputs), only_b)
    assert trainable(model) and all(".b." in name for name in trainable(model))


def test_an_unknown_adapter_cannot_be_deleted():
    with pytest.raises(ValueError, match="Adapter c does not exist"):
        two_adapters().delete_adapter("c")


def test_requires_grad_is_set_for_one_adapter_or_several():
    model = two_adapters()
    model.set_requires_grad("b")
    assert {name.split(".reft_interventions.")[1][0] for name in trainable(model)} == {"a", "b"}
    model.set_requires_grad(["a", "b"], requires_grad=False)
    assert not trainable(model)


def test_active_adapters_are_summed_whatever_their_order(inputs):
    """Of one block, each edit is computed on the block's own output."""
    one_block = {"layers_to_transform": 1}
    model = two_adapters(one_block, {**one_block, "intervention": "direft", "positions": "all"})

    def after_block(*names):
        model.base_model.set_adapter(list(names))
        with torch.no_grad():
            return model(**inputs, output_hidden_states=True).hidden_states[2]

    with model.disable_adapter(), torch.no_grad():
        base = model(**inputs, output_hidden_states=True).hidden_states[2]
    a, b, both = after_block("a"), after_block("b"), after_block("a", "b")
    torch.testing.assert_close(both - base, (a - base) + (b - base), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(after_block("b", "a"), both)
    assert not torch.allclose(both, a, atol=1e-2) and not torch.allclose(both, b, atol=1e-2)


def test_active_adapters_train_together(inputs):
    model = two_adapters()
    model.base_model.set_adapter(["a", "b"])
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    train(model, inputs)
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == trainable(model) and {".a." in name for name in moved} == {True, False}


@pytest.mark.parametrize("name", ["layers", "0", "reft", "model", "basis", "default_2"])
def test_an_adapter_may_be_named_like_a_module(name, inputs, tmp_path):
    model = reft_model(tiny_model("llama"), adapter=name, share_weights=False, **CAUSAL)
    want = logits(model, inputs)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / name, adapter_name=name)
    assert torch.equal(logits(again, inputs), want)
    again = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / name, adapter_name="default")
    assert torch.equal(logits(again, inputs), want)


# What PEFT reports.


def test_layer_status_names_the_layer_beside_each_block():
    model = two_adapters({"layers_to_transform": [0, 2]})
    status = model.get_layer_status()
    assert [layer.name for layer in status] == [f"model.model.layers.{i}.reft" for i in range(BLOCKS)]
    by_name = {layer.name.split(".")[3]: layer for layer in status}
    assert by_name["0"].available_adapters == ["a", "b"] and by_name["1"].available_adapters == ["b"]
    assert by_name["0"].requires_grad == {"a": True, "b": False}
    assert {layer.module_type for layer in status} == {"ReftLayer"}
    assert all(layer.enabled and layer.merged_adapters == [] for layer in status)
    assert by_name["0"].devices == {"a": ["cpu"], "b": ["cpu"]}


def test_model_status_counts_adapters_and_parameters():
    model = two_adapters()
    status = model.get_model_status()
    assert status.peft_types == {"a": "REFT", "b": "REFT"} and status.adapter_model_type == "ReftModel"
    assert status.trainable_params == BLOCKS * (2 * 4 * HIDDEN + 4)
    assert status.num_adapter_layers == BLOCKS and status.available_adapters == ["a", "b"]
    assert status.active_adapters == ["a"] and status.enabled is True and status.merged_adapters == []
    with model.disable_adapter():
        assert model.get_model_status().enabled is False


def test_trainable_parameters_are_printed(capsys):
    get_peft_model(tiny_model("llama"), ReftConfig(**CAUSAL)).print_trainable_parameters()
    assert f"trainable params: {BLOCKS * (2 * 4 * HIDDEN + 4):,} ||" in capsys.readouterr().out


def test_a_model_card_is_written(tmp_path):
    model = tiny_model("llama")
    model.config._name_or_path = model.name_or_path = "someone/llama"
    get_peft_model(model, ReftConfig(**CAUSAL)).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "library_name: peft" in card and "base_model: someone/llama" in card and "transformers" in card


def test_adapters_are_found_at_the_targeted_module_too():
    model = two_adapters()
    block = model.base_model.model.model.layers[0]
    assert block.active_adapters == ["a"] and block.adapter_layer_names == ("reft_interventions",)
    model.set_adapter("b")
    assert block.active_adapters == ["b"] and set(block.reft_interventions) == {"a", "b"}
    copied = copy.deepcopy(model).base_model.model.model.layers[0]
    assert copied.reft_interventions is copied.reft.reft_interventions is not block.reft_interventions
    unloaded = model.unload().model.layers[0]
    assert not {"active_adapters", "reft_interventions"} & set(vars(unloaded))


# Which modules.


def test_excluded_modules_are_not_edited():
    model = get_peft_model(tiny_model("llama"), ReftConfig(exclude_modules=["layers.1"]))
    assert list(get_interventions(model)) == ["model.layers.0", "model.layers.2"]


@pytest.mark.parametrize("pattern", ["layers.1", r".*\.1"])
def test_ranks_may_differ_by_module(pattern):
    model = get_peft_model(tiny_model("llama"), ReftConfig(r=4, rank_pattern={pattern: 2}))
    ranks = [interventions[0].subspace.shape[0] for interventions in get_interventions(model).values()]
    assert ranks == [4, 2, 4]


def test_several_adapters_of_which_one_is_not_there_are_not_activated():
    model = reft_model(tiny_model("llama"), **CAUSAL)
    model.add_adapter("second", ReftConfig(**CAUSAL))
    with pytest.raises(ValueError, match=r"Adapter secnod not found; the adapters are \['default', 'second'\]"):
        model.base_model.set_adapter(["default", "secnod"])
    assert model.active_adapters == ["default"]
    model.base_model.set_adapter(["default", "second"])
    assert model.active_adapters == ["default", "second"]


def test_what_switches_the_casts_of_other_methods_leaves_an_adapter_alone(inputs):
    model = reft_model(tiny_model("llama"), **CAUSAL)
    before = logits(model, inputs)
    with disable_input_dtype_casting(model):
        assert torch.equal(logits(model, inputs), before)


def test_of_rank_patterns_the_first_that_matches_counts_and_still_does_when_loaded(inputs, tmp_path):
    patterns = {"model.layers.1": 8, "layers.*": 2}  # PEFT sorts the keys of what it saves
    model = reft_model(tiny_model("llama"), rank_pattern=patterns, **CAUSAL)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path))
    assert list(loaded.peft_config["default"].rank_pattern.items()) == list(patterns.items())
    assert [groups[0].subspace.shape[0] for groups in get_interventions(loaded).values()] == [2, 8, 2]
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


def test_all_linear_targets_every_linear_layer_but_the_head(inputs):
    with pytest.warns(UserWarning, match="edits the outputs of linear layers") as caught:
        model = reft_model(tiny_model("llama"), target_modules="all-linear", **CAUSAL)
    assert max(len(str(w.message)) for w in caught) < 600  # PEFT has put the names of all layers into the config
    assert len(get_interventions(model)) == 7 * BLOCKS and "lm_head" not in get_interventions(model)
    assert not torch.allclose(logits(model, inputs), logits(tiny_model("llama"), inputs), atol=1e-2)
    model.add_adapter("b", ReftConfig(target_modules="all-linear", **CAUSAL))  # finds no linear layers of the first
    assert get_interventions(model, "b").keys() == get_interventions(model, "default").keys()


def test_a_state_dict_wins_over_the_config_in_saying_where_to_inject():
    saved = get_peft_model_state_dict(
        inject_adapter_in_model(ReftConfig(layers_to_transform=[0, 2]), tiny_model("llama"))
    )
    with pytest.warns(RuntimeWarning, match=r"additional target modules: \['model.layers.1'\]"):
        model = inject_adapter_in_model(ReftConfig(layers_to_transform=[1]), tiny_model("llama"), state_dict=saved)
    assert list(get_interventions(model)) == ["model.layers.0", "model.layers.2"]
    assert get_peft_model_state_dict(model).keys() == saved.keys()


class Plain(nn.Module):
    """No transformers model: no config, no tokens."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.lin0 = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.lin1 = nn.Linear(8, 2)

    def forward(self, X):
        return self.lin1(self.norm(self.lin0(self.conv(X).mean((2, 3)))))


@pytest.mark.parametrize("target, width", [("conv", 6), ("lin0", 8), ("norm", 8)])
def test_plain_modules_are_edited_in_every_vector(target, width):
    """Rows of a Linear's [B, d], and the channels at every place of a convolution's [B, d, H, W]."""
    torch.manual_seed(0)
    base = Plain().eval()
    model = reft_model(copy.deepcopy(base), target_modules=[target], positions="all", r=2)
    (intervention,) = get_interventions(model)[target]
    X = torch.randn(5, 3, 7, 7)

    def edit(module, args, output):
        vectors = output.movedim(1, -1)
        return intervention(vectors).movedim(-1, 1)

    handle = base.get_submodule(target).register_forward_hook(edit)
    with torch.no_grad():
        want, got = base(X), model(X)
        handle.remove()
        torch.testing.assert_close(got, want)
        assert intervention.subspace.shape == (2, width) and not torch.allclose(got, base(X), atol=1e-2)


def test_rows_of_plain_vectors_are_prompts_of_one_token():
    model = reft_model(Plain(), target_modules=["lin0"], positions="f1+l1")
    every = reft_model(Plain(), target_modules=["lin0"], positions="all")
    every.load_state_dict(model.state_dict())
    X = torch.randn(5, 3, 7, 7)
    with torch.no_grad():
        torch.testing.assert_close(model(X), every(X))


def test_plain_modules_take_adapters_by_row():
    model = reft_model(Plain(), adapter="a", target_modules=["lin0"], positions="all", r=2)
    model.add_adapter("b", ReftConfig(target_modules=["lin0", "conv"], positions="all", intervention="direft"))
    randomize(model, "b", seed=2).eval()
    X = torch.randn(6, 3, 7, 7)
    names = ["a", "__base__", "b", "b", "a", "__base__"]
    with torch.no_grad():
        got = model(X, adapter_names=names)
        for row, name in enumerate(names):
            if name == "__base__":
                with model.disable_adapter():
                    want = model(X)
            else:
                model.set_adapter(name)
                want = model(X)
            torch.testing.assert_close(got[row], want[row])


# What is trained in full, and task types.


@pytest.mark.parametrize("task", TASKS)
def test_every_task_type_trains_the_adapter_and_its_head(task):
    family, auto = TASKS[task]
    base = auto.from_config(tiny_model(family).config)
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    model = get_peft_model(base, ReftConfig(task_type=task))
    assert type(model).__name__ == type(peft.get_peft_model(copy.deepcopy(base), LoraConfig(task_type=task))).__name__
    head = HEADS.get(task)
    names = trainable(model)
    assert any(".reft_interventions." in name for name in names)
    assert all(".reft_interventions." in name or (head and f"{head}.modules_to_save" in name) for name in names)
    assert any("modules_to_save" in name for name in names) == (head is not None)
    train(model, inputs_of(base, 7, 4))
    after = dict(model.unload().named_parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(head and head in name for name in changed) and bool(changed) == (head is not None)


@pytest.mark.parametrize("task", TASKS)
def test_auto_peft_models_load_every_task_type(task, tmp_path):
    family, auto = TASKS[task]
    base = auto.from_config(tiny_model(family).config).eval()
    base.save_pretrained(tmp_path / "base")
    base = auto.from_pretrained(tmp_path / "base")
    model = reft_model(base, task_type=task)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            nn.init.normal_(parameter)
    inputs = inputs_of(base, 7, 4)
    with torch.no_grad():
        want = next(iter(model(**inputs).values()))
    model.save_pretrained(tmp_path / "adapter")
    kind = "FeatureExtraction" if task == "FEATURE_EXTRACTION" else auto.__name__.removeprefix("AutoModelFor")
    again = getattr(peft, f"AutoPeftModelFor{kind}").from_pretrained(tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(next(iter(again(**inputs).values())), want)
    assert type(again) is type(model)


def test_auto_peft_model_loads_an_adapter_without_a_task_type(inputs, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    model = reft_model(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    again = peft.AutoPeftModel.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(again, inputs), logits(model, inputs))


def test_a_key_mapping_renames_blocks_on_loading(inputs, tmp_path):
    model = reft_model(tiny_model("llama"), **CAUSAL)
    model.save_pretrained(tmp_path)
    weights = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    renamed = {name.replace("model.layers.", "decoder.blocks."): tensor for name, tensor in weights.items()}
    safetensors.torch.save_file(renamed, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"the model lacks base_model\.model\.decoder\.blocks\.0"):
        PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    again = PeftModel.from_pretrained(tiny_model("llama"), tmp_path, key_mapping={"decoder.blocks": "model.layers"})
    assert torch.equal(logits(again, inputs), logits(model, inputs))


def test_an_adapter_brings_its_own_classification_head(inputs):
    model = get_peft_model(tiny_model("bert", "classifier"), ReftConfig(task_type="SEQ_CLS"), adapter_name="a")
    model.add_adapter("b", ReftConfig(task_type="SEQ_CLS"))
    outputs = {}
    for number, name in enumerate(("a", "b")):
        randomize(model, name, seed=number)
        nn.init.normal_(model.base_model.model.classifier.modules_to_save[name].weight)
    model.eval()
    for name in ("a", "b"):
        model.set_adapter(name)
        outputs[name] = logits(model, inputs)
    assert not torch.allclose(outputs["a"], outputs["b"], atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), logits(tiny_model("bert", "classifier"), inputs))


def test_trained_tokens_go_with_the_adapter(inputs):
    model = get_peft_model(tiny_model("llama"), ReftConfig(trainable_token_indices=[5, 6], **CAUSAL))
    ids = {"input_ids": torch.tensor([[5, 7, 6, 8]])}
    base = logits(tiny_model("llama"), ids)
    assert torch.equal(logits(model.eval(), ids), base)
    train(model, ids)
    tokens = [name for name in trainable(model) if "trainable_tokens_delta" in name]
    assert tokens and get_peft_model_state_dict(model)[
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    ].shape == (2, HIDDEN)
    assert not torch.allclose(logits(model, ids), base)
    unloaded = model.unload()
    assert torch.equal(logits(unloaded, ids), base)
    assert type(unloaded.model.embed_tokens) is nn.Embedding


@pytest.mark.parametrize("indices", [[5, 6], {"embed_tokens": [5, 6]}], ids=str)
def test_tokens_of_an_edited_embedding_are_not_trained(indices):
    """PEFT's layer for them does not call the embedding: its output would not be edited, and nothing would say so."""
    base = tiny_model("llama")
    with pytest.raises(ValueError, match=r"trains tokens of 'model\.embed_tokens', whose output is edited"):
        get_peft_model(base, ReftConfig(target_modules=["embed_tokens"], trainable_token_indices=indices, **CAUSAL))
    assert base.state_dict().keys() == tiny_model("llama").state_dict().keys()
    model = get_peft_model(base, ReftConfig(target_modules=["embed_tokens"], **CAUSAL))
    with pytest.raises(ValueError, match="whose output is edited"):
        model.add_adapter("b", ReftConfig(target_modules=["q_proj"], trainable_token_indices=indices, **CAUSAL))


# Weights that change under a running model.


@pytest.mark.parametrize("frozen", [True, False])
def test_swapped_weights_show_in_the_next_forward(frozen, inputs):
    """Also in a frozen model, which keeps what it multiplies with from forward to forward."""
    model = reft_model(tiny_model("llama"), **CAUSAL)
    model.requires_grad_(not frozen)
    other = reft_model(tiny_model("llama"), seed=2, **CAUSAL)
    first, want = logits(model, inputs), logits(other, inputs)
    assert torch.equal(logits(model, inputs), first) and not torch.allclose(first, want, atol=1e-2)
    peft.set_peft_model_state_dict(model, get_peft_model_state_dict(other))
    assert torch.equal(logits(model, inputs), want)
    with torch.no_grad():
        next(iter(get_interventions(model).values()))[0].bias.add_(1)
    assert not torch.allclose(logits(model, inputs), want, atol=1e-3)


SWAPPED = {
    "loreft": ("llama", None, {}),
    "own_weights": ("llama", None, {"intervention": "direft", "share_weights": False, "positions": "f2+l2"}),
    "shared_by_blocks": ("llama", None, {"share_layers": True, "intervention": "noreft", "act_fn": "relu"}),
    "head": ("bert", "classifier", {"task_type": "SEQ_CLS"}),
    "tokens": ("llama", None, {"trainable_token_indices": [5, 6], "layers_to_transform": [0, 2]}),
}


def saved_adapter(path, seed: int, family: str = "llama", head: str | None = None, **settings) -> str:
    """The directory of a random adapter: interventions, heads and tokens."""
    model = reft_model(tiny_model(family, head), seed, **settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or "trainable_tokens_delta" in name:
                parameter.add_(torch.randn(parameter.shape))
    model.save_pretrained(path)
    return str(path)


def loaded(path: str, family: str = "llama", head: str | None = None, **kwargs) -> PeftModel:
    return PeftModel.from_pretrained(tiny_model(family, head), path, **kwargs)


@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("kind", SWAPPED)
def test_hotswap_gives_the_model_that_loading_gives_in_place(kind, is_trainable, inputs, tmp_path):
    family, head, settings = SWAPPED[kind]
    inputs["input_ids"][:, 1] = 5  # a token that is trained
    old, new = (saved_adapter(tmp_path / name, seed, family, head, **settings) for seed, name in enumerate("ab"))
    model = loaded(old, family, head, is_trainable=is_trainable).eval()
    model.load_adapter(old, "beside")
    before, fresh = logits(model, inputs), loaded(new, family, head)
    set_strength(model, 0.5)
    places = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    hotswap_adapter(model, new, "default", torch_device="cpu")
    assert torch.equal(logits(model, inputs), logits(fresh, inputs))
    assert not torch.allclose(logits(model, inputs), before, atol=1e-2)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == places
    own = get_peft_model_state_dict(fresh)
    assert all(torch.equal(tensor, own[name]) for name, tensor in get_peft_model_state_dict(model).items())
    model.set_adapter("beside")
    assert torch.equal(logits(model, inputs), before)
    hotswap_adapter(model, old, "default", torch_device="cpu")  # and back, while it is not active
    model.set_adapter("default")
    assert torch.equal(logits(model, inputs), before)


def test_hotswap_looks_at_the_adapter_that_is_replaced_and_not_at_the_active_one(inputs, tmp_path):
    model = two_adapters()
    active = logits(model, inputs)
    new = saved_adapter(tmp_path, 3, intervention="direft", positions="all", **CAUSAL)
    hotswap_adapter(model, new, "b", torch_device="cpu")
    assert torch.equal(logits(model, inputs), active)
    model.set_adapter("b")
    assert torch.equal(logits(model, inputs), logits(loaded(new), inputs))


def test_a_compiled_model_is_not_compiled_again_by_hotswap(tmp_path, inputs):
    old, new = (saved_adapter(tmp_path / name, seed, **CAUSAL) for seed, name in enumerate("ab"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = torch.compile(loaded(old), fullgraph=True, backend="eager")
    before = logits(model, inputs)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for path in (new, old, new):
            hotswap_adapter(model, path, "default", torch_device="cpu")
            got = logits(model, inputs)
            torch.testing.assert_close(got, logits(loaded(path), inputs))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch.allclose(got, before, atol=1e-2)


PLAIN_SETTINGS = {"r": 2, "positions": "f1+l1", **CAUSAL}
OTHER_MEANING = [
    ({"positions": "f1+l2"}, r"positions is 'f1\+l2' in the new adapter and 'f1\+l1' in the one"),
    ({"intervention": "noreft"}, "intervention is 'noreft'"),
    ({"share_weights": False, "positions": "f1+l1"}, "share_weights is False"),
    ({"share_layers": True}, "share_layers is True"),
    ({"prompt_end": [7]}, r"prompt_end is \[7\]"),
    ({"turns": "all"}, "turns is 'all'"),
    ({"act_fn": "relu"}, "act_fn is 'relu'"),
    ({"trainable_token_indices": [3]}, r"trainable_token_indices is \[3\]"),
    ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
]
OTHER_TENSORS = [
    ({"r": 3}, r"is \[3, 32\] in the adapter and \[2, 32\] in this model: another rank"),
    ({"layers_to_transform": [0, 1]}, "the adapter has 2 edited blocks, this model 3"),
]


@pytest.mark.parametrize("settings, message", OTHER_MEANING + OTHER_TENSORS, ids=str)
def test_hotswap_of_an_adapter_with_other_settings_is_refused_and_changes_nothing(settings, message, inputs, tmp_path):
    model = loaded(saved_adapter(tmp_path / "old", 1, **PLAIN_SETTINGS))
    new = saved_adapter(tmp_path / "new", 2, **{**PLAIN_SETTINGS, **settings})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    set_strength(model, 0.5)
    want = logits(model, inputs)
    with pytest.raises(ValueError, match=f"weights of adapter 'default' cannot be replaced, .*{message}"):
        hotswap_adapter(model, new, "default", torch_device="cpu")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model, inputs), want)


@pytest.mark.parametrize("settings, message", OTHER_MEANING, ids=str)
def test_loading_weights_of_another_meaning_onto_an_adapter_is_refused(settings, message, inputs, tmp_path):
    """PEFT reads the config of new adapters only: old positions would edit with new weights."""
    model = loaded(saved_adapter(tmp_path / "old", 1, **PLAIN_SETTINGS))
    new = saved_adapter(tmp_path / "new", 2, **{**PLAIN_SETTINGS, **settings})
    want = logits(model, inputs)
    with pytest.raises(ValueError, match=message):
        model.load_adapter(new, "default")
    assert torch.equal(logits(model, inputs), want)
    model.load_adapter(new, "another")
    model.set_adapter("another")
    assert torch.equal(logits(model, inputs), logits(loaded(new), inputs))


def test_a_config_that_is_passed_along_wins_over_the_saved_one(inputs, tmp_path):
    """Only an adapter that is there already is not to change its meaning; `from_pretrained` is asked to do so."""
    path = saved_adapter(tmp_path, 1, **PLAIN_SETTINGS)
    other = {**PLAIN_SETTINGS, "positions": "f1+l2"}
    model = loaded(path, config=ReftConfig(**other))
    assert torch.equal(logits(model, inputs), logits(reft_model(tiny_model("llama"), 1, **other), inputs))
    assert not torch.allclose(logits(model, inputs), logits(loaded(path), inputs), atol=1e-2)


def test_hotswap_of_a_head_for_more_classes_is_refused(tmp_path):
    head = {"task_type": "SEQ_CLS"}
    model = loaded(saved_adapter(tmp_path / "old", 1, "bert", "classifier", **head), "bert", "classifier")
    three = reft_model(tiny_model("bert", "classifier", num_labels=3), **head)
    three.save_pretrained(tmp_path / "new")
    with pytest.raises(
        ValueError, match=r"another shape: base_model.model.classifier.bias, .*classifier.weight\. Load"
    ):
        hotswap_adapter(model, str(tmp_path / "new"), "default", torch_device="cpu")


def test_hotswap_of_an_offloaded_adapter_is_refused(tmp_path):
    """There is no tensor to write to in place, and torch would say nothing."""
    old = saved_adapter(tmp_path, 1, **CAUSAL)
    with pytest.raises(ValueError, match="they are offloaded"):
        hotswap_adapter(accelerate.cpu_offload(loaded(old)), old, "default", torch_device="cpu")


def test_each_setting_is_compared_seen_in_the_tensors_or_only_for_training():
    in_tensors = {"r", "rank_pattern", "layers_to_transform", "target_modules", "exclude_modules"}
    own = {field.name for field in dataclasses.fields(ReftConfig)} - {f.name for f in dataclasses.fields(PeftConfig)}
    assert own == {*MEANING, *in_tensors, "dropout", "init_weights", "train_bias", "frozen_subspaces"}


def test_hotswap_needs_an_adapter_of_that_name(tmp_path):
    model, new = two_adapters(), saved_adapter(tmp_path, 3, **CAUSAL)
    with pytest.raises(ValueError, match=r"no ReFT adapter 'c' whose .* its adapters are \['a', 'b'\]"):
        hotswap_adapter(model, new, "c", torch_device="cpu")


def test_transformers_and_lora_s_own_ways_of_hotswapping_refuse_reft(tmp_path):
    old = saved_adapter(tmp_path, 1, **CAUSAL)
    with pytest.raises(ValueError, match="No adapter layers found on the model, make sure call"):
        prepare_model_for_compiled_hotswap(loaded(old))
    base = tiny_model("llama")
    base.load_adapter(old, "default")
    with pytest.raises(ValueError, match="Hotswapping is currently only supported for LoRA"):
        base.load_adapter(old, "default", hotswap=True)


def test_hotswap_of_lora_is_what_it_was(inputs, tmp_path):
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        lora = get_peft_model(tiny_model("llama"), LoraConfig(**{**LORA, "r": 2 + seed}, lora_alpha=3, **CAUSAL))
        lora.save_pretrained(tmp_path / name)
    model = loaded(tmp_path / "a")
    hotswap_adapter(model, str(tmp_path / "b"), "default", torch_device="cpu")
    assert torch.equal(logits(model, inputs), logits(loaded(tmp_path / "b"), inputs))
    reft = saved_adapter(tmp_path / "reft", 1, **CAUSAL)
    with pytest.raises(ValueError, match="Incompatible PEFT types found: LORA and REFT"):
        hotswap_adapter(model, reft, "default", torch_device="cpu")


# One adapter for each row.

BY_ROW = {
    "a": {},
    "b": {"intervention": "direft", "positions": "all", "r": 2},
    "c": {"intervention": "noreft", "positions": "f1+l2", "share_weights": False, "layers_to_transform": [0, 1]},
    "d": {"intervention": "lobireft", "positions": "l3", "r": 8},
    "e": {"act_fn": "relu", "intervention": "odireft", "positions": "f2"},
}
ROWS = ["a", "__base__", "c", "b", "e", "d", "a"]


def many_adapters(family: str = "llama", head: str | None = None, **common) -> PeftModel:
    model = None
    for seed, (name, settings) in enumerate(BY_ROW.items()):
        settings = {**common, **settings}
        if model is None:
            model = reft_model(tiny_model(family, head), seed, name, **settings)
        else:
            model.add_adapter(name, ReftConfig(**settings))
            randomize(model, name, seed)
    return model.eval()


def alone(model: PeftModel, name: str, run):
    """What `run(model)` gives with one adapter active, or with none."""
    if name == "__base__":
        with model.disable_adapter():
            return run(model)
    model.set_adapter(name)
    return run(model)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_with_its_own_adapter_gives_what_it_gives_alone(side):
    model = many_adapters(**CAUSAL)
    inputs = batch(7, 4, 6, 5, 8, 9, 3, side=side)
    got = logits(model, inputs, adapter_names=ROWS)
    for row, name in enumerate(ROWS):
        want = alone(model, name, lambda m: logits(m, inputs))
        real = inputs["attention_mask"][row].bool()
        torch.testing.assert_close(got[row][real], want[row][real], atol=1e-4, rtol=1e-4)
    with model.disable_adapter():
        assert not torch.allclose(got[0], logits(model, inputs)[0], atol=1e-2)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"use_cache": False}], ids=str)
def test_rows_generate_with_their_own_adapters(family, settings):
    model = many_adapters(family, task_type="SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM")
    inputs = batch(7, 4, 6, 5, 8, 9, 3, side="left")
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **settings}
    got = model.generate(**inputs, adapter_names=ROWS, **settings)
    different = 0
    for row, name in enumerate(ROWS):
        want = alone(model, name, lambda m: m.generate(**inputs, **settings))
        assert got[row].tolist() == want[row].tolist(), name
        different += (
            got[row].tolist() != alone(model, "__base__", lambda m: m.generate(**inputs, **settings))[row].tolist()
        )
    assert different


def test_rows_take_their_own_classification_heads():
    model = many_adapters("bert", "classifier", task_type="SEQ_CLS")
    for name in BY_ROW:
        nn.init.normal_(model.base_model.model.classifier.modules_to_save[name].weight)
    inputs = batch(7, 4, 6, 5, 8, 9, 3)
    got = logits(model, inputs, adapter_names=ROWS)
    for row, name in enumerate(ROWS):
        want = alone(model, name, lambda m: logits(m, inputs))
        torch.testing.assert_close(got[row], want[row], atol=1e-4, rtol=1e-4)


def test_adapters_by_row_work_without_a_peft_model():
    model = tiny_model("llama")
    for seed, name in enumerate(("a", "b")):
        model.add_adapter(ReftConfig(positions="all"), name)
        randomize(model, name, seed)
    model.eval()
    inputs = batch(5, 5, 5)
    got = logits(model, inputs, adapter_names=["b", "__base__", "a"])
    assert torch.equal(got[1], logits(tiny_model("llama"), inputs)[1])
    model.set_adapter("b")
    torch.testing.assert_close(got[0], logits(model, inputs)[0], atol=1e-4, rtol=1e-4)


def test_the_base_model_alone_may_be_asked_for_by_row(inputs):
    model = two_adapters()
    assert torch.equal(logits(model, inputs, adapter_names=["__base__"] * 3), logits(tiny_model("llama"), inputs))


@pytest.mark.parametrize(
    "names, message",
    [
        (["a", "x", "b"], r"non-existing adapter\(s\): x\."),
        (["a", "b"], "got 2 and 3 respectively"),
        ("aba", r"adapter_names='aba' is one name\. Pass a list"),  # three names to Python, one for each row
    ],
)
def test_names_that_do_not_fit_the_batch_or_the_model_are_refused(names, message, inputs):
    model = two_adapters()
    before = logits(model, inputs)
    with pytest.raises(ValueError, match=message):
        model(**inputs, adapter_names=names)
    assert torch.equal(logits(model, inputs), before)  # nothing stays behind


def test_adapters_by_row_are_for_inference(inputs):
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when the model is in training mode"):
        two_adapters().train()(**inputs, adapter_names=["a", "b", "a"])


# Strength.


def test_strength_scales_the_edit(inputs):
    model = reft_model(tiny_model("llama"), layers_to_transform=1, **CAUSAL)

    def after_block(strength):
        set_strength(model, strength)
        with torch.no_grad():
            return model(**inputs, output_hidden_states=True).hidden_states[2]

    base, trained = after_block(0), after_block(1)
    for strength in (-1.0, 0.5, 2.0):
        torch.testing.assert_close(after_block(strength) - base, strength * (trained - base), atol=1e-4, rtol=1e-4)
    set_strength(model, 0)
    assert torch.equal(logits(model, inputs), logits(tiny_model("llama"), inputs))


def test_strength_is_an_adapters_own_and_holds_by_row(inputs):
    model = two_adapters()
    full = {name: alone(model, name, lambda m: logits(m, inputs)) for name in ("a", "b")}
    set_strength(model, 0.5, "b")
    half = alone(model, "b", lambda m: logits(m, inputs))
    assert torch.equal(alone(model, "a", lambda m: logits(m, inputs)), full["a"])
    assert not torch.allclose(half, full["b"], atol=1e-2)
    got = logits(model, inputs, adapter_names=["a", "b", "b"])
    torch.testing.assert_close(got, torch.stack([full["a"][0], half[1], half[2]]), atol=1e-4, rtol=1e-4)
    set_strength(model, 1.0, "b")
    assert torch.equal(alone(model, "b", lambda m: logits(m, inputs)), full["b"])


@contextmanager
def scaled_edits(base: nn.Module, model: PeftModel, strengths: list[dict[str, float]], columns):
    """Plain hooks on a model without adapters: to each row's h is added, of each of its adapters, strength * edit(h).

    Args:
        strengths: one for each row, by adapter.
        columns: gives an adapter's [row][group] -> columns in the call that is being made.
    """

    def hook_of(block: str):
        def hook(module, args, hidden):
            edited = hidden.clone()
            for row, adapters in enumerate(strengths):
                for name, strength in adapters.items():
                    config, interventions = model.peft_config[name], get_interventions(model, name).get(block, [])
                    for group, intervention in enumerate(interventions):
                        groups = columns(name)[row]
                        for column in groups[group] if len(interventions) > 1 else itertools.chain(*groups):
                            h = hidden[row, column]
                            after = edit_vector(config.intervention, intervention, h, config.act_fn)
                            edited[row, column] += strength * (after - h)
            return edited

        return hook

    blocks = {block for name in model.peft_config for block in get_interventions(model, name)}
    handles = [base.get_submodule(block).register_forward_hook(hook_of(block)) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def logits_with_scaled_edits(model: PeftModel, inputs: dict, strengths: list[dict[str, float]]) -> torch.Tensor:
    def columns(name):
        return columns_to_edit(model.peft_config[name].positions, inputs["attention_mask"])

    base = tiny_model("llama")
    with scaled_edits(base, model, strengths, columns):
        return logits(base, inputs)


@pytest.mark.parametrize("strength", [0, 1, -1.0, 0.3, 2.5])
@pytest.mark.parametrize("name", BY_ROW)
def test_strength_is_what_multiplies_the_equations_in_every_block(name, strength, inputs):
    model = many_adapters(**CAUSAL)
    model.set_adapter(name)
    set_strength(model, strength)
    got = logits(model, inputs)
    torch.testing.assert_close(
        got, logits_with_scaled_edits(model, inputs, [{name: strength}] * 3), atol=1e-3, rtol=1e-3
    )
    base = logits(tiny_model("llama"), inputs)
    assert torch.equal(got, base) if strength == 0 else not torch.allclose(got, base, atol=1e-2)


def test_active_adapters_are_summed_each_with_its_strength(inputs):
    model = many_adapters(**CAUSAL)
    strengths = {"a": -0.7, "b": 0.4, "c": 1.5, "d": 0.0}
    model.base_model.set_adapter(list(strengths))
    for name, strength in strengths.items():
        set_strength(model, strength, name)
    got = logits(model, inputs)
    torch.testing.assert_close(got, logits_with_scaled_edits(model, inputs, [strengths] * 3), atol=1e-3, rtol=1e-3)
    set_strength(model, 1.0)  # of all that are active
    assert not torch.allclose(logits(model, inputs), got, atol=1e-2)
    model.base_model.set_adapter(["a", "d"])
    set_strength(model, 0.0, "d")
    both = logits(model, inputs)
    model.set_adapter("a")
    assert torch.equal(logits(model, inputs), both)


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_row_has_its_adapters_strength(side):
    model, inputs = many_adapters(**CAUSAL), batch(7, 4, 6, 5, 8, 9, 3, side=side)
    strengths = {"a": 2.0, "b": -0.5, "c": 0.0, "d": 0.3, "e": 1.0, "__base__": 0.0}
    for name in BY_ROW:
        set_strength(model, strengths[name], name)
    got = logits(model, inputs, adapter_names=ROWS)
    rows = [{} if name == "__base__" else {name: strengths[name]} for name in ROWS]
    want, base = logits_with_scaled_edits(model, inputs, rows), logits(tiny_model("llama"), inputs)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[real], want[real], atol=1e-3, rtol=1e-3)
    for row, name in enumerate(ROWS):
        assert torch.allclose(got[row][real[row]], base[row][real[row]], atol=1e-2) == (strengths[name] == 0)


@pytest.mark.parametrize("schedule", [[1.0, -1.0, 2.0, 0.0, 0.5], [0.0, 0.0, 3.0, 3.0, 0.0], [0.0] * 5], ids=str)
def test_a_strength_that_is_set_while_text_is_generated_holds_from_the_next_token_on(schedule):
    """What is in the cache stays as it was made; the prompt's first token and all generated tokens are edited."""
    model = reft_model(tiny_model("llama"), positions="f1+d", **CAUSAL)
    inputs, base = batch(6, 6), tiny_model("llama")
    later = iter(schedule[1:])

    def change(ids, scores):
        if (strength := next(later, None)) is not None:
            set_strength(model, strength)
        return scores

    set_strength(model, schedule[0])
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    out = model.generate(**inputs, **settings, output_logits=True, logits_processor=[change])

    def first_token(name):  # of the prompt, or the only one in a call that follows
        return [[[0]]] * 2

    ids, cache, want = inputs["input_ids"], None, []
    for step, strength in enumerate(schedule):
        with scaled_edits(base, model, [{"default": strength}] * 2, first_token), torch.no_grad():
            output = base(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        want.append(output.logits[:, -1])
        ids = out.sequences[:, 6 + step : 7 + step]
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(want), atol=1e-3, rtol=1e-3)
    plain = base.generate(**inputs, **settings, output_logits=True)
    if not any(schedule):
        torch.testing.assert_close(out.logits, plain.logits)
        assert out.sequences.tolist() == plain.sequences.tolist()
    else:
        assert not torch.allclose(out.logits[2], plain.logits[2], atol=1e-2)


@pytest.mark.parametrize(
    "strength, name, message", [(float("nan"), None, "finite"), ("1", None, "finite"), (1, "c", "'c'")]
)
def test_a_strength_that_makes_no_sense_is_refused(strength, name, message):
    with pytest.raises(ValueError, match=message):
        set_strength(two_adapters(), strength, name)


# With LoRA on the same model.


def lora_and_reft(reft_first: bool, **settings) -> transformers.PreTrainedModel:
    """A tiny llama with both, made by transformers' own `add_adapter`."""
    model = tiny_model("llama")
    configs = {"lora_one": LoraConfig(**LORA), "reft_one": ReftConfig(**settings)}
    for name in sorted(configs, reverse=reft_first):
        torch.manual_seed(0)
        model.add_adapter(configs[name], name)
    randomize(model, "reft_one")
    model.set_adapter(["lora_one", "reft_one"])
    return model


@pytest.mark.parametrize("reft_first", [True, False])
def test_lora_and_reft_train_together(reft_first, inputs):
    model = lora_and_reft(reft_first)
    names = trainable(model)
    assert {"lora_" in name for name in names} == {True, False}
    assert all("lora_" in name or ".reft_interventions." in name for name in names)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    train(model, inputs)
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == names


def test_reft_edits_the_output_of_a_module_that_has_lora(inputs, tmp_path):
    def base():
        torch.manual_seed(0)
        return inject_adapter_in_model(
            LoraConfig(target_modules=["down_proj"], r=2, init_lora_weights=False), tiny_model("llama"), "lora_one"
        )

    model = reft_model(base(), adapter="reft_one", positions="all", target_modules=["down_proj"])
    found, expected = logits(model, inputs), base()
    for name, (intervention,) in get_interventions(model, "reft_one").items():
        expected.get_submodule(name).register_forward_hook(lambda _, __, h, edit=intervention: edit(h))
    kept = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[kept], logits(expected, inputs)[kept], rtol=1e-4, atol=1e-4)
    assert (found - logits(base(), inputs))[kept].abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    for other in (base(), tiny_model("llama")):  # its names are those of a model without LoRA
        loaded = PeftModel.from_pretrained(other, tmp_path / "reft_one", adapter_name="reft_one")
        assert len(get_interventions(loaded, "reft_one")) == 3
        if any("lora" in name for name in loaded.state_dict()):
            torch.testing.assert_close(logits(loaded, inputs), found)


PUT_ON = {
    "lora": LoraConfig(target_modules=["down_proj"], r=2),
    "ia3": peft.IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"]),
    "taken out": None,
}


@pytest.mark.parametrize("put_on", PUT_ON)
def test_an_edited_module_that_is_no_longer_in_its_place_is_told(put_on, inputs):
    model = reft_model(tiny_model("llama"), positions="f1+l1", target_modules=["down_proj"])
    mlp = model.get_base_model().model.layers[1].mlp
    if PUT_ON[put_on] is None:
        mlp.down_proj = copy.deepcopy(tiny_model("llama").model.layers[1].mlp.down_proj)
    else:
        inject_adapter_in_model(PUT_ON[put_on], model.get_base_model(), "other")
    told = warnings_of(lambda: [logits(model, inputs) for _ in range(3)])
    assert len(told) == 1
    assert "'down_proj' was a Linear" in told[0]
    assert "Add such an adapter first" in told[0]
    with pytest.raises(ValueError, match="no longer in its place"):
        model.train()(**inputs)


def test_a_module_that_another_adapter_saves_in_full_cannot_be_an_edited_one(inputs):
    model = reft_model(tiny_model("llama"), positions="f1+l1")
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["layers.1"])
    inject_adapter_in_model(config, model.get_base_model(), "other")
    with pytest.raises(ValueError, match="no longer in its place"):
        logits(model, inputs)


@pytest.mark.parametrize("frozen", ["lora_one", "reft_one"])
def test_one_of_lora_and_reft_may_be_frozen(frozen, inputs):
    model = lora_and_reft(reft_first=True)
    for name, parameter in model.named_parameters():
        if f".{frozen}." in name:
            parameter.requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    train(model, inputs)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trainable(model) and moved and not any(frozen in name for name in moved)


@pytest.mark.parametrize("reft_first", [True, False])
def test_lora_and_reft_are_saved_and_loaded_each_for_itself(reft_first, inputs, tmp_path):
    model = lora_and_reft(reft_first).eval()
    both = logits(model, inputs)
    for name in ("lora_one", "reft_one"):
        model.set_adapter(name)
        model.save_pretrained(tmp_path / name)
    assert json.loads((tmp_path / "reft_one" / "adapter_config.json").read_text())["peft_type"] == "REFT"
    again = tiny_model("llama")
    for name in sorted(("lora_one", "reft_one"), reverse=not reft_first):
        again.load_adapter(tmp_path / name, adapter_name=name)
    again.set_adapter(["lora_one", "reft_one"])
    assert torch.equal(logits(again, inputs), both)
    again.disable_adapters()
    assert torch.equal(logits(again, inputs), logits(tiny_model("llama"), inputs))
    again.enable_adapters()
    again.delete_adapter("reft_one")
    again.set_adapter("lora_one")
    model.set_adapter("lora_one")
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    assert not any(".reft" in name for name in again.state_dict())


def nested_peft_models(reft_first: bool, like: nn.Module) -> PeftModel:
    """A PeftModel around a PeftModel, with the weights of the flat model `like`."""
    configs = [LoraConfig(**LORA, **CAUSAL), ReftConfig(**CAUSAL)]
    inner = get_peft_model(tiny_model("llama"), configs[reft_first], adapter_name="inner")
    with pytest.warns(UserWarning, match="for a second time"):
        outer = get_peft_model(inner, configs[not reft_first], adapter_name="outer").eval()
    ours = {_anonymous(name): parameter for name, parameter in outer.named_parameters()}
    with torch.no_grad():
        for name, parameter in like.named_parameters():
            ours[_anonymous(name)].copy_(parameter)
    return outer


@pytest.mark.parametrize("reft_first", [True, False])
def test_a_peft_model_can_be_put_around_a_peft_model(reft_first, inputs):
    flat = lora_and_reft(reft_first).eval()
    nested = nested_peft_models(reft_first, flat)
    labels = torch.where(torch.arange(inputs["input_ids"].shape[1]) < 2, -100, inputs["input_ids"])
    for extra in ({}, {"labels": labels}):
        torch.testing.assert_close(logits(nested, inputs, **extra), logits(flat, inputs, **extra))
    names = trainable(nested)
    assert {"lora_" in name for name in names} == {True, False}
    train(nested, inputs)


@pytest.mark.parametrize("reft_first", [True, False])
def test_a_peft_model_around_a_peft_model_generates(reft_first):
    flat = lora_and_reft(reft_first).eval()
    nested = nested_peft_models(reft_first, flat)
    inputs, settings = batch(7, 4, side="left"), {"max_new_tokens": 4, "do_sample": False}
    for extra in ({}, {"intervention_locations": torch.tensor([[0, 2], [3, 4]])}):
        want = flat.generate(**inputs, **settings, **extra)
        assert nested.generate(**inputs, **settings, **extra).tolist() == want.tolist()


def _anonymous(name: str) -> str:
    """A parameter's name without those of adapters and of what is around the model."""
    return re.sub(r"base_layer\.|base_model\.model\.|\.(lora_one|reft_one|inner|outer)\b", "", name)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("reft_first", [True, False])
def test_lora_can_be_merged_where_reft_is_on_the_same_model(reft_first, mixed, inputs):
    base = tiny_model("llama")
    if reft_first:
        inject_adapter_in_model(ReftConfig(**CAUSAL), base, "reft_one")
    model = get_peft_model(base, LoraConfig(**LORA), adapter_name="lora_one", mixed=mixed)
    if not reft_first:
        inject_adapter_in_model(ReftConfig(**CAUSAL), base, "reft_one")
    randomize(base.eval(), "reft_one")
    both, lora = logits(model, inputs), next(m for m in base.modules() if isinstance(m, LoraLayer))
    before = lora.get_base_layer().weight.clone()
    model.merge_adapter()
    assert (lora.get_base_layer().weight - before).abs().max() > 1e-3
    torch.testing.assert_close(logits(model, inputs), both, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model, inputs), both, rtol=1e-4, atol=1e-4)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, inputs), both, rtol=1e-4, atol=1e-4)
    assert len(get_interventions(merged, "reft_one")) == 3


def test_peft_refuses_what_it_cannot_combine():
    model = get_peft_model(tiny_model("llama"), ReftConfig())
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("other", LoraConfig(**LORA))
    with pytest.raises(ValueError, match="'REFT' is not compatible with the `PeftMixedModel`"):
        get_peft_model(tiny_model("llama"), ReftConfig(), mixed=True)


def test_a_peft_model_in_use_stays_within_the_vocabulary(inputs):
    """`resize_token_embeddings` after the adapter was added reaches the base model."""
    model = reft_model(tiny_model("llama"), **CAUSAL)
    model.resize_token_embeddings(VOCAB + 4, mean_resizing=False)
    assert logits(model, inputs).shape[-1] == VOCAB + 4


def test_a_model_around_one_with_adapters_has_names_of_its_own_for_the_blocks(inputs):
    """PEFT warns of it, and LoRA takes it."""
    inner = randomize(get_peft_model(tiny_model("llama"), ReftConfig(target_modules="model.layers.0", r=2, **CAUSAL)))
    before = logits(inner.eval(), inputs)
    with pytest.warns(UserWarning, match="a second time"):
        outer = get_peft_model(inner, ReftConfig(target_modules="base_model.model.model.layers.1", r=2, **CAUSAL))
    randomize(outer)
    assert list(get_interventions(outer)) == ["base_model.model.model.layers.1"]
    assert not torch.allclose(logits(outer.eval(), inputs), before, atol=1e-3)


def test_which_of_several_active_adapters_to_look_at_is_asked():
    model = reft_model(tiny_model("llama"), r=2)
    model.add_adapter("other", ReftConfig(r=3))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"active ReFT adapters are \['default', 'other'\]; name the one"):
        get_interventions(model)
    assert {len(groups[0].subspace) for groups in get_interventions(model, "other").values()} == {3}


def test_blocks_of_different_widths_cannot_share_an_intervention():
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 8))
    settings = {"r": 2, "positions": "all", "share_layers": True}
    with pytest.raises(ValueError, match=r"needs blocks of one width, but these are \[3, 8\] wide"):
        get_peft_model(net, ReftConfig(target_modules=["0", "1"], **settings))
    assert not any("reft" in name for name, _ in net.named_modules())
    get_peft_model(net, ReftConfig(target_modules=["1"], **settings))
