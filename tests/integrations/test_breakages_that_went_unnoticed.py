"""Breakages of which no test told: each of these tests fails if its line is broken."""

import random

import pytest
import torch
import transformers
from conftest import EOS, PAD, batch, reft_model, tiny_model
from edit_spy import spied
from peft import get_peft_model
from slow_places import marker_ends, places
from trainer_kit import word_tokenizer
from transformers import GenerationConfig, default_data_collator
from transformers.generation.continuous_batching.requests import RequestState

from peft_reft import ReftConfig, ReftDataCollator, get_interventions
from peft_reft.convert import adapterhub_locations, pyreft_locations

MARKER = [7, 8]
CONFIG = {"r": 2, "task_type": "CAUSAL_LM"}


# A pad that is also eos tells no padding.


@pytest.mark.parametrize("eos", [PAD, [EOS, PAD], [PAD]], ids=str)
def test_a_pad_that_is_an_eos_is_a_token_of_the_prompt(eos):
    """transformers infers no mask then; what a chat template ends its turns with is part of the prompt."""
    model = reft_model(tiny_model("llama"), positions="f2+l2", **CONFIG)
    ids = torch.tensor([[PAD, PAD, 5, 6, 7, 8], [PAD, 5, 6, PAD, 7, PAD]])
    with spied(model, tiny_model("llama")) as calls:
        model.generate(input_ids=ids, max_new_tokens=2, min_new_tokens=2, pad_token_id=PAD, eos_token_id=eos)
    assert calls[0] == [[0, 1, 4, 5]] * 2


def test_a_pad_that_is_no_eos_is_padding():
    model = reft_model(tiny_model("llama"), positions="f2+l2", **CONFIG)
    ids = torch.tensor([[PAD, PAD, 5, 6, 7, 8], [3, 4, 5, 6, 7, 8]])
    with spied(model, tiny_model("llama")) as calls:
        model.generate(input_ids=ids, max_new_tokens=2, pad_token_id=PAD, eos_token_id=EOS)
    assert calls[0] == [[2, 3, 4, 5], [0, 1, 4, 5]]


# The collator.


def collated(features, collator=default_data_collator, **settings):
    """The columns [row][group] that a wrapped collator gives."""
    config = ReftConfig(**{**CONFIG, **settings})
    locations = ReftDataCollator(collator, config)(features)["intervention_locations"]
    return [[[column for column in group if column >= 0] for group in row] for row in locations.tolist()]


def features_of(ids, mask=None, labels=None):
    columns = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return [{name: value[row] for name, value in columns.items() if value is not None} for row in range(ids.shape[0])]


def test_one_row_of_covering_labels_is_enough_for_the_collator_to_need_the_marker():
    ids = torch.tensor([[3, 7, 8, 4, 5, 6], [3, 4, 7, 8, 5, 6]])
    labels = ids.clone()
    labels[0, :4] = -100  # this row's labels show its prompt, the other's cover it
    assert collated(features_of(ids, labels=labels), positions="l1", prompt_end=MARKER) == [[[3]], [[3]]]
    assert collated(features_of(ids.flip(0), labels=labels.flip(0)), positions="l1", prompt_end=MARKER) == [[[3]]] * 2


def test_a_marker_in_words_is_encoded_where_one_row_of_covering_labels_needs_it():
    tokenizer = word_tokenizer()
    collator = transformers.DataCollatorWithPadding(tokenizer)
    ids = torch.tensor([[3, 90, 4, 5], [3, 4, 90, 5]])
    labels = ids.clone()
    labels[0, :3] = -100

    class Keeps:
        def __init__(self):
            self.tokenizer = tokenizer

        def __call__(self, features):
            return {name: torch.stack([feature[name] for feature in features]) for name in features[0]}

    assert collator.tokenizer is tokenizer
    assert collated(features_of(ids, labels=labels), Keeps(), positions="l1", prompt_end="user") == [[[2]], [[2]]]


@pytest.mark.parametrize("turns", [None, "first", "last", "all"])
@pytest.mark.parametrize("seed", range(8))
def test_the_collators_columns_are_those_of_the_slow_loop(seed, turns):
    """Rows that end in the marker, several markers, padding that holds the marker, labels or none."""
    draw = random.Random(f"{seed} {turns}")
    for _ in range(6):
        n, rows = draw.randint(2, 12), 3
        ids = torch.tensor([[draw.choice([7, 8, 8, *range(9, 14)]) for _ in range(n)] for _ in range(rows)])
        if draw.random() < 0.6:
            ids[0, -2:] = torch.tensor(MARKER)
        mask = torch.ones_like(ids)
        for row in range(rows):
            mask[row, n - draw.choice([0, 0, 1, 2]) :] = 0
            mask[row, 0] = 1
        labels = None
        if draw.random() < 0.5:
            labels = torch.where(torch.rand(rows, n) < 0.5, ids, -100).masked_fill(mask == 0, -100)
        positions = draw.choice(["l1", "f1+l2", "f2+m1+l1", "l2"])
        settings = {"positions": positions, "turns": turns, "prompt_end": MARKER}
        config = ReftConfig(**CONFIG, **settings, share_weights=False)
        expected = [
            places(config, mask[row].tolist(), None if labels is None else labels[row].tolist(), ids[row].tolist())
            for row in range(rows)
        ]
        got = collated(features_of(ids, mask, labels), **settings, share_weights=False)
        found = [[sorted(group) for group in row] for row in got]
        assert found == [[sorted(group) for group in row] for row in expected], (ids, mask, labels, settings)


def test_a_row_that_ends_in_the_marker_keeps_its_last_turn():
    ids = torch.tensor([[3, 7, 8, 4, 5, 7, 8], [3, 4, 7, 8, 5, 6, 9]])
    assert marker_ends(ids[0].tolist(), MARKER) == [2, 6]
    assert collated(features_of(ids), positions="l1", turns="all", prompt_end=MARKER) == [[[2, 6]], [[3]]]


def test_padding_that_holds_the_marker_is_no_marker_to_the_collator():
    ids, mask = torch.tensor([[3, 7, 8, 4, 7, 8]]), torch.tensor([[1, 1, 1, 1, 0, 0]])
    assert collated(features_of(ids, mask), positions="l1", prompt_end=MARKER) == [[[2]]]


# What the peers edited, in rows shorter than their ends.


@pytest.mark.parametrize("positions", ["l3", "f1+l3", "f2+l9"])
def test_the_peers_suffix_never_begins_before_the_row(positions):
    for start in range(4):
        for n in range(1, 5):
            mask = torch.zeros(1, 9, dtype=torch.long)
            mask[0, start : start + n] = 1
            for locate in (adapterhub_locations, pyreft_locations):
                columns = [column for column in locate(mask, positions).flatten().tolist() if column != -1]
                assert all(start <= column < start + n for column in columns), (locate.__name__, start, n)
            last = int(positions.split("l")[1])
            suffix = [column for column in adapterhub_locations(mask, positions)[0, -1].tolist() if column != -1]
            assert suffix == list(range(max(start, start + n - last), start + n))


# A fresh adapter.


@pytest.mark.parametrize("init_weights", [True, False])
@pytest.mark.parametrize("kind", ["loreft", "odireft", "consreft", "lobireft"])
def test_the_free_rows_of_a_fresh_adapter_are_half_as_long_as_one(kind, init_weights):
    """Their length sets how fast R turns: a step of the optimizer turns a longer row by less."""
    config = ReftConfig(**{**CONFIG, "r": 3}, intervention=kind, init_weights=init_weights)
    model = get_peft_model(tiny_model("llama"), config)
    for group in get_interventions(model).values():
        lengths = dict(group[0].named_parameters())["basis"].norm(dim=1)
        torch.testing.assert_close(lengths, torch.full((3,), 0.5))
        torch.testing.assert_close(group[0].subspace @ group[0].subspace.T, torch.eye(3), rtol=0, atol=1e-5)


# Continuous batching: a request that had to make room begins anew with what it has generated.


@pytest.mark.parametrize("positions", ["f2+l2", "l1+d2"])
def test_a_request_that_made_room_keeps_its_prompt(positions, monkeypatch):
    resets = []
    create = RequestState.create_equivalent_initial_request

    def counted(state, *args, **kwargs):
        resets.append(len(state.generated_tokens))
        return create(state, *args, **kwargs)

    monkeypatch.setattr(RequestState, "create_equivalent_initial_request", counted)
    model = reft_model(tiny_model("llama", eos_token_id=None), positions=positions, **CONFIG)
    prompts = [batch(length, seed=length)["input_ids"][0].tolist() for length in (9, 7, 11, 8)]
    new = 14
    alone = [
        model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=new, do_sample=False)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    answers = model.generate_batch(
        prompts,
        generation_config=GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1),
        continuous_batching_config=transformers.ContinuousBatchingConfig(
            max_batch_tokens=64, num_blocks=16, block_size=4
        ),
    )
    got = {tuple(answer.prompt_ids): answer.generated_tokens for answer in answers.values()}
    assert any(resets), "no request had to make room: the cache of this test is too large"
    assert [got[tuple(prompt)] for prompt in prompts] == alone
