"""The hidden state in what a block returns."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from peft_reft.blocks import edit_hidden_state

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
