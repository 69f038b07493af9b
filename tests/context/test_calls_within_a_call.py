"""A model that runs a part several times within one call: each batch has its own places, or the user is told."""

import pytest
import torch
import torch.nn.functional as F
from conftest import batch, randomize, reft_model, tiny_model
from edit_spy import assert_right, assert_told, spied, warnings_of
from peft import inject_adapter_in_model
from torch import nn
from transformers import LlamaForCausalLM

from peft_reft import ReftConfig


class AsksTwice(nn.Module):
    """Runs one language model on two batches of the same shape."""

    def __init__(self, lm):
        super().__init__()
        self.lm, self.config = lm, lm.config

    def forward(self, input_ids, attention_mask, other_ids, other_mask):
        other = self.lm(input_ids=other_ids, attention_mask=other_mask)
        return self.lm(input_ids=input_ids, attention_mask=attention_mask).logits, other.logits


def test_a_part_that_runs_twice_within_a_model_edits_each_batch_at_its_own_places():
    lm = tiny_model("llama")
    model = reft_model(AsksTwice(lm), positions="f1+l1", target_modules=r"lm\.model\.layers\.\d+")
    one, other = batch(7, 5), batch(3, 7, side="left", seed=1)
    with torch.no_grad():
        found = model(**one, other_ids=other["input_ids"], other_mask=other["attention_mask"])
        for inputs, logits in zip((one, other), found):
            kept = inputs["attention_mask"].bool()
            torch.testing.assert_close(logits[kept], lm(**inputs).logits[kept])


class AsksForPairs(nn.Module):
    """Runs one language model on rows and on others, as contrastive losses do."""

    def __init__(self, order):
        super().__init__()
        self.lm, self.order = tiny_model("llama"), order

    def forward(self, input_ids, attention_mask, labels=None, other_ids=None, other_mask=None, other_labels=None):
        calls = {
            "own": {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels},
            "other": {"input_ids": other_ids, "attention_mask": other_mask, "labels": other_labels},
        }
        return {name: self.lm(**calls[name]).logits for name in self.order}


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("given", ["mask", "labels", "labels of both", "mask and labels of both", "nothing"])
@pytest.mark.parametrize("order", [("own", "other"), ("other", "own")], ids=" then ".join)
def test_other_rows_that_a_model_runs_have_their_own_mask_and_labels_or_none(order, given, task_type, training):
    model = adapted(AsksForPairs(order), task_type)
    one, other = batch(8, 6), batch(8, 5, seed=3)
    inputs = {**one, "other_ids": other["input_ids"]}
    expected = {"own": [[0, 7], [0, 5]], "other": [[0, 7], [0, 7]]}
    if "mask" in given:
        inputs["other_mask"] = other["attention_mask"]
        expected["other"] = [[0, 7], [0, 4]]
    if "labels" in given:
        inputs["labels"] = one["input_ids"].masked_fill(torch.arange(8) < 3, -100)
        expected["own"] = [[0, 2], [0, 2]]
    if "both" in given:
        inputs["other_labels"] = other["input_ids"].masked_fill(torch.arange(8) < 4, -100)
        expected["other"] = [[0, 3], [0, 3]]
    model.train(training)
    with spied(model, AsksForPairs(order), "lm.model.layers.0") as calls, torch.set_grad_enabled(training):
        model(**inputs)
    assert calls == [expected[name] for name in order]


class Around(nn.Module):
    """A language model, and a function that runs it: the forward of the module around it."""

    def __init__(self, run):
        super().__init__()
        self.lm, self.run = tiny_model("llama"), run

    def forward(self, input_ids, attention_mask=None, labels=None, others=None, other_mask=None):
        self.run(self.lm, input_ids, attention_mask, labels, others, other_mask)


def adapted(module, task_type):
    config = {"positions": "f1+l1", "r": 2}
    if task_type is None:
        return reft_model(module, **config)
    return randomize(inject_adapter_in_model(ReftConfig(task_type=task_type, **config), module)).eval()


def run_within(run, task_type=None, training=False, **inputs):
    """The columns that each run of the language model edits, and the warnings."""
    model = adapted(Around(run), task_type).train(training)
    with spied(model, Around(run), "lm.model.layers.0") as calls, torch.set_grad_enabled(training):
        told = warnings_of(lambda: model(**inputs))
    return calls, told


def labels_from(ids, first):
    return ids.masked_fill(torch.arange(ids.shape[1]) < first, -100)


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_a_mask_that_only_the_inner_call_has_is_read(task_type):
    ids = batch(8, 6)["input_ids"]

    def run(lm, ids, *_):
        lm(input_ids=ids, attention_mask=torch.tensor([[1] * 8, [1] * 6 + [0] * 2]))

    assert run_within(run, task_type, input_ids=ids) == ([[[0, 7], [0, 5]]], [])


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("form", ["ids", "ids without a mask", "embeddings"])
@pytest.mark.parametrize("order", ["own", "other"])
def test_rows_in_a_list_and_masks_beside_the_own_one_are_of_others(order, form, task_type):
    one, other = batch(8, 6), batch(8, 5, seed=3)

    def run(lm, ids, mask, labels, others, other_mask):
        def tokens(ids):
            return {"inputs_embeds": lm.get_input_embeddings()(ids)} if form == "embeddings" else {"input_ids": ids}

        def own():
            lm(**tokens(ids), attention_mask=mask, labels=labels)

        if order == "own":
            own()
        lm(**tokens(others[0]["ids"]), attention_mask=None if form == "ids without a mask" else other_mask)
        if order == "other":
            own()

    given = {"others": [{"ids": other["input_ids"].int()}], "other_mask": other["attention_mask"]}
    calls, told = run_within(run, task_type, **one, labels=labels_from(one["input_ids"], 3), **given)
    expected = [[[0, 2], [0, 2]], [[0, 7], [0, 7 if form == "ids without a mask" else 4]]]
    assert calls == (expected if order == "own" else expected[::-1])
    assert told == []


def test_labels_beside_embeddings_are_of_those_rows():
    one, other = batch(8, 6), batch(8, 5, seed=3)

    def run(lm, ids, mask, labels, others, other_mask):
        embed = lm.get_input_embeddings()
        lm(inputs_embeds=embed(ids), attention_mask=mask, labels=labels)
        lm(inputs_embeds=embed(others), attention_mask=mask, labels=labels_from(others, 4))

    labels = labels_from(one["input_ids"], 3)
    calls, told = run_within(run, "CAUSAL_LM", **one, labels=labels, others=other["input_ids"])
    assert (calls, told) == ([[[0, 2], [0, 2]], [[0, 3], [0, 3]]], [])


def in_another_form(lm, ids, mask, labels, *_):
    lm(input_ids=ids.flip(1), attention_mask=mask.flip(1), labels=None)


def own_rows(lm, ids, mask, labels, *_):
    lm(input_ids=ids, attention_mask=mask, labels=labels)


def test_rows_moved_within_a_module_have_the_mask_that_moved_with_them():
    assert run_within(in_another_form, None, **batch(8, 6)) == ([[[0, 7], [2, 7]]], [])


def test_rows_computed_from_the_calls_own_count_as_others_after_those():
    def run(*given):
        own_rows(*given)
        in_another_form(*given)

    one = batch(8, 6)
    calls, told = run_within(run, "CAUSAL_LM", **one, labels=labels_from(one["input_ids"], 3))
    assert (calls, told) == ([[[0, 2], [0, 2]], [[0, 7], [2, 7]]], [])


@pytest.mark.parametrize("missing", ["labels", "mask"])
def test_rows_computed_from_the_calls_own_that_run_before_those_are_told(missing):
    """Only the own ones, which come after them, show that they are none of those in another form."""

    def run(lm, ids, mask, labels, *_):
        lm(input_ids=ids.flip(1), attention_mask=None if missing == "mask" else mask.flip(1))
        own_rows(lm, ids, mask, labels)

    given = batch(8, 6)
    if missing == "labels":
        given["labels"] = labels_from(given["input_ids"], 3)
    calls, told = run_within(run, "CAUSAL_LM", **given)
    assert calls == ([[[0, 2], [2]], [[0, 2], [0, 2]]] if missing == "labels" else [[[0, 7], [0, 5]]] * 2)
    assert len(told) == 1 and "run the ids that were passed first" in told[0]
    with pytest.raises(ValueError, match="pass labels and attention_mask on with them"):
        run_within(run, "CAUSAL_LM", training=True, **given)


@pytest.mark.parametrize("training", [False, True])
def test_rows_in_another_form_with_the_calls_labels_and_mask_are_told_nothing(training):
    """As of a model that answers its input with noise, and without: both ways out of the message are."""

    def run(lm, ids, mask, labels, *_):
        own_rows(lm, ids.clone(), mask, labels)
        own_rows(lm, ids, mask, labels)

    one = batch(8, 6)
    given = {**one, "labels": labels_from(one["input_ids"], 3)}
    assert run_within(run, "CAUSAL_LM", training, **given) == ([[[0, 2], [0, 2]]] * 2, [])


def test_two_batches_computed_from_the_calls_own_cannot_be_told_from_its_rows_with_noise():
    """From outside, other rows and the same with some tokens replaced are alike: the call's labels hold for both."""

    def run(change):
        def computed(lm, ids, mask, labels, *_):
            for seed in (0, 1):
                lm(input_ids=change(ids, seed), attention_mask=mask)

        return computed

    def with_noise(ids, seed):
        return torch.where(torch.arange(8) == 5 + seed, 1, ids)

    def of_other_rows(ids, seed):
        return ids.roll(seed + 1, 0)

    one = batch(8, 8)
    given = {**one, "labels": labels_from(one["input_ids"], 3)}
    for change in (with_noise, of_other_rows):
        assert run_within(run(change), "CAUSAL_LM", **given) == ([[[0, 2], [0, 2]]] * 2, [])


# Tokens that a module adds, as soft prompts and images are.


class LengthensRows(nn.Module):
    """A user's own module that puts two tokens in front, as embeddings or as ids."""

    def __init__(self, form, hands_labels_on):
        super().__init__()
        self.lm, self.form, self.hands_labels_on = tiny_model("llama"), form, hands_labels_on

    def forward(self, input_ids, attention_mask, labels=None):
        ids, mask = (F.pad(one, (2, 0), value=1) for one in (input_ids, attention_mask))
        tokens = {"input_ids": ids}
        if self.form == "embeddings":
            tokens = {"inputs_embeds": self.lm.get_input_embeddings()(ids)}
        labels = F.pad(labels, (2, 0), value=-100) if self.hands_labels_on else None
        return self.lm(**tokens, attention_mask=mask, labels=labels)


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("form", ["embeddings", "ids"])
def test_labels_of_rows_that_became_longer_are_used_or_told(form, task_type):
    given = batch(8, 6)
    given["labels"] = labels_from(given["input_ids"], 3)
    handed_on, kept = (adapted(LengthensRows(form, hands_labels_on), task_type) for hands_labels_on in (True, False))
    clean = LengthensRows(form, True)
    assert_right(handed_on, clean, [[0, 4], [0, 4]], "lm.model.layers.0", **given)
    told = "`labels` of 8 columns were passed to LengthensRows.* runs LlamaForCausalLM on 10 columns"
    assert_told(kept, clean, told, "lm.model.layers.0", **given)


class LengthensItsOwnRows(LlamaForCausalLM):
    """A language model with images in its text: what it hands on to its class is seen by no module."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        embeds = self.get_input_embeddings()(F.pad(input_ids, (2, 0), value=1))
        return super().forward(inputs_embeds=embeds, labels=F.pad(labels, (2, 0), value=-100))


@pytest.mark.parametrize("positions", ["f1+l1", "f1"])
def test_labels_that_a_model_lengthens_for_itself_are_told_where_it_matters(positions):
    base = tiny_model("llama")
    base.__class__ = LengthensItsOwnRows
    model, ids = reft_model(base, task_type="CAUSAL_LM", positions=positions), batch(8)["input_ids"]
    given = {"input_ids": ids, "labels": labels_from(ids, 3)}
    if positions == "f1":
        assert_right(model, tiny_model("llama"), [[0]], **given)
    else:
        assert_told(model, tiny_model("llama"), "runs LlamaModel on 10 columns", **given)
