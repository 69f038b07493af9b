"""Tables and pictures of what an adapter does: against slow hooks, and models in which a block does not edit."""

from __future__ import annotations

import copy
import csv
import math
import os
import threading

import matplotlib.image
import numpy
import pytest
import reference
import torch
from conftest import BLOCKS, HIDDEN, inputs_of, logits, randomize, reft_model, tiny_model
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, ViTConfig, ViTForImageClassification

from peft_reft import ReftConfig, get_interventions, register_intervention, set_strength
from peft_reft.inspect import inspect_adapter, main
from peft_reft.inspect.heatmap import GAP, UNEDITED, shown
from peft_reft.interventions import REGISTRY
from peft_reft.tuner.injection import reft_layers

WORDS = ["[PAD]", "<eos>", "<unk>", "[MASK]", "one", "two", "$three$", "four", "five", "six", "seven", "eight"]


@pytest.fixture(scope="module")
def tokenizer():
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "[PAD]", "eos_token": "<eos>", "unk_token": "<unk>", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def slow(base, interventions, config, inputs, columns):
    """The blocks' own outputs and the edited ones, from plain hooks on a model without an adapter, by block."""
    before, after, handles = {}, {}, []

    def recorder(seen, name):
        def hook(module, args, output):
            seen[name] = (output if isinstance(output, torch.Tensor) else output[0]).detach().clone()

        return hook

    for name in interventions:
        handles.append(base.get_submodule(name).register_forward_hook(recorder(before, name)))
    with torch.no_grad(), reference.edits(base, interventions, config, columns):
        for name in interventions:
            handles.append(base.get_submodule(name).register_forward_hook(recorder(after, name)))
        output = base(**inputs)
    for handle in handles:
        handle.remove()
    return before, after, output


def columns_of(base, config, inputs, labels=None):
    """Slow positions: [row][group] -> columns, by the name of the block."""
    own = reference.columns_to_edit(config.positions, inputs["attention_mask"], labels)
    if "decoder_input_ids" not in inputs:
        return lambda name: own
    decoder = reference.columns_to_edit(config.positions, torch.ones_like(inputs["decoder_input_ids"]))
    return lambda name: decoder if ".decoder." in f".{name}" else own


def angle(v, rows):
    """The angle of a vector to the span of rows, by least squares, in degrees."""
    closest = rows.T @ torch.linalg.lstsq(rows.T, v.unsqueeze(1)).solution
    return math.degrees(math.acos(min(1.0, (closest.norm() / v.norm()).item())))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize(
    ("kind", "share"), [("loreft", True), ("direft", False), ("noreft", True), ("lobireft", False)]
)
def test_the_table_is_what_slow_hooks_see(family, kind, share, side):
    settings = {"positions": "f2+l1", "intervention": kind, "share_weights": share, "r": 3}
    model = reft_model(tiny_model(family), **settings)
    inputs = inputs_of(model, 7, 4, 2, side=side)
    found = inspect_adapter(model, inputs, effects=False)
    base, config = tiny_model(family), ReftConfig(**settings)
    interventions = get_interventions(model)
    columns = columns_of(base, config, inputs)
    before, after, _ = slow(base, interventions, config, inputs, columns)
    rows = {(row["block"], row["prompt"], row["column"]): row for row in found.edits}
    assert len(rows) == len(found.edits)
    seen = 0
    for name, modules in interventions.items():
        decoder = family == "t5" and ".decoder." in f".{name}"
        mask = torch.ones_like(inputs["decoder_input_ids"]) if decoder else inputs["attention_mask"]
        ids = inputs["decoder_input_ids" if decoder else "input_ids"]
        for prompt, groups in enumerate(columns(name)):
            position = 0
            for column in range(mask.shape[1]):
                row = rows.pop((name, prompt, column), None)
                assert (row is not None) == bool(mask[prompt, column]), "padding is left out and nothing else"
                if row is None:
                    continue
                assert row["position"] == position and row["token_id"] == ids[prompt, column]
                assert row["stack"] == ("" if family != "t5" else "decoder" if decoder else "encoder")
                position += 1
                group = next((number for number, places in enumerate(groups) if column in places), None)
                assert row["edited"] == (group is not None)
                assert row["term"] == ("" if group is None else ["f2", "l1"][group])
                h, moved = before[name][prompt, column].double(), after[name][prompt, column].double()
                assert row["h_norm"] == pytest.approx(h.norm().item(), rel=1e-5)
                if group is None:
                    assert row["edit_norm"] == row["relative"] == row["turn"] == 0 and math.isnan(row["angle_before"])
                    continue
                seen += 1
                delta = moved - h
                assert row["edit_norm"] == pytest.approx(delta.norm().item(), rel=1e-4)
                assert row["relative"] == pytest.approx((delta.norm() / h.norm()).item(), rel=1e-4)
                turn = math.degrees(torch.arccos(h @ moved / h.norm() / moved.norm()).item())
                assert row["turn"] == pytest.approx(turn, abs=0.01)
                basis = modules[group if len(modules) > 1 else 0].subspace.detach().double()
                assert row["angle_before"] == pytest.approx(angle(h, basis), abs=0.01)
                assert row["angle_after"] == pytest.approx(angle(moved, basis), abs=0.01)
                assert row["edit_angle"] < 1e-3
    assert not rows and seen >= 6 * BLOCKS


def distance(logits, other):
    """Total variation and Kullback-Leibler divergence of two predictions [V], in slow words."""
    p, q = logits.double().softmax(-1).tolist(), other.double().softmax(-1).tolist()
    return 0.5 * sum(abs(a - b) for a, b in zip(p, q)), sum(a * math.log(a / b) for a, b in zip(p, q))


@pytest.mark.parametrize("settings", [{}, {"share_layers": True}, {"share_weights": False}], ids=str)
def test_an_effect_is_that_of_a_model_in_which_the_block_does_not_edit(settings):
    settings = {"positions": "f1+l2", **settings}
    model = reft_model(tiny_model("llama"), **settings)
    inputs = inputs_of(model, 6, 3, side="left")
    found = inspect_adapter(model, inputs)
    base, config, interventions = tiny_model("llama"), ReftConfig(**settings), get_interventions(model)

    def prediction(blocks):
        some = {name: modules for name, modules in interventions.items() if name in blocks}
        with torch.no_grad():
            return reference.forward(base, some, config, inputs).logits[:, -1]

    full, none = prediction(interventions), prediction(())
    effects = {(row["prompt"], row["block"]): row for row in found.effects}
    assert set(effects) == {(prompt, block) for prompt in range(2) for block in interventions}
    for prompt in range(2):
        all_tv, all_kl = distance(full[prompt], none[prompt])
        total = found.totals[prompt]
        assert (total["tv"], total["kl"]) == pytest.approx((all_tv, all_kl), rel=1e-3)
        assert total["top"] == str(int(full[prompt].argmax()))
        assert total["top_unedited"] == str(int(none[prompt].argmax()))
        for block in interventions:
            without = prediction(set(interventions) - {block})
            tv, kl = distance(full[prompt], without[prompt])
            row = effects[prompt, block]
            assert tv > 0.01
            assert (row["tv"], row["kl"]) == pytest.approx((tv, kl), rel=1e-3)
            assert (row["tv_share"], row["kl_share"]) == pytest.approx((tv / all_tv, kl / all_kl), rel=1e-3)
            change = (full[prompt] - without[prompt]).square().mean().sqrt().item()
            assert row["logits"] == pytest.approx(change, rel=1e-3)


def test_an_effect_is_that_of_a_model_whose_intervention_was_zeroed():
    model = reft_model(tiny_model("llama"), intervention="direft")
    inputs = inputs_of(model, 5)
    effects = {row["block"]: row for row in inspect_adapter(model, inputs).effects}
    for block in get_interventions(model):
        zeroed = copy.deepcopy(model)
        with torch.no_grad():
            get_interventions(zeroed)[block][0].basis.zero_()
        tv, kl = distance(logits(model, inputs)[0, -1], logits(zeroed, inputs)[0, -1])
        assert (effects[block]["tv"], effects[block]["kl"]) == pytest.approx((tv, kl), rel=1e-4)


def test_texts_of_different_lengths_give_what_each_gives_alone(tokenizer):
    model = reft_model(tiny_model("llama"), positions="f1+l2", task_type="CAUSAL_LM")
    texts = ["one two three", "four", "five six seven eight one two", "two two"]
    together = inspect_adapter(model, texts, tokenizer, batch_size=3)
    for number, text in enumerate(texts):
        alone = inspect_adapter(model, text, tokenizer)
        for table in ("edits", "effects", "totals"):
            own = [row for row in getattr(together, table) if row["prompt"] == number]
            assert len(own) == len(getattr(alone, table)) > 0
            for row, other in zip(own, getattr(alone, table)):
                numbers = {key: v for key, v in row.items() if isinstance(v, float)}
                assert numbers == pytest.approx({key: other[key] for key in numbers}, rel=1e-3, abs=1e-3, nan_ok=True)
                same = [key for key in row if key not in numbers and key != "prompt"]
                assert [row[key] for key in same] == [other[key] for key in same]
    assert [row["token"] for row in together.edits if row["prompt"] == 0][:3] == ["one", "two", "<unk>"]


def test_several_adapters_have_a_row_each_and_one_for_their_sum():
    settings = {"a": {"positions": "f2"}, "b": {"positions": "l1", "intervention": "direft", "r": 2}}
    model = reft_model(tiny_model("llama"), adapter="a", **settings["a"])
    model.add_adapter("b", ReftConfig(**settings["b"]))
    randomize(model, "b", seed=2).eval()
    model.base_model.set_adapter(["a", "b"])
    inputs = inputs_of(model, 2, 5)
    found = inspect_adapter(model, inputs)
    assert found.adapters == ["a", "b"] and {row["adapter"] for row in found.edits} == {"a", "b", "a+b"}
    rows = {(row["adapter"], row["block"], row["prompt"], row["column"]): row for row in found.edits}
    with torch.no_grad():
        h = model(**inputs, output_hidden_states=True).hidden_states[1]  # after the first block
    first = "model.layers.0"
    both = rows["a+b", first, 0, 1]  # in a prompt of two tokens both edit the second
    with torch.no_grad(), model.disable_adapter():
        own = model(**inputs, output_hidden_states=True).hidden_states[1][0, 1]
    edits = {}
    for name in "ab":
        (module,) = get_interventions(model, name)[first]
        edits[name] = reference.edit_vector("loreft" if name == "a" else "direft", module, own) - own.double()
        assert rows[name, first, 0, 1]["edit_norm"] == pytest.approx(edits[name].norm().item(), rel=1e-4)
    total = edits["a"] + edits["b"]
    assert both["edit_norm"] == pytest.approx(total.norm().item(), rel=1e-4)
    assert torch.allclose(own.double() + total, h[0, 1].double(), atol=1e-4)
    assert both["relative"] != pytest.approx(rows["a", first, 0, 1]["relative"], rel=0.01)
    assert math.isnan(both["angle_before"]) and both["edited"] and both["term"] == ""
    assert not rows["b", first, 1, 0]["edited"] and rows["a+b", first, 1, 0]["edited"]


def test_adapters_of_different_blocks_have_a_sum_in_each():
    model = reft_model(tiny_model("llama"), adapter="a", positions="l1", layers_to_transform=[0])
    model.add_adapter("b", ReftConfig(positions="f1", layers_to_transform=[1]))
    randomize(model, "b", seed=2).eval()
    model.base_model.set_adapter(["a", "b"])
    found = inspect_adapter(model, inputs_of(model, 3))
    edited = {(row["adapter"], row["depth"], row["column"]): row["edit_norm"] for row in found.edits if row["edited"]}
    assert set(edited) == {("a", 0, 2), ("a+b", 0, 2), ("b", 1, 0), ("a+b", 1, 0)} and min(edited.values()) > 0.01
    assert edited["a+b", 0, 2] == edited["a", 0, 2] and edited["a+b", 1, 0] == edited["b", 1, 0]
    assert [text.get_text() for text in found.plot().axes[0].get_yticklabels()] == ["0", "1"]


def test_strength_is_part_of_the_edit():
    model = reft_model(tiny_model("llama"), positions="l1")
    inputs = inputs_of(model, 5)
    first = [row["edit_norm"] for row in inspect_adapter(model, inputs).edits if row["depth"] == 0]
    set_strength(model, -0.25)
    weaker = [row["edit_norm"] for row in inspect_adapter(model, inputs).edits if row["depth"] == 0]
    assert weaker == pytest.approx([0.25 * size for size in first]) and max(first) > 0.1
    assert {layer.scaling["default"] for layer in reft_layers(model).values()} == {-0.25}


def test_given_locations_are_what_is_edited():
    model = reft_model(tiny_model("llama"), positions="f1+l1")
    inputs = {**inputs_of(model, 6, 6), "intervention_locations": torch.tensor([[3, -1], [1, 4]])}
    found = inspect_adapter(model, inputs, effects=False)
    edited = {(row["prompt"], row["column"]) for row in found.edits if row["edited"]}
    assert edited == {(0, 3), (1, 1), (1, 4)} and {row["term"] for row in found.edits} == {""}


def test_answers_show_the_edits_of_generated_tokens(tokenizer):
    model = reft_model(tiny_model("llama"), positions="l1+d2", task_type="CAUSAL_LM")
    found = inspect_adapter(model, ["one two four", "five"], tokenizer, answers=["six seven eight one", "two"])
    rows = [row for row in found.edits if row["depth"] == 0]
    assert [(row["token"], row["part"], row["term"]) for row in rows if row["prompt"] == 0] == [
        ("one", "prompt", ""), ("two", "prompt", ""), ("four", "prompt", "l1"),
        ("six", "answer", ""), ("seven", "answer", "d2"), ("eight", "answer", ""), ("one", "answer", "d2"),
    ]  # fmt: skip
    assert [(row["token"], row["part"], row["term"]) for row in rows if row["prompt"] == 1] == [
        ("five", "prompt", "l1"), ("two", "answer", "")
    ]  # fmt: skip
    # The prediction is that of the answer's tokens: of four places here.
    ids = tokenizer("one two four six seven eight one", return_tensors="pt").input_ids
    labels = ids.masked_fill(torch.arange(7) < 3, -100)
    with torch.no_grad():
        full = model(input_ids=ids, labels=labels).logits[0, 2:6]
        with model.disable_adapter():
            base = model(input_ids=ids, labels=labels).logits[0, 2:6]
    tv = sum(distance(a, b)[0] for a, b in zip(full, base)) / 4
    assert found.totals[0]["tv"] == pytest.approx(tv, rel=1e-3)


def test_encoder_decoder_models_have_two_stacks(tokenizer):
    model = reft_model(tiny_model("t5"), positions="f1+d", task_type="SEQ_2_SEQ_LM")
    found = inspect_adapter(model, ["one two four", "five"], tokenizer, answers=["six seven", "eight one two"])
    decoder = [row for row in found.edits if row["stack"] == "decoder" and row["depth"] == 0 and row["prompt"] == 0]
    assert [(row["token"], row["part"], row["term"]) for row in decoder[:3]] == [
        ("[PAD]", "prompt", "f1"), ("six", "answer", "d"), ("seven", "answer", "d")
    ]  # fmt: skip
    assert len(found.effects) == 2 * 2 * BLOCKS and all(row["tv"] > 0 for row in found.effects)
    alone = inspect_adapter(model, "one two four", tokenizer)  # without an answer: the start token's prediction
    ids = tokenizer("one two four", return_tensors="pt").input_ids
    inputs = {"input_ids": ids, "decoder_input_ids": torch.zeros(1, 1, dtype=torch.long)}
    with torch.no_grad():
        full = model(**inputs).logits[0, -1]
        with model.disable_adapter():
            base = model(**inputs).logits[0, -1]
    assert alone.totals[0]["tv"] == pytest.approx(distance(full, base)[0], rel=1e-3)


def test_classifiers_and_scores(tokenizer):
    texts = ["one two", "four five six"]
    model = reft_model(tiny_model("bert", "classifier", num_labels=3), task_type="SEQ_CLS", positions="f1")
    found = inspect_adapter(model, texts, tokenizer)
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    full = logits(model, inputs)
    classifier = model.base_model.model.classifier.modules_to_save["default"]
    with torch.no_grad(), model.disable_adapter():
        hidden = model.get_base_model().bert(**inputs).pooler_output
        base = classifier(hidden)  # the head that was trained with the adapter stays
    for prompt in range(2):
        tv, kl = distance(full[prompt], base[prompt])
        assert (found.totals[prompt]["tv"], found.totals[prompt]["kl"]) == pytest.approx((tv, kl), rel=1e-3)
        assert found.totals[prompt]["top"] == str(int(full[prompt].argmax()))
    score = reft_model(tiny_model("bert", "classifier", num_labels=1), task_type="SEQ_CLS", positions="f1")
    row = inspect_adapter(score, texts, tokenizer).totals[0]
    assert math.isnan(row["tv"]) and math.isnan(row["kl"]) and row["logits"] > 0
    with pytest.raises(ValueError, match="answers are for language models"):
        inspect_adapter(score, texts, tokenizer, answers=texts)


def test_masked_models_predict_at_their_masks(tokenizer):
    model = reft_model(tiny_model("bert"), positions="f1")
    found = inspect_adapter(model, ["one [MASK] two four", "five six"], tokenizer)
    ids = tokenizer("one [MASK] two four", return_tensors="pt").input_ids
    with torch.no_grad():
        full = model(input_ids=ids).logits[0]
        with model.disable_adapter():
            base = model(input_ids=ids).logits[0]
    assert found.totals[0]["tv"] == pytest.approx(distance(full[1], base[1])[0], rel=1e-3)


def test_a_model_without_logits_has_edits_and_no_effects():
    model = reft_model(tiny_model("bert", "base"), positions="f1")
    found = inspect_adapter(model, inputs_of(model, 4))
    assert found.edits and found.effects == found.totals == []


def test_a_model_of_images_has_patches_for_tokens():
    config = ViTConfig(
        hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=8, patch_size=4
    )
    model = reft_model(ViTForImageClassification(config).eval(), positions="f1+l2")
    found = inspect_adapter(model, {"pixel_values": torch.randn(2, 3, 8, 8)})
    rows = [row for row in found.edits if row["depth"] == 0 and row["prompt"] == 1]
    assert [(row["token"], row["edited"]) for row in rows] == [
        ("0", True), ("1", False), ("2", False), ("3", True), ("4", True)
    ]  # fmt: skip
    assert len(found.effects) == 4 and all(row["tv"] > 0 for row in found.effects)


def test_an_intervention_of_one_s_own_may_leave_its_subspace():
    class Sideways(torch.nn.Module):
        """Adds a constant vector, and says that it edits the first two axes."""

        def __init__(self, d, r):
            super().__init__()
            self.shift = torch.nn.Parameter(torch.zeros(d))
            self.register_buffer("subspace", torch.eye(r, d), persistent=False)

        def forward(self, h):
            return h + self.shift

    register_intervention("sideways", Sideways)
    try:
        model = get_peft_model(tiny_model("llama"), ReftConfig(intervention="sideways", r=2, positions="l1")).eval()
        with torch.no_grad():
            for modules in get_interventions(model).values():
                modules[0].shift[1:3] = torch.tensor([1.0, 1.0])  # half in the subspace, half out of it
        row = next(row for row in inspect_adapter(model, inputs_of(model, 4)).edits if row["edited"])
    finally:
        del REGISTRY["sideways"]
    assert row["edit_angle"] == pytest.approx(45, abs=1e-4) and row["edit_norm"] == pytest.approx(2**0.5)


def test_a_fresh_adapter_moves_nothing_and_has_no_share():
    model = get_peft_model(tiny_model("llama"), ReftConfig(intervention="direft", positions="l1")).eval()
    found = inspect_adapter(model, inputs_of(model, 5))
    (row,) = [row for row in found.edits if row["edited"] and row["depth"] == 0]
    assert row["edit_norm"] == row["turn"] == 0 and math.isnan(row["edit_angle"]) and row["angle_before"] == 90
    assert found.effects[0]["tv"] == 0 and math.isnan(found.effects[0]["tv_share"])


# The model is left as it was.


def state_of(model):
    modes = {name: module.training for name, module in model.named_modules()}
    hooks = {
        name: [list(hooks) for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        for name, module in model.named_modules()
    }
    layers = {
        name: (dict(layer.scaling), layer.active_adapters, layer.disable_adapters, sorted(layer.__dict__))
        for name, layer in reft_layers(model).items()
    }
    grads = {name: (p.requires_grad, p.grad is None) for name, p in model.named_parameters()}
    return modes, hooks, layers, grads


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails, monkeypatch):
    model = reft_model(tiny_model("llama"), positions="f1+l1", dropout=0.5)
    set_strength(model, 0.5)
    model.train()
    model.base_model.model.model.layers[1].eval()
    inputs = inputs_of(model, 5, 3)
    before = state_of(model)
    if fails:
        calls = []
        forward = type(model.base_model.model).forward

        def failing(self, *args, **kwargs):
            calls.append(1)
            if len(calls) == 4:  # in the midst of the effects
                raise RuntimeError("out of memory")
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(type(model.base_model.model), "forward", failing)
        with pytest.raises(RuntimeError, match="out of memory"):
            inspect_adapter(model, inputs)
        monkeypatch.undo()
    else:
        assert inspect_adapter(model, inputs).effects
    assert state_of(model) == before
    twin = reft_model(tiny_model("llama"), positions="f1+l1", dropout=0.5)
    set_strength(twin, 0.5)
    twin.train()
    twin.base_model.model.model.layers[1].eval()
    for one in (model, twin):  # and trains on as one that was not looked at
        torch.manual_seed(0)
        one(**inputs, labels=inputs["input_ids"]).loss.backward()
    for (name, p), (_, q) in zip(model.named_parameters(), twin.named_parameters()):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.equal(p.grad, q.grad), name
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_what_cannot_be_inspected_is_refused(tokenizer):
    model = reft_model(tiny_model("llama"), task_type="CAUSAL_LM")
    lora = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="No ReFT adapter is active"):
        inspect_adapter(lora, "one", tokenizer)
    with model.disable_adapter(), pytest.raises(ValueError, match="No ReFT adapter is active"):
        inspect_adapter(model, "one", tokenizer)
    with pytest.raises(ValueError, match="need a tokenizer"):
        inspect_adapter(model, "one")
    with pytest.raises(ValueError, match="2 answers for 1 prompts"):
        inspect_adapter(model, "one", tokenizer, answers=["two", "four"])
    with pytest.raises(ValueError, match="must be a text"):
        inspect_adapter(model, [1, 2], tokenizer)
    with pytest.raises(ValueError, match="'' has no tokens"):
        inspect_adapter(model, ["one", ""], tokenizer)
    with pytest.raises(ValueError, match="adapter_names"):
        inspect_adapter(model, {**inputs_of(model, 3), "adapter_names": ["default"]})
    last_only = {**inputs_of(model, 3, 4), "logits_to_keep": 1}
    with pytest.raises(ValueError, match="effects=False"):
        inspect_adapter(model, last_only)
    assert inspect_adapter(model, last_only, effects=False).edits


def test_a_model_with_injected_adapters(tokenizer):
    model = tiny_model("llama")
    model.add_adapter(ReftConfig(positions="l1", task_type="CAUSAL_LM"))
    randomize(model).eval()
    found = inspect_adapter(model, "one two", tokenizer)
    assert [row["edited"] for row in found.edits] == [False, True] * BLOCKS and found.effects[0]["tv"] > 0


# Tables and pictures.


@pytest.fixture
def found(tokenizer):
    model = reft_model(tiny_model("llama"), positions="f2+l1", task_type="CAUSAL_LM")
    return inspect_adapter(model, ["one two $three$ four five", "six seven"], tokenizer)


def test_tables_go_to_pandas_and_to_files(found, tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = found.to_pandas()
    assert len(frame) == len(found.edits) == 7 * BLOCKS and frame["relative"].dtype == float
    assert len(found.to_pandas("effects")) == 2 * BLOCKS
    pivot = frame[frame.prompt == 0].pivot(index="depth", columns="position", values="relative")
    assert pivot.shape == (BLOCKS, 5) and (pivot[[2, 3]] == 0).all().all() and (pivot[[0, 1, 4]] > 0).all().all()
    for table in ("edits", "effects", "totals"):
        found.to_csv(tmp_path / "table.csv", table)
        written = pandas.read_csv(tmp_path / "table.csv", dtype=str, keep_default_na=False)
        for key, column in found.to_pandas(table).items():
            if column.dtype == float:
                assert list(pandas.to_numeric(written[key])) == pytest.approx(list(column), nan_ok=True)
            else:
                assert list(written[key]) == [str(value) for value in column]
    with pytest.raises(ValueError, match="table='nothing'"):
        found.to_pandas("nothing")


def labels_of(axes):
    return [text.get_text() for text in axes.get_xticklabels()]


def test_a_table_or_picture_that_cannot_be_written_leaves_the_old_one(found, tmp_path, monkeypatch):
    def fail(*args, **settings):
        if args[1:]:
            args[1].write_text("half")
        raise OSError(28, "No space left on device")

    table, picture = tmp_path / "edits.csv", tmp_path / "plot.png"
    found.to_csv(table)
    found.plot(picture)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(csv.DictWriter, "writeheader", fail)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    for write in (lambda: found.to_csv(table), lambda: found.plot(picture)):
        with pytest.raises(OSError, match="No space left"):
            write()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_a_pipe_is_written_to_and_stays_one(found, tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    found.to_csv(pipe)
    reader.join(10)
    assert read[0].startswith("prompt,block,") and pipe.is_fifo()


def test_the_heat_map_s_axes_are_tokens_and_blocks_and_its_colours_the_table(found, tmp_path):
    figure = found.plot(tmp_path / "plot.png")
    first, bars, second, _, bar = figure.axes
    assert labels_of(first) == ["one", "two", "$three$", "four", "five"] and labels_of(second) == ["six", "seven"]
    assert [text.get_text() for text in first.get_yticklabels()] == ["0", "1", "2"]
    assert "‖Δh‖ / ‖h‖" in bar.get_ylabel()
    assert first.get_xlabel().startswith("token") and first.get_ylabel() == "block"
    (image,) = first.get_images()
    drawn = image.get_array()
    for row in (row for row in found.edits if row["prompt"] == 0):
        cell = drawn[row["depth"], row["position"]]
        assert (cell is numpy.ma.masked) if not row["edited"] else cell == pytest.approx(row["relative"])
    assert [patch.get_width() for patch in bars.patches] == pytest.approx([row["tv"] for row in found.effects[:BLOCKS]])
    picture = matplotlib.image.imread(tmp_path / "plot.png")
    assert picture.shape[0] > 200 and picture.shape[1] > 300
    grey = torch.tensor([int(UNEDITED[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    assert (torch.tensor(picture[..., :3]) - grey).abs().amax(-1).lt(0.01).float().mean() > 0.05  # two of five tokens


def test_long_runs_of_unedited_tokens_are_one_column(tokenizer):
    model = reft_model(tiny_model("llama"), positions="f2+m1+l1", task_type="CAUSAL_LM")
    found = inspect_adapter(model, " ".join(["one"] * 30 + ["two"]), tokenizer, effects=False)
    axes = found.plot().axes[0]
    assert labels_of(axes) == ["one", "one", f"{GAP} 13", "one", f"{GAP} 14", "two"]
    assert axes.get_images()[0].get_array()[0].mask.tolist() == [False, False, True, False, True, False]
    assert len(labels_of(found.plot(max_unedited=None).axes[0])) == 31
    answered = inspect_adapter(model, " ".join(["one"] * 9), tokenizer, answers="two two two two", effects=False)
    axes = answered.plot().axes[0]
    assert labels_of(axes)[-2:] == ["one", f"{GAP} 4"], "prompt and answer are not one run"
    assert axes.lines[0].get_xdata()[0] == len(labels_of(axes)) - 1.5


def test_other_values_adapters_and_prompts_can_be_drawn(found):
    figure = found.plot(value="angle_after", prompts=[1], adapter="default")
    assert labels_of(figure.axes[0]) == ["six", "seven"] and "degrees" in figure.axes[-1].get_ylabel()
    for wrong in ({"value": "colour"}, {"prompts": [7]}, {"adapter": "other"}):
        with pytest.raises(ValueError, match=str(next(iter(wrong.values()))).strip("[]")):
            found.plot(**wrong)


def test_labels_show_blanks_and_line_ends():
    assert [shown(token) for token in (" a", "\n", "\x07")] == ["␣a", "\\n", "\\x07"]


# The command.


@pytest.fixture
def saved(tmp_path, tokenizer):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = reft_model(tiny_model("llama"), positions="f1+l1+d", task_type="CAUSAL_LM")
    model.save_pretrained(tmp_path / "adapter")
    return model


def test_the_command_writes_a_picture_and_tables(saved, tmp_path, capsys, tokenizer):
    out, table = tmp_path / "plot.png", tmp_path / "table.csv"
    argv = [str(tmp_path / "adapter"), "--model", str(tmp_path / "base"), "--prompt", "one two four", "--out", str(out)]
    assert main([*argv, "--answer", "five six", "--csv", str(table), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("prompt 0: one two four\n")
    assert "model.layers.2: moves 4 tokens" in printed and "nats" in printed
    assert matplotlib.image.imread(out).ndim == 3
    expected = inspect_adapter(saved, "one two four", tokenizer, answers="five six")
    with open(table, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    written = [float(row["relative"]) for row in rows]
    assert written == pytest.approx([row["relative"] for row in expected.edits], rel=1e-5)
    with open(tmp_path / "table-effects.csv", encoding="utf-8", newline="") as file:
        assert [row["block"] for row in csv.DictReader(file)] == [f"model.layers.{n}" for n in range(BLOCKS)]


def test_the_command_s_errors_are_one_line(saved, tmp_path, capsys):
    for argv, message in (
        ([str(tmp_path), "--prompt", "one"], "adapter_config.json"),
        ([str(tmp_path / "adapter"), "--prompt", "one"], "--model"),
        ([str(tmp_path / "adapter"), "--prompt", "one", "--model", str(tmp_path / "nowhere")], "nowhere"),
    ):
        assert main(argv) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and message in captured.err and captured.err.count("\n") == 1


def test_the_command_takes_classifiers_with_the_classes_they_were_trained_for(tmp_path, capsys, tokenizer):
    tiny_model("bert", "base").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = reft_model(tiny_model("bert", "classifier", num_labels=5), task_type="SEQ_CLS", positions="f1")
    model.save_pretrained(tmp_path / "adapter")
    argv = [str(tmp_path / "adapter"), "--model", str(tmp_path / "base"), "--prompt", "one two", "--device", "cpu"]
    assert main(argv) == 2 and "--num-labels" in capsys.readouterr().err
    assert main([*argv, "--num-labels", "5"]) == 0 and "all blocks: tv" in capsys.readouterr().out
