"""Collators, collected states, causal tracing and drift against plain hooks; models are given back as they were."""

import math

import pytest
import torch
from accelerate.utils import compile_regions
from conftest import batch, logits, randomize, tiny_model
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from trainer_kit import word_tokenizer
from transformers import DataCollatorForSeq2Seq
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from peft_reft import ReftConfig, ReftDataCollator, get_interventions
from peft_reft.causal import InterchangeCollator, collect, edit_drift, interchange_accuracy, trace
from peft_reft.causal.accuracy import hits

BLOCK_NAMES = [f"model.layers.{number}" for number in range(3)]


def outputs(base, inputs, names=BLOCK_NAMES):
    """What modules return, by plain hooks."""
    found, handles = {}, []
    for name in names:

        def note(module, args, output, name=name):
            found[name] = (output if isinstance(output, Tensor) else output[0]).clone()

        handles.append(base.get_submodule(name).register_forward_hook(note))
    result = logits(base, inputs)
    for handle in handles:
        handle.remove()
    return found, result


def snapshot(model):
    """Everything about a model that a look at it must not change."""
    modules = {
        name: (id(module), module.training, sorted(module.__dict__), len(module._forward_hooks))
        for name, module in model.named_modules()
    }
    return modules, {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}


def edited_model(**settings):
    settings = {"r": 3, "positions": "f1+l1", "task_type": "CAUSAL_LM", **settings}
    return randomize(get_peft_model(tiny_model("llama"), ReftConfig(**settings)))


# collect


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["plain", "edited", "lora"])
def test_collected_states_are_those_of_the_unedited_model(kind, side):
    base, inputs = tiny_model("llama"), batch(7, 4, side=side)
    model: nn.Module = tiny_model("llama")
    if kind == "lora":
        base, model = (get_peft_model(tiny_model("llama"), LoraConfig(init_lora_weights=True, r=2)) for _ in range(2))
    elif kind == "edited":
        model = edited_model()
    before = snapshot(model)
    found = collect(model, inputs, "f1+l2")
    assert snapshot(model) == before
    inner = base.get_base_model() if kind == "lora" else base
    states, _ = outputs(inner, inputs)
    columns = {"right": [[0, 5, 6], [0, 2, 3]], "left": [[0, 5, 6], [3, 5, 6]]}[side]
    assert list(found) == BLOCK_NAMES
    for name in BLOCK_NAMES:
        for row in range(2):
            torch.testing.assert_close(found[name][row], states[name][row, columns[row]])


def test_collected_states_of_chosen_blocks_modules_places_and_short_rows():
    base, inputs = tiny_model("llama"), batch(5, 1)
    states, _ = outputs(base, inputs, ["model.layers.2", "model.layers.0.mlp"])
    (name,) = found = collect(base, inputs, "f1+l2", layers=-1)
    assert name == "model.layers.2"
    torch.testing.assert_close(found[name][1, 0], states[name][1, 0])
    assert not found[name][1, 1:].any()  # a row with one token
    locations = torch.tensor([[4, 2], [0, -1]])
    found = collect(base, {**inputs, "intervention_locations": locations}, target_modules=["layers.0.mlp"])
    torch.testing.assert_close(found["model.layers.0.mlp"][0], states["model.layers.0.mlp"][0, [4, 2]])
    with pytest.raises(ValueError, match="names no module"):
        collect(base, inputs, target_modules=["nothing"])


def test_collect_on_compiled_blocks():
    found = collect(compile_regions(tiny_model("llama"), backend="eager"), batch(5, 3), "l1")
    expected = collect(tiny_model("llama"), batch(5, 3), "l1")
    assert list(found) == list(expected) == BLOCK_NAMES
    for name in BLOCK_NAMES:
        torch.testing.assert_close(found[name], expected[name])


def test_collect_on_an_encoder_decoder_model():
    base = tiny_model("t5")
    inputs = {**batch(7, 4), "decoder_input_ids": torch.tensor([[0, 5, 6]] * 2)}
    found = collect(base, inputs, "l1")
    states, _ = outputs(base, inputs, list(found))
    assert {name.split(".")[0] for name in found} == {"encoder", "decoder"}
    for name, value in found.items():
        columns = [6, 3] if name.startswith("encoder") else [2, 2]
        torch.testing.assert_close(value[:, 0], states[name][[0, 1], columns])


def test_a_model_is_given_back_as_it_was_when_the_look_fails():
    model = edited_model()
    expected = logits(model.eval(), batch(5))
    before = snapshot(model.train())
    with pytest.raises(ValueError, match=r"cannot be aligned|columns"):
        collect(model, {**batch(5), "intervention_locations": torch.tensor([[9]])})
    assert snapshot(model) == before
    assert torch.equal(logits(model.eval(), batch(5)), expected)


# trace


def grid_by_hooks(base, clean, corrupted, answer):
    """P(answer) for each block and token with the clean state put back there."""
    states, _ = outputs(base, clean)
    rows = []
    for name in BLOCK_NAMES:
        row = []
        for column in range(states[name].shape[1]):

            def put(module, args, output, name=name, column=column):
                hidden = (output if isinstance(output, Tensor) else output[0]).clone()
                hidden[0, column] = states[name][0, column]
                return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

            handle = base.get_submodule(name).register_forward_hook(put)
            row.append(logits(base, corrupted)[0, -1].softmax(-1)[answer].item())
            handle.remove()
        rows.append(row)
    return torch.tensor(rows)


@pytest.mark.parametrize("noisy", [False, True])
def test_the_grid_of_causal_tracing_is_that_of_plain_hooks(noisy, tmp_path):
    base, clean = tiny_model("llama"), batch(6, seed=1)
    corrupted = {"input_ids": clean["input_ids"].clone(), "attention_mask": clean["attention_mask"]}
    corrupted["input_ids"][0, 1:3] = torch.tensor([50, 60])
    if noisy:
        embeds = base.get_input_embeddings()(clean["input_ids"]).detach()
        embeds[0, 1:3] += 3 * embeds.std() * torch.randn(2, embeds.shape[-1])
        corrupted = {"inputs_embeds": embeds, "attention_mask": clean["attention_mask"]}
    before = snapshot(base)
    found = trace(base, clean, corrupted, batch_size=4)
    assert snapshot(base) == before
    answer = int(logits(base, clean)[0, -1].argmax())
    expected = grid_by_hooks(base, clean, corrupted, answer)
    blocks, values = found.grid("value")
    assert blocks == BLOCK_NAMES
    torch.testing.assert_close(values, expected, atol=1e-6, rtol=1e-5)
    high, low = (logits(base, inputs)[0, -1].softmax(-1)[answer].item() for inputs in (clean, corrupted))
    assert found.examples == [{"example": 0, "clean": pytest.approx(high), "corrupted": pytest.approx(low)}]
    restored = found.grid()[1]
    torch.testing.assert_close(restored, (expected - low) / (high - low), atol=1e-4, rtol=1e-4)
    assert restored[-1, -1].item() == pytest.approx(1, abs=1e-4)  # the last block at the last token is the answer
    torch.testing.assert_close(restored[:, 0], torch.zeros(3), atol=1e-4, rtol=0)  # before the corruption
    assert (restored[:, 1:3].abs() > 1e-3).any()
    found.plot(tmp_path / "trace.png")
    found.to_csv(tmp_path / "trace.csv")
    assert (tmp_path / "trace.png").stat().st_size > 1000
    assert len((tmp_path / "trace.csv").read_text().splitlines()) == 1 + 3 * 6


def test_tracing_of_several_padded_rows_with_a_metric_and_modules_of_one_s_own():
    base = edited_model()
    clean = batch(6, 4, seed=1)
    corrupted = {**clean, "input_ids": clean["input_ids"].clone()}
    corrupted["input_ids"][:, 1] = 50

    def difference(logits):
        return logits[:, 5] - logits[:, 6]

    found = trace(base, clean, corrupted, difference, layers=[0, 2], target_modules=["mlp"])
    assert list(dict.fromkeys(row["block"] for row in found.rows)) == ["model.layers.0.mlp", "model.layers.2.mlp"]
    assert [sum(row["example"] == n for row in found.rows) for n in (0, 1)] == [12, 8]
    alone = {name: value[1:, :4] for name, value in clean.items()}
    alone_corrupted = {name: value[1:, :4] for name, value in corrupted.items()}
    one = trace(base, alone, alone_corrupted, difference, layers=[0, 2], target_modules=["mlp"])
    torch.testing.assert_close(one.grid()[1], found.grid(example=1)[1], atol=1e-4, rtol=1e-3)
    assert {row["token_id"] for row in found.rows if row["position"] == 1} == {50}


def test_labels_and_inputs_that_rows_share_do_not_change_a_trace():
    model = tiny_model("llama")
    clean, corrupted = (batch(5, 5, seed=seed) for seed in (1, 2))
    labels = clean["input_ids"].masked_fill(torch.arange(5) < 2, -100)
    more = {"labels": labels, "position_ids": torch.arange(5)[None]}
    plain, found = (trace(model, {**clean, **own}, {**corrupted, **own}) for own in ({}, more))
    for one, other in zip(plain.rows, found.rows, strict=True):
        assert one["value"] == pytest.approx(other["value"], abs=1e-5)
    assert len({row["value"] for row in plain.rows}) > len(plain.rows) // 2
    with pytest.raises(ValueError, match=r"metric returned \[\] for the logits of 5 rows"):
        trace(model, clean, corrupted, lambda logits: logits[:, 3].mean())


def test_tracing_a_classifier_and_an_encoder_decoder_model():
    for family, head in (("bert", "classifier"), ("t5", None)):
        base, clean = tiny_model(family, head), batch(5, seed=1)
        more = {"decoder_input_ids": torch.tensor([[0]])} if family == "t5" else {}
        corrupted = {**clean, **more, "input_ids": clean["input_ids"].clone()}
        corrupted["input_ids"][0, 1] = 50
        found = trace(base, {**clean, **more}, corrupted)
        assert len(found.grid()[0]) == 3 and all(math.isfinite(row["value"]) for row in found.rows)
        assert found.grid()[1].abs().max() > 1e-3


def test_the_prediction_is_found_behind_padding_of_another_stack_and_in_logits_of_some_columns():
    model, right = tiny_model("t5"), {"attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]])}
    right["decoder_input_ids"] = torch.tensor([[0, 11, 12, 13, 14, 15]])  # as long as the encoder's row
    clean, corrupted = ({"input_ids": torch.tensor([[3, token, 7, 9, 0, 0]]), **right} for token in (5, 50))
    found = trace(model, clean, corrupted, lambda logits: logits[:, 3])
    assert found.examples[0]["clean"] == pytest.approx(float(logits(model, clean)[0, -1, 3]), abs=1e-5)

    model, mask = tiny_model("llama"), {"attention_mask": right["attention_mask"]}
    clean, corrupted = ({"input_ids": one["input_ids"], **mask} for one in (clean, corrupted))
    whole, some = (trace(model, {**clean, **keep}, {**corrupted, **keep}) for keep in ({}, {"logits_to_keep": 3}))
    torch.testing.assert_close(whole.grid("value")[1], some.grid("value")[1])
    with pytest.raises(
        ValueError, match=r"its last 1 column\(s\), which are padding; the prediction is that of column 3"
    ):
        trace(model, {**clean, "logits_to_keep": 1}, {**corrupted, "logits_to_keep": 1})


def test_inputs_of_other_lengths_cannot_be_traced():
    with pytest.raises(ValueError, match="each state takes the place of another"):
        trace(tiny_model("llama"), batch(6), batch(5))
    with pytest.raises(ValueError, match="needs input_ids"):
        trace(tiny_model("llama"), {"x": torch.ones(1)}, batch(5))


# InterchangeCollator, interchange_accuracy


def test_bases_and_sources_are_padded_apart():
    collator = InterchangeCollator(DataCollatorForSeq2Seq(word_tokenizer(), return_tensors="pt"))
    made = collator(
        [
            {"input_ids": [3, 4, 5], "labels": [-100, -100, 5], "source_input_ids": [6]},
            {"input_ids": [3], "labels": [7], "source_input_ids": [6, 7, 8, 9], "source_intervention_locations": [3]},
        ]
    )
    assert made["input_ids"].shape == (2, 3) and made["labels"].shape == (2, 3)
    source = made["source_inputs"]
    assert source["input_ids"].shape == (2, 4) and source["attention_mask"].sum(1).tolist() == [1, 4]
    assert source["intervention_locations"].tolist() == [[[-1]], [[3]]]
    assert "labels" not in source and "intervention_locations" not in made


def test_sources_by_name_and_examples_without_any():
    def stack(rows):
        return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}

    collator = InterchangeCollator(stack)
    one = {"x": 1, "source_inputs": {"number": {"x": 2}, "gender": {"x": 3}}, "subspaces": ["number"]}
    made = collator([one, one])
    assert {name: inputs["x"].tolist() for name, inputs in made["source_inputs"].items()} == {
        "number": [2, 2],
        "gender": [3, 3],
    }
    assert made["subspaces"] == [["number"], ["number"]]
    other = {**one, "source_inputs": dict(reversed(one["source_inputs"].items()))}
    again = collator([one, other])["source_inputs"]  # in whatever order they are named
    assert {name: inputs["x"].tolist() for name, inputs in again.items()} == {"number": [2, 2], "gender": [3, 3]}
    assert "source_inputs" not in collator([{"x": 1}])
    with pytest.raises(ValueError, match=r"Some examples have sources for \['gender', 'number'\], others for"):
        collator([one, {"x": 1}])
    with pytest.raises(ValueError, match="in one of the two ways"):
        collator([{"x": 1, "source_x": 2, "source_inputs": {"x": 3}}])
    with pytest.raises(TypeError, match="is not callable"):
        InterchangeCollator(3)


def test_a_reft_collator_inside_finds_the_places_of_both():
    config = ReftConfig(intervention="interchange", positions="l1", r=2, task_type="CAUSAL_LM")
    inner = ReftDataCollator(DataCollatorForSeq2Seq(word_tokenizer(), return_tensors="pt"), config)
    made = InterchangeCollator(inner)([{"input_ids": [3, 4, 5], "labels": [-100, -100, 5], "source_input_ids": [6, 7]}])
    assert made["intervention_locations"].tolist() == [[[1]]]
    assert made["source_inputs"]["intervention_locations"].tolist() == [[[1]]]


def test_places_that_a_collator_found_by_labels_of_its_own_are_not_used():
    config = ReftConfig(intervention="interchange", positions="l1", r=2, task_type="CAUSAL_LM")
    inner = ReftDataCollator(DataCollatorForLanguageModeling(pad_token_id=0), config)  # TRL's: labels are the ids
    example = {"input_ids": [3, 4, 5, 8], "labels": [-100, -100, -100, 8], "source_input_ids": [6, 7, 9]}
    made = InterchangeCollator(inner)([example])
    assert made["intervention_locations"].tolist() == [[[2]]]
    assert made["source_inputs"].keys() == {"input_ids", "attention_mask"}  # the model finds the prompt's end


def test_accuracy_of_a_language_model():
    base = tiny_model("llama")
    model = get_peft_model(base, ReftConfig(intervention="vanilla", positions="all", task_type="CAUSAL_LM"))
    rows, sources = (batch(6, 6, 6, seed=seed)["input_ids"] for seed in (1, 2))
    answers = logits(tiny_model("llama"), {"input_ids": sources}).argmax(-1)  # all states are the source's
    labels = torch.full_like(rows, -100)
    labels[:, 5] = answers[:, 4]
    labels[2, 5] = (labels[2, 5] + 1) % 100
    triples = zip(rows, sources, labels)
    data = [{"input_ids": r, "source_input_ids": s, "labels": n, "source_labels": n} for r, s, n in triples]
    model.train()
    assert interchange_accuracy(model, data, batch_size=2) == pytest.approx(2 / 3)
    assert model.training
    with pytest.raises(ValueError, match="has no 'labels'"):
        interchange_accuracy(model, [{"input_ids": rows[0]}])
    with pytest.raises(ValueError, match=r"labels of a batch are a list: .*with_format"):
        interchange_accuracy(model, [{name: value.tolist() for name, value in row.items()} for row in data])
    for nothing in ([-100, -100, -100], [7, -100, -100]):  # a first token is predicted from nothing
        with pytest.raises(ValueError, match="Row 1 of a batch has no label that is predicted"):
            hits(torch.ones(2, 3, 9), torch.tensor([[-100, 1, 2], nothing]), causal=True)
    with pytest.raises(ValueError, match="do not fit logits"):
        hits(torch.ones(2, 3), torch.ones(2, 3), causal=False)


# edit_drift


def test_an_edit_lies_in_its_subspace_at_its_block_and_leaves_it_later():
    model = edited_model(layers_to_transform=[0, 1])
    inputs = batch(7, 5)
    before = snapshot(model)
    rows = edit_drift(model, inputs)
    assert snapshot(model) == before
    at_home = [row for row in rows if row["edited"] == row["block"]]
    assert [row["block"] for row in at_home] == BLOCK_NAMES[:2]
    for row in at_home:
        assert row["places"] == "edited" and row["inside"] == pytest.approx(1, abs=1e-5) and row["norm"] > 0.1
    later = [row for row in rows if row["edited"] != row["block"]]
    assert {(row["edited"], row["block"]) for row in later} == {
        (BLOCK_NAMES[0], BLOCK_NAMES[1]),
        (BLOCK_NAMES[0], BLOCK_NAMES[2]),
        (BLOCK_NAMES[1], BLOCK_NAMES[2]),
    }
    assert all(row["inside"] < 0.99 for row in later) and {row["places"] for row in later} == {"edited", "other"}
    # By hand, for the first block's edit at the second block.
    base = tiny_model("llama")
    one = edited_model(layers_to_transform=[0, 1])
    intervention = get_interventions(one)["model.layers.0"][0]
    states, _ = outputs(base, inputs, ["model.layers.1"])

    def put(module, args, output):
        edited = output.clone()
        for row, columns in enumerate(([0, 6], [0, 4])):
            edited[row, columns] = intervention(output[row, columns]).detach()
        return edited

    handle = base.model.layers[0].register_forward_hook(put)
    after, _ = outputs(base, inputs, ["model.layers.1"])
    handle.remove()
    change = (after["model.layers.1"] - states["model.layers.1"])[[0, 0, 1, 1], [0, 6, 0, 4]].double()
    R = intervention.subspace.detach().double()
    (row,) = (r for r in later if (r["edited"], r["block"], r["places"]) == (*BLOCK_NAMES[:2], "edited"))
    assert row["norm"] == pytest.approx(float(change.square().sum(1).mean().sqrt()), rel=1e-4)
    assert row["inside"] == pytest.approx(float((change @ R.T).square().sum() / change.square().sum()), rel=1e-4)
    assert row["chance"] == 3 / 32


def test_padding_is_no_token_that_drifts():
    model = edited_model(positions="l1", layers_to_transform=[0])
    padded = {name: value[1:] for name, value in batch(6, 4).items()}
    alone = {name: value[:, :4] for name, value in padded.items()}
    one, other = edit_drift(model, alone), edit_drift(model, padded)
    assert [row["places"] for row in one] == [row["places"] for row in other] == ["edited"] * 3
    for row, same in zip(one, other):
        assert row["inside"] == pytest.approx(same["inside"], rel=1e-3)


def test_there_is_no_drift_without_an_edit():
    with pytest.raises(ValueError, match="No ReFT adapter is active"):
        edit_drift(tiny_model("llama"), batch(5))
