"""Labels that are passed decide where the prompt ends, or the caller is told that they cannot."""

import copy
import re
import warnings

import architectures
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import HIDDEN, batch, randomize, reft_model, tiny_model
from edit_spy import assert_right, assert_told, edited_columns, spied, warnings_of
from peft import get_peft_model, inject_adapter_in_model
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from peft_reft import ReftConfig

PROMPT = 6  # of ten tokens: f1+l1 edits the columns 0 and 5


def rows():
    ids = batch(10, 10)["input_ids"]
    return ids, ids.masked_fill(torch.arange(10) < PROMPT, -100)


# Modules of a user's own around a language model.


class PassesLabelsOn(nn.Module):
    def __init__(self):
        super().__init__()
        self.lm = tiny_model("llama")

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        return self.lm(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


class PassesThemByPosition(PassesLabelsOn):
    def forward(self, input_ids, labels):
        return self.lm(input_ids, None, None, None, None, labels)


class PassesADict(PassesLabelsOn):
    def forward(self, data):
        return self.lm(**data)


class CallsForward(PassesLabelsOn):
    def forward(self, input_ids, labels=None):
        return self.lm.forward(input_ids=input_ids, labels=labels)


class KeepsLabels(PassesLabelsOn):
    def forward(self, input_ids, labels=None):
        logits = self.lm(input_ids=input_ids).logits
        return CausalLMOutput(F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), logits)


class KeepsLabelsOfADict(PassesLabelsOn):
    def forward(self, data):
        logits = self.lm(input_ids=data["input_ids"]).logits
        return CausalLMOutput(F.cross_entropy(logits[:, :-1].flatten(0, 1), data["labels"][:, 1:].flatten()), logits)


class HasAnotherNameForThem(PassesLabelsOn):
    def forward(self, tokens, labels):
        return self.lm(input_ids=tokens, labels=labels)


class AroundTheBackbone(nn.Module):
    """A head of the user's own on a model without one."""

    def __init__(self):
        super().__init__()
        self.lm = tiny_model("llama")

    def forward(self, input_ids, labels=None):
        logits = self.lm.lm_head(self.lm.model(input_ids=input_ids).last_hidden_state)
        return CausalLMOutput(F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), logits)


class Twice(nn.Module):
    """Two wrappers, the labels handed on through both."""

    def __init__(self):
        super().__init__()
        self.inner = PassesLabelsOn()

    def forward(self, input_ids, labels=None):
        return self.inner(input_ids=input_ids, labels=labels)


def call_of(kind, ids, labels):
    if kind in (PassesADict, KeepsLabelsOfADict):
        return {"data": {"input_ids": ids, "labels": labels}}
    return {"tokens" if kind is HasAnotherNameForThem else "input_ids": ids, "labels": labels}


WRAPPERS = [
    PassesLabelsOn,
    PassesThemByPosition,
    PassesADict,
    CallsForward,
    KeepsLabels,
    HasAnotherNameForThem,
    AroundTheBackbone,
    Twice,
]


def adapted(module, task_type=None, **settings):
    """A module with an adapter in it; with a task type by `inject_adapter_in_model`, as PEFT's own class for causal
    models wants a model that can generate.
    """
    settings = {"positions": "f1+l1", **settings}
    if task_type is None:
        return reft_model(module, **settings)
    config = ReftConfig(task_type=task_type, **settings)
    return randomize(inject_adapter_in_model(config, module)).eval()


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("kind", WRAPPERS, ids=lambda kind: kind.__name__)
def test_labels_through_a_module_of_the_users_own_are_used_or_the_user_is_told(kind, task_type):
    ids, labels = rows()
    name = "inner.lm.model.layers.0" if kind is Twice else "lm.model.layers.0"
    model = adapted(kind(), task_type)
    if kind in (KeepsLabels, AroundTheBackbone) and task_type is None:
        told = f"`labels` were passed to {kind.__name__}, a module around Llama.* that does not pass them on"
        assert_told(model, kind(), told, name, **call_of(kind, ids, labels))
    else:
        assert_right(model, kind(), [[0, PROMPT - 1]] * 2, name, **call_of(kind, ids, labels))


@pytest.mark.parametrize("kind", [PassesLabelsOn, PassesADict, Twice], ids=lambda kind: kind.__name__)
def test_labels_that_reach_the_language_model_itself_are_used(kind):
    ids, labels = rows()
    name = "inner.lm.model.layers.0" if kind is Twice else "lm.model.layers.0"
    model = adapted(kind())
    assert edited_columns(model, kind(), name, **call_of(kind, ids, labels)) == [[0, PROMPT - 1]] * 2


def test_labels_in_a_dict_that_the_language_model_never_sees_are_told_in_training():
    ids, labels = rows()
    model = adapted(KeepsLabelsOfADict()).train()
    try:
        told = warnings_of(lambda: model({"input_ids": ids, "labels": labels}))
    except ValueError as error:
        told = [str(error)]
    assert len(told) == 1


def test_labels_that_only_a_module_around_sees_raise_in_training_and_warn_once_otherwise():
    ids, labels = rows()
    model = adapted(KeepsLabels())
    told = warnings_of(lambda: [model(input_ids=ids, labels=labels) for _ in range(3)])
    assert len(told) == 1
    assert "labels" in told[0]
    model.train()
    with pytest.raises(ValueError, match=r"labels[\s\S]*(task_type|intervention_locations)"):
        model(input_ids=ids, labels=labels)


class HasAnotherNameAndKeepsThem(PassesLabelsOn):
    def forward(self, tokens, labels):
        return self.lm(input_ids=tokens)


@pytest.mark.parametrize(("task_type", "way_out"), [(None, "task_type"), ("CAUSAL_LM", "the name input_ids")])
def test_the_way_out_of_labels_that_are_not_handed_on_is_one_that_is_still_open(task_type, way_out):
    ids, labels = rows()
    model = adapted(HasAnotherNameAndKeepsThem(), task_type)
    (told,) = warnings_of(lambda: model(tokens=ids, labels=labels))
    assert [words for words in ("task_type", "the name input_ids") if words in told] == [way_out]


def test_a_labelled_forward_through_a_wrapper_is_the_same_twice():
    """What a call edits does not depend on the call before it."""
    ids, labels = rows()
    model, clean = adapted(PassesLabelsOn()), PassesLabelsOn()
    name = "lm.model.layers.0"
    plain = edited_columns(model, clean, name, input_ids=ids)
    assert plain == [[0, 9]] * 2
    edited_columns(model, clean, name, input_ids=ids, labels=labels)
    assert edited_columns(model, clean, name, input_ids=ids) == plain


class Classifies(nn.Module):
    """A head of classes on the language model's states: its labels are no tokens."""

    def __init__(self):
        super().__init__()
        self.lm = tiny_model("llama")
        torch.manual_seed(0)
        self.head = nn.Linear(HIDDEN, 3)

    def forward(self, input_ids, labels=None):
        logits = self.head(self.lm.model(input_ids=input_ids).last_hidden_state[:, -1])
        return CausalLMOutput(F.cross_entropy(logits, labels), logits)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
def test_labels_of_classes_are_no_tokens_and_not_a_word_is_said(task_type, training):
    ids, _ = rows()
    model = adapted(Classifies(), task_type).train(training)
    arguments = {"input_ids": ids, "labels": torch.tensor([0, 2])}
    assert warnings_of(lambda: model(**arguments)) == []
    assert edited_columns(model, Classifies(), "lm.model.layers.0", **arguments) == [[0, 9]] * 2


@pytest.mark.parametrize("task_type", ["SEQ_2_SEQ_LM", "TOKEN_CLS", None])
def test_labels_are_what_the_model_takes_them_for_whatever_the_task_is_said_to_be(task_type):
    ids, labels = rows()
    model = reft_model(tiny_model("llama"), positions="f1+l1", task_type=task_type)
    assert_right(model, tiny_model("llama"), [[0, PROMPT - 1]] * 2, input_ids=ids, labels=labels)
    classes = transformers.LlamaForTokenClassification._from_config(tiny_model("llama").config).eval()
    clean = copy.deepcopy(classes)
    model = reft_model(classes, positions="f1+l1", task_type="TOKEN_CLS")
    assert_right(model, clean, [[0, 9]] * 2, input_ids=ids, labels=labels.clamp(max=1))


def test_features_are_extracted_in_training_without_a_word():
    model = reft_model(tiny_model("llama"), positions="f1+l1", task_type="FEATURE_EXTRACTION").train()
    assert warnings_of(lambda: model(rows()[0])) == []


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("head", ["classifier", "masked"])
def test_labels_of_encoders_do_not_end_a_prompt(head, training):
    task_type = "SEQ_CLS" if head == "classifier" else None
    model = reft_model(tiny_model("bert", head), positions="f1+l1", task_type=task_type).train(training)
    inputs = batch(8, 5)
    labels = (
        torch.tensor([0, 1]) if head == "classifier" else inputs["input_ids"].masked_fill(torch.arange(8) < 3, -100)
    )
    assert warnings_of(lambda: model(**inputs, labels=labels)) == []
    found = edited_columns(model, tiny_model("bert", head), "bert.encoder.layer.0", **inputs, labels=labels)
    assert found == [[0, 7], [0, 4]]


# Labels of some columns only.


PARTIAL = {
    "of the last columns": lambda ids: {"labels": ids[:, -4:], "logits_to_keep": 4},
    "of all but the first": lambda ids: {"labels": ids[:, 1:], "logits_to_keep": 9},
    "shifted, of the last columns": lambda ids: {
        "shift_labels": ids[:, -4:].contiguous(),
        "labels": ids[:, -4:],
        "logits_to_keep": 4,
    },
}


@pytest.mark.parametrize("which", PARTIAL)
def test_labels_of_some_columns_raise_in_training_and_warn_once_otherwise(which):
    ids, _ = rows()
    model = reft_model(tiny_model("llama"), positions="f1+l1", task_type="CAUSAL_LM")
    told = warnings_of(lambda: [model(input_ids=ids, **PARTIAL[which](ids)) for _ in range(3)])
    assert len(told) == 1
    assert "labels" in told[0]
    assert "intervention_locations" in told[0]
    model.train()
    with pytest.raises(ValueError, match=r"labels[\s\S]*intervention_locations"):
        model(input_ids=ids, **PARTIAL[which](ids))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("which", PARTIAL)
def test_locations_are_used_beside_labels_that_cannot_be(which, training):
    ids, _ = rows()
    model = reft_model(tiny_model("llama"), positions="f1+l1", task_type="CAUSAL_LM").train(training)
    arguments = {
        "input_ids": ids,
        "intervention_locations": torch.tensor([[0, 4], [1, 3]]),
        **PARTIAL[which](ids),
    }
    assert warnings_of(lambda: model(**arguments)) == []
    assert edited_columns(model, tiny_model("llama"), **arguments) == [[0, 4], [1, 3]]


class Codebooks(nn.Module):
    """An audio model in small: several ids per column, as in CSM; labels have their shape."""

    def __init__(self):
        super().__init__()
        self.lm = tiny_model("llama")

    def forward(self, input_ids, labels=None):
        embeds = self.lm.get_input_embeddings()(input_ids).sum(2)
        logits = self.lm(inputs_embeds=embeds).logits
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:, 0].flatten())
        return CausalLMOutput(loss, logits)


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_labels_of_several_codebooks_that_a_model_keeps_are_told(task_type):
    ids = batch(10, 10)["input_ids"][..., None].repeat(1, 1, 3)
    labels = ids.masked_fill((torch.arange(10) < PROMPT)[:, None], -100)
    model = adapted(Codebooks(), task_type)
    told = "`labels` were passed to Codebooks, a module around LlamaForCausalLM that does not pass them on"
    assert_told(model, Codebooks(), told, "lm.model.layers.0", input_ids=ids, labels=labels)


# Labels that cover the prompt.


def covered():
    inputs = batch(10, 7)
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def test_labels_that_cover_the_prompt_warn_once_in_training_with_the_ways_out():
    model = reft_model(tiny_model("llama"), positions="f1+l1", task_type="CAUSAL_LM").train()
    told = warnings_of(lambda: [model(**covered()).loss.backward() for _ in range(4)])
    assert len(told) == 1
    for way_out in (
        "completion",
        "completion_only_loss",
        "assistant_only_loss",
        "prompt_end",
        "chat_prompt_end",
        "ReFT",
    ):
        assert way_out in told[0]
    assert re.search(r"\b0\b.*\b1\b", told[0])  # the numbers of the rows


def test_labels_that_cover_the_prompt_say_nothing_where_the_marker_ends_it():
    model = reft_model(tiny_model("llama"), positions="f1+l1", prompt_end=[7, 8], task_type="CAUSAL_LM").train()
    inputs = covered()
    inputs["input_ids"][:, 3:5] = torch.tensor([7, 8])
    inputs["labels"][:, 3:5] = torch.tensor([7, 8])
    assert warnings_of(lambda: model(**inputs).loss.backward()) == []
    assert edited_columns(model, tiny_model("llama"), **inputs) == [[0, 4]] * 2


# Labels that show several answers.


def of_two_turns():
    inputs = batch(10, 10)
    shown = (inputs["attention_mask"] == 1) & torch.tensor([column in (4, 5, 8, 9) for column in range(10)])
    return {**inputs, "labels": inputs["input_ids"].masked_fill(~shown, -100)}


@pytest.mark.parametrize("settings", [{"positions": "l1"}, {"positions": "all"}, {"prompt_end": [7, 8]}])
def test_labels_of_several_answers_warn_once_where_no_turns_are_chosen(settings):
    """Training edits the first answer's prompt, `generate` the end of all that it is given."""
    inputs = of_two_turns()
    inputs["labels"][1, 8:] = -100  # one answer
    model = reft_model(tiny_model("llama"), **{"positions": "f1+l1", **settings}, task_type="CAUSAL_LM").train()
    told = warnings_of(lambda: [model(**inputs).loss.backward() for _ in range(4)])
    assert len(told) == 1
    assert "show several answers" in told[0]
    assert 'turns="all", prompt_end=chat_prompt_end(tokenizer)' in told[0]


@pytest.mark.parametrize("settings", [{"turns": "first"}, {"turns": "last"}, {"turns": "all"}, {"positions": "f2"}])
def test_labels_of_several_answers_say_nothing_where_turns_are_chosen_or_make_no_difference(settings):
    model = reft_model(tiny_model("llama"), **{"positions": "f1+l1", **settings}, task_type="CAUSAL_LM").train()
    assert warnings_of(lambda: model(**of_two_turns()).loss.backward()) == []


def test_packed_documents_of_one_answer_each_are_no_several_answers():
    model = reft_model(tiny_model("llama"), positions="f1+l1", task_type="CAUSAL_LM").train()
    ids = batch(10)["input_ids"]
    labels = ids.masked_fill(torch.tensor([column not in (3, 4, 8, 9) for column in range(10)]), -100)
    documents = {"position_ids": torch.arange(5).repeat(2)[None]}
    assert warnings_of(lambda: model(input_ids=ids, labels=labels, **documents).loss.backward()) == []
    assert edited_columns(model, tiny_model("llama"), input_ids=ids, labels=labels, **documents) == [[0, 2, 5, 7]]


def test_labels_that_show_a_prompt_say_nothing():
    model = reft_model(tiny_model("llama"), positions="f1+l1", task_type="CAUSAL_LM").train()
    ids, labels = rows()
    assert warnings_of(lambda: model(input_ids=ids, labels=labels).loss.backward()) == []


def test_a_users_plain_forward_of_a_prompt_is_told_nothing():
    model = reft_model(tiny_model("llama"), positions="f1+l1", task_type="CAUSAL_LM")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", UserWarning)
        model(**batch(10, 7))
        model(input_ids=batch(6)["input_ids"])
        model.get_base_model().forward(**batch(5, 7))
        model.generate(**batch(5, 7, side="left"), max_new_tokens=2)


def test_a_training_forward_without_labels_is_told_once_through_a_wrapper_too():
    class TakesTargets(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm = tiny_model("llama")

        def forward(self, x):
            return self.lm(input_ids=x).logits

    model = adapted(TakesTargets()).train()
    told = warnings_of(lambda: [model(x=batch(6)["input_ids"]) for _ in range(3)])
    assert len(told) == 1
    assert "ReftDataCollator" in told[0] or "intervention_locations" in told[0]


def test_the_same_call_gives_the_same_logits_after_a_call_with_labels():
    model = reft_model(tiny_model("llama"), positions="f1+l1", task_type="CAUSAL_LM")
    ids, labels = rows()
    with torch.no_grad():
        first = model(input_ids=ids, use_cache=False).logits
        labelled = model(input_ids=ids, labels=labels).logits
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, first)
        assert torch.equal(model(input_ids=ids.clone(), use_cache=False).logits, first)
    assert (labelled - first).abs().max() > 1e-3


def test_a_decoder_that_takes_its_ids_under_another_name_has_a_prompt_of_one_token():
    """SpeechT5's encoder takes sounds as `input_values`, and its decoder takes ids under the same name."""
    torch.manual_seed(0)
    clean = transformers.SpeechT5ForSpeechToText(architectures.tiny_config("speecht5")).eval()
    config = ReftConfig(positions="f1+l1+d2", exclude_modules=r".*encoder\..*")
    model = randomize(get_peft_model(copy.deepcopy(clean), config).eval())
    inputs = {"input_values": torch.randn(2, 4000), "labels": torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])}
    decoder = "speecht5.decoder.wrapped_decoder.layers.0"
    assert edited_columns(model, clean, decoder, **inputs) == [[0, 2], [0, 2]]
    del inputs["labels"]
    inputs |= {"decoder_input_ids": torch.tensor([[2, 5, 6]] * 2), "do_sample": False, "max_new_tokens": 3}
    for use_cache, expected in ((True, [[[0, 2]], [[]], [[0]]]), (False, [[[0, 2]], [[0, 2]], [[0, 2, 4]]])):
        with spied(model, clean, decoder) as calls:
            model.generate(**inputs, min_new_tokens=3, use_cache=use_cache)
        assert calls == [[columns[0]] * 2 for columns in expected]
