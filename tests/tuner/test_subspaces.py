"""Named parts of R: chosen by row and for a model, trained apart, grown by one, saved in order, refused in words."""

import json
import warnings

import pytest
import torch
from conftest import batch, inputs_of, logits, randomize, tiny_model
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import nn
from trainer_kit import QUIET, word_tokenizer
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from peft_reft import ReftConfig, ReftDataCollator, get_interventions, set_strength, set_subspaces
from peft_reft.info import adapter_info
from peft_reft.inspect import inspect_adapter
from peft_reft.interventions import Intervention, orthonormal_rows, register_intervention
from peft_reft.interventions.registry import REGISTRY

PARTS = {"german": 3, "formal": 2}
CONFIG = {"r": 5, "positions": "f1+l1", "task_type": "CAUSAL_LM", "subspaces": PARTS}
WITH_R = ("loreft", "odireft", "consreft", "lobireft")
ELSEWHERE = ({"share_weights": False}, {"share_layers": True})  # more than one intervention per block, or fewer
CHOICES = ["german", ["formal"], {"german": 0.5, "formal": -1.0}, None, []]
STRENGTHS = [[1.0, 0.0], [0.0, 1.0], [0.5, -1.0], [1.0, 1.0], [0.0, 0.0]]


def parted(base=None, seed=1, scale=0.5, **settings):
    model = get_peft_model(tiny_model("llama") if base is None else base, ReftConfig(**{**CONFIG, **settings}))
    return randomize(model, seed=seed, scale=scale).eval()


class OnlyDirections:
    """A slow reference: hooks that add Σ strength · (the part's own low-rank edit), a token at a time."""

    def __init__(self, model, base, strengths):
        self.found, self.base, self.strengths = get_interventions(model), base, strengths

    def logits(self, inputs, columns):
        handles = []
        for name, groups in self.found.items():

            def hook(block, args, output, module=groups[0]):
                hidden = output if isinstance(output, torch.Tensor) else output[0]
                edited = hidden.clone()
                R = module.subspace
                for row, places in enumerate(columns):
                    factor = torch.tensor([self.strengths[row][0]] * 3 + [self.strengths[row][1]] * 2)
                    for column in places:
                        h = hidden[row, column]
                        value = module.weight @ h + module.bias - R @ h
                        edited[row, column] = h + R.T @ (factor * value)
                return edited if isinstance(output, torch.Tensor) else (edited, *output[1:])

            handles.append(self.base.get_submodule(name).register_forward_hook(hook))
        try:
            return logits(self.base, inputs)
        finally:
            for handle in handles:
                handle.remove()


def test_each_row_is_edited_in_the_directions_of_its_parts():
    model, inputs = parted(), batch(7, 4, 6, 5, 5)
    lengths = inputs["attention_mask"].sum(1).tolist()
    expected = OnlyDirections(model, tiny_model("llama"), STRENGTHS).logits(inputs, [[0, n - 1] for n in lengths])
    found = logits(model, inputs, subspaces=CHOICES)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits(model, inputs, subspaces=torch.tensor(STRENGTHS)), found)
    assert (found[0] - logits(model, inputs, subspaces=["formal"] * 5)[0]).abs().max() > 0.1


@pytest.mark.parametrize("kind", WITH_R)
@pytest.mark.parametrize(
    "settings", [{}, {"share_weights": False}, {"share_layers": True}, {"act_fn": "tanh"}], ids=str
)
def test_parts_that_are_all_on_are_the_adapter_and_none_is_the_base_model(kind, settings):
    base = tiny_model("llama")
    model, inputs = parted(intervention=kind, **settings), batch(6, 4)
    whole, alone = logits(model, inputs), logits(base, inputs)
    assert torch.equal(logits(model, inputs, subspaces=[None, None]), whole)
    torch.testing.assert_close(logits(model, inputs, subspaces=[["german", "formal"]] * 2), whole)
    torch.testing.assert_close(logits(model, inputs, subspaces=[[], []]), alone)
    assert (whole - alone).abs().max() > 0.1


def test_the_edits_of_parts_add_up():
    model = parted(layers_to_transform=[1])
    with torch.no_grad():
        (intervention,) = get_interventions(model)["model.layers.1"]
        h = torch.randn(4, 32)
        masks = torch.tensor([[1.0] * 3 + [0.0] * 2, [0.0] * 3 + [1.0] * 2])
        first, second = (intervention.edit(h, mask.expand(4, -1)) for mask in masks)
        torch.testing.assert_close(first + second, intervention.edit(h))
        R = intervention.subspace
        assert (first @ R[3:].T).abs().max() < 1e-5 < (first @ R[:3].T).abs().max()


def test_generate_takes_parts_by_row_and_repeats_them_for_beams():
    model, inputs = parted(), batch(6, 5, side="left")
    inputs = {**inputs, "max_new_tokens": 4, "do_sample": False}
    for beams in (1, 3):
        together = model.generate(**inputs, subspaces=["german", "formal"], num_beams=beams)
        for row, part in enumerate(("german", "formal")):
            set_subspaces(model, part)
            assert torch.equal(model.generate(**inputs, num_beams=beams)[row], together[row])
            set_subspaces(model, None)
        first = {"num_beams": beams, "return_dict_in_generate": True, "output_logits": True}
        by_names, by_numbers = (
            model.generate(**inputs, subspaces=given, **first).logits[0]
            for given in (["german", "formal"], torch.eye(2))
        )
        torch.testing.assert_close(by_numbers, by_names)
        assert (
            by_names - model.generate(**inputs, subspaces=["formal", "german"], **first).logits[0]
        ).abs().max() > 1e-2
    assert not torch.equal(
        model.generate(**inputs, subspaces=[[], []]), model.generate(**inputs, subspaces=["german"] * 2)
    )


def test_parts_by_row_of_adapters_by_row_act_in_every_group():
    model, inputs = parted(share_weights=False), batch(6, 6, 6)
    model.add_adapter("other", ReftConfig(**CONFIG, share_weights=False))
    randomize(model, "other", seed=7, scale=0.5)
    names, parts = ["default", "other", "default"], ["german", "formal", {"formal": -2.0}]
    together = logits(model, inputs, adapter_names=names, subspaces=parts)
    for row in range(3):
        one = {name: value[row : row + 1] for name, value in inputs.items()}
        alone = logits(model, one, adapter_names=names[row : row + 1], subspaces=parts[row : row + 1])
        torch.testing.assert_close(together[row], alone[0], atol=1e-5, rtol=1e-4)
    assert (together[0] - logits(model, inputs, adapter_names=names)[0]).abs().max() > 1e-2


def test_a_model_s_choice_holds_until_it_is_set_again_and_a_row_s_own_wins():
    model, inputs = parted(), batch(6, 4)
    whole, german = logits(model, inputs), logits(model, inputs, subspaces=["german"] * 2)
    set_subspaces(model, {"german": 1, "formal": 0})
    assert torch.equal(logits(model, inputs), german)
    assert torch.equal(logits(model, inputs, subspaces=[None, "german"])[0], whole[0])
    set_subspaces(model, None)
    assert torch.equal(logits(model, inputs), whole)


def test_rows_with_adapters_of_their_own_have_parts_and_strengths_too():
    base = tiny_model("llama")
    model = parted(base)
    model.add_adapter("other", ReftConfig(**{**CONFIG, "subspaces": {"short": 2, "long": 3}}))
    model.add_adapter("plain", ReftConfig(**{**CONFIG, "subspaces": None}))
    for seed, name in enumerate(("other", "plain")):
        randomize(model, name, seed + 5)
    set_strength(model, 0.5, "other")
    inputs = batch(6, 4, 5, 6, 6)
    names = ["default", "other", "plain", "__base__", "other"]
    found = logits(model, inputs, adapter_names=names, subspaces=["formal", {"long": 2.0}, None, None, None])
    for row, (name, choice) in enumerate(zip(names, ("formal", {"long": 2.0}, None, None, None))):
        if name == "__base__":
            with model.disable_adapter():
                expected = logits(model, inputs)
        else:
            model.set_adapter(name)
            expected = logits(model, inputs, **({} if name == "plain" else {"subspaces": [choice] * 5}))
        torch.testing.assert_close(found[row], expected[row], atol=1e-5, rtol=1e-4)


def test_several_active_adapters_are_switched_by_the_names_that_they_have():
    model, inputs = parted(), batch(6, 4)
    model.add_adapter("other", ReftConfig(**{**CONFIG, "r": 2, "subspaces": {"long": 2}}))
    randomize(model, "other", 7)
    german = logits(model, inputs, subspaces=["german"] * 2)
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(logits(model, inputs, subspaces=["german"] * 2), german)
    assert (logits(model, inputs, subspaces=[["german", "long"]] * 2) - german).abs().max() > 0.1


@pytest.mark.parametrize("family", ["t5", "bert", "gpt2"])
def test_parts_by_row_on_other_architectures(family):
    base = tiny_model(family)
    task = {"t5": "SEQ_2_SEQ_LM", "bert": None, "gpt2": "CAUSAL_LM"}[family]
    model, inputs = parted(base, task_type=task), inputs_of(base)
    found = logits(model, inputs, subspaces=["german", "formal"])
    for row, part in enumerate(("german", "formal")):
        set_subspaces(model, part)
        torch.testing.assert_close(logits(model, inputs)[row], found[row], atol=1e-5, rtol=1e-4)
    if family == "t5":  # whose prompts are the encoder's: a row short is not taken for a beam
        with pytest.raises(ValueError, match="subspaces has 1 entries, but the batch has 2 rows"):
            model.generate(input_ids=inputs["input_ids"], subspaces=["german"], max_new_tokens=1)


def test_parts_by_row_in_a_module_without_tokens():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    config = ReftConfig(r=4, positions="all", target_modules=["0"], subspaces={"a": 1, "b": 3})
    model = randomize(get_peft_model(net, config))
    x = torch.randn(3, 8)
    mixed = model(x, subspaces=["a", "b", []])
    for row, part in enumerate(("a", "b", [])):
        torch.testing.assert_close(model(x, subspaces=[part] * 3)[row], mixed[row])


# Training.


def labelled(seed):
    inputs = batch(6, 6, 6, 6, seed=seed)
    return {**inputs, "labels": inputs["input_ids"].masked_fill(torch.arange(6) < 4, -100)}


def train(model, choices, steps=5, **settings):
    """The parameters of all interventions after a few steps."""
    settings = {"lr": 1e-2, "weight_decay": 0.0, **settings}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **settings)
    for step in range(steps):
        model.train()(**labelled(step), subspaces=choices).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return [intervention for groups in get_interventions(model).values() for intervention in groups]


def rows(interventions, part):
    return [t[part].detach().clone() for i in interventions for t in (i.subspace, i.rows("weight"), i.rows("bias"))]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def fresh(**settings):
    torch.manual_seed(1)
    return get_peft_model(tiny_model("llama"), ReftConfig(**{**CONFIG, **settings}))


GERMAN, FORMAL = slice(0, 3), slice(3, 5)


def test_a_part_trained_beside_another_is_the_part_trained_alone_bit_for_bit():
    beside = train(fresh(), ["german", "german", "formal", "formal"])
    alone = train(fresh(), ["german", "german", [], []])
    assert same(rows(beside, GERMAN), rows(alone, GERMAN))
    assert not same(rows(beside, FORMAL), rows(alone, FORMAL))
    for intervention in beside:
        torch.testing.assert_close(intervention.subspace @ intervention.subspace.T, torch.eye(5))
    before = [i for groups in get_interventions(fresh()).values() for i in groups]
    assert not same(rows(alone, GERMAN), rows(before, GERMAN))


def test_a_part_that_is_alone_in_its_adapter_comes_out_the_same():
    beside = train(fresh(), ["german", "german", "formal", "formal"])
    torch.manual_seed(1)
    alone = get_peft_model(tiny_model("llama"), ReftConfig(**{**CONFIG, "r": 3, "subspaces": {"german": 3}}))
    with torch.no_grad():
        for small, large in zip(get_interventions(alone).values(), get_interventions(fresh()).values()):
            for name, parameter in small[0].named_parameters():
                parameter.copy_(large[0]._parameters[name][GERMAN])
    found = train(alone, ["german", "german", [], []])
    for one, other in zip(rows(found, GERMAN), rows(beside, GERMAN), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_without_parts_one_half_of_r_turns_with_the_other():
    """What the parts are for: R as a whole is turned by later rows."""
    basis = torch.randn(5, 32, requires_grad=True)
    orthonormal_rows(basis)[FORMAL].square().sum(1).mul(torch.randn(2)).sum().backward()
    orthonormal_rows(basis)[FORMAL].mul(torch.randn(2, 32)).sum().backward()
    assert basis.grad[GERMAN].abs().max() > 1e-4
    basis.grad = None
    parted = Intervention(32, 5, parts=(3, 2))
    parted.directions(basis)[FORMAL].mul(torch.randn(2, 32)).sum().backward()
    assert basis.grad[GERMAN].abs().max() == 0 < basis.grad[FORMAL].abs().max()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_part_added_later_leaves_the_earlier_ones_as_they_are(weight_decay):
    model = fresh()
    earlier = train(model, ["german", "german", "formal", "formal"])
    before, inputs = rows(earlier, slice(0, 5)), batch(6, 4)
    expected = logits(model, inputs, subspaces=["german", "formal"])
    model.add_subspace("default", "polite", 2)
    torch.testing.assert_close(logits(model, inputs, subspaces=["german", "formal"]), expected)
    config = model.peft_config["default"]
    assert (config.r, config.subspaces, config.frozen_subspaces) == (7, {**PARTS, "polite": 2}, ["german", "formal"])
    fresh_part = logits(model, inputs, subspaces=["polite"] * 2)
    with model.disable_adapter():
        torch.testing.assert_close(fresh_part, logits(model, inputs))
    after = train(model, ["polite", None, "polite", []], weight_decay=weight_decay)
    assert same(rows(after, slice(0, 5)), before)
    assert (logits(model, inputs, subspaces=["polite"] * 2) - fresh_part).abs().max() > 1e-2
    for intervention in after:
        torch.testing.assert_close(intervention.subspace @ intervention.subspace.T, torch.eye(7))


@pytest.mark.parametrize(
    "settings", [{"share_weights": False}, {"share_layers": True}, {"intervention": "lobireft"}], ids=str
)
def test_a_part_is_added_to_every_intervention_once(settings):
    model = parted(**settings)
    before = logits(model, batch(6, 4))
    model.add_subspace("default", "polite", 2)
    torch.testing.assert_close(logits(model, batch(6, 4), subspaces=[["german", "formal"]] * 2), before)
    torch.testing.assert_close(logits(model, batch(6, 4)), before)
    interventions = {id(i): i for groups in get_interventions(model).values() for i in groups}
    assert len(interventions) == {"share_weights": 6, "share_layers": 1, "intervention": 3}[next(iter(settings))]
    assert all(i.rows("basis").shape == (7, 32) and i.basis.shape == (2, 32) for i in interventions.values())


def switch_on_and_off(model):
    model.add_adapter("other", ReftConfig(r=1))
    model.set_adapter("other")
    model.set_adapter("default")
    with model.disable_adapter():
        pass


def test_frozen_parts_stay_so_whatever_is_switched_on_and_off_and_after_loading(tmp_path):
    model = parted()
    before = logits(model, batch(6, 4))
    model.add_subspace("default", "polite", 2)
    switch_on_and_off(model)
    assert [p.shape[0] for i in get_interventions(model).values() for p in i.parameters() if p.requires_grad] == [2] * 9
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path, is_trainable=True).eval()
    torch.testing.assert_close(logits(loaded, batch(6, 4)), before)
    kept = rows([i for g in get_interventions(loaded).values() for i in g], slice(0, 5))
    after = train(loaded, ["polite"] * 4, weight_decay=0.1)
    assert same(rows(after, slice(0, 5)), kept)
    # Loaded to be used, and trained after all.
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    loaded.set_adapter("default")
    after = train(loaded, ["polite"] * 4, weight_decay=0.1)
    assert same(rows(after, slice(0, 5)), kept)


def test_an_adapter_that_was_loaded_and_grown_is_copied_by_its_config(tmp_path):
    parted().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    model.add_subspace("default", "polite", 1)
    model.add_adapter("ref", model.peft_config["default"])  # a reference, as TRL's trainers make it
    own = {name: p for name, p in model.named_parameters() if ".default." in name}
    assert any("kept_" in name for name in own)
    for name, parameter in own.items():
        model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter)
    inputs = batch(7, 4)
    expected = logits(model, inputs)
    model.set_adapter("ref")
    assert torch.equal(logits(model, inputs), expected)
    assert not torch.allclose(logits(tiny_model("llama"), inputs), expected, atol=0.1)


def test_parts_are_trained_by_gradient_checkpoints_too():
    found = []
    for checkpoints in (False, True):
        model = fresh()
        if checkpoints:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        found.append(rows(train(model, ["german", "german", "formal", "formal"], steps=2), slice(0, 5)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def features():
    ids = torch.randint(3, 100, (8, 6), generator=torch.Generator().manual_seed(0)).tolist()
    parts = ["german", "formal"] * 4
    return [
        {"input_ids": row, "attention_mask": [1] * 6, "labels": [-100] * 4 + row[4:], "subspaces": part}
        for row, part in zip(ids, parts)
    ]


def collate(examples):
    return {name: torch.tensor([example[name] for example in examples]) for name in examples[0]}


# A norm of gradients over all parameters, by which they are clipped, would make each part depend on the others.
def trained(model, data, collator, tmp_path):
    settings = {**QUIET, "max_steps": 3, "learning_rate": 1e-2, "remove_unused_columns": False, "max_grad_norm": 0.0}
    args = TrainingArguments(str(tmp_path), **settings)
    Trainer(model, args, train_dataset=data, data_collator=collator).train()
    return [intervention for groups in get_interventions(model).values() for intervention in groups]


def test_a_column_of_the_data_set_reaches_the_model_through_the_collator(tmp_path):
    config = ReftConfig(**CONFIG)
    collator = ReftDataCollator(collate, config)
    made = collator(features()[:3])
    assert made["subspaces"].tolist() == [[1, 0], [0, 1], [1, 0]]
    found = trained(fresh(), Dataset.from_list(features()), collator, tmp_path)
    german = [{**row, "subspaces": "german" if row["subspaces"] == "german" else []} for row in features()]
    alone = trained(fresh(), german, collator, tmp_path)
    assert same(rows(found, GERMAN), rows(alone, GERMAN))
    assert not same(rows(found, FORMAL), rows(alone, FORMAL))


def test_training_all_parts_together_without_a_word_warns_once(tmp_path):
    inputs = labelled(0)
    with pytest.warns(UserWarning, match=r"got no `subspaces`.*\['german', 'formal'\]"):
        fresh().train()(**inputs)
    model = fresh().train()
    set_subspaces(model, ["german", "formal"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**inputs)


def test_a_collator_s_rows_that_are_more_or_fewer_than_the_examples():
    config = ReftConfig(**CONFIG)

    def twice(examples):
        ids = torch.tensor([example["input_ids"] for example in examples])
        return {"input_ids": torch.cat([ids, ids])}

    def packed(examples):
        return {"input_ids": torch.tensor([[t for example in examples for t in example["input_ids"]]])}

    examples = features()[:2]
    assert ReftDataCollator(twice, config)(examples)["subspaces"].tolist() == [[1, 0], [0, 1], [1, 0], [0, 1]]
    with pytest.raises(ValueError, match=r"2 examples with different subspaces were put into 1 row"):
        ReftDataCollator(packed, config)(examples)
    assert ReftDataCollator(packed, config)([examples[0]] * 2)["subspaces"].tolist() == [[1, 0]]
    with pytest.raises(ValueError, match="but the config has none"):
        ReftDataCollator(twice, ReftConfig(r=5))(examples)


# Saved, loaded, shown.


def test_the_order_of_parts_survives_saving(tmp_path):
    model, inputs = parted(subspaces={"z": 2, "a": 3}), batch(6, 4)
    expected = logits(model, inputs, subspaces=["a", "z"])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path).eval()
    assert list(loaded.peft_config["default"].subspaces.items()) == [("z", 2), ("a", 3)]
    torch.testing.assert_close(logits(loaded, inputs, subspaces=["a", "z"]), expected)
    with pytest.raises(ValueError, match="subspaces is"):
        parted(tiny_model("llama"), subspaces={"a": 2, "z": 3}).load_adapter(tmp_path, "default")


def test_a_grown_adapter_is_stored_in_whole_tensors(tmp_path):
    model = parted()
    model.add_subspace("default", "polite", 2)
    model.save_pretrained(tmp_path)
    info = adapter_info(tmp_path)
    assert info.subspaces == "german (rank 3, keeps its values), formal (rank 2, keeps its values), polite (rank 2)"
    assert {block.rank for block in info.blocks} == {7}
    assert "german (rank 3" in str(info)
    assert "| Subspaces | german (rank 3" in (tmp_path / "README.md").read_text()
    native = tiny_model("llama")
    native.load_adapter(str(tmp_path))
    assert (logits(native.eval(), batch(6, 4)) - logits(model, batch(6, 4))).abs().max() < 1e-5


def test_a_grown_adapter_that_transformers_loads_is_trained_after_loading(tmp_path):
    model = parted()
    model.add_subspace("default", "polite", 2)
    randomize(model, seed=3).save_pretrained(tmp_path)
    inputs = batch(6, 4)
    base = tiny_model("llama")
    with pytest.raises(ValueError, match=r"keep their values \(\['german', 'formal'\]\).*call model.set_adapter"):
        base.load_adapter(str(tmp_path), is_trainable=True)
    assert torch.equal(logits(base, inputs), logits(tiny_model("llama"), inputs))
    base.load_adapter(str(tmp_path))
    base.set_adapter("default")
    assert torch.equal(logits(base, inputs), logits(model, inputs))
    shapes = {name.rpartition(".")[2]: tuple(p.shape) for name, p in base.named_parameters() if p.requires_grad}
    assert shapes == {"basis": (2, 32), "weight": (2, 32), "bias": (2,)}


def test_inspect_has_a_row_for_each_part():
    model = parted(layers_to_transform=[1])
    found = inspect_adapter(model, {**batch(5), "subspaces": [{"german": 0.5, "formal": 1.0}]}, effects=False).edits
    norms = {row["adapter"]: row["edit_norm"] for row in found if row["position"] == 0}
    assert list(norms) == ["default", "default:german", "default:formal"]
    assert norms["default"] ** 2 == pytest.approx(norms["default:german"] ** 2 + norms["default:formal"] ** 2)
    whole = inspect_adapter(model, batch(5), effects=False).edits
    german = next(row for row in whole if row["adapter"] == "default:german")
    assert norms["default:german"] == pytest.approx(0.5 * german["edit_norm"], rel=1e-4)


# Refused.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"subspaces": {"a": 2, "b": 2}}, "have 4 directions together, but r=5"),
        ({"subspaces": {}}, "must be a dictionary of ranks by name"),
        ({"subspaces": {"a": 0, "b": 5}}, "is not a rank"),
        ({"subspaces": {"": 5}}, "a name is printable text"),
        ({"subspaces": [["a", 2], ["a", 3]]}, "has a name twice"),
        ({"rank_pattern": {"layers.1": 2}}, "which rank_pattern"),
        ({"act_fn": "prelu"}, "would share the weights of the activation"),
        ({"intervention": "noreft"}, "its directions are free"),
        ({"intervention": "direft"}, "its directions are free"),
        ({"frozen_subspaces": ["formal"]}, "must be the first of the subspaces"),
        ({"frozen_subspaces": ["german", "formal"]}, "leave one to train"),
        ({"subspaces": None, "frozen_subspaces": ["german"]}, "needs subspaces"),
    ],
)
def test_a_config_with_impossible_parts_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ReftConfig(**{**CONFIG, **settings})


class Bent(Intervention):
    def edit(self, h):
        return 2 * super().edit(h)


class Opaque(nn.Module):
    def __init__(self, d, r):
        super().__init__()


@pytest.mark.parametrize("cls", [Bent, Opaque])
def test_parts_of_interventions_of_one_s_own_that_cannot_be_switched_are_refused(cls, monkeypatch):
    monkeypatch.setitem(REGISTRY, "own", cls)
    with pytest.raises(ValueError, match="subspaces have no meaning for the intervention 'own'"):
        ReftConfig(**CONFIG, intervention="own")


def test_a_subclass_that_changes_nothing_has_parts(monkeypatch):
    class Same(Intervention):
        pass

    monkeypatch.setattr("peft_reft.interventions.registry.REGISTRY", dict(REGISTRY))
    register_intervention("same", Same)
    assert ReftConfig(**CONFIG, intervention="same").parts == (3, 2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["french", "german"], "holds 'french' for row 0"),
        (["german"], "has 1 entries, but the batch has 2 rows"),
        ("german", "is not one entry per row"),
        ([3, 4], "subspaces holds 3, which is not a name, a list of names"),
        ([{"german": float("nan")}, None], r"subspaces holds \{'german': nan\}.*finite number"),
        ([None, {"german": float("-inf")}], r"subspaces holds \{'german': -inf\}"),
        ([None, {"german": 10**400}], r"subspaces holds \{'german': 10000"),
        ([{"german": True}, None], r"subspaces holds \{'german': True\}"),
        (torch.tensor([[1.0, 0.5], [1.0, float("nan")]]), "subspaces holds nan for 'formal' in row 1.*finite number"),
        (torch.tensor([[float("inf"), 0.5], [1.0, 1.0]]), "subspaces holds inf for 'german' in row 0"),
        (torch.ones(2, 2, dtype=torch.bool), "subspaces is a tensor of torch.bool.*finite number"),
        (torch.ones(2, 3), "there are 2 subspaces"),
    ],
)
@pytest.mark.parametrize("call", ["forward", "generate"])
def test_a_call_with_impossible_parts_is_refused(given, message, call):
    model, inputs = parted(), batch(6, 4, side="left")
    with pytest.raises(ValueError, match=message):
        model(**inputs, subspaces=given) if call == "forward" else model.generate(**inputs, subspaces=given)


@pytest.mark.parametrize("dtype", [torch.long, torch.bfloat16])
def test_strengths_are_numbers_of_any_type(dtype):
    model, inputs = parted(), batch(6, 4)
    found = logits(model, inputs, subspaces=torch.tensor([[1, 0], [-1, 2]], dtype=dtype))
    expected = logits(model, inputs, subspaces=[{"german": 1}, {"german": -1, "formal": 2.0}])
    torch.testing.assert_close(found, expected)
    assert (expected[0] - logits(model, inputs, subspaces=[None, None])[0]).abs().max() > 1e-2


def test_a_tensor_for_adapters_with_other_parts_than_each_other_is_refused():
    """Its columns have no names."""
    model, inputs = parted(), batch(6, 4)
    model.add_adapter("other", ReftConfig(**{**CONFIG, "subspaces": {"formal": 2, "german": 3}}))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(
        ValueError, match=r"is a tensor, but the adapters of this call have different ones: .*Pass names"
    ):
        model(**inputs, subspaces=torch.ones(2, 2))
    model(**inputs, subspaces=["german", "formal"])


def test_parts_for_more_rows_than_a_module_without_tokens_has_are_refused():
    """Whose rows are known from the hidden state alone."""
    net = nn.Sequential(nn.Linear(4, 8))
    config = ReftConfig(r=2, positions="all", target_modules=["0"], subspaces={"first": 1, "second": 1})
    model, x = randomize(get_peft_model(net, config)).eval(), torch.ones(2, 3, 4)
    with pytest.raises(ValueError, match="subspaces has 3 entries, but the batch has 2 rows"):
        model(x, subspaces=["first"] * 3)
    first, whole = model(x, subspaces=["first", None])
    assert not torch.equal(first, whole)


def test_a_part_is_added_to_an_adapter_that_is_not_active():
    model = parted()
    model.add_adapter("other", ReftConfig(**{**CONFIG, "positions": "f1"}))
    model.add_subspace("other", "polite", 2)
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".other." in name)
    model.set_adapter("other")
    trained = [
        p.shape[0] for i in get_interventions(model, "other").values() for p in i.parameters() if p.requires_grad
    ]
    assert trained == [2] * 9


def test_a_part_that_does_not_fit_every_block_leaves_the_adapter_as_it_was():
    narrow_first = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 8))
    config = ReftConfig(r=2, positions="all", target_modules=["0", "1"], subspaces={"first": 2})
    model = randomize(get_peft_model(narrow_first, config))
    before = model(torch.ones(1, 2, 4))
    with pytest.raises(ValueError, match="r=4 is not a rank for hidden states of width 3, which '0' returns"):
        model.add_subspace("default", "second", 2)
    assert torch.equal(model(torch.ones(1, 2, 4)), before)


def test_parts_are_not_swallowed_where_there_are_none():
    model, inputs = parted(subspaces=None), batch(6, 4)
    with pytest.raises(ValueError, match=r"of this call .* have none"):
        model(**inputs, subspaces=["german"] * 2)
    with pytest.raises(ValueError, match="No active ReFT adapter has subspaces"):
        set_subspaces(model, "german")
    with pytest.raises(ValueError, match="has no subspaces to which 'polite' could be added"):
        model.add_subspace("default", "polite", 2)
    model = parted()
    with pytest.raises(ValueError, match="are not all there"):
        set_subspaces(model, ["french"])
    with pytest.raises(ValueError, match="has a subspace 'german' already"):
        model.add_subspace("default", "german", 2)
    with pytest.raises(ValueError, match="r=45 is not a rank"):
        model.add_subspace("default", "wide", 40)
    assert model.peft_config["default"].r == 5
    with pytest.raises(ValueError, match="Adapter nothing does not exist"):
        model.add_subspace("nothing", "polite", 2)
    with pytest.raises(ValueError, match=r"row 1, whose adapter \[\] has no subspaces"):
        model(**inputs, adapter_names=["default", "__base__"], subspaces=["german", "german"])


def test_the_config_in_a_file_has_pairs(tmp_path):
    ReftConfig(**CONFIG).save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["subspaces"] == [["german", 3], ["formal", 2]]
    assert ReftConfig.from_pretrained(str(tmp_path)).subspaces == PARTS


def numbers(model, part):
    """The trained numbers of a part's rows; those of R itself turn with the parts before it."""
    return [p.detach()[part].clone() for groups in get_interventions(model).values() for p in groups.parameters()]


def test_trl_s_sft_trainer_trains_the_part_that_the_column_names(tmp_path):
    words = [{"prompt": f"w{n} w4 w5", "completion": f" w{n + 1} w7"} for n in range(10, 18)]
    data = Dataset.from_list([{**row, "subspaces": "german"} for row in words])
    settings = {"max_steps": 2, "remove_unused_columns": False, "max_grad_norm": 0.0}
    model = fresh()
    german, formal = (numbers(model, part) for part in (GERMAN, FORMAL))
    arguments = SFTConfig(str(tmp_path), **{**QUIET, **settings})
    trainer = SFTTrainer(model, arguments, train_dataset=data, processing_class=word_tokenizer())
    trainer.data_collator = ReftDataCollator(trainer.data_collator, ReftConfig(**CONFIG))
    trainer.train()
    assert same(numbers(model, FORMAL), formal)
    assert not any(torch.equal(*pair) for pair in zip(numbers(model, GERMAN), german, strict=True))
