"""Prompts that a marker ends, and conversations of several turns, in a model."""

import warnings

import pytest
import torch
from conftest import batch, logits, reft_model, tiny_model
from peft import PeftModel
from transformers import default_data_collator

from peft_reft import ReftConfig, ReftDataCollator

MARKER = [7, 8]


def family(**settings):
    return reft_model(
        tiny_model("llama", eos_token_id=None), task_type="CAUSAL_LM", **{"positions": "f1+l1", **settings}
    )


def conversation(*columns):
    """A row of ten tokens in which the marker ends at the given columns."""
    ids = batch(10)["input_ids"].clamp(min=9)
    for column in columns:
        ids[0, column - 1 : column + 1] = torch.tensor(MARKER)
    return ids


def assert_edits(model, inputs, columns, **kwargs):
    got = logits(model, inputs, **kwargs)
    locations = torch.tensor(columns)[None]
    torch.testing.assert_close(got, logits(model, inputs, intervention_locations=locations))
    with model.disable_adapter():
        assert (logits(model, inputs) - got).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("turns", "columns"), [(None, [0, 6]), ("last", [0, 6]), ("first", [0, 2]), ("all", [0, 2, 6])]
)
def test_a_marker_ends_the_prompt_of_a_forward_without_labels(turns, columns):
    model = family(prompt_end=MARKER, turns=turns)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert_edits(model, {"input_ids": conversation(2, 6)}, columns)


@pytest.mark.parametrize(
    ("turns", "columns"), [(None, [0, 2]), ("first", [0, 2]), ("last", [0, 6]), ("all", [0, 2, 6])]
)
def test_labels_show_the_same_turns(turns, columns):
    model = family(turns=turns)
    ids = conversation()
    labels = torch.full_like(ids, -100)
    labels[0, 3:5] = ids[0, 3:5]
    labels[0, 7:] = ids[0, 7:]
    assert_edits(model, {"input_ids": ids}, columns, labels=labels)


def test_labels_win_over_a_marker_and_locations_over_both():
    model = family(prompt_end=MARKER)
    ids = conversation(2, 6)
    labels = torch.where(torch.arange(10) < 5, -100, ids)
    assert_edits(model, {"input_ids": ids}, [0, 4], labels=labels)
    got = logits(model, {"input_ids": ids}, labels=labels, intervention_locations=torch.tensor([[3]]))
    torch.testing.assert_close(got, logits(family(), {"input_ids": ids}, intervention_locations=torch.tensor([[3]])))


@pytest.mark.parametrize("masked", [0, 1])
@pytest.mark.parametrize(("turns", "column"), [(None, 6), ("last", 6), ("first", 2)])
def test_labels_that_cover_the_prompt_leave_its_end_to_the_marker(masked, turns, column):
    """As where labels are a copy of the tokens: training edits what generation from the prompt will edit."""
    model = family(prompt_end=MARKER, turns=turns)
    ids = conversation(2, 6)
    labels = ids.masked_fill(torch.arange(10) < masked, -100)
    assert_edits(model, {"input_ids": ids}, [0, column], labels=labels)
    got = logits(model, {"input_ids": conversation()}, labels=labels)  # no marker: the first token is the prompt
    torch.testing.assert_close(
        got, logits(model, {"input_ids": conversation()}, intervention_locations=torch.tensor([[0]]))
    )
    batch = ReftDataCollator(default_data_collator, ReftConfig(positions="f1+l1", prompt_end=MARKER, turns=turns))(
        [{"input_ids": ids[0], "labels": labels[0]}]
    )
    assert batch["intervention_locations"].flatten().tolist() == [0, column]


def test_labels_that_show_a_prompt_are_believed_and_the_marker_is_not_looked_at():
    """The shortest prompt that labels can show has two tokens: the first token is never predicted."""
    model, ids = family(prompt_end=MARKER), conversation(2, 6)
    labels = ids.masked_fill(torch.arange(10) < 2, -100)
    assert_edits(model, {"input_ids": ids}, [0, 1], labels=labels)
    batch = ReftDataCollator(default_data_collator, ReftConfig(positions="f1+l1", prompt_end=MARKER))(
        [{"input_ids": ids[0], "labels": labels[0]}]
    )
    assert batch["intervention_locations"].flatten().tolist() == [0, 1]


def test_a_row_without_the_marker_warns_once_and_is_all_prompt():
    model = family(prompt_end=MARKER)
    with pytest.warns(UserWarning, match=r"without the marker prompt_end=\[7, 8\]"):
        assert_edits(model, {"input_ids": conversation()}, [0, 9])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        logits(model, {"input_ids": conversation()})


def test_generate_takes_what_it_was_given_for_the_prompt():
    ids = conversation(2, 6)
    settings = {"max_new_tokens": 4, "do_sample": False}
    plain, marked = family(), family(prompt_end=MARKER)
    expected = plain.generate(input_ids=ids, **settings)
    assert torch.equal(marked.generate(input_ids=ids, **settings), expected)
    first = family(prompt_end=MARKER, turns="first")
    by_hand = plain.generate(input_ids=ids, intervention_locations=torch.tensor([[0, 2]]), **settings)
    assert torch.equal(first.generate(input_ids=ids, **settings), by_hand)
    assert not torch.equal(by_hand, expected)


@pytest.mark.parametrize("settings", [{}, {"use_cache": False}, {"num_beams": 2}, {"prefill_chunk_size": 3}], ids=str)
def test_turns_are_found_in_the_padded_rows_that_generate_is_given(settings):
    ids = torch.nn.functional.pad(conversation(2, 6), (2, 0))
    mask = torch.ones_like(ids)
    mask[:, :2] = 0
    given = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 4, "do_sample": False, **settings}
    model = family(prompt_end=MARKER, turns="all")
    by_hand = family().generate(intervention_locations=torch.tensor([[2, 4, 8, 11]]), **given)
    assert torch.equal(model.generate(**given), by_hand)
    assert not torch.equal(family().generate(**given), by_hand)


def test_a_marker_survives_saving(tmp_path):
    model = family(prompt_end=MARKER, turns="first")
    inputs = {"input_ids": conversation(2, 6)}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama", eos_token_id=None), tmp_path)
    torch.testing.assert_close(logits(loaded, inputs), logits(model, inputs))
    assert (logits(family(), inputs) - logits(model, inputs)).abs().max() > 1e-3


def test_a_marker_in_words_needs_a_tokenizer_and_says_so():
    with pytest.raises(ValueError, match=r"prompt_end='<\|assistant\|>' needs the tokenizer.*tokenizer.encode"):
        family(prompt_end="<|assistant|>")


@pytest.mark.parametrize("bad", [[], "", ["a"], 7])
def test_a_marker_that_marks_nothing_is_refused(bad):
    with pytest.raises(ValueError, match="marks nothing"):
        ReftConfig(prompt_end=bad)


def test_an_unknown_choice_of_turns_is_refused():
    with pytest.raises(ValueError, match="turns='middle' must be 'first'"):
        ReftConfig(turns="middle")
