"""The "f7+l7" notation, and the arithmetic from prompts to columns, against a slow loop."""

import dataclasses
import math
import random
import re

import pytest
import reference
import torch

from peft_reft import ReftConfig
from peft_reft.positions import GRAMMAR, find_prompts, locate, mark, parse_positions, places_at, places_of
from peft_reft.positions.terms import TERMS

FURTHER = ["m1", "m3", "e1", "e3", "f2+m3", "m2+l2", "f2+m2+l2", "e2+l1", "f1+e2", "f2+e3+l2", "l2+e2"]


def named_tokens(positions: str, n: int) -> list[list[int]]:
    """For each term, the prompt's tokens it names, counted from 0: every rule as a loop over the tokens."""
    terms = positions.split("+")
    ends = "+".join(term for term in terms if term[0] in "fl" or term == "all")
    at_ends = dict(zip(ends.split("+"), reference.select(ends, n))) if ends else {}
    groups: list[list[int]] = []
    for term in terms:
        if term in at_ends:
            group = at_ends[term]
        elif term[0] == "m":
            first = max(0, (n - int(term[1:])) // 2)
            group = [token for token in range(n) if first <= token < first + int(term[1:])]
        elif term[0] == "e":
            group = [token for token in range(n) if (token + 1) % int(term[1:]) == 0]
        else:
            group = []
        groups.append([token for token in group if all(token not in earlier for earlier in groups)])
    return groups


def compact(located: torch.Tensor) -> list[list[list[int]]]:
    """[row][group] -> columns, the unused entries left out."""
    return [[[column for column in group if column >= 0] for group in row] for row in located.tolist()]


@pytest.mark.parametrize("positions", ["f1", "f3", "l1", "l4", "f1+l1", "f3+l2", "f2+l5", "f4+l4", "all", *FURTHER])
@pytest.mark.parametrize("length", range(1, 13))
def test_locate_matches_the_loop_for_every_prompt_length(positions, length):
    offset = 4
    valid = torch.zeros(1, offset + length + 2, dtype=torch.bool)
    valid[0, offset : offset + length] = True
    located = locate(parse_positions(positions), find_prompts(valid))
    assert compact(located)[0] == [[offset + token for token in group] for group in named_tokens(positions, length)]


@pytest.mark.parametrize("first", range(1, 6))
@pytest.mark.parametrize("last", range(1, 6))
def test_a_prompt_shorter_than_the_spec_is_edited_at_every_token_exactly_once(first, last):
    for length in range(1, first + last):
        prefix, suffix = compact(
            locate(parse_positions(f"f{first}+l{last}"), find_prompts(torch.ones(1, length, dtype=torch.bool)))
        )[0]
        size = min(first, max(length - last, math.ceil(length / 2)))  # the contract's own words
        assert prefix == list(range(size))
        assert suffix == list(range(size, length))


def test_entries_run_from_left_to_right_and_unused_ones_are_minus_one():
    located = locate(parse_positions("f3+l2"), find_prompts(torch.tensor([[0, 1, 1], [1, 1, 1]]).bool()))
    assert located.tolist() == [[[1, -1, -1], [2, -1, -1]], [[0, 1, -1], [2, -1, -1]]]
    assert located.dtype == torch.int64


def test_the_width_does_not_depend_on_the_prompts():
    spec = parse_positions("f2+l5")
    for length in (1, 3, 9):
        assert locate(spec, find_prompts(torch.ones(2, length, dtype=torch.bool))).shape == (2, 2, 5)


def test_one_group_per_position_counts_a_suffix_from_the_end():
    prompts = find_prompts(torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]).bool())
    located = locate(parse_positions("f1+l2"), prompts, "position")
    assert located.tolist() == [[[0], [3], [4]], [[3], [-1], [4]]]


@pytest.mark.parametrize("positions", ["f2+l3", "m3", "f1+m2+l1"])
def test_positions_of_their_own_name_the_same_tokens_as_their_terms(positions):
    for length in range(1, 10):
        prompts = find_prompts(torch.ones(1, length, dtype=torch.bool))
        by_term = {column for group in compact(locate(parse_positions(positions), prompts))[0] for column in group}
        by_position = compact(locate(parse_positions(positions), prompts, "position"))[0]
        assert all(len(group) <= 1 for group in by_position)
        assert sorted(column for group in by_position for column in group) == sorted(by_term)


@pytest.mark.parametrize("seed", range(40))
def test_random_batches_of_packed_rows_match_the_loop(seed):
    draw = random.Random(seed)
    positions = draw.choice(["f1+l1", "f2+l3", "l2", "f3", "m2", "e2", "f1+m1+l1", "all"])
    lengths = [draw.randint(1, 7) for _ in range(draw.randint(1, 5))]
    starts = torch.zeros(1, sum(lengths), dtype=torch.bool)
    starts[0, torch.tensor([0, *lengths[:-1]]).cumsum(0)] = True
    prompts = find_prompts(torch.ones_like(starts), starts=starts, num_documents=len(lengths))
    expected: list[list[int]] = [[] for _ in positions.split("+")]
    for number, length in enumerate(lengths):
        for group, tokens in zip(expected, named_tokens(positions, length)):
            group += [sum(lengths[:number]) + token for token in tokens]
    message = f"seed={seed} positions={positions} lengths={lengths}"
    assert compact(locate(parse_positions(positions), prompts))[0] == expected, message
    marks = mark(parse_positions(positions), prompts)[0]
    assert [group.nonzero().flatten().tolist() for group in marks] == expected, message


def test_unused_places_look_at_a_token_that_is_edited_anyway():
    places = places_at(torch.tensor([[[2, -1], [5, -1]], [[-1, -1], [-1, 3]]]))
    assert places.columns.tolist() == [[[2, 5], [5, 5]], [[3, 3], [3, 3]]]
    assert places.keep.tolist() == [[[1, 0], [1, 0]], [[0, 0], [0, 1]]]


@pytest.mark.parametrize("share", [True, False])
def test_marked_and_located_sites_name_the_same_places(share):
    valid = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]]).bool()
    prompts = find_prompts(valid)
    marked = places_of(parse_positions("all"), prompts, share)
    assert marked.columns is None
    assert torch.equal(marked.keep[:, 0], valid)
    located = places_of(parse_positions("f2+l2"), prompts, share)
    assert located.columns.shape == located.keep.shape == ((2, 1, 4) if share else (2, 2, 2))


@pytest.mark.parametrize(
    ("bad", "way_out"),
    [
        ("", "no term"),
        ("7", "'f7'"),
        ("f", "'f7'"),
        ("f-1", "'f7'"),
        ("f1,l1", "'f7\\+l7'"),
        ("F1+L1", "prefix first"),
        ("f1 + l1", "no term"),
        ("x3", "Further terms"),
        ("f0", "at least 1"),
        ("f2+l0", "Leave that term out"),
        ("e0", "at least 1"),
        ("l1+f2", "Did you mean 'f2\\+l1'"),
        ("d4+l3+f2", "Did you mean 'f2\\+l3\\+d4'"),
        ("f1+f2", "add them up"),
        ("all+l1", "already"),
        (7, "must be a string"),
        (None, "must be a string"),
    ],
)
def test_what_is_no_spec_is_refused_with_the_value_and_the_way_out(bad, way_out):
    with pytest.raises(ValueError, match=way_out) as error:
        parse_positions(bad)
    assert repr(bad) in str(error.value)


def test_a_number_that_no_machine_counts_to_is_refused_and_cut_off():
    with pytest.raises(ValueError, match="names more tokens than any model takes") as error:
        parse_positions("f" + "1" * 5000)  # Python itself refuses to read so many digits
    assert len(str(error.value)) < 500


def test_what_needs_a_bound_is_refused_without_one():
    prompts = find_prompts(torch.ones(1, 6).bool(), starts=torch.tensor([[1, 0, 0, 1, 0, 0]]).bool())
    with pytest.raises(ValueError, match="needs the number of documents"):
        locate(parse_positions("f1"), prompts)
    with pytest.raises(NotImplementedError, match="'all' names any number of tokens"):
        mark(parse_positions("all"), prompts, "position")


@pytest.mark.parametrize("symbol", TERMS)
def test_every_term_of_the_registry_is_named_where_a_spec_is_refused_and_in_the_config(symbol):
    named = {term for quoted in re.findall(r"'(.*?)'", GRAMMAR) for term in quoted.split("+")}
    assert symbol in {re.sub("[0-9]+$", "", term) for term in named}
    (field,) = (field for field in dataclasses.fields(ReftConfig) if field.name == "positions")
    assert GRAMMAR in field.metadata["help"]


@pytest.mark.parametrize("good", ["f1", "l12", "f7+l7", "all", "m4", "e3", "d", "d8", "f3+l3+d8", "all+d"])
def test_a_spec_is_printed_as_it_was_written(good):
    assert str(parse_positions(good)) == good
