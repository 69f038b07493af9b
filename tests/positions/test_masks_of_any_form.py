"""Whatever form the mask of a call has, its padding is read, or the caller is told that it cannot be."""

import warnings

import pytest
import torch
from conftest import batch, reft_model, tiny_model
from edit_spy import assert_right, edited_columns, spied
from transformers import DynamicCache, StaticCache
from transformers.masking_utils import create_masks_for_generate

from peft_reft.context.arguments import valid_columns

LENGTHS = (6, 4)
LEFT, RIGHT = [[0, 4, 5], [2, 4, 5]], [[0, 4, 5], [0, 2, 3]]  # f1+l2 of rows of six and four tokens


def family(name="llama", **settings):
    return reft_model(tiny_model(name), positions="f1+l2", task_type="CAUSAL_LM", **settings)


def causal(mask: torch.Tensor, pads_see_themselves: bool = False) -> torch.Tensor:
    """Bool [B, 1, S, S] of a 2-D mask: True where a token may look."""
    size = mask.shape[1]
    looks = torch.tril(torch.ones(size, size, dtype=torch.bool)) & mask[:, None, :].bool() & mask[:, :, None].bool()
    if pads_see_themselves:
        looks = looks | (torch.eye(size, dtype=torch.bool) & ~mask[:, None, :].bool())
    return looks[:, None]


def additive(looks: torch.Tensor) -> torch.Tensor:
    return torch.zeros(looks.shape).masked_fill(~looks, torch.finfo(torch.float32).min)


# 2-D.


@pytest.mark.parametrize("fill", [0, 1])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_a_mask_as_wide_as_the_cache_is_read_from_its_first_column(cache, side, fill):
    """Decode loops of one's own pass it: the columns behind the tokens say nothing about the tokens."""
    model, clean = family(), tiny_model("llama")
    inputs = batch(*LENGTHS, side=side)
    wide = torch.full((2, 16), fill)
    wide[:, :6] = inputs["attention_mask"]

    def empty():
        return StaticCache(config=clean.config, max_cache_len=16) if cache == "static" else DynamicCache()

    with torch.no_grad():  # the base model reads it so
        narrow = clean(**inputs).logits
        own = clean(inputs["input_ids"], attention_mask=wide, past_key_values=empty()).logits
    valid = inputs["attention_mask"].bool()
    torch.testing.assert_close(own[valid], narrow[valid], rtol=1e-4, atol=1e-5)
    expected = LEFT if side == "left" else RIGHT
    assert_right(model, clean, expected, input_ids=inputs["input_ids"], attention_mask=wide, past_key_values=empty)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mask_of_any_number_type_is_read(side):
    model, clean = family(), tiny_model("llama")
    inputs = batch(*LENGTHS, side=side)
    for dtype in (torch.bool, torch.int32, torch.float32, torch.uint8):
        found = edited_columns(
            model, clean, input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"].to(dtype)
        )
        assert found == (LEFT if side == "left" else RIGHT), dtype


def test_a_mask_of_one_row_holds_for_all():
    """Also behind a cache whose length one would have to wait for."""
    mask, on_cpu = torch.tensor([[0, 1, 1, 1, 1, 1]]), torch.device("cpu")
    for past, expected in ((0, [0, 1, 1]), (1, [1, 1, 1]), (torch.tensor(0), [0, 1, 1]), (torch.tensor(1), [1, 1, 1])):
        valid, _ = valid_columns(mask, 2, 3, past, on_cpu)
        assert valid.tolist() == [[bool(one) for one in expected]] * 2
    assert valid_columns(mask, 2, 6, 0, on_cpu)[0].tolist() == [[False] + [True] * 5] * 2


# 4-D.


@pytest.mark.parametrize("form", [lambda looks: looks, additive], ids=["bool", "additive"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pads_see_themselves", [False, True])
def test_padding_of_a_4d_mask_is_read(side, form, pads_see_themselves):
    model, clean = family(), tiny_model("llama")
    inputs = batch(*LENGTHS, side=side)
    mask = form(causal(inputs["attention_mask"], pads_see_themselves))
    expected = LEFT if side == "left" else RIGHT
    assert_right(model, clean, expected, input_ids=inputs["input_ids"], attention_mask=mask)


def test_pads_that_look_at_every_column_are_read():
    """As older masks for torch's attention, in which no row may be empty."""
    model, clean = family(), tiny_model("llama")
    inputs = batch(*LENGTHS, side="left")
    looks = causal(inputs["attention_mask"])
    looks = looks | ~looks.any(-1, keepdim=True)
    assert_right(model, clean, LEFT, input_ids=inputs["input_ids"], attention_mask=additive(looks))


@pytest.mark.parametrize("wide", [9, 16])
def test_the_mask_of_a_forward_behind_a_cache_is_read_where_its_columns_are(wide):
    """With labels, such a forward is edited; its tokens are the last five columns, of which the second row has four."""
    model, clean = family(), tiny_model("llama")
    ids = batch(9, 9)["input_ids"]
    mask = torch.ones(2, wide, dtype=torch.long)
    mask[1, 4] = 0
    labels = torch.full((2, 5), -100)
    labels[:, 4] = 5

    def cache():
        with torch.no_grad():
            return clean(ids[:, :4], use_cache=True).past_key_values

    given = {"input_ids": ids[:, 4:], "attention_mask": mask, "labels": labels}
    assert_right(model, clean, [[0, 2, 3], [1, 2, 3]], past_key_values=cache, **given)


def test_a_4d_mask_of_one_row_holds_for_all():
    model, clean = family(), tiny_model("llama")
    ids = batch(6, 6)["input_ids"]
    mask = causal(torch.tensor([[0, 0, 1, 1, 1, 1]]))
    assert_right(model, clean, [[2, 4, 5]] * 2, input_ids=ids, attention_mask=mask)


def test_a_4d_mask_of_a_single_token_shows_a_token():
    ids = batch(1, 1)["input_ids"]
    mask = torch.ones(2, 1, 1, 1, dtype=torch.bool)
    assert_right(family(), tiny_model("llama"), [[0], [0]], input_ids=ids, attention_mask=mask)


def test_a_4d_mask_by_which_every_token_looks_at_every_other_shows_no_padding():
    model, clean = reft_model(tiny_model("bert"), positions="f1+l2"), tiny_model("bert")
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    ids = batch(6, 6)["input_ids"]
    assert_right(model, clean, [[0, 4, 5]] * 2, "bert.encoder.layer.0", input_ids=ids, attention_mask=mask)


def test_the_mask_of_full_attention_is_the_one_that_is_read():
    """By a window of a single token every token would be a document of its own."""
    looks = causal(batch(*LENGTHS, side="left")["attention_mask"])
    masks = {"sliding_attention": torch.eye(6).bool() & looks, "full_attention": looks}
    valid, starts = valid_columns(masks, 2, 6, 0, looks.device)
    assert valid.sum(1).tolist() == [6, 4]
    assert starts.sum(1).tolist() == [1, 1]
    assert valid_columns({"sliding_attention": looks}, 2, 6, 0, looks.device)[0].equal(valid)
    assert valid_columns({**masks, "full_attention": None}, 2, 6, 0, looks.device)[0].all()
    assert valid_columns({"sliding_attention": looks, "chunked_attention": looks}, 2, 6, 0, looks.device) is None


@pytest.mark.parametrize("hidden", [-torch.inf, -1e9, -1e4], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mask_that_holds_biases_too_is_read(side, hidden):
    """As of ALiBi, or of relative positions: only what is far below zero hides a token."""
    inputs = batch(*LENGTHS, side=side)
    looks = causal(inputs["attention_mask"], pads_see_themselves=True)
    bias = -0.5 * (torch.arange(6)[:, None] - torch.arange(6)).clamp(min=0)
    mask = torch.where(looks, bias, torch.tensor(hidden))
    expected = LEFT if side == "left" else RIGHT
    assert_right(family(), tiny_model("llama"), expected, input_ids=inputs["input_ids"], attention_mask=mask)


@pytest.mark.parametrize("form", ["bool", "additive", "additive, of one row"])
def test_a_mask_that_is_the_same_for_every_token_is_read(form):
    """[B, 1, 1, S], as encoders make it of a mask [B, S]."""
    inputs = batch(*((4, 4) if "one row" in form else LENGTHS), side="right")
    mask = inputs["attention_mask"].bool()[:, None, None]
    ids, expected = inputs["input_ids"], RIGHT
    if "one row" in form:
        ids, mask, expected = (
            torch.nn.functional.pad(ids, (0, 2)),
            torch.tensor([1, 1, 1, 1, 0, 0]).bool(),
            [[0, 2, 3]] * 2,
        )
        mask = mask[None, None, None]
    model = reft_model(tiny_model("bert"), positions="f1+l2")
    mask = mask if form == "bool" else additive(mask)
    assert_right(model, tiny_model("bert"), expected, "bert.encoder.layer.0", input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("fill", [False, True])
def test_a_4d_mask_as_wide_as_a_static_cache_is_read(fill):
    model, clean = family(), tiny_model("llama")
    inputs = batch(*LENGTHS, side="left")
    looks = torch.full((2, 1, 6, 16), False)
    looks[..., :6] = causal(inputs["attention_mask"], pads_see_themselves=fill)
    assert_right(
        model,
        clean,
        LEFT,
        input_ids=inputs["input_ids"],
        attention_mask=additive(looks),
        past_key_values=lambda: StaticCache(config=clean.config, max_cache_len=16),
    )


def blocks(*lengths: int) -> torch.Tensor:
    """Bool [1, 1, S, S]: documents that do not see each other."""
    looks = torch.block_diag(*(torch.ones(n, n) for n in lengths)).bool()
    return torch.tril(looks)[None, None]


@pytest.mark.parametrize("positions_restart", [False, True])
@pytest.mark.parametrize("labelled", [False, True])
def test_documents_of_a_block_diagonal_mask_are_documents(positions_restart, labelled):
    model, clean = family(), tiny_model("llama")
    lengths = (5, 4)
    ids = batch(9)["input_ids"]
    extra = {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None]} if positions_restart else {}
    expected = [[0, 3, 4, 5, 7, 8]]
    if labelled:
        answers = torch.tensor([[0, 0, 0, 1, 1, 0, 0, 1, 1]]).bool()
        extra["labels"] = ids.masked_fill(~answers, -100)
        expected = [[0, 1, 2, 5, 6]]
    assert_right(model, clean, expected, input_ids=ids, attention_mask=blocks(*lengths), use_cache=False, **extra)


def test_a_causal_4d_mask_makes_one_document_wherever_position_ids_restart():
    model, clean = family(), tiny_model("llama")
    ids = batch(9)["input_ids"]
    restarted = torch.cat([torch.arange(5), torch.arange(4)])[None]
    mask = causal(torch.ones(1, 9))
    with torch.no_grad():  # the second part sees the first
        whole = clean(ids, attention_mask=mask, position_ids=restarted, use_cache=False).logits
        alone = clean(ids[:, 5:], use_cache=False).logits
    assert (whole[:, 5:] - alone).abs().max() > 1e-3
    assert_right(model, clean, [[0, 7, 8]], input_ids=ids, attention_mask=mask, position_ids=restarted, use_cache=False)


# Other forms.


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_masks_of_each_layer_type_are_read(side):
    settings = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    clean = tiny_model("qwen2", **settings)
    model = reft_model(tiny_model("qwen2", **settings), positions="f1+l2", task_type="CAUSAL_LM")
    inputs = batch(*LENGTHS, side=side)
    masks = create_masks_for_generate(
        clean.config,
        clean.get_input_embeddings()(inputs["input_ids"]).detach(),
        inputs["attention_mask"],
        None,
        position_ids=torch.arange(6)[None],
    )
    assert isinstance(masks, dict)
    expected = LEFT if side == "left" else RIGHT
    assert_right(model, clean, expected, input_ids=inputs["input_ids"], attention_mask=masks, use_cache=False)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_3d_mask_of_an_encoder_is_read(side):
    valid = batch(*LENGTHS, side=side)["attention_mask"].bool()
    mask = (valid[:, None, :] & valid[:, :, None]).long()
    found, _ = valid_columns(mask, *valid.shape, 0, valid.device)
    assert torch.equal(found, valid) and not valid.all()


class Unreadable:
    """A mask that only the model's own attention understands, as flex attention's BlockMask."""

    def __init__(self, mask):
        self.mask = mask


def model_with_masks_of_its_own(**settings):
    """A llama whose forward takes `Unreadable` masks."""

    def unpack(module, args, kwargs):
        mask = kwargs.get("attention_mask")
        return args, {**kwargs, "attention_mask": mask.mask if isinstance(mask, Unreadable) else mask}

    base = tiny_model("llama")
    base.model.register_forward_pre_hook(unpack, with_kwargs=True)
    return base if not settings else reft_model(base, task_type="CAUSAL_LM", **settings)


def test_a_mask_that_cannot_be_read_raises_in_training_and_warns_once_otherwise():
    model = model_with_masks_of_its_own(positions="f1+l2")
    inputs = batch(*LENGTHS, side="left")
    mask = Unreadable(inputs["attention_mask"])
    with pytest.warns(UserWarning, match="attention_mask"), torch.no_grad():
        model(input_ids=inputs["input_ids"], attention_mask=mask)
    with warnings.catch_warnings(), torch.no_grad():  # once only
        warnings.simplefilter("error", UserWarning)
        model(input_ids=inputs["input_ids"], attention_mask=mask)
    model.train()
    labels = inputs["input_ids"].masked_fill(torch.arange(6) < 4, -100)
    with pytest.raises(ValueError, match=r"attention_mask[\s\S]*intervention_locations"):
        model(input_ids=inputs["input_ids"], attention_mask=mask, labels=labels)


def test_locations_are_used_whatever_the_mask():
    model = model_with_masks_of_its_own(positions="f1+l2")
    inputs = batch(*LENGTHS, side="left")
    mask = Unreadable(inputs["attention_mask"])
    locations = torch.tensor([[0, 5], [2, 3]])
    for training in (False, True):
        model.train(training)
        with warnings.catch_warnings(), spied(model, tiny_model("llama")) as calls, torch.no_grad():
            warnings.simplefilter("error", UserWarning)
            model(input_ids=inputs["input_ids"], attention_mask=mask, intervention_locations=locations)
        assert calls == [[[0, 5], [2, 3]]]
