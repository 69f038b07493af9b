"""ReftDataCollator adds the columns that the model would find itself, and passes for the collator that it wraps."""

import copy
import pickle
import warnings

import pytest
import reference
import torch
from conftest import EOS, PAD, VOCAB, logits, reft_model, tiny_model
from edit_spy import spied
from trainer_kit import word_tokenizer
from transformers import DataCollatorForSeq2Seq, DataCollatorForTokenClassification, default_data_collator
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from peft_reft import ReftConfig, ReftDataCollator
from peft_reft.causal import InterchangeCollator
from peft_reft.positions import IGNORED


def examples(*shapes):
    """Examples of (tokens, prompt tokens), as TRL prepares prompt/completion data."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for tokens, prompt in shapes:
        ids = torch.randint(EOS + 1, VOCAB, (tokens,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]})
    return made


SHAPES = ((9, 5), (4, 1), (6, 6), (3, 2))


def collate(config=None, inner=None, data=None, **settings):
    config = config or ReftConfig(**{"task_type": "CAUSAL_LM", "positions": "f2+l2", **settings})
    return ReftDataCollator(inner or DataCollatorForLanguageModeling(PAD), config)(data or examples(*SHAPES))


@pytest.mark.parametrize("positions", ["f2+l2", "l3", "f1", "f4+l4", "all"])
def test_the_columns_are_those_of_the_loop_over_mask_and_labels(positions):
    got = collate(positions=positions)
    expected = reference.columns_to_edit(positions, got["attention_mask"], got["labels"])
    locations = got["intervention_locations"]
    assert locations.dtype == torch.int64
    assert [[[c for c in group if c >= 0] for group in row] for row in locations.tolist()] == expected


def test_the_width_is_constant():
    for shapes in (SHAPES, ((2, 1),), ((20, 19), (5, 3))):
        assert collate(data=examples(*shapes), positions="f2+l5")["intervention_locations"].shape == (len(shapes), 2, 5)


def test_labels_that_are_shifted_already_name_the_same_columns():
    """In `shift_labels`, as of sequence parallelism, column i holds the label of token i + 1."""
    by_labels = collate()

    def shifted(examples):
        batch = dict(DataCollatorForLanguageModeling(PAD)(examples))
        batch["shift_labels"] = torch.nn.functional.pad(batch.pop("labels")[:, 1:], (0, 1), value=IGNORED)
        return batch

    by_shifted = collate(inner=shifted)
    assert "labels" not in by_shifted
    assert torch.equal(by_shifted["intervention_locations"], by_labels["intervention_locations"])


def test_the_mask_of_a_preference_batch_names_the_same_columns():
    """TRL's preference trainers make the labels of `completion_mask` after the collator."""
    by_labels = collate()

    def preferences(examples):
        batch = dict(DataCollatorForLanguageModeling(PAD)(examples))
        batch["completion_mask"] = (batch.pop("labels") != IGNORED).long()
        return batch

    assert torch.equal(collate(inner=preferences)["intervention_locations"], by_labels["intervention_locations"])


@pytest.mark.parametrize("share_weights", [True, False, "position"])
@pytest.mark.parametrize("positions", ["f2+l2", "f1+m2+l1"])
def test_the_model_does_the_same_with_the_locations_as_with_the_labels(positions, share_weights):
    model = reft_model(tiny_model("llama"), task_type="CAUSAL_LM", positions=positions, share_weights=share_weights)
    got = dict(collate(config=model.peft_config["default"]))
    locations = got.pop("intervention_locations")
    by_labels = logits(model, got)
    labels = got.pop("labels")
    by_locations = logits(model, got, intervention_locations=locations)
    torch.testing.assert_close(by_locations, by_labels)
    assert (logits(model, got) - by_labels).abs().max() > 1e-3
    assert labels.shape == got["input_ids"].shape


@pytest.mark.parametrize("positions", ["f2+l2", "f1+d2", "all"])
def test_padding_free_batches_name_the_same_tokens(positions):
    padded = collate(positions=positions)
    flat = collate(positions=positions, inner=DataCollatorForLanguageModeling(PAD, padding_free=True))
    assert flat["input_ids"].shape[0] == 1
    mask = padded["attention_mask"].bool()
    named = torch.zeros_like(mask)
    for row, groups in enumerate(padded["intervention_locations"]):
        named[row, groups[groups >= 0]] = True
    flat_named = torch.zeros(flat["input_ids"].shape[1], dtype=torch.bool)
    locations = flat["intervention_locations"][0]
    flat_named[locations[locations >= 0]] = True
    assert torch.equal(flat_named, named[mask])
    assert named.any()


@pytest.mark.parametrize("documents", [1, 2, 3])
def test_documents_of_a_padding_free_row_are_counted_from_two_on(documents):
    """Their `position_ids` begin anew; without labels each document is a prompt."""
    data = examples(*SHAPES[:documents])
    flat = DataCollatorForLanguageModeling(PAD, padding_free=True)

    def unlabelled(examples):
        return {name: value for name, value in flat(examples).items() if name != "labels"}

    got = collate(inner=unlabelled, data=data, positions="f1+l1")
    ends = torch.tensor([0] + [tokens for tokens, _ in SHAPES[:documents]]).cumsum(0).tolist()
    first, last = (group[group >= 0].tolist() for group in got["intervention_locations"][0])
    assert (first, last) == (ends[:-1], [end - 1 for end in ends[1:]])
    assert got["intervention_locations"].shape == (1, 2, documents)


@pytest.mark.parametrize("completion", [3, 2], ids=["of the same prompt", "of another prompt"])
def test_locations_are_left_out_where_they_do_not_hold_for_the_second_rows_of_kto(completion):
    """TRL's KTO trainer hands a batch's locations to its `KL_` rows, too."""

    def both(examples):
        batch = dict(DataCollatorForLanguageModeling(PAD)(examples))
        second = batch["labels"].clone()
        second[0, :] = torch.tensor([IGNORED] * (9 - completion) + [5] * completion)
        return {**batch, **{f"KL_{name}": value for name, value in {**batch, "labels": second}.items()}}

    got = collate(inner=both, data=examples((9, 6), (4, 1)))
    assert ("intervention_locations" in got) == (completion == 3)


def test_it_passes_for_the_collator_it_wraps():
    inner = DataCollatorForLanguageModeling(PAD, padding_free=False)
    collator = ReftDataCollator(inner, ReftConfig(task_type="CAUSAL_LM"))
    assert isinstance(collator, DataCollatorForLanguageModeling)
    assert isinstance(collator, ReftDataCollator)
    assert collator.pad_token_id == PAD
    collator.return_position_ids = True  # as TRL does under sequence parallelism
    assert inner.return_position_ids
    assert "position_ids" in collator(examples(*SHAPES))
    with pytest.raises(AttributeError, match="nothing_like_it"):
        collator.nothing_like_it  # noqa: B018


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_and_pickles_work_like_the_original(duplicate):
    collator = ReftDataCollator(DataCollatorForLanguageModeling(PAD), ReftConfig(task_type="CAUSAL_LM"))
    again = duplicate(collator)
    assert type(again) is ReftDataCollator
    assert isinstance(again, DataCollatorForLanguageModeling)
    data = examples(*SHAPES)
    for name, tensor in collator(data).items():
        assert torch.equal(again(data)[name], tensor)


def test_worker_processes_can_use_it():
    collator = ReftDataCollator(DataCollatorForLanguageModeling(PAD), ReftConfig(task_type="CAUSAL_LM"))
    loader = torch.utils.data.DataLoader(
        examples(*SHAPES), batch_size=2, collate_fn=collator, num_workers=1, multiprocessing_context="spawn"
    )
    assert [tuple(b["intervention_locations"].shape) for b in loader] == [(2, 2, 1), (2, 2, 1)]


def test_a_function_can_be_wrapped():
    data = [
        {"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]},
        {"input_ids": [8, 9, 5], "labels": [IGNORED, IGNORED, 5]},
    ]
    got = ReftDataCollator(default_data_collator, ReftConfig(positions="l1"))(data)
    assert got["intervention_locations"].tolist() == [[[0]], [[1]]]


def test_locations_of_the_data_set_pass_untouched():
    data = examples(*SHAPES)
    own = [[1, 3], [0], None, [2, 0, 1]]
    for example, locations in zip(data, own):
        if locations is not None:
            example["intervention_locations"] = locations
    got = collate(data=data)
    assert got["intervention_locations"].tolist() == [
        [[1, 3, -1]],
        [[0, -1, -1]],
        [[-1, -1, -1]],
        [[2, 0, 1]],
    ]
    assert data[0]["intervention_locations"] == [1, 3]


def test_locations_of_the_data_set_move_with_padding_in_front():
    tokenizer = word_tokenizer()
    tokenizer.padding_side = "left"
    data = examples((5, 3), (3, 2))
    data[1] |= {"intervention_locations": [[0], [2]]}
    inner = DataCollatorForSeq2Seq(tokenizer)
    got = collate(inner=inner, data=data)
    assert got["intervention_locations"].tolist() == [[[-1], [-1]], [[2], [4]]]
    bases = [{**example, "source_input_ids": [5] * 7} for example in data]
    bases[0] |= {"source_input_ids": [4, 6, 7], "source_intervention_locations": [[0], [-1]]}
    made = InterchangeCollator(inner)(bases)
    assert made["intervention_locations"].tolist() == [[[-1], [-1]], [[2], [4]]]
    assert made["source_inputs"]["intervention_locations"].tolist() == [[[4], [-1]], [[-1], [-1]]]


def test_locations_by_group_of_the_data_set_pass_untouched():
    data = examples((5, 3), (4, 2))
    data[0]["intervention_locations"] = [[0, 1], [2, -1]]
    data[1]["intervention_locations"] = [[0], [1]]
    assert collate(data=data)["intervention_locations"].tolist() == [[[0, 1], [2, -1]], [[0, -1], [1, -1]]]


@pytest.mark.parametrize(("task_type", "last"), [("TOKEN_CLS", [2, 3]), ("CAUSAL_LM", [0, 2]), (None, [0, 2])])
def test_labels_end_a_prompt_for_causal_language_models_only(task_type, last):
    class Tokenizer:
        padding_side = "right"

        def pad(self, features, **kwargs):
            width = max(len(f["input_ids"]) for f in features)
            rows = [f["input_ids"] + [PAD] * (width - len(f["input_ids"])) for f in features]
            masks = [[1] * len(f["input_ids"]) + [0] * (width - len(f["input_ids"])) for f in features]
            return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}

    data = [{"input_ids": [5, 6, 7], "labels": [1, 2, 3]}, {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, -100, 4]}]
    inner = DataCollatorForTokenClassification(Tokenizer())
    got = collate(inner=inner, data=data, positions="l1", task_type=task_type)
    assert got["intervention_locations"].flatten().tolist() == last


@pytest.mark.parametrize(("mlm", "last"), [(True, 5), (False, 2)])
def test_labels_of_a_collator_that_masks_tokens_end_no_prompt(mlm, last):
    """Of a config without a task type, too: the tokens to be found may be anywhere."""

    class Masks:
        def __init__(self):
            self.mlm = mlm

        def __call__(self, examples):
            ids = torch.tensor([[5, 6, 7, 8, 9, 3]])
            return {"input_ids": ids, "labels": ids.masked_fill(torch.tensor([[1, 1, 1, 0, 1, 1]]).bool(), IGNORED)}

    assert collate(ReftConfig(positions="l1"), Masks())["intervention_locations"].tolist() == [[[last]]]


def test_padding_that_a_batch_numbers_as_a_document_is_none():
    ids = torch.tensor([[5, 6, 7, 8, PAD, PAD]])
    mask, numbers = (ids != PAD).long(), torch.tensor([[0, 0, 0, 0, -1, -1]])
    batch = {"input_ids": ids, "attention_mask": mask, "seq_idx": numbers}
    found = collate(inner=lambda examples: dict(batch), positions="f1+l1")
    assert found["intervention_locations"].tolist() == [[[0], [3]]]


def test_batches_of_an_encoder_decoder_count_over_the_encoders_input():
    inner = lambda features: {  # noqa: E731
        "input_ids": torch.tensor([[5, 6, 7, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0]]),
        "labels": torch.tensor([[3, 4, 5, 6]]),
        "decoder_input_ids": torch.tensor([[0, 3, 4, 5]]),
    }
    assert collate(inner=inner, positions="l1", task_type="SEQ_2_SEQ_LM")["intervention_locations"].tolist() == [[[2]]]


def test_a_marker_ends_the_prompt_where_there_are_no_labels():
    data = [{"input_ids": [5, 7, 8, 6, 9]}, {"input_ids": [7, 8, 5, 5, 5]}]
    got = ReftDataCollator(default_data_collator, ReftConfig(positions="l1", prompt_end=[7, 8]))(data)
    assert got["intervention_locations"].tolist() == [[[2]], [[1]]]


def test_labels_of_several_answers_are_told_where_no_turns_are_chosen():
    labels = torch.tensor([-100, -100, 5, -100, -100, 8, 9])
    data = [{"input_ids": torch.arange(3, 10), "labels": labels}]
    with pytest.warns(UserWarning, match=r"several answers.*positions=f1\+l1.*turns=\"all\""):
        got = ReftDataCollator(default_data_collator, ReftConfig(positions="f1+l1"))(data)
    assert got["intervention_locations"].flatten().tolist() == [0, 1]
    data[0]["labels"] = labels.masked_fill(torch.arange(7) > 4, -100)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ReftDataCollator(default_data_collator, ReftConfig(positions="f1+l1"))(data)


@pytest.mark.parametrize(("turns", "named"), [("first", [1]), ("last", [6]), ("all", [1, 4, 6])])
def test_turns_choose_whose_prompt_is_edited(turns, named):
    labels = [IGNORED, IGNORED, 5, 5, IGNORED, 5, IGNORED, 5]
    data = [{"input_ids": list(range(10, 18)), "labels": labels}]
    got = ReftDataCollator(default_data_collator, ReftConfig(positions="l1", turns=turns))(data)[
        "intervention_locations"
    ]
    assert got[got >= 0].tolist() == named


@pytest.mark.parametrize(
    ("inner", "config", "message"),
    [
        (None, ReftConfig(), "None is not callable"),
        (default_data_collator, None, "None is not a ReftConfig"),
        (default_data_collator, {"positions": "f1"}, "pass the one that the adapter was made with"),
    ],
)
def test_what_cannot_be_wrapped_is_refused(inner, config, message):
    with pytest.raises(TypeError, match=message):
        ReftDataCollator(inner, config)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_masks_of_pairs_of_tokens_show_padding_and_documents(dtype):
    """Two documents in a row, and padding in front of it; a collator of one's own may make such masks."""
    document = torch.tensor([-1, -1, 0, 0, 0, 1, 1, 1, 1])
    seen = (document.unsqueeze(1) == document) & (document >= 0) & torch.ones(9, 9, dtype=torch.bool).tril()
    mask = seen[None, None] if dtype is torch.bool else torch.where(seen, 0.0, -1e9)[None, None]
    labels = torch.tensor([[-100, -100, -100, -100, 7, -100, -100, -100, 8]])
    batch = {"input_ids": torch.arange(9)[None] + 3, "attention_mask": mask, "labels": labels}
    got = collate(inner=lambda rows: dict(batch), positions="f1+l1", share_weights=False)
    assert got["intervention_locations"].tolist() == [[[2, 5], [3, 7]]]
    with spied(model := reft_model(tiny_model("llama"), task_type="CAUSAL_LM"), tiny_model("llama")) as calls:
        model(**got)
        model(**batch)
    assert calls == [[[2, 3, 5, 7]]] * 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"attention_mask": torch.ones(1, 4)}, r"attention_mask \(a float32 tensor of shape \[1, 4\]\)"),
        ({"labels": torch.ones(2, 5, dtype=torch.long)}, r"labels of shape \[2, 5\] cannot be aligned"),
    ],
)
def test_what_does_not_go_with_the_token_ids_is_refused(wrong, message):
    batch = {"input_ids": torch.ones(2, 6, dtype=torch.long), "attention_mask": torch.ones(2, 6), **wrong}
    with pytest.raises(ValueError, match=message):
        collate(inner=lambda rows: dict(batch))


def test_a_batch_without_token_ids_is_refused():
    with pytest.raises(ValueError, match=r"needs a batch with `input_ids`.*pixel_values"):
        collate(inner=lambda features: {"pixel_values": torch.zeros(1)})
