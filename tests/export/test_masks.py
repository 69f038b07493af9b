"""The edit mask: every term and way of sharing, against loops over single tokens, and against the package itself."""

import pytest
import torch
from conftest import batch, reft_model, tiny_model
from slow_places import named_tokens, split_by_position, terms_of

from peft_reft.export import edit_mask

POSITIONS = ["f2", "l3", "f2+l1", "f1+l3", "m2", "e2", "all", "d", "d2", "f2+m1+l2+e3+d2", "all+d3", "l1+d"]


def slow_mask(positions: str, row: list[int], prompt: int, share_weights) -> list[list[float]]:
    """Per column and group: 1.0 where it is edited, by a loop over tokens.

    Args:
        row: 1 for tokens, 0 for padding.
        prompt: tokens of the prompt; those behind it are generated.
    """
    columns = [column for column, is_token in enumerate(row) if is_token]
    groups = named_tokens(positions, prompt)
    for number, (kind, step) in enumerate(terms_of(positions)):
        if kind == "d":
            behind = range(prompt, len(columns))
            groups[number] = [token for token in behind if (token - prompt + 1) % step == 0]
    if share_weights == "position":
        groups = split_by_position(positions, groups, prompt)
    elif share_weights is True:
        groups = [sorted(token for group in groups for token in group)]
    mask = [[0.0] * len(groups) for _ in row]
    for number, group in enumerate(groups):
        for token in group:
            mask[columns[token]][number] = 1.0
    return mask


@pytest.mark.parametrize("share_weights", [False, True])
@pytest.mark.parametrize("positions", POSITIONS)
def test_every_term_is_where_a_loop_over_tokens_finds_it(positions, share_weights):
    rows = [[1] * 9, [0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0, 0], [1, 0, 1, 1, 0, 1, 1, 1, 1]]
    for generated in (0, 1, 4):
        got = edit_mask(positions, torch.tensor(rows), generated=generated, share_weights=share_weights)
        expected = [slow_mask(positions, row, sum(row) - generated, share_weights) for row in rows]
        assert got.tolist() == expected


@pytest.mark.parametrize("length", range(1, 8))
def test_a_group_per_position_also_in_prompts_that_are_too_short(length):
    got = edit_mask("f2+m1+l2", prompt_length=length, share_weights="position")
    assert got.tolist() == [slow_mask("f2+m1+l2", [1] * length, length, "position")]


@pytest.mark.parametrize("positions", POSITIONS)
def test_a_decode_step_alone_is_the_last_column_of_the_row(positions):
    for step in range(1, 7):
        whole = edit_mask(positions, prompt_length=5, generated=step)
        assert torch.equal(edit_mask(positions, generated=step), whole[:, -1:])


def test_a_prompt_of_the_callers_own_length_ends_where_he_says():
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    got = edit_mask("l1+d", mask, prompt_length=[2, 3])
    assert got.tolist() == [slow_mask("l1+d", row, n, False) for row, n in zip(mask.tolist(), (2, 3))]
    assert got.tolist() != [slow_mask("l1+d", row, n, False) for row, n in zip(mask.tolist(), (3, 3))]


@pytest.mark.parametrize("share_weights", [False, True])
@pytest.mark.parametrize("positions", ["f2+l1", "m2+e3", "all+d3", "d2", "f2+m1+l2+e3+d2"])
def test_it_names_the_tokens_that_the_package_edits_in_prompts_and_answers(positions, share_weights):
    base = tiny_model("llama", num_hidden_layers=1)
    base.generation_config.eos_token_id = None
    model = reft_model(base, positions=positions, share_weights=share_weights, task_type="CAUSAL_LM")
    inputs, new = batch(7, 3, side="left"), 7
    states = []
    handle = model.get_base_model().model.layers[0].register_forward_hook(lambda block, args, h: states.append(h))
    with torch.no_grad(), handle:
        row = model.generate(**inputs, max_new_tokens=new, do_sample=False)[:, :-1]  # the last token is not run
        edited, states = torch.cat(states, dim=1), []
        mask = torch.cat((inputs["attention_mask"], torch.ones(2, new - 1, dtype=torch.long)), dim=1)
        with model.disable_adapter():
            model(input_ids=row, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    moved = (edited - states[0]).abs().amax(-1) > 1e-5
    expected = edit_mask(positions, mask, generated=new - 1, share_weights=share_weights).any(-1)
    assert torch.equal(moved, expected) and expected.any()


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"positions": "f2"}, "how long the rows are"),
        ({"positions": "l2+f2", "prompt_length": 3}, "Did you mean 'f2\\+l2'"),
        ({"positions": "f2", "prompt_length": 3, "generated": -1}, "generated=-1"),
        ({"positions": "f2", "prompt_length": [3, 4]}, "pass the attention_mask"),
        ({"positions": "f2", "prompt_length": 2.5}, "prompt_length=2.5"),
        ({"positions": "f2", "attention_mask": torch.ones(1, 3), "prompt_length": 5}, "Row 0 .* has 3 tokens"),
        ({"positions": "f2", "attention_mask": torch.ones(2, 3), "generated": 3}, "a prompt of at least one"),
        ({"positions": "f2", "attention_mask": torch.ones(1, 4), "prompt_length": 2, "generated": 1}, "Row 0"),
        ({"positions": "f2", "attention_mask": torch.ones(3)}, r"shape \(3,\)"),
        ({"positions": "f2", "attention_mask": [[1, 1]]}, "must be a tensor"),
        ({"positions": "f2", "attention_mask": torch.ones(2, 3), "prompt_length": [1, 2, 3]}, "3 entries, .* 2 rows"),
        ({"positions": "f2", "prompt_length": 0}, "above 0"),
        ({"positions": "f2", "prompt_length": [-1]}, "above 0"),
        ({"positions": "all", "prompt_length": 3, "share_weights": "position"}, "share_weights='position'"),
        ({"positions": "f2", "prompt_length": 3, "share_weights": "term"}, "share_weights='term'"),
    ],
)
def test_lengths_that_rows_do_not_have_are_refused(arguments, what):
    with pytest.raises(ValueError, match=what):
        edit_mask(**arguments)
