"""Prompt learning of PEFT's on a model with a ReFT adapter: whichever was added first, the same tokens are edited.

Soft prompts run as tokens in front of the prompt's, and count among them. A prefix lies in the cache, and does not run.
"""

from contextlib import contextmanager

import pytest
import torch
from conftest import batch, randomize, tiny_model
from edit_spy import tensor_of
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model, inject_adapter_in_model

from peft_reft import ReftConfig, get_interventions

SOFT = 4
METHODS = {
    "prompt tuning": (PromptTuningConfig, {}, SOFT),
    "p-tuning": (PromptEncoderConfig, {"encoder_hidden_size": 16}, SOFT),
    "prefix tuning": (PrefixTuningConfig, {}, 0),
}
SETTINGS = [{}, {"num_beams": 2}, {"num_return_sequences": 2, "num_beams": 2}, {"use_cache": False}]
CASES = [(name, settings) for name in METHODS for settings in SETTINGS]
CASES.remove(("prefix tuning", {"use_cache": False}))  # where PEFT fails


def with_prompts(method, reft=None, config=None):
    """A model with learned prompts, and with a ReFT adapter that is put on it "before" or "after"."""
    base = tiny_model("llama", eos_token_id=None)
    if reft == "before":
        inject_adapter_in_model(config, base)
    cls, more, _ = METHODS[method]
    model = get_peft_model(base, cls(task_type="CAUSAL_LM", num_virtual_tokens=SOFT, **more)).eval()
    if reft == "after":
        inject_adapter_in_model(config, base)
    if reft is not None:
        randomize(base.eval())
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


@contextmanager
def edited_by_hooks(model, edits, firsts, end, answers):
    """Plain hooks that edit, of each row, its first token, the last one before a column, and maybe those behind it."""

    def hook_of(edit):
        def hook(block, args, output):
            before = tensor_of(output)
            h, columns = before.clone(), before.shape[1]
            for row in range(len(h)):
                first = firsts[row * len(firsts) // len(h)]
                places = {first, end - 1} if columns > 1 else set()
                places |= {*range(end if columns > 1 else 0, columns)} if answers else set()
                for column in places:
                    h[row, column] = edit(before[row, column])
            return h if isinstance(output, torch.Tensor) else (h, *output[1:])

        return hook

    handles = [model.get_submodule(name).register_forward_hook(hook_of(edit)) for name, (edit,) in edits.items()]
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(("method", "settings"), CASES, ids=str)
@pytest.mark.parametrize("positions", ["f1+l1", "f1+l1+d"])
@pytest.mark.parametrize("reft", ["before", "after"])
def test_generate_edits_the_same_tokens_whichever_was_added_first(method, reft, positions, settings):
    soft = METHODS[method][2]
    model = with_prompts(method, reft, ReftConfig(positions=positions, r=2, task_type="CAUSAL_LM"))
    plain = with_prompts(method)
    prompt = batch(6, 4, side="left")
    settings = {"max_new_tokens": 5, "do_sample": False, **settings}
    edits = get_interventions(model.get_base_model())
    with edited_by_hooks(plain.get_base_model(), edits, [0, 0] if soft else [0, 2], soft + 6, "d" in positions):
        wanted = plain.generate(**prompt, **settings)
    for _ in range(2):  # PEFT puts its method in the place of ours, and the model's back
        assert model.generate(**prompt, **settings).tolist() == wanted.tolist()
    assert wanted.tolist() != plain.generate(**prompt, **settings).tolist()


@pytest.mark.parametrize("reft", ["before", "after"])
@pytest.mark.parametrize("method", [name for name, (*_, soft) in METHODS.items() if soft])
def test_a_forward_counts_soft_prompts_as_generate_does(method, reft):
    model = with_prompts(method, reft, ReftConfig(positions="f1+l1", r=2, task_type="CAUSAL_LM"))
    plain, prompt = with_prompts(method), batch(6, 6)
    with (
        torch.no_grad(),
        edited_by_hooks(plain.get_base_model(), get_interventions(model.get_base_model()), [0, 0], SOFT + 6, False),
    ):
        wanted = plain(**prompt).logits
    with torch.no_grad():
        torch.testing.assert_close(model(**prompt).logits, wanted, rtol=1e-4, atol=1e-4)
        assert (plain(**prompt).logits - wanted).abs().max() > 1e-2


def test_the_base_model_generates_as_before_when_prompts_were_learned_on_it():
    """PEFT leaves the model's own method in its place, without our entry: the next `generate` puts it back."""
    config = ReftConfig(positions="f1+l1+d", r=2, task_type="CAUSAL_LM")
    base = with_prompts("prompt tuning", "after", config).get_base_model()
    prompt, settings = batch(6, 4, side="left"), {"max_new_tokens": 5, "do_sample": False}
    wanted = base.generate(**prompt, **settings)
    model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=SOFT))
    model.generate(**prompt, **settings)
    assert base.generate(**prompt, **settings).tolist() == wanted.tolist()
