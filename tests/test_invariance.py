"""The result of an adapter depends on the text alone: not on padding, batch mates or packing."""

import threading

import architectures
import pytest
import torch
import transformers
from conftest import HIDDEN, batch, logits, reft_model, tiny_model

from peft_reft.positions import IGNORED
from peft_reft.tuner.injection import state_of

FAMILIES = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "gpt2": {},
    "bert": {"head": "masked"},
}
POSITIONS = ("f2+l2", "l3", "f1+m2+l1", "e3", "all")
LENGTHS = (9, 1, 4, 2, 7)


def family(name, **settings):
    """A tiny model of a family with a random adapter."""
    changes = dict(FAMILIES[name])
    model = tiny_model(name, changes.pop("head", None), **changes)
    return reft_model(model, task_type=None if name == "bert" else "CAUSAL_LM", **settings)


def rows_alone(model, inputs):
    """Logits of each row run by itself, without padding."""
    rows = zip(inputs["input_ids"], inputs["attention_mask"])
    return [logits(model, {"input_ids": row[mask.bool()][None]})[0] for row, mask in rows]


def assert_rows(got, mask, expected, atol=2e-5):
    for row, (found, wanted) in enumerate(zip(got, expected)):
        valid = mask[row].bool()
        torch.testing.assert_close(
            found[valid], wanted, rtol=1e-4, atol=atol, msg=f"row {row} differs from itself alone"
        )


def assert_adapter_matters(model, inputs, got, atol=1e-3):
    with model.disable_adapter():
        base = logits(model, inputs)
    valid = inputs["attention_mask"].bool()
    assert (got - base).abs()[valid].max() > atol


def pad_both_sides(inputs):
    """The same rows with padding on the left and on the right."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    width = ids.shape[1] + 3
    moved = {"input_ids": torch.zeros(len(ids), width, dtype=torch.long)}
    moved["attention_mask"] = torch.zeros_like(moved["input_ids"])
    for row, length in enumerate(mask.sum(1).tolist()):
        start = min(1 + row % 3, width - length)
        moved["input_ids"][row, start : start + length] = ids[row][mask[row].bool()]
        moved["attention_mask"][row, start : start + length] = 1
    return moved


@pytest.mark.parametrize("share_weights", [True, False])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_gives_the_same_logits_alone_and_in_any_padded_batch(name, positions, share_weights):
    model = family(name, positions=positions, share_weights=share_weights)
    right = batch(*LENGTHS)
    for inputs in (right, batch(*LENGTHS, side="left"), pad_both_sides(right)):
        # The base model's own positions have to count over the tokens, too.
        ids = {"position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}
        got = logits(model, {**inputs, **ids})
        assert_rows(got, inputs["attention_mask"], rows_alone(model, inputs))
        assert_adapter_matters(model, {**inputs, **ids}, got)


@pytest.mark.parametrize("share_weights", [True, False])
@pytest.mark.parametrize("kind", ["loreft", "noreft", "direft", "odireft", "consreft", "lobireft"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_intervention_gives_a_row_the_same_logits_in_any_padded_batch(name, kind, share_weights):
    model = family(name, positions="f2+l1", intervention=kind, share_weights=share_weights)
    right = batch(*LENGTHS)
    for inputs in (right, batch(*LENGTHS, side="left"), pad_both_sides(right)):
        ids = {"position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}
        got = logits(model, {**inputs, **ids})
        assert_rows(got, inputs["attention_mask"], rows_alone(model, inputs))
        assert_adapter_matters(model, {**inputs, **ids}, got)


@pytest.mark.parametrize("positions", ["f2+l2", "l3", "all"])
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_a_decoder_that_classifies_its_encoders_input_counts_no_padding(name, positions):
    model = reft_model(architectures.tiny_model(name, "sequence"), task_type="SEQ_CLS", positions=positions)
    inputs = architectures.batch_for(model.get_base_model(), "sequence", LENGTHS).inputs
    assert "decoder_input_ids" not in inputs  # the model makes them of its input
    got = logits(model, inputs)
    rows = [row[mask.bool()][None] for row, mask in zip(inputs["input_ids"], inputs["attention_mask"])]
    alone = torch.cat([logits(model, {"input_ids": row}) for row in rows])  # where every token counts
    torch.testing.assert_close(got, alone, rtol=1e-4, atol=2e-5)
    with model.disable_adapter():
        assert (logits(model, inputs) - got).abs().amax(1).min() > 1e-4


def test_classes_as_many_as_a_decoder_has_tokens_are_none_of_its_tokens():
    config = architectures.tiny_config("bart")
    config.num_labels, config.problem_type = max(LENGTHS), "multi_label_classification"
    torch.manual_seed(0)
    base = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    model = reft_model(base, task_type="SEQ_CLS", positions="l2")
    inputs = architectures.batch_for(base, "sequence", LENGTHS).inputs
    classes = torch.ones(len(LENGTHS), max(LENGTHS))
    assert torch.equal(logits(model, inputs, labels=classes), logits(model, inputs))


@pytest.mark.parametrize("name", ["xlm", "flaubert", "xlnet"])
def test_padding_that_a_model_takes_under_a_name_of_its_own_is_padding(name):
    model = reft_model(architectures.tiny_model(name, "sequence"), task_type="SEQ_CLS", positions="f1+l2").base_model
    inputs = batch(*LENGTHS)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    own = {"input_mask": 1.0 - mask} if name == "xlnet" else {"lengths": mask.sum(1)}
    got = model.model.transformer(ids, **own).last_hidden_state
    expected = model.model.transformer(ids, attention_mask=mask.float()).last_hidden_state
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()])
    ignored = model.model.transformer(ids, attention_mask=torch.ones_like(mask).float()).last_hidden_state
    assert (got - ignored)[mask.bool()].abs().max() > 1e-2


def packed(lengths, seed=3):
    """Documents in one row, and the descriptions by which trainers hand them over."""
    generator = torch.Generator().manual_seed(seed)
    documents = [torch.randint(3, 100, (n,), generator=generator) for n in lengths]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    descriptions = {
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "seq_idx": torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None].int(),
    }
    return documents, descriptions


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("by", ["position_ids", "cu_seq_lens", "all"])
@pytest.mark.parametrize("positions", [*POSITIONS, "f1+l1+d2"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_packed_documents_give_the_same_logits_as_documents_alone(name, positions, by, labelled):
    model = family(name, positions=positions)
    lengths = (5, 1, 8, 3)
    documents, descriptions = packed(lengths)
    # The base separates documents by position_ids, so these are always there.
    names = {"position_ids": ["position_ids"], "cu_seq_lens": ["position_ids", "cu_seq_lens_q", "cu_seq_lens_k"]}
    names["cu_seq_lens"] += ["max_length_q", "max_length_k"]
    chosen = {name: value for name, value in descriptions.items() if name in names.get(by, descriptions)}
    prompts = (2, 1, 5, 3)
    labels = [torch.where(torch.arange(len(d)) < p, IGNORED, d) for d, p in zip(documents, prompts)]
    kwargs = {"labels": torch.cat(labels)[None]} if labelled else {}
    got = logits(model, {"input_ids": torch.cat(documents)[None], **chosen, **kwargs}, use_cache=False)
    parts = got[0].split(list(lengths))
    changes = []
    for document, label, part in zip(documents, labels, parts):
        own = {"labels": label[None]} if labelled else {}
        alone = logits(model, {"input_ids": document[None], **own}, use_cache=False)[0]
        torch.testing.assert_close(part, alone, rtol=1e-4, atol=2e-5)
        with model.disable_adapter():
            changes.append((logits(model, {"input_ids": document[None]})[0] - alone).abs().max())
    assert max(changes) > 1e-3  # e3 names nothing in a short prompt


@pytest.mark.parametrize("positions", ["f2+l2", "all", "f1+d"])
def test_tokens_that_no_term_names_keep_their_hidden_states_bit_for_bit(positions):
    model = family("llama", positions=positions, layers_to_transform=0)
    inputs = batch(8, 5)
    labels = torch.where(torch.arange(8) < 4, IGNORED, inputs["input_ids"])
    seen = {}
    block = model.get_base_model().model.layers[0]
    handle = block.register_forward_hook(lambda module, args, output: seen.update(out=output.clone()))
    logits(model, inputs, labels=labels)
    edited = seen["out"]
    with model.disable_adapter():
        logits(model, inputs, labels=labels)
    handle.remove()
    same = (seen["out"] == edited).all(-1)
    prompt = torch.arange(8) < 4
    named = {"f2+l2": prompt, "all": prompt, "f1+d": (torch.arange(8) == 0) | ~prompt}[positions]
    expected = ~named.expand(2, 8) | ~inputs["attention_mask"].bool()
    assert torch.equal(same, expected)


def test_labels_locations_and_shift_labels_say_the_same():
    model = family("llama", positions="f2+l2", share_weights=False)
    inputs = batch(8, 6, side="left")
    prompts = inputs["attention_mask"].bool() & (torch.arange(8) < 5)
    labels = torch.where(prompts | ~inputs["attention_mask"].bool(), IGNORED, inputs["input_ids"])
    by_labels = logits(model, inputs, labels=labels)
    by_locations = logits(model, inputs, intervention_locations=torch.tensor([[[0, 1], [3, 4]], [[2, 3], [4, -1]]]))
    both = logits(
        model,
        inputs,
        labels=torch.full_like(labels, IGNORED),
        intervention_locations=torch.tensor([[[0, 1], [3, 4]], [[2, 3], [4, -1]]]),
    )
    shifted = torch.cat([labels[:, 1:], torch.full((2, 1), IGNORED)], 1)
    by_shift = logits(model, inputs, shift_labels=shifted)
    for other in (by_locations, both, by_shift):
        torch.testing.assert_close(other, by_labels)
    assert (by_labels - logits(model, inputs)).abs().max() > 1e-3  # without any of them, the whole row is the prompt


@pytest.mark.parametrize(("labels", "column"), [([5, 6, 7, 8], 0), ([-100, 5, 6, 7], 1), ([-100, -100, 5, 6], 2)])
def test_a_decoders_prompt_ends_with_the_token_that_predicts_its_first_label(labels, column):
    model = reft_model(tiny_model("t5"), task_type="SEQ_2_SEQ_LM", positions="l1")
    base, seen = model.get_base_model(), []
    handle = base.decoder.block[0].register_forward_hook(lambda module, args, output: seen.append(output[0].clone()))
    with torch.no_grad():
        encoded = base.encoder(batch(7)["input_ids"])
        model(encoder_outputs=encoded, labels=torch.tensor([labels]))
        with model.disable_adapter():
            model(encoder_outputs=encoded, labels=torch.tensor([labels]))
    handle.remove()
    changed = (seen[0] != seen[1]).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [column]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_edits_the_same_tokens(dtype):
    model = family("llama", positions="f2+l2")
    inputs = batch(*LENGTHS, side="left")
    with torch.autocast("cpu", dtype=dtype):
        got = logits(model, inputs).float()
    exact = logits(model, inputs)
    valid = inputs["attention_mask"].bool()
    assert (got - exact).abs()[valid].max() < 0.1 * exact.abs().max()
    with model.disable_adapter():
        base = logits(model, inputs)
    assert (exact - base).abs()[valid].max() > 0.3 * exact.abs().max()  # far more than autocast's error


@pytest.mark.parametrize("positions", ["f2+l2", "all", "f1+m2+l1"])
def test_a_compiled_model_gives_the_same_logits_without_graph_break_or_recompilation(positions):
    torch._dynamo.reset()
    model = family("llama", positions=positions)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=False):
        for lengths in ((7, 4), (7, 2)):
            inputs = batch(*lengths, side="left")
            torch.testing.assert_close(logits(compiled, inputs), logits(model, inputs))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (1, 3, 5):
            inputs = batch(7, length, side="left")
            got = logits(compiled, inputs)
            torch.testing.assert_close(got, logits(model, inputs))
    assert_adapter_matters(model, inputs, got)


def test_threads_do_not_see_each_others_positions():
    model = family("llama", positions="f2+l2")
    batches = [batch(3 + i, 9 - i, side=("left", "right")[i % 2], seed=i) for i in range(6)]
    expected = [logits(model, inputs) for inputs in batches]
    failures = []

    def run(number):
        for _ in range(10):
            if not torch.allclose(logits(model, batches[number]), expected[number], atol=1e-5):
                failures.append(number)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("inner_lengths", [(6, 5, 2), (9, 2)], ids=["another shape", "the same shape"])
def test_a_call_within_a_call_has_positions_of_its_own(inner_lengths):
    model = family("llama", positions="f2+l2")
    outer, inner = batch(9, 4, side="left"), batch(*inner_lengths, seed=7)
    expected, expected_inner = logits(model, outer), logits(model, inner)
    found = []

    def call_again(module, args, output):
        handle.remove()
        found.append(logits(model, inner))

    handle = model.get_base_model().model.layers[1].register_forward_hook(call_again)
    torch.testing.assert_close(logits(model, outer), expected)
    torch.testing.assert_close(found[0], expected_inner)


def test_a_forward_that_fails_leaves_nothing_behind():
    model = family("llama", positions="f2+l2")
    inputs = batch(9, 4, side="left")
    expected = logits(model, inputs)

    def fail(module, args, output):
        raise RuntimeError("in the middle of a forward")

    for module in (model.get_base_model().model.layers[1], model.get_base_model().lm_head):
        handle = module.register_forward_hook(fail)
        for call in (lambda: model(**batch(5, 5)), lambda: model.generate(**batch(5, 5), max_new_tokens=2)):
            with pytest.raises(RuntimeError, match="in the middle"):
                call()
        handle.remove()
        assert state_of(model).running.context is None
        torch.testing.assert_close(logits(model, inputs), expected)
    with pytest.raises(ValueError, match="another batch"):
        model(**inputs, intervention_locations=torch.zeros(5, 1, dtype=torch.long))
    assert state_of(model).running.context is None
    torch.testing.assert_close(logits(model, inputs), expected)


@pytest.mark.parametrize("whole", [True, False], ids=["model", "backbone"])
def test_an_interrupted_forward_does_not_lend_its_positions_to_the_next(whole):
    model = family("llama", positions="f2+l2")
    called = model if whole else model.get_base_model().model
    interrupted, inputs = batch(9, 4, side="left"), batch(9, 6)
    expected = logits(called, inputs)

    def interrupt(module, args, output):
        raise KeyboardInterrupt  # torch calls no hooks for it

    handle = model.get_base_model().model.layers[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        called(**interrupted)
    handle.remove()
    torch.testing.assert_close(logits(called, inputs), expected)


@pytest.mark.parametrize(
    ("locations", "message"),
    [
        (torch.tensor([[9], [0]]), "holds 9, but the rows have the columns 0 to 8"),
        (torch.tensor([[0], [-2]]), "holds -2"),
        (torch.zeros(3, 1, dtype=torch.long), "3 rows, but the batch has 2"),
        (torch.zeros(2, 1), "float32"),
        (torch.tensor([[1] + [0] * 8] * 2).bool(), "torch.bool"),  # a mask of columns
        (torch.zeros(2, 1, 1, 1, dtype=torch.long), r"shape \(2, 1, 1, 1\)"),
        ([[0], [1]], "LongTensor"),
    ],
)
def test_locations_that_cannot_be_are_refused_with_the_value_and_the_rule(locations, message):
    model = family("llama", positions="f2+l2")
    with pytest.raises(ValueError, match=message) as error:
        model(**batch(9, 4), intervention_locations=locations)
    assert "-1 = unused" in str(error.value)


@pytest.mark.parametrize("share_weights", [True, False])
def test_a_column_that_is_named_twice_is_edited_once_by_the_first(share_weights):
    model = family("llama", positions="f2+l2", share_weights=share_weights)
    inputs = batch(9, 4)
    once = torch.tensor([[[0, 5], [7, -1]], [[1, -1], [2, 3]]])
    twice = torch.tensor([[[0, 5], [5, 7]], [[1, 1], [2, 3]]])
    once[0, 1] = torch.tensor([-1, 7])
    got = logits(model, inputs, intervention_locations=twice)
    torch.testing.assert_close(got, logits(model, inputs, intervention_locations=once))
    assert_adapter_matters(model, inputs, got)


def test_locations_for_other_groups_are_refused():
    model = family("llama", positions="f2+l2", share_weights=False)
    with pytest.raises(ValueError, match=r"cannot be split over the 2 groups.*\[B, 2, P\]"):
        model(**batch(9, 4), intervention_locations=torch.zeros(2, 3, dtype=torch.long))


def test_a_batch_with_one_row_without_locations_leaves_that_row_alone():
    model = family("llama", positions="f2+l2")
    inputs = batch(6, 6)
    got = logits(model, inputs, intervention_locations=torch.tensor([[0, 5], [-1, -1]]))
    with model.disable_adapter():
        base = logits(model, inputs)
    assert torch.equal(got[1], base[1])
    assert (got[0] - base[0]).abs().max() > 1e-3


def test_padding_that_is_not_a_number_spoils_neither_edits_nor_gradients(monkeypatch):
    model = family("llama", positions="f4+l4", layers_to_transform=0)
    inputs = batch(9, 2, side="left")
    valid = inputs["attention_mask"].bool()
    hidden = torch.full((2, 9, HIDDEN), torch.nan)
    hidden[valid] = torch.randn(int(valid.sum()), HIDDEN)
    block = model.get_base_model().model.layers[0]
    seen = {}
    monkeypatch.setattr(block.forward, "replaced", lambda *args, **kwargs: hidden)
    handle = block.register_forward_hook(lambda module, args, output: seen.update(out=output))
    model(**inputs)
    handle.remove()
    assert torch.isfinite(seen["out"][valid]).all()
    assert not torch.equal(seen["out"][valid], hidden[valid])
    seen["out"][valid].sum().backward()
    grads = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert any(grad.abs().max() > 0 for grad in grads)
