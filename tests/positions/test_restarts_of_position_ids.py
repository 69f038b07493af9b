"""`position_ids` that restart make documents where the base model separates them, and nowhere else."""

import pytest
import torch
from conftest import batch, logits, reft_model, tiny_model
from edit_spy import edited_columns

from peft_reft.positions import document_starts

LENGTHS = (5, 4)
RESTARTED = torch.cat([torch.arange(n) for n in LENGTHS])[None]


def family(**settings):
    return reft_model(tiny_model("llama"), positions="f1+l1", task_type="CAUSAL_LM", **settings)


def separated(**arguments) -> bool:
    """Whether the base model keeps the second part of the row from seeing the first."""
    clean, ids = tiny_model("llama"), batch(9)["input_ids"]
    whole = logits(clean, {"input_ids": ids, "position_ids": RESTARTED}, use_cache=False, **arguments)
    alone = logits(clean, {"input_ids": ids[:, 5:]}, use_cache=False)
    return torch.allclose(whole[:, 5:], alone, atol=1e-4)


def test_without_a_mask_they_are_documents():
    assert separated()
    found = edited_columns(
        family(), tiny_model("llama"), input_ids=batch(9)["input_ids"], position_ids=RESTARTED, use_cache=False
    )
    assert found == [[0, 4, 5, 8]]


@pytest.mark.parametrize(("axes", "begins"), [(4, [0, 5]), (3, None)], ids=["with the text's own", "of images alone"])
def test_of_several_axes_the_first_of_four_are_the_texts(axes, begins):
    """Models of images and video: time, height and width, and before them the text's."""
    position_ids = torch.cat([RESTARTED[None], torch.zeros(axes - 1, 1, 9, dtype=torch.long)])
    starts, _ = document_starts(torch.ones(1, 9, dtype=torch.bool), position_ids)
    assert (None if starts is None else starts[0].nonzero().flatten().tolist()) == begins


@pytest.mark.parametrize("labelled", [False, True])
def test_with_a_mask_the_row_is_one_document(labelled):
    """transformers looks at position_ids only where there is no mask, so that the parts see each other."""
    mask, ids = torch.ones(1, 9, dtype=torch.long), batch(9)["input_ids"]
    assert not separated(attention_mask=mask)
    labels = ids.masked_fill(torch.arange(9) < 7, -100) if labelled else None
    found = edited_columns(
        family(),
        tiny_model("llama"),
        input_ids=ids,
        attention_mask=mask,
        position_ids=RESTARTED,
        labels=labels,
        use_cache=False,
    )
    assert found == ([[0, 6]] if labelled else [[0, 8]])


def test_with_a_mask_and_labels_of_both_parts_the_first_answer_ends_the_prompt():
    mask, ids = torch.ones(1, 9, dtype=torch.long), batch(9)["input_ids"]
    answers = torch.tensor([[0, 0, 0, 1, 1, 0, 0, 1, 1]]).bool()
    arguments = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": RESTARTED,
        "labels": ids.masked_fill(~answers, -100),
        "use_cache": False,
    }
    assert edited_columns(family(), tiny_model("llama"), **arguments) == [[0, 2]]


@pytest.mark.parametrize("name", ["positions that go down", "positions that stay"])
def test_positions_of_a_padded_row_that_do_not_go_up_are_no_documents(name):
    """Some trainers give every token of an image, or of a shared prefix, the same position."""
    mask, ids = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1]]), batch(9)["input_ids"]
    position_ids = {
        "positions that go down": [[0, 0, 0, 1, 2, 3, 1, 2, 3]],
        "positions that stay": [[0, 0, 0, 1, 1, 1, 2, 3, 4]],
    }[name]
    found = edited_columns(
        family(),
        tiny_model("llama"),
        input_ids=ids,
        attention_mask=mask,
        position_ids=torch.tensor(position_ids),
        use_cache=False,
    )
    assert found == [[2, 8]]
