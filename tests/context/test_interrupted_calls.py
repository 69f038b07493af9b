"""An interrupted call leaves nothing to the next, however it ends."""

import functools
import sys

import pytest
import torch
from conftest import batch, logits, randomize, reft_model, tiny_model
from edit_spy import edited_columns
from peft import get_peft_model

from peft_reft import ReftConfig

CONFIG = {"positions": "f1+l1", "r": 2, "task_type": "CAUSAL_LM"}


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


PLACES = {
    "a block": lambda base: base.model.layers[1],
    "inside a block": lambda base: base.model.layers[0].mlp,
    "the first block": lambda base: base.model.layers[0],
    "the lm_head": lambda base: base.lm_head,
    "the embedding": lambda base: base.model.embed_tokens,
    "the last norm": lambda base: base.model.norm,
}


def labelled(ids):
    return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(ids.shape[1]) < 3, -100)}


INTERRUPTED = {
    "a labelled forward": lambda model, ids: model(**labelled(ids)),
    "a forward with locations": lambda model, ids: model(
        input_ids=ids, intervention_locations=torch.tensor([[0, 1], [2, 3]])
    ),
    "a forward with adapter names": lambda model, ids: model(input_ids=ids, adapter_names=["default", "__base__"]),
    "a call past __call__": lambda model, ids: model.get_base_model().forward(**labelled(ids)),
    "a training step": lambda model, ids: model.train()(**labelled(ids)),
    "generate": lambda model, ids: model.generate(input_ids=ids, max_new_tokens=3, do_sample=False),
    "generate with locations": lambda model, ids: model.generate(
        input_ids=ids, max_new_tokens=3, intervention_locations=torch.tensor([[0, 1], [2, 3]])
    ),
}


ENDS = [(place, call, KeyboardInterrupt) for place in PLACES for call in INTERRUPTED]
ENDS += [(place, "a labelled forward", error) for place in PLACES for error in (SystemExit, GeneratorExit)]


@pytest.mark.parametrize(("place", "call", "error"), ENDS)
def test_an_interrupted_call_leaves_nothing_to_the_next(place, call, error):
    model = reft_model(tiny_model("llama", eos_token_id=None), **CONFIG)
    base, ids = model.get_base_model(), batch(6, 6, seed=5)["input_ids"]
    others = [batch(6, 6, seed=9), batch(7, 4, 7, seed=9)]
    hidden = torch.randn(2, 6, 32)
    states = {"position_embeddings": base.model.rotary_emb(hidden, torch.arange(6)[None])}

    def block_alone():
        try:
            return base.model.layers[0](hidden, **states)
        except ValueError as told:  # a block alone has no tokens to count, which is told
            return str(told)

    def observe():
        with torch.no_grad():
            backbone = [base.model(**inputs).last_hidden_state for inputs in others]
            return [block_alone(), *backbone, *(model(**inputs).logits for inputs in others)]

    expected = observe()

    def stop(*args):
        raise error

    handle = PLACES[place](base).register_forward_pre_hook(stop)
    with pytest.raises(error):
        INTERRUPTED[call](model, ids)
    handle.remove()
    model.eval()
    for one, other in zip(observe(), expected):
        if isinstance(other, str):
            assert one == other
        else:
            torch.testing.assert_close(one, other)
    assert edited_columns(model, tiny_model("llama", eos_token_id=None), **others[0]) == [[0, 5], [0, 5]]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Ctrl-C while a generator is closed
def test_adapter_names_are_forgotten_wherever_ctrl_c_comes():
    """At each point around the scope at which CPython delivers a signal; the traceback is kept, as notebooks do."""
    model = reft_model(tiny_model("llama"), **CONFIG).eval()
    inputs = batch(5, 5)
    expected = logits(model, inputs)
    assert not torch.equal(expected, logits(model, inputs, adapter_names=["default", "__base__"]))
    files = ("tuner/rows.py", "tuner/model.py", "contextlib.py", "peft/peft_model.py")
    points, stop_at, kept = 0, 0, []

    def stop_there(frame, event, argument):
        nonlocal points
        if event in ("call", "c_return") and frame.f_code.co_filename.endswith(files):
            points += 1
            if points == stop_at:
                sys.setprofile(None)
                raise KeyboardInterrupt

    def call():
        nonlocal points
        points = 0
        sys.setprofile(stop_there)
        try:
            model(**inputs, adapter_names=["default", "__base__"])
        finally:
            sys.setprofile(None)

    call()
    for stop_at in range(1, points + 1):
        try:
            call()
        except KeyboardInterrupt as error:
            kept.append(error)
        assert torch.equal(logits(model, inputs), expected), stop_at
    assert len(kept) > 20


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("place", ["a block", "the lm_head"])
def test_the_first_call_after_something_took_the_place_of_forward_leaves_nothing(place, error):
    """Such a call is opened and closed by hooks, of which torch calls none after Ctrl-C."""
    model = reft_model(tiny_model("llama", eos_token_id=None), **CONFIG)
    base, other = model.get_base_model(), batch(6, 6, seed=9)
    expected = logits(base.model, other)
    assert (expected - logits(tiny_model("llama", eos_token_id=None).model, other)).abs().max() > 1e-3
    hooks = len(base._forward_hooks)
    base.forward = functools.partial(base.forward)  # as accelerate and TRL do

    def stop(*args):
        raise error

    handle = PLACES[place](base).register_forward_pre_hook(stop)
    with pytest.raises(error):
        model(**labelled(batch(6, 6, seed=5)["input_ids"]))
    handle.remove()
    assert len(base._forward_hooks) == hooks
    torch.testing.assert_close(logits(base.model, other), expected)


def test_a_generator_around_a_forward_that_is_closed_leaves_nothing():
    model = reft_model(tiny_model("llama"), **CONFIG)
    base, ids, other = model.get_base_model(), batch(6, 6)["input_ids"], batch(6, 6, seed=9)
    expected = logits(base.model, other)
    assert (expected - logits(tiny_model("llama").model, other)).abs().max() > 1e-3

    def steps():
        def give_up(*args):
            raise GeneratorExit

        handle = base.lm_head.register_forward_pre_hook(give_up)
        try:
            yield
            model(**labelled(ids))
        finally:
            handle.remove()

    generator = steps()
    next(generator)
    with pytest.raises(GeneratorExit):
        generator.send(None)
    generator.close()
    torch.testing.assert_close(logits(base.model, other), expected)


def test_an_interrupted_scope_of_adapter_names_leaves_the_active_adapter():
    model = reft_model(tiny_model("llama"), **CONFIG)
    inputs = batch(6, 6)
    expected = logits(model, inputs)
    assert (expected - logits(tiny_model("llama"), inputs)).abs().max() > 1e-3
    handle = model.get_base_model().model.layers[2].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**inputs, adapter_names=["__base__", "__base__"])
    handle.remove()
    torch.testing.assert_close(logits(model, inputs), expected)


def test_an_interrupted_backward_pass_of_checkpointed_blocks_leaves_nothing():
    model = get_peft_model(tiny_model("llama"), ReftConfig(**CONFIG)).train()
    randomize(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    other = batch(7, 4, seed=9)
    expected = logits(model.eval(), other)
    assert (expected - logits(tiny_model("llama"), other)).abs().max() > 1e-3
    loss = model.train()(**labelled(batch(6, 6)["input_ids"])).loss
    handle = model.get_base_model().model.layers[1].mlp.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        loss.backward()
    handle.remove()
    torch.testing.assert_close(logits(model.eval(), other), expected)
