"""The edited tokens of an engine's step and the keys of its cached blocks, compared with loops over single tokens."""

from types import SimpleNamespace

import numpy as np
import pytest
import slow_places

from peft_reft.integrations.vllm.keys import block_keys
from peft_reft.integrations.vllm.requests import wishes_of
from peft_reft.integrations.vllm.rule import RequestEdits, Rule
from peft_reft.integrations.vllm.step import edited_tokens
from peft_reft.positions import parse_positions

POSITIONS = ["f1", "l1", "f2+l3", "f1+l2+d", "m3", "f1+m2+l1", "e4", "e3+d2", "l2+d", "d3", "all", "all+d2"]
LORA = ("lora", "name", "path")


def rule_of(positions: str, share=True, turns=None, prompt_end=()) -> Rule:
    return Rule(parse_positions(positions, turns, prompt_end), share)


def expected(positions: str, share, length: int, total: int) -> list[int]:
    """The intervention of each token of a request, by the slow reference; -1 for none."""
    config = SimpleNamespace(positions=positions, share_weights=share)
    groups = slow_places.places_in_generate(config, length, total)
    found = [-1] * total
    for number, columns in enumerate(groups):
        for column in columns:
            found[column] = 0 if share is True else number
    return found


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 13])
def test_every_token_has_the_intervention_that_the_loop_finds(positions, share, length):
    edits = RequestEdits(rule_of(positions, share), length)
    wanted = expected(positions, share, length, length + 7)
    assert edits.interventions(0, length + 7).tolist() == wanted
    for start in range(length + 7):  # any piece of it is the same
        assert edits.interventions(start, length + 7).tolist() == wanted[start:]
        if not edits.may_edit(start):
            assert set(wanted[start:]) <= {-1}


@pytest.mark.parametrize("positions", ["f2+l3", "m3", "f1+m2+l2"])
@pytest.mark.parametrize("length", [1, 3, 6, 11])
def test_weights_of_single_positions(positions, length):
    edits = RequestEdits(rule_of(positions, "position"), length)
    assert edits.interventions(0, length + 3).tolist() == expected(positions, "position", length, length + 3)


def cut(total: int, draw: np.random.Generator) -> list[tuple[int, int]]:
    """A request's tokens in pieces of one to four."""
    pieces, at = [], 0
    while at < total:
        size = min(int(draw.integers(1, 5)), total - at)
        pieces.append((at, size))
        at += size
    return pieces


def test_steps_of_many_requests_in_pieces_edit_each_token_once_and_rightly():
    draw = np.random.default_rng(0)
    requests = []  # edits or None, the true interventions, pieces
    for number in range(60):
        length, positions = int(draw.integers(1, 12)), POSITIONS[number % len(POSITIONS)]
        share = bool(number % 2)
        pieces = cut(length + 5, draw)
        if number % 7 == 0:
            requests.append((None, [-1] * (length + 5), pieces))
        else:
            truth = expected(positions, share, length, length + 5)
            requests.append((RequestEdits(rule_of(positions, share), length), truth, pieces))
    steps = 0
    while any(pieces for *_, pieces in requests):
        waiting = [number for number, (*_, pieces) in enumerate(requests) if pieces]
        batch = draw.permutation(waiting)[:9].tolist()  # an engine's order is its own
        now = [requests[number][2].pop(0) for number in batch]
        found = edited_tokens(
            [requests[number][0] for number in batch],
            np.array([at for at, _ in now]),
            np.array([n for _, n in now], np.int32),
        )
        row, owner = [], []
        for place, (number, (at, size)) in enumerate(zip(batch, now)):
            row += requests[number][1][at : at + size]
            owner += [place] * size
        wanted = [token for token, intervention in enumerate(row) if intervention >= 0]
        assert found.token.tolist() == wanted
        assert found.intervention.tolist() == [row[token] for token in wanted]
        assert found.request.tolist() == [owner[token] for token in wanted]
        steps += 1
    assert steps > 10


def test_turns_are_found_in_the_prompts_tokens():
    tokens = [5, 9, 9, 1, 7, 2, 5, 9, 1, 7, 3, 4]  # the marker 9 1 ends two turns, the given tokens a third
    edits = RequestEdits(rule_of("l2", turns="all", prompt_end=(9, 1)), len(tokens), tokens=tokens)
    assert np.flatnonzero(edits.interventions(0, 15) >= 0).tolist() == [2, 3, 7, 8, 10, 11]
    assert np.flatnonzero(edits.interventions(8, 15) >= 0).tolist() == [0, 2, 3]
    first = RequestEdits(rule_of("l2", turns="first", prompt_end=(9, 1)), len(tokens), tokens=tokens)
    assert np.flatnonzero(first.interventions(0, 15) >= 0).tolist() == [2, 3]
    step = edited_tokens([None, edits], np.array([3, 6]), np.array([2, 4]))
    assert (step.token.tolist(), step.request.tolist()) == ([3, 4], [1, 1])
    with pytest.raises(ValueError, match="given as embeddings"):
        RequestEdits(rule_of("l2", turns="all", prompt_end=(9, 1)), 12)


@pytest.mark.parametrize("positions", ["l3", "f2+l3", "m2", "e4+d2", "all"])
@pytest.mark.parametrize("share", [True, False])
def test_blocks_have_one_key_exactly_where_their_states_are_the_same(positions, share):
    """Of two prompts that begin alike: a block's keys, with all before it, are equal if and only if the same tokens up
    to its end are edited by the same interventions.
    """
    size = 4
    rule = rule_of(positions, share)
    same = 0
    for one in range(1, 14):
        for other in range(one, 14):
            for stop in range(size, one + 1, size):  # the tokens that both prompts have
                chains = [
                    [
                        block_keys((LORA,), RequestEdits(rule, n), 1, start, start + size)
                        for start in range(0, stop, size)
                    ]
                    for n in (one, other)
                ]
                edits = [expected(positions, share, n, n)[:stop] for n in (one, other)]
                assert (chains[0] == chains[1]) == (edits[0] == edits[1]), (one, other, stop)
                same += edits[0] == edits[1]
    assert same


def test_blocks_before_the_first_edit_are_named_like_the_base_models():
    edits = RequestEdits(rule_of("l1"), 10)
    keys = [block_keys((LORA, ("mm", "image", 3)), edits, "v", start, start + 4) for start in (0, 4, 8, 12)]
    assert keys[0] == keys[1] == keys[3] == (("mm", "image", 3),)
    assert keys[2][:2] == (LORA, ("mm", "image", 3)) and keys[2][2][0] == "reft"
    assert block_keys((LORA,), edits, "v", 0, 4) is None


def test_strength_version_and_intervention_enter_the_key_of_an_edited_block():
    rule = rule_of("f1+l1", share=False)
    plain = block_keys((LORA,), RequestEdits(rule, 8), "v", 0, 4)
    assert plain == block_keys((LORA,), RequestEdits(rule, 9), "v", 0, 4)
    others = [
        block_keys((LORA,), RequestEdits(rule, 8, 0.5), "v", 0, 4),
        block_keys((LORA,), RequestEdits(rule, 8), "w", 0, 4),
        block_keys((LORA,), RequestEdits(rule_of("f1"), 8), "w", 1, 5),
        block_keys((("lora", "other", "path"),), RequestEdits(rule, 8), "v", 0, 4),
    ]
    assert plain not in others


def test_what_a_request_says():
    assert wishes_of(None) == wishes_of({"other": "thing"}) == (1.0, None)
    assert wishes_of({"reft_strength": 2, "reft_prompt_length": 7}) == (2.0, 7)
    with pytest.raises(ValueError, match=r"reft_strength='0\.5' is not a strength"):
        wishes_of({"reft_strength": "0.5"})
    with pytest.raises(ValueError, match="nan is not a strength"):
        wishes_of({"reft_strength": float("nan")})
    with pytest.raises(ValueError, match="'reft_strenght' is no argument"):
        wishes_of({"reft_strenght": 0.5})
    with pytest.raises(ValueError, match="reft_prompt_length=0 is not a number of tokens"):
        wishes_of({"reft_prompt_length": 0})
