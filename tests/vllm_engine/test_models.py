"""Tiny models of many types, each against transformers; engines that run out of room, and engines that must refuse."""

import pytest
import torch
from engines import Asked, assert_right, engine, every_pair
from kit import MODELS, Truth, make_adapter, make_model, prompts
from packaging.version import Version

ADAPTERS = {
    "both-ends": {"positions": "f2+l3", "r": 4},
    "answers": {"positions": "l2+d", "r": 2, "act_fn": "relu", "intervention": "direft"},
}
SUMS = {"llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "phi3"}  # with the stream in two tensors


def adapters_of(name, place):
    base = make_model(name, place)
    return base, {
        own: make_adapter(base, place / f"{name}-{own}", seed, **settings)
        for seed, (own, settings) in enumerate(ADAPTERS.items(), 1)
    }


def check(name, place, implementation, stream=None, **settings):
    from peft_reft.integrations.vllm import runner
    from peft_reft.integrations.vllm.slots import TABLES

    base, adapters = adapters_of(name, place)
    truth = Truth(base, adapters)
    pairs = every_pair([None, *ADAPTERS], prompts(6))
    for own, prompt in pairs:
        truth.answer(own, prompt)
    with engine(base, max_loras=2, max_num_batched_tokens=64, model_impl=implementation, **settings) as llm:
        worker = list(runner._workers.values())[-1]
        assert worker.problem is None and worker.table is TABLES[-1]
        hooks = [hook for block in worker.blocks.values() for hook in block._forward_hooks.values()]
        assert len(hooks) == 4
        if stream is not None:
            assert {hook.convention.stream for hook in hooks} == {stream}
        asked = Asked(llm, adapters)
        # Of some models (Gemma 2) vLLM's own log-probabilities differ from transformers' by more than rounding.
        base_alone = asked.compare([(None, prompt) for prompt in prompts(6)], truth)
        assert_right(base_alone, 0.05)
        assert_right(asked.compare(pairs, truth), max(2e-4, 2 * base_alone.worst))
    for own in ADAPTERS:
        assert any(truth.answer(own, prompt).tokens != truth.answer(None, prompt).tokens for prompt in prompts(6))


@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"gpt2", "llama", "phi"}))
def test_a_model_of_each_type(name, place):
    check(name, place, "auto", "sum" if name in SUMS else "first")


def test_lora_reft_and_base_in_one_batch(place):
    import transformers
    from peft import LoraConfig, get_peft_model

    base, adapters = adapters_of("llama", place)
    truth = Truth(base, adapters)
    torch.manual_seed(5)
    model = get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    ).eval()
    model.save_pretrained(place / "lora")
    # LoRA takes the first of four slots: on CPUs vLLM 0.32 applies what is in the last one to tokens without adapter.
    with engine(base, max_loras=4) as llm:
        asked = Asked(llm, {"lora": place / "lora", **adapters})
        asked.generate([("lora", [5, 6, 7])])
        pairs = every_pair([None, "lora", *adapters], prompts(6))
        for (name, prompt), output in zip(pairs, asked.generate(pairs)):
            if name == "lora":
                ids = torch.tensor([prompt])
                answer = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=8,
                    do_sample=False,
                    eos_token_id=None,
                )
                wanted = answer[0, len(prompt) :].tolist()
            else:
                wanted = truth.answer(name, prompt).tokens
            assert list(output.outputs[0].token_ids) == wanted, (name, len(prompt))
        with pytest.raises(Exception, match="is not for a ReFT adapter"):
            asked.generate([("lora", [5, 6])], extra={"reft_strength": 0.5})
        with pytest.raises(Exception, match="Give it an id of its own"):  # vLLM would answer with the LoRA adapter
            Asked(llm, {"answers": adapters["answers"]}).generate([("answers", [5, 6])])
        system = prompts(2, longest=96, seed=11)[1]
        cached = [
            asked.generate([(name, [*system, 9, 9, 9])])[0].num_cached_tokens for name in (None, "answers", "lora")
        ]
        assert cached == [0, 96, 0]  # behind the base model's run of it


def test_prompts_given_as_embeddings_and_their_log_probabilities_with_a_single_slot(place):
    import transformers
    from vllm import SamplingParams

    base, adapters = adapters_of("llama", place)
    truth = Truth(base, adapters)
    embed = transformers.AutoModelForCausalLM.from_pretrained(base).get_input_embeddings()
    turns = make_adapter(base, place / "turns", 9, positions="l1", r=2, turns="all", prompt_end=[7, 8])
    pairs = every_pair([None, *ADAPTERS], prompts(5))
    for caching in (True, False):
        settings = {"max_loras": 1, "lora_target_modules": ["none"], "enable_prefix_caching": caching}
        with engine(base, enable_prompt_embeds=True, **settings) as llm:
            asked = Asked(llm, {**adapters, "turns": turns})
            params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)

            def answers(pairs, asked=asked, params=params):
                given = [{"prompt_embeds": embed(torch.tensor(prompt)).detach()} for _, prompt in pairs]
                requests = [asked.requests.get(name) for name, _ in pairs]
                return asked.llm.generate(given, params, lora_request=requests, use_tqdm=False)

            for _ in range(1 + caching):
                for (name, prompt), output in zip(pairs, answers(pairs)):
                    assert list(output.outputs[0].token_ids) == truth.answer(name, prompt).tokens, (name, len(prompt))
            with pytest.raises(Exception, match="is given as embeddings"):
                answers([("turns", [5, 6, 7, 8])])
            assert_right(asked.compare(pairs, truth))
            # The prompt's log-probabilities, which blocks in the cache do not hold.
            for (name, prompt), output in zip(pairs, asked.generate(pairs, new=1, prompt_logprobs=0)):
                found = [by_token[token].logprob for token, by_token in zip(prompt[1:], output.prompt_logprobs[1:])]
                wanted = truth.hidden(name, prompt)[0][:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
                assert found == pytest.approx(wanted.tolist(), abs=2e-4)


def test_embeddings_of_prompts(place):
    """A pooling engine returns the last hidden state of the prompt's last token, normalised."""
    base, adapters = adapters_of("llama", place)
    truth = Truth(base, adapters)
    pairs = every_pair([None, *ADAPTERS], prompts(5))
    with engine(base, max_loras=2, runner="pooling", convert="embed", enable_prefix_caching=True) as llm:
        asked = Asked(llm, adapters)
        for _ in range(2):
            outputs = llm.embed(
                [{"prompt_token_ids": prompt} for _, prompt in pairs],
                lora_request=[asked.requests.get(name) for name, _ in pairs],
                use_tqdm=False,
            )
            for (name, prompt), output in zip(pairs, outputs):
                wanted = torch.nn.functional.normalize(truth.hidden(name, prompt)[1][-1], dim=-1)
                torch.testing.assert_close(torch.tensor(output.outputs.embedding), wanted, atol=1e-4, rtol=1e-3)


def test_a_model_that_takes_no_adapters_says_how_it_does(place):
    """From 0.33 on vLLM refuses it in words of its own, before a worker is there."""
    import vllm

    base, is_older = make_model("gpt2", place), Version(vllm.__version__) < Version("0.33")
    said = "model_impl='transformers'" if is_older else "LoRA is not supported for GPT2LMHeadModel"
    with pytest.raises(Exception, match=said), engine(base):
        pass


def test_requests_that_are_preempted_and_run_again(place):
    """A cache with room for two of eight long requests: the others lose their blocks and run their answers as input."""
    base, adapters = adapters_of("llama", place)
    truth = Truth(base, adapters)
    long = [prompt for prompt in prompts(16, longest=60) if len(prompt) > 20]
    pairs = every_pair([None, *ADAPTERS], long)
    with engine(
        base, max_loras=2, num_gpu_blocks_override=9, max_num_seqs=8, max_model_len=128, disable_log_stats=False
    ) as llm:
        assert_right(Asked(llm, adapters).compare(pairs, truth, new=40))
        counts = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    assert counts["vllm:num_preemptions"] > 0


def test_a_model_whose_residual_stream_is_not_found_is_served_and_its_adapters_refused(place, monkeypatch):
    """Blocks that return the stream in a way that no probe knows: here the sum of both tensors with a sign changed."""
    from vllm.model_executor.models.llama import LlamaDecoderLayer

    original = LlamaDecoderLayer.forward

    def changed(self, positions, hidden_states, residual, *args, **kwargs):
        residual = None if residual is None else -residual
        hidden, residual = original(self, positions, hidden_states, residual, *args, **kwargs)
        return hidden, -residual

    base, adapters = adapters_of("llama", place)
    monkeypatch.setattr(LlamaDecoderLayer, "forward", changed)
    with engine(base, max_loras=2) as llm:
        asked = Asked(llm, adapters)
        with pytest.raises(Exception, match="reach the next one in an unknown way"):
            asked.generate([("answers", [5, 6, 7])])
        assert asked.generate([(None, [5, 6, 7])])[0].outputs[0].token_ids


# Last, since vLLM then changes transformers' classes in this process: their models run in it only within vLLM.


@pytest.mark.parametrize("name, implementation", [("phi", "auto"), ("llama", "transformers")])
def test_models_that_run_transformers_modules(name, implementation, place):
    check(name, place, implementation, "first")
