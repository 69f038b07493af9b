"""`generate` edits the prompt it was given, however it is run, and generated tokens only where a term asks for it."""

import threading

import pytest
import torch
import transformers
from conftest import batch, logits, randomize, reft_model, tiny_model
from edit_spy import spied
from peft import inject_adapter_in_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, GenerationConfig

from peft_reft import ReftConfig
from peft_reft.context.generate import DecoderPromptEntry

FAMILIES = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "gpt2": {},
}
POSITIONS = ("f2+l2", "l3", "f4+l4", "f1+m2", "f1+l1+d2", "all", "d")
NEW = 6


def family(name="llama", **settings):
    model = tiny_model(name, eos_token_id=None, **FAMILIES[name])
    return reft_model(model, task_type="CAUSAL_LM", **settings)


def greedy(model, inputs, **kwargs):
    """The generated tokens of each row."""
    torch.manual_seed(0)
    out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, **kwargs)
    width = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    return out[:, width:].tolist()


def by_hand(model, ids, terms):
    """Greedy continuation of one prompt by whole forwards with explicit locations: the oracle.

    Args:
        terms: function from prompt length and row length to the columns to edit.
    """
    row = ids.clone()
    for _ in range(NEW):
        locations = torch.tensor([terms(len(ids), len(row))], dtype=torch.long).reshape(1, -1)
        row = torch.cat(
            [row, logits(model, {"input_ids": row[None]}, intervention_locations=locations)[0, -1:].argmax(-1)]
        )
    return row[len(ids) :].tolist()


TERMS = {
    "f2+l2": lambda n, s: sorted({*range(min(2, n)), *range(max(n - 2, 0), n)}),
    "l3": lambda n, s: list(range(max(0, n - 3), n)),
    "f4+l4": lambda n, s: sorted({*range(min(4, n)), *range(max(n - 4, 0), n)}),
    "all": lambda n, s: list(range(n)),
    "d": lambda n, s: list(range(n, s)),
    "f1+l1+d2": lambda n, s: sorted({0, n - 1, *range(n + 1, s, 2)}),
    "f1+m2": lambda n, s: sorted({0, *range(max(0, (n - 2) // 2), min(n, max(0, (n - 2) // 2) + 2))}),
}


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_generation_equals_whole_forwards_with_the_edits_at_their_columns(name, positions):
    model = family(name, positions=positions)
    changed = []
    for length in (1, 3, 9):
        ids = batch(length, seed=length)["input_ids"][0]
        expected = by_hand(model, ids, TERMS[positions])
        assert greedy(model, {"input_ids": ids[None]}) == [expected]
        with model.disable_adapter():
            changed.append(greedy(model, {"input_ids": ids[None]}) != [expected])
    assert any(changed)


HOW = {
    "without a cache": {"use_cache": False},
    "chunked prefill": {"prefill_chunk_size": 4},
    "chunks of one token": {"prefill_chunk_size": 1},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "an empty cache": {"past_key_values": "empty"},
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_left_padded_batch_continues_like_its_rows_alone(name, positions, how):
    model = family(name, positions=positions)
    inputs = batch(9, 1, 4, side="left")
    kwargs = dict(HOW[how])
    if kwargs.get("past_key_values") == "empty":
        kwargs["past_key_values"] = DynamicCache(config=model.config)
    alone = [greedy(model, {"input_ids": ids[mask.bool()][None]})[0] for ids, mask in zip(*inputs.values())]
    assert greedy(model, inputs, **kwargs) == alone
    with model.disable_adapter():
        assert greedy(model, inputs) != alone


@pytest.mark.skipif(not torch.cuda.is_available(), reason="transformers offloads caches from a GPU only")
@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
def test_an_offloaded_cache_continues_like_the_usual_one(cache):
    model = family(positions="f2+l2").cuda()
    inputs = {name: tensor.cuda() for name, tensor in batch(9, 4, side="left").items()}
    assert greedy(model, inputs, cache_implementation=cache) == greedy(model, inputs)


def test_padding_is_inferred_as_transformers_infers_it():
    model = family(positions="f2+l2")
    inputs = batch(9, 4, side="left")
    expected = greedy(model, inputs)
    assert greedy(model, {"input_ids": inputs["input_ids"]}, pad_token_id=0) == expected
    with model.disable_adapter():
        assert greedy(model, inputs) != expected


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("shared", [1, 3, 6, 8])
def test_a_cached_shared_prefix_continues_like_one_prompt(positions, shared):
    model = family(positions=positions)
    ids = batch(9)["input_ids"]
    expected = greedy(model, {"input_ids": ids})
    # What the prefix edits within the shared part is known only with the whole prompt: hand its columns over.
    columns = [[c for c in TERMS[positions](9, 9) if c < shared]]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(
            input_ids=ids[:, :shared],
            past_key_values=cache,
            use_cache=True,
            intervention_locations=torch.tensor(columns, dtype=torch.long).reshape(1, -1),
        )
    assert cache.get_seq_length() == shared
    assert greedy(model, {"input_ids": ids}, past_key_values=cache) == expected


@pytest.mark.parametrize("positions", ["f2", "f2+l2", "l3"])
def test_a_system_prompt_run_once_serves_prompts_that_go_on_with_it(positions):
    model = family(positions=positions)
    system = batch(6)["input_ids"]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=system, past_key_values=cache, use_cache=True)  # its own first and last tokens are edited
    prompt = torch.cat([system, batch(4, seed=5)["input_ids"]], dim=1)
    got = greedy(model, {"input_ids": prompt}, past_key_values=cache)
    own = TERMS.get(positions, lambda n, s: [0, 1])
    edited = {*own(6, 6), *(c for c in own(10, 10) if c >= 6)}
    assert got == [by_hand(model, prompt[0], lambda n, s: sorted(edited))]


@pytest.mark.parametrize("positions", ["f2+l2", "f4+l4", "f1+d2"])
@pytest.mark.parametrize(
    "kwargs", [{"num_beams": 3}, {"num_beams": 3, "use_cache": False}, {"num_beams": 2, "num_return_sequences": 2}]
)
def test_beams_of_a_batch_continue_like_its_rows_alone(positions, kwargs):
    model = family(positions=positions)
    inputs = batch(9, 4, 6, side="left")
    times = kwargs.get("num_return_sequences", 1)
    got = greedy(model, inputs, **kwargs)
    alone = [
        tokens
        for ids, mask in zip(*inputs.values())
        for tokens in greedy(model, {"input_ids": ids[mask.bool()][None]}, **kwargs)
    ]
    assert len(got) == 3 * times
    assert got == alone
    with model.disable_adapter():
        assert greedy(model, inputs, **kwargs) != got


@pytest.mark.parametrize("positions", ["f2+l2", "l3", "all", "f1+l1+d2"])
def test_speculative_decoding_gives_the_same_tokens(positions):
    model = family(positions=positions)
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])  # repeats itself, so that prompt lookup has guesses
    expected = greedy(model, {"input_ids": ids})
    assert greedy(model, {"input_ids": ids}, prompt_lookup_num_tokens=3) == expected
    plain = tiny_model("llama", eos_token_id=None)
    assert greedy(model, {"input_ids": ids}, assistant_model=plain) == expected
    other = reft_model(tiny_model("llama", eos_token_id=None), seed=9, task_type="CAUSAL_LM", positions="l2")
    assert greedy(model, {"input_ids": ids}, assistant_model=other.get_base_model()) == expected
    assert greedy(model, {"input_ids": ids}, assistant_model=model.get_base_model()) == expected
    assert greedy(model, {"input_ids": ids}, assistant_early_exit=2) == expected  # its own first blocks guess
    with model.disable_adapter():
        assert greedy(model, {"input_ids": ids}) != expected


@pytest.mark.parametrize("start", [[0], []], ids=["start token", "put in front by generate"])
def test_a_decoder_s_prompt_of_several_tokens_is_one_with_guesses_too(start):
    """The first step holds guesses behind it, which are generated tokens."""
    model = reft_model(tiny_model("t5"), positions="l1", task_type="SEQ_2_SEQ_LM")
    decoder_ids = torch.tensor([[*start, 5, 6, 7]])
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8]]), "decoder_input_ids": decoder_ids}
    with spied(model, tiny_model("t5"), "decoder.block.0") as calls:
        model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, prompt_lookup_num_tokens=2)
    assert calls[0] == [[3]]
    assert calls[1:] and all(call == [[]] for call in calls[1:])


def test_a_transformers_that_makes_a_decoder_s_prompt_otherwise_is_told_where_that_matters(monkeypatch):
    """Its method is a private one: where it is gone, guesses cannot be told from the prompt."""
    monkeypatch.setattr(DecoderPromptEntry, "name", "_gone")
    model = reft_model(tiny_model("t5"), positions="l1", task_type="SEQ_2_SEQ_LM")
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8]])}
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with pytest.raises(RuntimeError, match=f"transformers {transformers.__version__} did not call _gone"):
        model.generate(**inputs, **settings, prompt_lookup_num_tokens=2)
    assert model.generate(**inputs, **settings).shape == (1, 5)


@pytest.mark.parametrize("start", [[0], []], ids=["start token", "put in front by generate"])
def test_a_decoder_s_prompt_that_is_run_in_chunks_is_one(start):
    model = reft_model(tiny_model("t5"), positions="f1+l1+d2", task_type="SEQ_2_SEQ_LM")
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "decoder_input_ids": torch.tensor([[*start, 5, 6, 7]])}
    with spied(model, tiny_model("t5"), "decoder.block.0") as calls:
        model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, prefill_chunk_size=3)
    assert calls == [[[0]], [[0]], [[]], [[0]]]  # columns of each chunk, then of each step


@pytest.mark.parametrize("positions", POSITIONS)
def test_embeddings_continue_like_the_tokens_they_stand_for(positions):
    model = family(positions=positions)
    inputs = batch(9, 4, side="left")
    expected = greedy(model, inputs)
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    assert greedy(model, {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}) == expected


def test_sampled_sequences_of_a_row_all_have_its_edits():
    model = family(positions="f2+l2")
    inputs = batch(9, 4, side="left")
    seen = []
    handle = model.get_base_model().lm_head.register_forward_hook(lambda m, args, out: seen.append(out[:, -1]))
    model.generate(**inputs, max_new_tokens=2, do_sample=True, num_return_sequences=3)
    handle.remove()
    first = seen[0].reshape(2, 3, -1)
    expected = logits(model, {**inputs, "position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)})[:, -1]
    for sample in range(3):
        torch.testing.assert_close(first[:, sample], expected, rtol=1e-4, atol=1e-4)


def test_locations_given_to_generate_win():
    model = family(positions="f2+l2")
    inputs = batch(9, 6, side="left")
    locations = torch.tensor([[1, 4], [3, 8]])
    for kwargs in ({}, {"use_cache": False}, {"prefill_chunk_size": 4}, {"num_beams": 2}):
        got = greedy(model, inputs, intervention_locations=locations, **kwargs)
        alone = []
        for row, (ids, mask) in enumerate(zip(*inputs.values())):
            ids, own = ids[mask.bool()], locations[row : row + 1] - int((mask == 0).sum())
            if "num_beams" in kwargs:
                alone += greedy(model, {"input_ids": ids[None]}, intervention_locations=own, **kwargs)
            else:
                alone.append(by_hand(model, ids, lambda n, s, own=own: own[0].tolist()))
        assert got == alone
        assert got != greedy(model, inputs, **kwargs)
    with pytest.raises(ValueError, match="holds 9, but the rows have the columns 0 to 8"):
        greedy(model, inputs, intervention_locations=torch.tensor([[9], [0]]))


class PassesOn(torch.nn.Module):
    """A model whose `generate` is that of a part."""

    def __init__(self):
        super().__init__()
        self.lm = tiny_model("llama", eos_token_id=None)
        self.config = self.lm.config

    def forward(self, **kwargs):
        return self.lm(**kwargs)

    def generate(self, **kwargs):
        return self.lm.generate(**kwargs)

    def prepare_inputs_for_generation(self, *args, **kwargs):
        raise AssertionError("the part has one of its own")


def test_what_generate_is_given_holds_for_the_part_that_it_is_passed_on_to():
    model, plain = PassesOn(), tiny_model("llama", eos_token_id=None)
    configs = {
        "parts": ReftConfig(positions="f1+l1", r=4, subspaces={"one": 2, "other": 2}),
        "exchange": ReftConfig(positions="l1", r=2, intervention="interchange"),
    }
    for name, config in configs.items():
        for base in (model, plain):
            inject_adapter_in_model(config, base, name)
            randomize(base, name, scale=1.0)
    inputs, source = batch(9, 6, side="left"), batch(9, 6, side="left", seed=5)
    given = [
        {},
        {"intervention_locations": torch.tensor([[1, 4], [3, 8]])},
        {"subspaces": ["one", "other"]},
        {"adapter_names": ["parts", "__base__"]},
        {"source_inputs": source},
    ]
    found = []
    for arguments in given:
        for base in (model, plain):
            for layer in (module for module in base.modules() if type(module).__name__ == "ReftLayer"):
                layer.set_adapter("exchange" if "source_inputs" in arguments else "parts")
        found.append(greedy(model, inputs, **arguments))
        assert found[-1] == greedy(plain, inputs, **arguments)
    assert len(set(map(str, found))) == len(given)


def test_locations_of_an_encoder_decoder_are_those_of_its_encoder():
    model = reft_model(tiny_model("t5"), positions="f1+l1", task_type="SEQ_2_SEQ_LM")
    inputs, new = batch(9, 9), {"max_new_tokens": NEW, "do_sample": False}
    expected = model.generate(**inputs, **new)
    assert torch.equal(model.generate(**inputs, **new, intervention_locations=torch.tensor([[0, 8]] * 2)), expected)
    # The decoder's own start token is edited, whichever columns of the encoder are: column 0 is named in neither.
    clean = tiny_model("t5")
    with spied(model, clean, "decoder.block.0") as calls:
        found = model.generate(**inputs, **new, intervention_locations=torch.tensor([[3, 5]] * 2))
    assert calls[0] == [[0], [0]]
    assert not torch.equal(found, expected)


def test_locations_of_an_encoder_leave_generated_tokens_to_the_positions():
    """What a training forward edits with the same locations: the logits of the answer are equal."""
    model = reft_model(tiny_model("t5"), positions="f1+d2", task_type="SEQ_2_SEQ_LM")
    inputs = {**batch(6, 6), "intervention_locations": torch.tensor([[1], [2]])}
    new = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found = model.generate(**inputs, **new)
    torch.testing.assert_close(
        torch.stack(found.logits, 1), logits(model, inputs, labels=found.sequences[:, 1:].contiguous())
    )
    with model.disable_adapter():
        assert not torch.equal(
            logits(model, inputs, labels=found.sequences[:, 1:].contiguous()), torch.stack(found.logits, 1)
        )


@pytest.mark.parametrize("chunks", [{}, {"prefill_chunk_size": 2}])
def test_padding_is_inferred_by_the_settings_of_the_call_not_of_the_model(chunks):
    model = family(positions="f2+l2")
    inputs = batch(9, 4, side="left")
    expected = greedy(model, inputs)
    model.get_base_model().generation_config.pad_token_id = 99
    settings = GenerationConfig(pad_token_id=0, max_new_tokens=NEW, do_sample=False, **chunks)
    got = model.generate(input_ids=inputs["input_ids"], generation_config=settings)
    assert got[:, 9:].tolist() == expected


@pytest.mark.parametrize("positions", ["f2+l2", "f1+d2"])
@pytest.mark.parametrize("max_batch_tokens", [64, 8])  # a long prompt in one go, and in chunks
def test_continuous_batching_gives_each_request_its_own_positions(positions, max_batch_tokens):
    model = family(positions=positions)
    prompts = [batch(n, seed=n)["input_ids"][0].tolist() for n in (9, 3, 1, 21)]
    prompts.append(prompts[0] + [5, 6, 7])  # begins like another: cached blocks must not be shared
    alone = [greedy(model, {"input_ids": torch.tensor([prompt])})[0] for prompt in prompts]
    answers = model.generate_batch(
        prompts,
        generation_config=GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1),
        continuous_batching_config=transformers.ContinuousBatchingConfig(
            max_batch_tokens=max_batch_tokens, num_blocks=32, block_size=8
        ),
    )
    got = {tuple(answer.prompt_ids): answer.generated_tokens for answer in answers.values()}
    assert [got[tuple(prompt)] for prompt in prompts] == alone
    with model.disable_adapter():
        base = [greedy(model, {"input_ids": torch.tensor([prompt])})[0] for prompt in prompts]
    assert base != alone


@pytest.mark.parametrize("name", ["adapter_names", "intervention_locations", "subspaces", "source_inputs"])
def test_continuous_batching_refuses_what_it_would_pass_over(name):
    model = family(positions="f1")
    given = {"adapter_names": ["default"], "subspaces": ["one"], "source_inputs": {}}.get(name, torch.tensor([[0]]))
    for whole in (model, model.get_base_model()):
        with pytest.raises(ValueError, match=f"generate_batch was passed {name}, .* Use generate; or set_adapter"):
            whole.generate_batch([[5, 6, 7]], **{name: given})
    assert model.generate_batch([], **{name: None}) == {}
    assert "generate_batch" not in vars(model.unload())


@pytest.mark.parametrize("where", ["in the generation config", "nowhere"])
def test_continuous_batching_without_a_config_of_its_own(where):
    model, prompts = family(positions="f2+l2"), [[5, 6, 7, 8], [9, 10, 11], [5, 6, 7, 8, 9, 10]]
    alone = [greedy(model, {"input_ids": torch.tensor([prompt])})[0] for prompt in prompts]
    settings = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
    if where != "nowhere":
        settings.continuous_batching_config = transformers.ContinuousBatchingConfig(num_blocks=16, block_size=8)
    answers = model.generate_batch(prompts, generation_config=settings)
    got = {tuple(answer.prompt_ids): answer.generated_tokens for answer in answers.values()}
    assert [got[tuple(prompt)] for prompt in prompts] == alone
    with model.disable_adapter():
        assert [greedy(model, {"input_ids": torch.tensor([prompt])})[0] for prompt in prompts] != alone


def test_continuous_batching_shares_no_cached_blocks_between_requests_that_begin_alike():
    model = family(positions="f2+l2")
    config = transformers.ContinuousBatchingConfig(allow_block_sharing=True)
    settings = GenerationConfig(max_new_tokens=NEW, eos_token_id=-1)
    manager = model.init_continuous_batching(generation_config=settings, continuous_batching_config=config)
    assert manager.continuous_batching_config.allow_block_sharing is False
    assert config.allow_block_sharing is True  # the caller's own stays as it was


def test_generation_in_a_thread_streams_the_same_tokens():
    class Streamer(transformers.generation.streamers.BaseStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            pass

    model = family(positions="f2+l2")
    inputs = {"input_ids": batch(9)["input_ids"]}
    expected = greedy(model, inputs)
    streamer = Streamer()
    thread = threading.Thread(target=greedy, args=(model, inputs), kwargs={"streamer": streamer})
    thread.start()
    assert greedy(model, {"input_ids": batch(5, seed=8)["input_ids"]})  # another call at the same time
    thread.join()
    assert streamer.tokens == inputs["input_ids"][0].tolist() + expected[0]


@pytest.mark.parametrize("positions", ["f2+l2", "f2+l2+d"])
def test_a_decode_step_runs_no_operation_that_the_base_model_does_not(positions):
    class Count(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    model = family(positions=positions)
    counts = []
    base = model.get_base_model()
    forward = base.forward

    def counted(*args, **kwargs):
        with Count() as count:
            output = forward(*args, **kwargs)
        counts.append(len(count.names))
        return output

    def run():
        counts.clear()
        base.forward = counted
        try:
            greedy(model, batch(9, 4, side="left"))
        finally:
            del base.forward
        return counts[-1], counts[0]

    with model.disable_adapter():
        decode, prefill = run()
    with_adapter, with_adapter_prefill = run()
    assert with_adapter_prefill > prefill
    assert (with_adapter == decode) == (positions == "f2+l2")  # "d" asks for edits of generated tokens


def test_a_second_generation_starts_from_its_own_prompt():
    model = family(positions="f2+l2")
    first, second = batch(9, 4, side="left"), batch(3, seed=4)
    expected = greedy(model, second)
    greedy(model, first)
    assert greedy(model, second) == expected


def test_a_forward_that_continues_a_cache_by_itself_edits_nothing():
    model = family(positions="all")
    ids = batch(9)["input_ids"]
    with torch.no_grad():
        cache = model(input_ids=ids[:, :6], use_cache=True).past_key_values
        got = model(input_ids=ids[:, 6:], past_key_values=cache).logits
    expected = logits(model, {"input_ids": ids}, intervention_locations=torch.arange(6)[None])[:, 6:]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert (logits(model, {"input_ids": ids})[:, 6:] - got).abs().max() > 1e-3


@pytest.mark.parametrize("positions", ["f2+l2", "l3", "f1+e2", "l2+d2", "all"])
@pytest.mark.parametrize("turns", ["first", "last", "all"])
def test_multi_turn_generation_with_a_cache_equals_training_on_the_same_turns(turns, positions):
    model = family(positions=positions, turns=turns, prompt_end=[7, 8])
    marker = torch.tensor([[7, 8]])
    first = torch.cat([batch(6, seed=1)["input_ids"].clamp(min=9), marker], dim=1)
    cache = DynamicCache(config=model.config)
    out = model.generate(input_ids=first, past_key_values=cache, max_new_tokens=4, do_sample=False)
    second = torch.cat([out, batch(5, seed=2)["input_ids"].clamp(min=9), marker], dim=1)
    assert cache.get_seq_length() == out.shape[1] - 1
    scores = []
    handle = model.get_base_model().lm_head.register_forward_hook(lambda m, a, output: scores.append(output[:, -1]))
    model.generate(input_ids=second, past_key_values=cache, max_new_tokens=1, do_sample=False)
    handle.remove()
    # The same conversation as a training example, with labels on both answers.
    row = torch.cat([second, second[:, :1]], 1)
    labels = torch.full_like(row, -100)
    labels[:, first.shape[1] : out.shape[1]] = out[:, first.shape[1] :]
    labels[:, -1] = row[:, -1]
    trained = logits(model, {"input_ids": row}, labels=labels)[:, second.shape[1] - 1]
    torch.testing.assert_close(scores[0], trained, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        assert (logits(model, {"input_ids": row})[:, second.shape[1] - 1] - trained).abs().max() > 1e-3


class SaysThatItCannotBeCropped(DynamicCache):
    """Its `crop` would do something all the same, as that of a static cache of transformers 5.24 does."""

    is_croppable = False


def test_a_cache_that_says_that_it_cannot_be_cropped_is_not():
    model = family(positions="l2", turns="last", prompt_end=[7, 8])
    first = torch.cat([batch(6, seed=1)["input_ids"].clamp(min=9), torch.tensor([[7, 8]])], dim=1)
    cache = SaysThatItCannotBeCropped(config=model.config)
    out = model.generate(input_ids=first, past_key_values=cache, max_new_tokens=4, do_sample=False)
    with pytest.raises(ValueError, match="SaysThatItCannotBeCropped of 11 columns cannot be cropped to"):
        greedy(model, {"input_ids": torch.cat([out, first], dim=1)}, past_key_values=cache)
    assert cache.get_seq_length() == 11


@pytest.mark.parametrize("window", [None, 6])
def test_a_cache_that_cannot_be_cropped_is_refused_where_it_would_have_to_be(window):
    """transformers 5.24 crops static caches; what has left a layer's window does not come back there either."""
    settings = {} if window is None else {"sliding_window": window}
    base = tiny_model("llama" if window is None else "mistral", eos_token_id=None, **settings)
    model = reft_model(base, task_type="CAUSAL_LM", positions="l2", turns="last", prompt_end=[7, 8])
    first = torch.cat([batch(6, seed=1)["input_ids"].clamp(min=9), torch.tensor([[7, 8]])], dim=1)
    cache = transformers.StaticCache(config=model.config, max_cache_len=64)
    out = model.generate(input_ids=first, past_key_values=cache, max_new_tokens=4, do_sample=False)
    second = {"input_ids": torch.cat([out, first], dim=1)}
    if window is None and getattr(cache, "is_croppable", False):
        expected = greedy(model, second)
        assert greedy(model, second, past_key_values=cache) == expected
        with model.disable_adapter():
            assert greedy(model, second) != expected
        return
    with pytest.raises(ValueError, match=r"turns='last' has to take back edits.*Start with an empty cache"):
        greedy(model, second, past_key_values=cache)


class OtherName(transformers.LlamaForCausalLM):
    """Calls its cache by another name, as transformers 5.24 did to all models."""

    def prepare_inputs_for_generation(self, *args, **kwargs):
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        own = [inputs.pop(name) for name in ("cache", "past_key_values") if name in inputs]
        return {**inputs, "kept": own[0] if own else None}

    def forward(self, input_ids=None, attention_mask=None, kept=None, **kwargs):
        kwargs.pop("cache", None)
        return super().forward(input_ids, attention_mask, **{**kwargs, "past_key_values": kept})


def test_a_cache_by_a_name_that_is_not_known_is_told_and_not_taken_for_none():
    base, inputs = tiny_model("llama", eos_token_id=None), batch(7, 4, side="left")
    model = reft_model(OtherName(base.config), positions="f2+l2+d", task_type="CAUSAL_LM")
    model.get_base_model().load_state_dict(base.state_dict(), strict=False)
    with model.disable_adapter():
        plain = greedy(model, inputs)
    with pytest.raises(RuntimeError, match=r"runs the last 1 of 8 columns with no cache by a name.*use_cache=False"):
        greedy(model, inputs)
    expected = greedy(reft_model(base, positions="f2+l2+d", task_type="CAUSAL_LM"), inputs)
    assert greedy(model, inputs, use_cache=False) == expected != plain


def test_a_text_generation_pipeline_pads_and_continues_like_single_texts():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, 100)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="w2"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    model = family(positions="f2+l2")
    pipeline = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    texts = ["w5 w6 w7 w8 w9 w10 w11", "w12", "w20 w21 w22"]
    settings = {"max_new_tokens": NEW, "do_sample": False, "return_tensors": True}
    together = [out[0]["generated_token_ids"] for out in pipeline(texts, batch_size=3, **settings)]
    alone = [pipeline(text, **settings)[0]["generated_token_ids"] for text in texts]
    assert [list(tokens)[-NEW:] for tokens in together] == [list(tokens)[-NEW:] for tokens in alone]
    with model.disable_adapter():
        assert [pipeline(text, **settings)[0]["generated_token_ids"] for text in texts] != alone
