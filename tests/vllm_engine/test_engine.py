"""One engine with a tiny Llama and many adapters: every answer is compared with that of transformers and peft_reft."""

import json
import shutil

import pytest
import torch
from engines import Asked, assert_right, engine, every_pair
from kit import VOCABULARY, Truth, make_adapter, make_model, prompts

ADAPTERS = {
    "loreft": {"positions": "f2+l3", "r": 4},
    "noreft": {"positions": "f1+l2", "r": 3, "share_weights": False, "intervention": "noreft"},
    "direft": {"positions": "e4+d2", "r": 2, "intervention": "direft"},
    "odireft": {"positions": "m3+l1", "r": 2, "intervention": "odireft", "share_weights": "position"},
    "consreft": {"positions": "all", "r": 2, "intervention": "consreft"},
    "lobireft": {"positions": "all+d3", "r": 3, "intervention": "lobireft", "share_weights": False},
    "activated": {"positions": "l4+d", "r": 2, "act_fn": "relu"},
    "activated-direft": {"positions": "f3", "r": 2, "act_fn": "gelu", "intervention": "direft"},
    "two-blocks": {"positions": "l2", "r": 2, "layers_to_transform": [1, -1]},
    "shared-blocks": {"positions": "f1+l1", "r": 2, "share_layers": True, "layers_to_transform": [0, 2]},
    "ranks": {"positions": "f1+l1", "r": 2, "rank_pattern": {"layers.2": 5}},
    "turns": {"positions": "l2", "r": 2, "turns": "all", "prompt_end": [7, 8]},
    "last": {"positions": "l1", "r": 4},
    "last-two": {"positions": "l2", "r": 4},
}


@pytest.fixture(scope="module")
def base(place):
    return make_model("llama", place)


@pytest.fixture(scope="module")
def adapters(base, place):
    return {
        name: make_adapter(base, place / name, seed, **settings)
        for seed, (name, settings) in enumerate(ADAPTERS.items(), 1)
    }


@pytest.fixture(scope="module")
def truth(base, adapters):
    return Truth(base, adapters)


@pytest.fixture(scope="module")
def asked(base, adapters):
    """Steps of at most 64 tokens, so that prompts run in pieces; more adapters than slots; the prefix cache is on."""
    settings = {"max_loras": 3, "max_cpu_loras": 20, "max_num_batched_tokens": 64, "max_num_seqs": 8}
    with engine(base, **settings, enable_prefix_caching=True, enable_chunked_prefill=True) as llm:
        yield Asked(llm, adapters)


def forget_cache(asked):
    assert asked.llm.reset_prefix_cache()


def test_the_residual_stream_was_found(asked):
    from peft_reft.integrations.vllm import runner

    (worker,) = runner._workers.values()
    assert worker.problem is None and len(worker.blocks) == 4


def test_every_adapter_in_one_batch_with_the_base_model_twice(asked, truth):
    names = [None, *ADAPTERS]
    pairs = every_pair(names, prompts(8))
    assert_right(asked.compare(pairs, truth))
    assert_right(asked.compare(pairs, truth))  # from the cache, as far as that goes
    for name in ADAPTERS:  # each adapter does something
        assert any(truth.answer(name, prompt).tokens != truth.answer(None, prompt).tokens for prompt in prompts(8)), (
            name
        )


def test_prompts_that_begin_alike_share_blocks_only_where_states_are_the_same(asked, truth):
    forget_cache(asked)
    long = prompts(2, longest=120)[1]
    pairs = every_pair(
        [None, "last", "last-two", "loreft", "noreft"], [long[:n] for n in (40, 63, 64, 65, 66, 97, 120, 33)]
    )
    assert_right(asked.compare(pairs, truth))
    assert_right(asked.compare(pairs[::-1], truth))


def test_with_vllms_own_keys_answers_are_wrong(asked, truth, monkeypatch):
    """The test above can fail: it does, if cached blocks are named by the adapter alone, as they are for LoRA."""
    from vllm.v1.core import kv_cache_utils

    forget_cache(asked)
    own = kv_cache_utils.generate_block_hash_extra_keys.__wrapped__
    monkeypatch.setattr(kv_cache_utils, "generate_block_hash_extra_keys", own)
    long = prompts(2, longest=120)[1]
    pairs = every_pair(["last", "last-two", "loreft"], [long[:n] for n in (40, 63, 64, 65, 66, 97, 120, 33)])
    comparison = asked.compare(pairs, truth)
    forget_cache(asked)
    assert comparison.equal < comparison.total


def test_what_a_system_prompt_costs_behind_other_adapters(asked, truth):
    """Blocks before the first edited token are those of the base model, for every adapter."""
    forget_cache(asked)
    system, questions = prompts(2, longest=128)[1], prompts(6, longest=20, seed=3)
    asked.generate([(None, system + questions[0])])
    cached = {}
    for name, question in zip(["last", "last-two", "two-blocks", "loreft"], questions[1:]):
        (output,) = asked.generate([(name, system + question)])
        cached[name] = output.num_cached_tokens
    assert cached == {"last": 128, "last-two": 128, "two-blocks": 128, "loreft": 0}
    assert_right(asked.compare([("last", system + question) for question in questions], truth))


@pytest.mark.parametrize("strength", [0.5, -1.0, 0.0])
def test_strength_of_a_request(asked, truth, strength):
    pairs = every_pair(["loreft", "activated", "lobireft"], prompts(4))
    assert_right(asked.compare(pairs, truth, strength))
    assert_right(asked.compare(pairs, truth))  # not from blocks with the other strength


def test_several_answers_to_a_prompt(asked, truth):
    assert_right(asked.compare(every_pair(["last", "direft"], prompts(3)), truth, n=3, temperature=1.0, top_k=1))


def test_sampled_answers_have_the_probabilities_that_transformers_gives_them(asked, truth):
    pairs = every_pair(["last", "activated", "lobireft", None], prompts(3))
    answers = set()
    for (name, prompt), output in zip(pairs, asked.generate(pairs, n=3, temperature=1.0)):
        for sample in output.outputs:
            tokens = list(sample.token_ids)
            found = [by_token[token].logprob for token, by_token in zip(tokens, sample.logprobs)]
            assert found == pytest.approx(truth.forced(name, prompt, tokens), abs=2e-4)
            answers.add((name, len(prompt), *tokens))
    assert len(answers) > 2 * len(pairs)


FORMS = {
    "json": {
        "type": "object",
        "properties": {name: {"enum": ["red", "green", "blue", "grey", "white", "black"]} for name in "abc"},
        "required": ["a", "b", "c"],
        "additionalProperties": False,
    },
    "regex": "(w3[0-9]*){5}",
}


def test_answers_of_a_form(asked, base, truth):
    """A JSON schema, a regular expression and free answers in one batch; the same grammar guides transformers."""
    import xgrammar
    from transformers import AutoTokenizer
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams
    from xgrammar.contrib.hf import LogitsProcessor

    tokenizer = AutoTokenizer.from_pretrained(base)
    compiler = xgrammar.GrammarCompiler(xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=VOCABULARY))
    compiled = {
        "json": compiler.compile_json_schema(json.dumps(FORMS["json"])),
        "regex": compiler.compile_regex(FORMS["regex"]),
    }
    pairs = every_pair([None, "loreft", "activated", "lobireft"], prompts(3))
    asked_for = [(form, *pair) for form in (*FORMS, None) for pair in pairs]
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=8,
            ignore_eos=form is None,
            structured_outputs=StructuredOutputsParams(**{form: FORMS[form]}) if form else None,
        )
        for form, *_ in asked_for
    ]
    outputs = asked.llm.generate(
        [{"prompt_token_ids": prompt} for *_, prompt in asked_for],
        params,
        lora_request=[asked.requests.get(name) for _, name, _ in asked_for],
        use_tqdm=False,
    )
    answers = {}
    for (form, name, prompt), output in zip(asked_for, outputs):
        guided = {"logits_processor": (LogitsProcessor(compiled[form]),), "eos_token_id": 2} if form else {}
        assert list(output.outputs[0].token_ids) == truth.answer(name, prompt, **guided).tokens, (form, name)
        answers[form, name, len(prompt)] = list(output.outputs[0].token_ids)
        if form == "json":
            colours = json.loads("".join(tokenizer.convert_ids_to_tokens(output.outputs[0].token_ids[:-1])))
            assert list(colours) == ["a", "b", "c"]
    for form in FORMS:  # adapters fill it in their own ways
        assert any(tokens != answers[form, None, length] for (of, _, length), tokens in answers.items() if of == form)


def test_a_conversation_goes_on_behind_its_answers(asked, truth):
    """Each turn's prompt holds those before with their answers, whose blocks are in the cache."""
    forget_cache(asked)
    names, questions = ["last", "loreft", "activated", "lobireft", None], prompts(3, longest=60, seed=9)
    so_far = {name: prompts(2, longest=70)[1] for name in names}
    for question in questions:
        pairs = [(name, so_far[name] + question) for name in names]
        for (name, prompt), output in zip(pairs, asked.generate(pairs, new=20)):
            tokens = list(output.outputs[0].token_ids)
            assert tokens == truth.answer(name, prompt, 20).tokens, name
            so_far[name] = prompt + tokens


def test_aborted_requests_leave_nothing_behind(asked, truth):
    from vllm import SamplingParams

    core = asked.llm.llm_engine
    pairs = every_pair(["loreft", "activated", None, "lobireft", "last"], prompts(4, seed=8))
    for steps in (1, 2, 5):
        for number, (name, prompt) in enumerate(pairs):
            params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
            core.add_request(f"r{number}", {"prompt_token_ids": prompt}, params, lora_request=asked.requests.get(name))
        for _ in range(steps):
            core.step()
        core.abort_request([f"r{number}" for number in range(0, len(pairs), 2)])
        answers = {}
        while core.has_unfinished_requests():
            answers |= {output.request_id: output.outputs[0].token_ids for output in core.step() if output.finished}
        for number in range(1, len(pairs), 2):
            name, prompt = pairs[number]
            assert list(answers[f"r{number}"]) == truth.answer(name, prompt, 30).tokens
        pairs.append(pairs.pop(0))  # the same ids of requests for others next time
    assert_right(asked.compare(pairs, truth))


def test_allowed_tokens(asked, truth):
    allowed = list(range(10, 30))
    for name in ("loreft", "activated"):
        for prompt in prompts(3):
            (output,) = asked.generate([(name, prompt)], allowed_token_ids=allowed)
            wanted = truth.answer(name, prompt, prefix_allowed_tokens_fn=lambda row, ids: allowed)
            assert list(output.outputs[0].token_ids) == wanted.tokens


@pytest.mark.parametrize("name", ["last", "noreft", "direft", "activated", None])
def test_a_beam_search_of_width_one_is_greedy(asked, truth, name):
    """vLLM sends each step of a beam as a new request with a longer prompt."""
    from vllm.sampling_params import BeamSearchParams

    for prompt in prompts(4):
        (output,) = asked.llm.beam_search(
            [{"prompt_token_ids": prompt}],
            BeamSearchParams(beam_width=1, max_tokens=6, ignore_eos=True),
            lora_request=asked.requests.get(name),
        )
        assert output.sequences[0].tokens[len(prompt) :] == truth.answer(name, prompt).tokens[:6]


def test_a_request_may_say_where_its_prompt_ends(asked, truth):
    prompt = prompts(5)[3]
    for name in ("last", "direft", "activated"):
        answer = truth.answer(name, prompt).tokens
        (output,) = asked.generate([(name, prompt + answer[:3])], new=5, extra={"reft_prompt_length": len(prompt)})
        assert list(output.outputs[0].token_ids) == answer[3:]


def test_turns(asked, truth):
    draw = torch.Generator().manual_seed(3)
    turn = [torch.randint(10, 500, (n,), generator=draw).tolist() for n in (30, 12, 25, 9)]
    conversation = turn[0] + [7, 8] + turn[1] + [7, 8] + turn[2] + [7, 8] + turn[3]
    pairs = [("turns", conversation[:n]) for n in (20, 32, 33, 50, 70, len(conversation))]
    assert_right(asked.compare(pairs, truth))


def test_requests_that_arrive_while_others_decode(asked, truth):
    from vllm import SamplingParams

    core, params = asked.llm.llm_engine, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    waiting = every_pair(["loreft", "activated", None, "last"], prompts(5, seed=7))
    pairs, found = dict(enumerate(waiting)), {}
    step = 0
    while len(found) < len(pairs):
        if waiting and step % 2 == 0:
            number = len(pairs) - len(waiting)
            name, prompt = waiting.pop(0)
            core.add_request(str(number), {"prompt_token_ids": prompt}, params, lora_request=asked.requests.get(name))
        found |= {int(output.request_id): output.outputs[0] for output in core.step() if output.finished}
        step += 1
    for number, (name, prompt) in pairs.items():
        assert list(found[number].token_ids) == truth.answer(name, prompt).tokens


def test_an_adapter_comes_and_goes(asked, base, place):
    core = asked.llm.llm_engine
    one = make_adapter(base, place / "comes", 40, positions="l2", r=3)
    other = make_adapter(base, place / "goes", 41, positions="f1", r=2)
    asked.requests |= Asked(asked.llm, {"comes": one, "goes": other}, first_id=70).requests
    own = Truth(base, {"comes": one, "goes": other})
    for _ in range(2):
        assert core.add_lora(asked.requests["comes"])
        assert_right(asked.compare(every_pair(["comes", "goes", None], prompts(3)), own))
        assert core.remove_lora(70) and 70 not in core.list_loras()


def test_two_adapters_of_one_name(asked, base, adapters, truth):
    """As when a name is unloaded, and loaded from another folder, while requests with it run; vLLM compares names."""
    from vllm.lora.request import LoRARequest

    alike = {
        "last": LoRARequest("alike", 60, str(adapters["last"])),
        "noreft": LoRARequest("alike", 61, str(adapters["noreft"])),
    }
    others = {name: request for name, request in asked.requests.items() if name not in alike}
    both = Asked(asked.llm, {})
    both.requests = others | alike
    assert_right(both.compare(every_pair(["last", "noreft", None, "loreft", "activated"], prompts(5)), truth))


def test_an_adapter_that_is_loaded_in_place(asked, base, place):
    """New files in the folder, old ones again, under one name and id; the cache holds blocks of both."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    folder, core = place / "in-place", asked.llm.llm_engine
    versions = {
        "one": make_adapter(base, place / "version-one", 43, positions="f2+l2", r=4),
        "two": make_adapter(base, place / "version-two", 44, positions="f2+l3", r=2, share_weights=False),
    }
    own, pairs = Truth(base, versions), every_pair(["one"], prompts(4))
    here = Asked(asked.llm, {})
    answers = []
    for version in ("one", "two", "one", "two"):
        shutil.copytree(versions[version], folder, dirs_exist_ok=True)  # with the times of the files
        here.requests = {version: LoRARequest("in-place", 65, str(folder), load_inplace=True)}
        pairs = every_pair([version], prompts(4))
        assert_right(here.compare(pairs, own))
        assert_right(here.compare(pairs, own))
        answers.append([own.answer(*pair).tokens for pair in pairs])
    assert answers[0] != answers[1]
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    core.add_request("running", {"prompt_token_ids": pairs[-1][1]}, params, lora_request=here.requests["two"])
    core.step()
    shutil.copytree(versions["one"], folder, dirs_exist_ok=True)
    with pytest.raises(Exception, match=r"cannot be loaded in place while 1 request\(s\) run"):
        core.add_lora(here.requests["two"])
    with pytest.raises(Exception, match=r"cannot be removed while 1 request\(s\) run"):
        core.remove_lora(65)
    with pytest.raises(Exception, match="Give it an id of its own"):
        core.add_lora(LoRARequest("other", 65, str(versions["one"])))
    found = []
    while core.has_unfinished_requests():
        found += [output.outputs[0].token_ids for output in core.step() if output.finished]
    assert [list(tokens) for tokens in found] == [own.answer("two", pairs[-1][1], 9).tokens]


# Refusals.


def refused(asked, directory, number=90):
    """The error of a request for an adapter, after which the engine answers others as ever."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    with pytest.raises(Exception) as error:
        asked.llm.generate(
            [{"prompt_token_ids": [5, 6, 7]}],
            SamplingParams(max_tokens=2),
            lora_request=LoRARequest("refused", number, str(directory)),
            use_tqdm=False,
        )
    return str(error.value)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"modules_to_save": ["lm_head"]}, "Train it without modules_to_save"),
        ({"trainable_token_indices": [3]}, "Train it without trainable_token_indices"),
        ({"turns": "all", "prompt_end": "w3"}, "have no tokenizer"),
        ({"intervention": "unheard_of"}, "intervention='unheard_of' is unknown"),
        ({"positions": "l1+f2"}, "Did you mean 'f2+l1'"),
        ({"share_weights": False}, "has 1 interventions where its settings ask for 2"),
    ],
)
def test_what_cannot_be_served_is_an_error_of_its_request_alone(asked, truth, adapters, place, changes, said):
    directory = place / "odd"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(adapters["loreft"], directory)
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    assert said in refused(asked, directory)
    assert_right(asked.compare(every_pair(["last", None], prompts(2)), truth))


def test_more_refusals(asked, truth, base, adapters, place):
    wide = make_adapter(base, place / "wide", 1, positions="f3+l3", r=4, share_weights="position")
    assert "24 directions in all, and a slot has room for 16" in refused(asked, wide)
    inside = make_adapter(base, place / "inside", 1, target_modules=["o_proj"])
    assert "which is no block of this model" in refused(asked, inside, 91)
    damaged = shutil.copytree(adapters["loreft"], place / "damaged")
    (damaged / "adapter_model.safetensors").write_bytes(b"nothing")
    assert "the file is damaged" in refused(asked, damaged, 92)
    with pytest.raises(Exception, match="is not a strength"):
        asked.generate([("last", [5, 6])], extra={"reft_strength": "half"})
    with pytest.raises(Exception, match="Start it with --lora-target-modules none"):
        asked.generate([("last", [5, 6])], prompt_logprobs=0)
    with pytest.raises(Exception, match="is not for a ReFT adapter"):
        asked.generate([(None, [5, 6])], extra={"reft_strength": 0.5})
    with pytest.raises(Exception, match="is more than the 2 tokens that are given"):
        asked.generate([("last", [5, 6])], extra={"reft_prompt_length": 3})
    lora = place / "some-lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"]}))
    assert "Give it an id of its own" in refused(asked, lora, asked.requests["last"].lora_int_id)
    assert "Give it an id of its own" in refused(asked, adapters["last"], asked.requests["loreft"].lora_int_id)
    assert_right(asked.compare(every_pair(["last", None], prompts(2)), truth))


def test_files_written_anew_under_a_known_id_are_refused(asked, base, place):
    directory = make_adapter(base, place / "written", 50, positions="l1")
    asked.requests |= Asked(asked.llm, {"written": directory}, first_id=80).requests
    asked.generate([("written", [5, 6])])
    make_adapter(base, directory, 51, positions="l22")
    with pytest.raises(Exception, match=r"were loaded as they were before\. Give it an id of its own"):
        asked.generate([("written", [5, 6])])
