"""A forward belongs to `generate` only if it is one of its steps; a state is a continuation like a cache."""

import warnings
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import batch, logits, randomize, reft_model, tiny_model
from edit_spy import EditSpy, spied
from peft import get_peft_model
from slow_places import places_in_generate
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from peft_reft import ReftConfig
from peft_reft.context.arguments import has_state, past_length
from peft_reft.context.generate import Generation
from peft_reft.positions import Tokens

NEW = 4


def family(**settings):
    return reft_model(
        tiny_model("llama", eos_token_id=None), **{"positions": "f1+l2", "task_type": "CAUSAL_LM", **settings}
    )


def generated(model, inputs, **settings):
    torch.manual_seed(0)
    return model.generate(**inputs, max_new_tokens=NEW, do_sample=False, pad_token_id=0, **settings)


def by_forward(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


class AsksAgain(LogitsProcessor):
    """Calls the same model on another prompt in every step, and keeps what it answers."""

    def __init__(self, model, inputs):
        self.model, self.inputs, self.seen = model, inputs, []

    def __call__(self, input_ids, scores):
        self.seen.append(by_forward(self.model, **self.inputs))
        return scores


class AsksOnStopping(StoppingCriteria):
    def __init__(self, model, inputs):
        self.asks = AsksAgain(model, inputs)

    def __call__(self, input_ids, scores, **kwargs):
        self.asks(input_ids, scores)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


OTHER = {
    "another length": batch(5, 3, seed=9),
    "the same shape": batch(6, 4, side="left", seed=9),
    "more rows": batch(7, 2, 4, seed=9),
    "one token": batch(1, seed=9),
    "as long as the row becomes": batch(7, 7, seed=9),
}


@pytest.mark.parametrize("who", ["logits processor", "stopping criterion"])
@pytest.mark.parametrize("other", OTHER)
@pytest.mark.parametrize(
    ("positions", "settings"), [("f1+l2", {}), ("f1+l2", {"use_cache": False}), ("l1+d", {"num_beams": 2})], ids=str
)
def test_a_forward_in_a_step_of_generate_is_a_forward_of_its_own(positions, settings, other, who):
    for called in ("peft", "base") if not settings else ("peft",):
        model = family(positions=positions)
        inner = model if called == "peft" else model.get_base_model()
        inputs = batch(6, 4, side="left")
        expected_tokens = generated(model, inputs, **settings)
        expected = by_forward(inner, **OTHER[other])
        if who == "logits processor":
            asks = AsksAgain(inner, OTHER[other])
            extra = {"logits_processor": LogitsProcessorList([asks])}
        else:
            criterion = AsksOnStopping(inner, OTHER[other])
            asks, extra = criterion.asks, {"stopping_criteria": StoppingCriteriaList([criterion])}
        got = generated(model, inputs, **settings, **extra)
        assert torch.equal(got, expected_tokens)
        assert len(asks.seen) == NEW
        for seen in asks.seen:
            torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-4)
        with model.disable_adapter():
            assert (by_forward(inner, **OTHER[other]) - expected).abs().max() > 1e-3


def test_a_forward_with_labels_in_a_step_of_generate_uses_them():
    model = family(positions="l1")
    other = batch(8, seed=9)
    other["labels"] = other["input_ids"].masked_fill(torch.arange(8) < 5, -100)
    expected = by_forward(model, **other)
    asks = AsksAgain(model, other)
    generated(model, batch(6), logits_processor=LogitsProcessorList([asks]))
    for seen in asks.seen:
        torch.testing.assert_close(seen, expected)


def test_a_generate_in_a_step_of_generate_has_a_prompt_of_its_own():
    model = family(positions="f1+l1+d2")
    other = batch(5, seed=9)
    expected, expected_inner = generated(model, batch(6)), generated(model, other)
    seen = []

    class Generates(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(generated(model, other))
            return scores

    got = generated(model, batch(6), logits_processor=LogitsProcessorList([Generates()]))
    assert torch.equal(got, expected)
    assert len(seen) == NEW
    assert all(torch.equal(tokens, expected_inner) for tokens in seen)


class Guided:
    """Guidance by hand: the prompt and a negative prompt, each by whole forwards with columns that are named."""

    def __init__(self, model, scale):
        self.model, self.scale = model, scale

    def __call__(self, ids, negative, own, others):
        """Greedy tokens; `own` and `others` are the columns edited in the two prompts."""
        rows = [ids, negative]
        for _ in range(NEW):
            conditional, unconditional = (
                by_forward(self.model, input_ids=row, intervention_locations=torch.tensor([columns]), use_cache=False)[
                    :, -1
                ].log_softmax(-1)
                for row, columns in zip(rows, (own, others))
            )
            token = (self.scale * (conditional - unconditional) + unconditional).argmax(-1, keepdim=True)
            rows = [torch.cat([row, token], dim=1) for row in rows]
        return rows[0][:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("length", [3, 6, 8])
def test_a_negative_prompt_of_guidance_is_a_prompt_of_its_own(length, use_cache):
    """The first forward of the negative prompt edits its own f1+l2, and later tokens are generated ones."""
    model = family()
    ids, negative = batch(6)["input_ids"], batch(length, seed=3)["input_ids"]
    expected = Guided(model, 3.0)(ids, negative, [0, 4, 5], sorted({0, length - 2, length - 1}))
    with spied(model, tiny_model("llama", eos_token_id=None)) as calls:
        got = model.generate(
            input_ids=ids,
            negative_prompt_ids=negative,
            guidance_scale=3.0,
            max_new_tokens=NEW,
            do_sample=False,
            use_cache=use_cache,
        )
    assert [[0, 4, 5]] in calls
    assert [sorted({0, length - 2, length - 1})] in calls
    if use_cache:  # without a cache the negative row is run whole again, and what was generated is not told from it
        assert got[:, 6:].tolist() == expected


# States that are no key/value caches.


RECURRENT = {
    "mamba": {"state_size": 8, "expand": 2},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2, "chunk_size": 4},
    "falcon_mamba": {"state_size": 8},
    "rwkv": {"attention_hidden_size": 32, "context_length": 64, "rescale_every": 0},
}


def recurrent(name, **settings):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        name, vocab_size=100, hidden_size=32, num_hidden_layers=3, pad_token_id=0, eos_token_id=None, **RECURRENT[name]
    )
    base = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    model = get_peft_model(base, ReftConfig(task_type="CAUSAL_LM", r=2, **settings)).eval()
    return randomize(model)


class StatesOfLayers:
    """A cache of layers with states, as transformers' own say whether they hold one: by name, or as a whole."""

    def __init__(self, *states):
        self.layers = [SimpleNamespace(has_previous_state=state) for state in states]


@pytest.mark.parametrize(
    ("cache", "columns", "continues"),
    [
        (((torch.zeros(2, 4, 3, 8),) * 2,) * 2, 3, False),  # keys and values of old: [B, H, S, d] for each layer
        (StatesOfLayers({"conv": True, "recurrent": False}), 0, True),
        (StatesOfLayers({"conv": False}, False), 0, False),
        (StatesOfLayers(False, True), 0, True),
        (SimpleNamespace(seqlen_offset=0), 0, False),
        (SimpleNamespace(seqlen_offset=5), 0, True),
    ],
    ids=["keys and values", "one of two states", "no state", "a state", "an offset of 0", "an offset"],
)
def test_what_kinds_of_caches_say_of_the_past(cache, columns, continues):
    for name in ("past_key_values", "cache", "cache_params"):
        assert past_length({name: cache}, 4, 0) == columns
        assert has_state({name: cache}) == continues


def test_locations_behind_a_cache_are_columns_of_the_whole_row():
    model, ids = family(), batch(9, 9)["input_ids"]
    with torch.no_grad():
        cache = model(input_ids=ids[:, :5], use_cache=True).past_key_values
    given = {"input_ids": ids[:, 5:], "past_key_values": cache}
    with pytest.raises(ValueError, match="holds 9, but the rows have the columns 0 to 8"):
        model(**given, intervention_locations=torch.tensor([[9], [0]]))
    with spied(model, tiny_model("llama", eos_token_id=None)) as calls, torch.no_grad():
        model(**given, intervention_locations=torch.tensor([[2, 5, 8], [-1, 4, 7]]))
    assert calls == [[[0, 3], [2]]]


def test_padding_of_a_prompt_counts_as_none_where_a_model_does_not_look_at_the_mask():
    """RWKV runs it as tokens; the row's prompt begins behind it all the same."""
    model = recurrent("rwkv", positions="f1+l1+d2")
    ids = torch.cat([torch.zeros(1, 2, dtype=torch.long), batch(5)["input_ids"]], dim=1)
    got = model.generate(input_ids=ids, max_new_tokens=7, do_sample=False, pad_token_id=0)
    expected, steps = whole_forwards(model, ids, lambda columns: [2, 6, *range(8, columns, 2)])
    assert torch.equal(got, expected)
    _, others = whole_forwards(model, ids, lambda columns: [0, 6, *range(8, columns, 2)])
    assert not torch.equal(others[0], steps[0])


class TakesNoMask(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, past_key_values=None, inputs_embeds=None, position_ids=None, **kwargs):
        own = {"past_key_values": past_key_values, "inputs_embeds": inputs_embeds, "position_ids": position_ids}
        return super().forward(input_ids, **own, **kwargs)


def test_padding_of_a_prompt_counts_as_none_where_a_model_takes_no_mask():
    base = tiny_model("llama", eos_token_id=None)
    base.__class__ = TakesNoMask
    model = reft_model(base, positions="f1+l1", task_type="CAUSAL_LM")
    ids = torch.cat([torch.zeros(1, 2, dtype=torch.long), batch(5)["input_ids"]], dim=1)
    with spied(model, tiny_model("llama", eos_token_id=None)) as calls:
        generated(model, {"input_ids": ids})
    assert calls == [[[2, 6]], *[[[]]] * (NEW - 1)]


def test_new_tokens_behind_a_cache_end_the_whole_row_where_a_model_takes_no_mask():
    base = tiny_model("llama", eos_token_id=None)
    base.__class__ = TakesNoMask
    model, ids = reft_model(base, positions="f1+l1", task_type="CAUSAL_LM"), batch(7)["input_ids"]
    with torch.no_grad():
        cache = model(input_ids=ids[:, :4], use_cache=True).past_key_values
    with spied(model, tiny_model("llama", eos_token_id=None)) as calls:
        generated(model, {"input_ids": ids[:, 4:], "past_key_values": cache})
    assert calls == [[[2]], *[[[]]] * (NEW - 1)]


def test_a_cache_that_counts_on_another_device_is_asked_once(monkeypatch):
    """In its first step; ids that are only those of generated tokens do not tell how many columns there were."""
    state = family(positions="f1+l1").get_base_model().forward.state
    generation = Generation(state, Tokens(torch.ones(1, 7, dtype=torch.bool), given=True))
    generation.guesses = True
    monkeypatch.setattr("peft_reft.context.generate.past_length", lambda *_: torch.tensor(4))
    none, embeds = torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, 3, 8)
    step = generation.step(False, none, {"is_first_iteration": True}, {"inputs_embeds": embeds})
    assert step.past == 4


def test_embeddings_have_one_row_for_each_of_the_batch_where_ids_have_several():
    config = transformers.MusicgenDecoderConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, num_codebooks=2
    )
    base = transformers.MusicgenForCausalLM(config)
    model = get_peft_model(base, ReftConfig(task_type="CAUSAL_LM", r=2, subspaces={"a": 1, "b": 1}))
    for given, rows in (({"inputs_embeds": torch.zeros(4, 5, 32)}, 4), ({"input_ids": torch.zeros(4, 5).long()}, 2)):
        with pytest.raises(ValueError, match=f"has 3 entries, but the batch has {rows} rows"):
            model.generate(**given, subspaces=["a"] * 3)
    ids = torch.tensor(
        [[9, 9, 5], [9, 9, 5], [4, 5, 6], [4, 5, 6]]
    )  # two rows of two codebooks, of which one is padded
    valid = base.generate._valid_columns({"input_ids": ids, "pad_token_id": 9})
    assert valid.tolist() == [[False, False, True], [True, True, True]]


def whole_forwards(model, ids, places):
    """Greedy tokens and logits by forwards over the whole rows, with the columns of `places(columns)` edited."""
    row, steps = ids, []
    for _ in range(7):
        columns = places(row.shape[1]) or [-1]
        locations = torch.tensor([columns] * len(row))
        steps.append(by_forward(model, input_ids=row, intervention_locations=locations, use_cache=False)[:, -1])
        row = torch.cat([row, steps[-1].argmax(-1, keepdim=True)], dim=1)
    return row, steps


@pytest.mark.parametrize("positions", ["d", "d2", "l1+d3", "f1+l1"])
@pytest.mark.parametrize("name", RECURRENT)
def test_generated_tokens_are_counted_with_a_recurrent_state_as_in_whole_forwards(name, positions):
    model = recurrent(name, positions=positions)
    ids = batch(6, 6)["input_ids"]
    settings = {"max_new_tokens": 7, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with model.disable_adapter():
        plain = model.generate(input_ids=ids, **settings)
        _, plain_steps = whole_forwards(model, ids, lambda columns: [])
    if any((one - other).abs().max() > 1e-2 for one, other in zip(plain.logits, plain_steps)):
        pytest.skip(f"this transformers' {name} does not continue its own state in generate")
    got = model.generate(input_ids=ids, **settings)
    config = model.peft_config["default"]
    row, steps = whole_forwards(model, ids, lambda columns: sorted(chain(*places_in_generate(config, 6, columns))))
    for step, (one, other) in enumerate(zip(got.logits, steps)):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3, msg=lambda m, s=step: f"step {s}: {m}")
    assert torch.equal(got.sequences, row)
    assert any((one - other).abs().max() > 1e-2 for one, other in zip(got.logits, plain.logits))


@pytest.mark.parametrize("positions", ["all", "f1+l1"])
@pytest.mark.parametrize("name", RECURRENT)
def test_a_forward_that_continues_a_recurrent_state_edits_nothing(name, positions):
    """With one token: the states of Mamba models are not continued with several, with an adapter or without."""
    model = recurrent(name, positions=positions)
    ids = batch(8)["input_ids"]
    argument = "state" if name == "rwkv" else "cache_params"
    with torch.no_grad():
        first = model(input_ids=ids[:, :7], use_cache=True)
        if argument not in first:
            pytest.skip(f"{name} returns no {argument}: {list(first)}")
        continued = model(input_ids=ids[:, 7:], **{argument: first[argument]}, use_cache=True).logits
        edited = list(range(7)) if positions == "all" else [0, 6]
        whole = model(input_ids=ids, intervention_locations=torch.tensor([edited]), use_cache=False).logits
        other = model(input_ids=ids, intervention_locations=torch.tensor([[*edited, 7]]), use_cache=False).logits
    torch.testing.assert_close(continued, whole[:, 7:], rtol=1e-3, atol=1e-3)
    assert (other[:, 7:] - continued).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba", "mamba2"])
def test_embeddings_of_a_prompt_count_as_its_ids_do_with_a_recurrent_state(name):
    """The ids of a step are then those of the generated tokens alone, and no cache tells how many columns there are."""
    model = recurrent(name, positions="l1+d2")
    ids = batch(6, 6)["input_ids"]
    settings = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    embeds = model.get_input_embeddings()(ids)
    by_ids, by_embeds = model.generate(input_ids=ids, **settings), model.generate(inputs_embeds=embeds, **settings)
    for one, other in zip(by_ids.logits, by_embeds.logits):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        plain = model.generate(input_ids=ids, **settings)
    assert any((one - other).abs().max() > 1e-2 for one, other in zip(plain.logits, by_ids.logits))


# One `generate` made of several.


def whisper():
    config = transformers.WhisperConfig(
        vocab_size=120,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=8,
        max_source_positions=50,
        max_target_positions=40,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
    )
    torch.manual_seed(0)
    model = transformers.WhisperForConditionalGeneration(config).eval()
    settings = model.generation_config
    settings.no_timestamps_token_id, settings.is_multilingual, settings.max_initial_timestamp_index = 5, False, 50
    settings.return_timestamps, settings.alignment_heads = True, [[0, 0]]
    settings.suppress_tokens = settings.begin_suppress_tokens = None
    settings.eos_token_id, settings.pad_token_id, settings.decoder_start_token_id, settings.max_length = 2, 0, 3, 40
    return model


def sound(frames: int) -> dict:
    torch.manual_seed(5)
    return {"input_features": torch.randn(1, 8, frames), "attention_mask": torch.ones(1, frames).long()}


@pytest.mark.parametrize("settings", [{}, {"use_cache": False}], ids=str)
def test_every_segment_of_whispers_long_form_has_its_decoders_prompt_edited(settings):
    model = reft_model(whisper(), positions="f1+l1", r=2, task_type="SEQ_2_SEQ_LM")
    spy = EditSpy(model, whisper(), "model.decoder.layers.0")
    encoder = EditSpy(model, whisper(), "model.encoder.layers.0")
    with torch.no_grad():
        model.generate(**sound(300), return_timestamps=True, max_new_tokens=5, return_segments=True, **settings)
    segments = len(encoder.calls)
    assert segments > 1  # else this is no long form
    assert all(call == [[0, 49]] for call in encoder.calls)
    # A segment begins with a forward that has no past: its first column is edited, whether or not steps are cached.
    begun = [call[0] for call, past in zip(spy.calls, spy.pasts) if past == 0]
    assert len(begun) >= segments
    assert all(columns and columns[0] == 0 for columns in begun)


def test_every_attempt_of_whispers_temperature_fallback_has_its_decoders_prompt_edited():
    model = reft_model(whisper(), positions="f1+l1", r=2, task_type="SEQ_2_SEQ_LM")
    spy = EditSpy(model, whisper(), "model.decoder.layers.0")
    encoder = EditSpy(model, whisper(), "model.encoder.layers.0")
    with torch.no_grad():
        model.generate(
            **sound(100),
            return_timestamps=True,
            max_new_tokens=5,
            temperature=(0.0, 0.5, 1.0),
            compression_ratio_threshold=-1.0,  # no attempt is good enough
            logprob_threshold=0.0,
            no_speech_threshold=1.0,
        )
    begun = [call[0] for call, past in zip(spy.calls, spy.pasts) if past == 0]
    assert len(begun) >= 2  # else nothing fell back
    assert len(encoder.calls) >= 1
    assert all(columns and columns[0] == 0 for columns in begun)


@pytest.mark.parametrize("prepares", [False, True])
def test_what_a_custom_generate_leaves_unused_is_said(prepares):
    model = reft_model(tiny_model("llama"), positions="l1", task_type="CAUSAL_LM")
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    found = []

    def loop(model, input_ids, **kwargs):
        own = {"attention_mask": kwargs["attention_mask"]}
        if prepares:
            own = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **own)
        found.append(model(**{"input_ids": input_ids, **own}).logits)
        return input_ids

    expected = logits(model, {**inputs, "intervention_locations": torch.tensor([[1]])})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.generate(**inputs, intervention_locations=torch.tensor([[1]]), custom_generate=loop)
    told = [str(warning.message) for warning in caught if "had no effect" in str(warning.message)]
    assert len(told) == (0 if prepares else 1)
    assert all("intervention_locations" in message for message in told)
    if prepares:
        torch.testing.assert_close(found[0], expected)
        assert (expected - logits(model, inputs)).abs().max() > 1e-3
