"""A masked column anywhere in a row changes nothing: places count over tokens."""

import random

import pytest
import torch
from conftest import batch, logits, reft_model, tiny_model
from edit_spy import edited_columns
from slow_places import Adapters, places

from peft_reft import ReftConfig

MARKER = [7, 8]
POSITIONS = ("l1", "f1+l2", "l1+d2", "d", "f2+m1", "e2+d", "all+d3")
TURNS = (None, "first", "last", "all")


def with_holes(tokens: list[int], labels: list[int], holes: list[int], filling: int = 0):
    """A row in which each of `holes` is a number of tokens before which a masked column lies; -100 is its label."""
    ids, mask, answer = [], [], []
    for place in range(len(tokens) + 1):
        for _ in range(holes.count(place)):
            ids.append(filling), mask.append(0), answer.append(-100)
        if place < len(tokens):
            ids.append(tokens[place]), mask.append(1), answer.append(labels[place])
    mask_tensor = torch.tensor([mask])
    return {
        "input_ids": torch.tensor([ids]),
        "attention_mask": mask_tensor,
        "position_ids": (mask_tensor.cumsum(1) - 1).clamp(min=0),
        "labels": torch.tensor([answer]),
    }


HOLES = {
    "before the answer": [3],
    "inside the answer": [5],
    "inside the prompt": [1],
    "two before the answer": [3, 3],
    "everywhere": [1, 3, 5, 6, 8],
    "behind the first token": [1, 1],
    "before a second turn": [5],
    "before a second answer": [7],
}
ONE_ANSWER = [-100] * 3 + [1] * 7
TWO_ANSWERS = [-100] * 3 + [1] * 2 + [-100] * 2 + [1] * 3


@pytest.mark.parametrize("answers", [ONE_ANSWER, TWO_ANSWERS], ids=["one answer", "two answers"])
@pytest.mark.parametrize("holes", HOLES)
@pytest.mark.parametrize("turns", TURNS)
def test_a_row_with_holes_gives_the_logits_of_the_row_without(turns, holes, answers):
    tokens = batch(10, seed=2)["input_ids"][0].tolist()
    labels = [token if answer == 1 else -100 for token, answer in zip(tokens, answers)]
    for positions in POSITIONS:
        model = reft_model(tiny_model("llama"), positions=positions, turns=turns, task_type="CAUSAL_LM")
        dense, holed = with_holes(tokens, labels, []), with_holes(tokens, labels, HOLES[holes])
        expected = logits(model, dense)
        got = logits(model, holed)[:, holed["attention_mask"][0].bool()]
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4, msg=lambda m, p=positions: f"{p}: {m}")
        with model.disable_adapter():
            assert (logits(model, dense) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("seed", range(6))
def test_random_holes_against_the_slow_loop(seed, turns):
    """Labels and markers anywhere, holes that hold any token and any label."""
    draw = random.Random(f"{seed} {turns}")
    for positions in draw.sample(POSITIONS, 3):
        config = {"positions": positions, "turns": turns, "prompt_end": draw.choice([None, MARKER]), "r": 2}
        model = reft_model(tiny_model("llama"), task_type="CAUSAL_LM", **config)
        n = draw.randint(4, 12)
        ids = torch.tensor([[draw.choice([7, 8, *range(9, 20)]) for _ in range(n)] for _ in range(3)])
        mask = torch.tensor([[int(draw.random() > 0.25) for _ in range(n)] for _ in range(3)])
        mask[:, draw.randrange(n)] = 1
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        if draw.random() < 0.7:
            inputs["labels"] = ids.masked_fill(torch.rand(3, n) < 0.5, -100)
        got = logits(model, inputs)
        adapters = Adapters(model)
        expected = adapters.forward(tiny_model("llama"), ["default"] * 3, inputs)
        for row in range(3):
            own = mask[row].bool()
            message = f"row {row} of {inputs}, {config}"
            torch.testing.assert_close(
                got[row, own], expected[row, own], rtol=1e-3, atol=1e-4, msg=lambda m, t=message: f"{t}\n{m}"
            )


MARKED = {
    "a hole inside the marker": ([3, 4, 7, 0, 8, 5, 6], [1, 1, 1, 0, 1, 1, 1], [0, 4]),
    "a hole behind the marker": ([3, 4, 7, 8, 0, 5, 6], [1, 1, 1, 1, 0, 1, 1], [0, 3]),
    "a marker that padding completes": ([3, 7, 8, 4, 7, 8, 6], [1, 1, 1, 1, 1, 0, 1], [0, 2]),
    "a marker made of padding": ([3, 7, 8, 4, 7, 8, 6], [1, 1, 1, 1, 0, 0, 1], [0, 2]),
    "padding equal to the marker's end": ([8, 8, 3, 7, 8, 5, 6], [0, 0, 1, 1, 1, 1, 1], [2, 4]),
    "padding equal to the marker behind": ([3, 7, 8, 5, 6, 7, 8], [1, 1, 1, 1, 1, 0, 0], [0, 2]),
}


@pytest.mark.parametrize("case", MARKED)
def test_a_marker_is_read_in_the_tokens_and_never_in_padding(case):
    ids, mask, expected = MARKED[case]
    model = reft_model(tiny_model("llama"), positions="f1+l1", prompt_end=MARKER, task_type="CAUSAL_LM")
    found = edited_columns(
        model, tiny_model("llama"), input_ids=torch.tensor([ids]), attention_mask=torch.tensor([mask])
    )
    assert found == [expected]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_the_markers_own_id_is_no_marker(side):
    """A pad id may be the end of a turn: then rows of a batch hold it as padding."""
    model = reft_model(tiny_model("llama"), positions="l1", prompt_end=[8], task_type="CAUSAL_LM")
    ids, mask = torch.tensor([[3, 4, 8, 5, 6], [3, 8, 4, 8, 8]]), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    expected = [[2], [1]]
    if side == "left":
        ids[1], mask[1], expected[1] = ids[1].roll(2), mask[1].roll(2), [3]
    assert edited_columns(model, tiny_model("llama"), input_ids=ids, attention_mask=mask) == expected


def test_the_slow_loop_itself():
    """The oracle's own values, by hand."""
    config = ReftConfig(positions="f1+l1+d2", share_weights=False, task_type="CAUSAL_LM")
    valid, labels = [1, 1, 0, 1, 1, 0, 1, 1], [-100, -100, -100, -100, 5, -100, 5, 5]
    assert places(config, valid, labels) == [[0], [3], [6]]
    config.turns = "all"
    assert places(config, [1] * 8, [-100, -100, 5, 5, -100, -100, 5, 5]) == [[0], [1, 5], [7]]
    config.turns, config.prompt_end = None, [7]
    assert places(config, [1] * 5, None, [3, 7, 4, 5, 6]) == [[0], [1], [3]]
