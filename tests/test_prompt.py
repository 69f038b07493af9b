"""Where prompts lie: padding, labels, packed documents, turns and markers, against slow loops over random batches."""

import random

import pytest
import torch

from peft_reft.positions import (
    IGNORED,
    Tokens,
    align_shift_labels,
    document_starts,
    find_prompts,
    generated,
    mark,
    marker_ends,
    parse_positions,
    places_of,
)

MARKER = (7, 8)


def prompt_tokens(labels: list[int], turns: str) -> tuple[list[int], list[int]]:
    """Tokens of one document that are prompt, and per token the length of the prompt it belongs to; by loops.

    Args:
        labels: of the document's tokens, -100 = not predicted.
        turns: "first", "last" or "all".
    """
    n = len(labels)
    answer = [token >= 1 and labels[token] != IGNORED for token in range(n)]
    ends = [token for token in range(1, n) if answer[token] and not answer[token - 1]]  # lengths of the prompts
    if not ends:
        return list(range(n)), [n] * n
    if turns == "first":
        return list(range(ends[0])), [ends[0]] * n
    if turns == "last":
        return list(range(ends[-1])), [ends[-1]] * n
    # Of an answer that the conversation goes on from, the last token is run with the next turn's prompt.
    inside = [token for token in range(ends[-1]) if not answer[token] or (token + 1 < n and not answer[token + 1])]
    return inside, [next((end for end in ends if end > token), n) for token in range(n)]


def random_documents(draw: random.Random) -> list[list[int]]:
    """Labels of a few documents, with answers anywhere, none at all, or from the first token on."""
    documents = []
    for _ in range(draw.randint(1, 4)):
        kind = draw.choice(["none", "one", "turns", "full"])
        n = draw.randint(1, 9)
        labels = [IGNORED] * n
        if kind == "full":
            labels = [5] * n
        elif kind == "one":
            cut = draw.randint(0, n)
            labels = [IGNORED] * cut + [5] * (n - cut)
        elif kind == "turns":
            labels = [draw.choice([IGNORED, 5]) for _ in range(n)]
        documents.append(labels)
    return documents


@pytest.mark.parametrize("turns", ["first", "last", "all"])
@pytest.mark.parametrize("packed", [False, True])
def test_thousands_of_random_batches_match_the_loop(turns, packed):
    for seed in range(700):
        draw = random.Random(seed)
        documents = random_documents(draw)
        rows = [documents] if packed else [[document] for document in documents]
        width = max(sum(map(len, row)) for row in rows) + draw.randint(0, 3)
        labels = torch.full((len(rows), width), IGNORED)
        valid = torch.zeros(len(rows), width, dtype=torch.bool)
        starts = torch.zeros(len(rows), width, dtype=torch.bool)
        expected = []
        for number, row in enumerate(rows):
            at = draw.randint(0, width - sum(map(len, row)))  # padding on both sides
            inside: list[int] = []
            lengths: dict[int, int] = {}
            for document in row:
                starts[number, at] = True
                valid[number, at : at + len(document)] = True
                labels[number, at : at + len(document)] = torch.tensor(document)
                tokens, length = prompt_tokens(document, turns)
                inside += [at + token for token in tokens]
                lengths |= {at + token: length[token] for token in tokens}
                at += len(document)
            expected.append((inside, lengths))
        found = find_prompts(valid, labels, starts if packed else None, None, turns)
        message = f"seed={seed} turns={turns} documents={documents}"
        for number, (inside, lengths) in enumerate(expected):
            assert found.inside[number].nonzero().flatten().tolist() == inside, message
            length = found.length.expand(found.inside.shape)[number]
            assert {column: int(length[column]) for column in inside} == lengths, message


def test_answer_tokens_are_counted_anew_in_every_answer_as_generation_would():
    labels = torch.tensor([[-100, -100, 5, 5, 5, -100, 5, 5], [5, 5, -100, -100, -100, -100, -100, -100]])
    valid = torch.tensor([[1] * 8, [1] * 2 + [0] * 6]).bool()
    found = find_prompts(valid, labels)
    # The last token of the first answer is run with what follows it; the last one of the row ends it.
    assert [row.nonzero().flatten().tolist() for row in found.answer] == [[2, 3, 6, 7], [1]]
    assert [int(found.answer_order[0, c]) for c in (2, 3, 6, 7)] == [0, 1, 0, 1]
    assert int(found.answer_order[1, 1]) == 0


def test_answers_of_packed_documents_end_with_their_document():
    labels = torch.tensor([[-100, 5, 5, -100, -100, 5]])
    starts = torch.tensor([[1, 0, 0, 1, 0, 0]]).bool()
    found = find_prompts(torch.ones(1, 6).bool(), labels, starts)
    assert found.answer[0].nonzero().flatten().tolist() == [1, 2, 5]
    assert [int(found.answer_order[0, c]) for c in (1, 2, 5)] == [0, 1, 0]


def test_a_first_token_is_prompt_even_if_it_has_a_label():
    found = find_prompts(torch.ones(1, 4, dtype=torch.bool), torch.full((1, 4), 5))
    assert found.inside.tolist() == [[True, False, False, False]]
    assert found.length.tolist() == [[1]]


def test_labels_of_padding_do_not_end_a_prompt():
    valid = torch.tensor([[0, 0, 1, 1, 1]]).bool()
    found = find_prompts(valid, torch.tensor([[9, 9, -100, -100, 9]]))
    assert found.inside.tolist() == [[False, False, True, True, False]]


def test_shift_labels_say_the_same_as_labels():
    labels = torch.tensor([[-100, -100, 3, 4], [-100, 5, 6, 7]])
    shift_labels = torch.cat([labels[:, 1:], torch.full((2, 1), IGNORED)], dim=1)
    aligned = align_shift_labels(shift_labels)
    assert torch.equal(aligned, labels)


def test_documents_start_where_position_ids_restart():
    ids = torch.tensor([[0, 1, 2, 0, 1, 0, 0]])
    starts, _ = document_starts(torch.ones_like(ids).bool(), position_ids=ids)
    assert starts.tolist() == [[True, False, False, True, False, True, True]]


def test_position_ids_of_padding_and_holes_start_no_document():
    valid = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 1, 1]]).bool()
    for ids in (
        [[1, 1, 0, 1, 2], [0, 1, 1, 2, 3]],
        [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]],
        [[0, 0, 0, 1, 2], [5, 6, 7, 8, 9]],
    ):
        starts, _ = document_starts(valid, position_ids=torch.tensor(ids))
        assert starts.tolist() == [[False, False, True, False, False], [True, False, False, False, False]]


def test_every_description_of_packed_rows_starts_the_same_documents():
    ids = torch.tensor([[0, 1, 2, 0, 1, 0]])
    valid = torch.ones_like(ids).bool()
    by_ids, _ = document_starts(valid, position_ids=ids)
    by_seq, _ = document_starts(valid, seq_idx=torch.tensor([[0, 0, 0, 1, 1, 2]]))
    by_cu, count = document_starts(valid, cu_seq_lens=torch.tensor([0, 3, 5, 6], dtype=torch.int32))
    assert torch.equal(by_ids, by_seq)
    assert torch.equal(by_ids, by_cu)
    assert count >= 3
    padded, _ = document_starts(torch.ones(1, 8).bool(), cu_seq_lens=torch.tensor([0, 3, 5, 6], dtype=torch.int32))
    assert padded.tolist() == [[True, False, False, True, False, True, True, False]]  # the rest is by itself


def test_numbers_of_documents_of_other_columns_are_refused():
    with pytest.raises(ValueError, match=r"seq_idx has the shape \(1, 3\), but the batch has 2 rows of 6 columns"):
        document_starts(torch.ones(2, 6).bool(), seq_idx=torch.tensor([[0, 0, 1]]))


def test_bounds_of_documents_run_over_all_rows():
    valid, bounds = torch.ones(2, 4).bool(), torch.tensor([0, 3, 4, 6, 8], dtype=torch.int32)
    starts, count = document_starts(valid, cu_seq_lens=bounds)
    assert starts.tolist() == [[True, False, False, True], [True, False, True, False]]
    assert count >= 2


def test_multimodal_position_ids_start_documents_where_they_hold_the_texts_own():
    """Three rows of ids are of time, height and width; of four, the first are those of the text."""
    valid, ids = torch.ones(1, 4).bool(), torch.tensor([[0, 1, 0, 1]])
    assert document_starts(valid, position_ids=torch.zeros(3, 1, 4)) == (None, None)
    starts, _ = document_starts(valid, position_ids=torch.stack([ids, *torch.zeros(3, 1, 4, dtype=torch.long)]))
    assert torch.equal(starts, document_starts(valid, position_ids=ids)[0])


@pytest.mark.parametrize("count", [1, 3])
def test_generated_tokens_follow_a_prompt(count):
    whole = find_prompts(torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]).bool())
    longer = whole.followed_by(count)
    for row in range(2):
        for column in range(4 + count):
            assert bool(longer.answer[row, column]) == (column >= 4)
            assert longer.answer_order[row, column] == column - 4
            assert bool(longer.inside[row, column]) == (column < 4 and bool(whole.inside[row, column]))
            if column < 4:
                assert longer.order[row, column] == whole.order[row, column]
    assert torch.equal(longer.length, whole.length)


@pytest.mark.parametrize("positions", ["f2+l1", "m2", "all", "e2", "f1+d2"])
@pytest.mark.parametrize("start", range(7))
@pytest.mark.parametrize("columns", [1, 2, 4, 6])
def test_a_window_shows_the_columns_of_the_whole_row(positions, start, columns):
    spec = parse_positions(positions)
    prompts = find_prompts(torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]).bool()).followed_by(3)
    whole = mark(spec, prompts)
    places = places_of(spec, prompts, False).window(start, columns)
    for row in range(2):
        for group in range(whole.shape[1]):
            shown = [start + at for at in range(columns) if start + at < 7 and whole[row, group, start + at]]
            keep = places.keep[row, group]
            found = keep.nonzero().flatten() if places.columns is None else places.columns[row, group][keep]
            assert (found + start).tolist() == shown
    assert places.columns is None or ((places.columns >= 0) & (places.columns < columns)).all()


def test_repeated_rows_stand_next_to_each_other():
    found = find_prompts(torch.tensor([[0, 1], [1, 1]]).bool()).repeat(2)
    assert found.inside.tolist() == [[False, True], [False, True], [True, True], [True, True]]


def test_generated_tokens_are_no_prompt():
    found = generated(2, 3, 5, torch.device("cpu"))
    assert not found.inside.any()
    assert found.answer_order.tolist() == [[5, 6, 7]] * 2


def test_marker_ends_are_found_wherever_they_are():
    ids = torch.tensor([[7, 8, 1, 7, 8], [8, 7, 7, 8, 7]])
    assert marker_ends(ids, MARKER).tolist() == [
        [False, True, False, False, True],
        [False, False, False, True, False],
    ]


@pytest.mark.parametrize(
    ("turns", "inside"),
    [
        (None, [1, 1, 1, 1, 1, 0]),
        ("last", [1, 1, 1, 1, 1, 0]),
        ("first", [1, 1, 0, 0, 0, 0]),
        ("all", [1, 1, 1, 1, 1, 0]),
    ],
)
def test_the_last_marker_ends_the_prompt_unless_turns_says_otherwise(turns, inside):
    ids = torch.tensor([[7, 8, 1, 7, 8, 2]])
    found = Tokens(torch.ones_like(ids).bool(), ids=ids).prompts(turns, MARKER)
    assert found.inside.long().tolist() == [inside]


def test_what_stands_behind_the_marker_counts_as_generated():
    ids = torch.tensor([[5, 7, 8, 1, 2, 3], [1, 2, 3, 4, 5, 6]])
    found = Tokens(torch.ones_like(ids).bool(), ids=ids).prompts(None, MARKER)
    assert found.answer.long().tolist() == [[0, 0, 0, 1, 1, 1], [0] * 6]
    assert found.answer_order[0, 3:].tolist() == [0, 1, 2]


def test_a_row_without_the_marker_is_all_prompt():
    ids = torch.tensor([[1, 2, 3], [7, 8, 1]])
    found = Tokens(torch.ones_like(ids).bool(), ids=ids).prompts(None, MARKER)
    assert found.inside.long().tolist() == [[1, 1, 1], [1, 1, 0]]


def test_labels_win_over_the_marker():
    ids = torch.tensor([[7, 8, 1, 2]])
    found = Tokens(torch.ones_like(ids).bool(), torch.tensor([[-100, -100, -100, 2]]), ids=ids).prompts(None, MARKER)
    assert found.inside.long().tolist() == [[1, 1, 1, 0]]


def test_a_prompt_given_to_generate_ends_with_its_row():
    ids = torch.tensor([[7, 8, 1, 2]])
    tokens = Tokens(torch.ones_like(ids).bool(), ids=ids, given=True)
    assert tokens.prompts(None, MARKER).inside.all()
    assert tokens.prompts("last", MARKER).inside.all()
    assert tokens.prompts("first", MARKER).inside.long().tolist() == [[1, 1, 0, 0]]
    every = tokens.prompts("all", MARKER)
    assert every.inside.all()
    assert every.length.tolist() == [[2, 2, 4, 4]]
