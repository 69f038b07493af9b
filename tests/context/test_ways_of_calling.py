"""Labels, masks, locations and adapter names are used whichever way the model is called."""

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32, extract_model_from_parallel
from conftest import batch, randomize, reft_model, tiny_model
from edit_spy import spied

from peft_reft import ReftConfig
from peft_reft.context.forward import ForwardContext, Given
from peft_reft.positions import find_prompts
from peft_reft.tuner.injection import state_of

PROMPT = 6  # of ten tokens: f1+l1 edits the columns 0 and 5


def ways_of_calling():
    """Name -> (model, what is called)."""

    def peft():
        return reft_model(tiny_model("llama"), positions="f1+l1", task_type="CAUSAL_LM")

    def native():
        model = tiny_model("llama")
        model.add_adapter(ReftConfig(positions="f1+l1", task_type="CAUSAL_LM"))
        return randomize(model).eval()

    return {
        "PeftModel(...)": (peft, lambda model: model),
        "PeftModel.forward": (peft, lambda model: model.forward),
        "base_model(...)": (peft, lambda model: model.base_model),
        "base_model.forward": (peft, lambda model: model.base_model.forward),
        "get_base_model()(...)": (peft, lambda model: model.get_base_model()),
        "get_base_model().forward": (peft, lambda model: model.get_base_model().forward),
        "add_adapter: model(...)": (native, lambda model: model),
        "add_adapter: model.forward": (native, lambda model: model.forward),
    }


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("way", ways_of_calling())
def test_every_way_of_calling_the_model_uses_its_labels_and_mask(way, training):
    make, callee = ways_of_calling()[way]
    model = make().train(training)
    inputs = batch(10, 7)
    labels = inputs["input_ids"].masked_fill(torch.arange(10) < PROMPT, -100)
    with spied(model, tiny_model("llama")) as calls:
        output = callee(model)(**inputs, labels=labels)
    assert calls == [[[0, PROMPT - 1]] * 2]
    if training:
        output.loss.backward()
    with spied(model, tiny_model("llama")) as calls, torch.no_grad():
        callee(model)(**inputs)
    assert calls == [[[0, 9], [0, 6]]]


@pytest.mark.parametrize("way", ["get_base_model().forward", "add_adapter: model.forward", "get_base_model()(...)"])
def test_locations_and_adapter_names_are_taken_by_every_way_of_calling(way):
    make, callee = ways_of_calling()[way]
    model = make()
    inputs = batch(10, 7)
    with spied(model, tiny_model("llama")) as calls, torch.no_grad():
        callee(model)(**inputs, intervention_locations=torch.tensor([[2, 3], [4, -1]]))
        callee(model)(**inputs, adapter_names=["__base__", next(iter(model.peft_config))])
    assert calls == [[[2, 3], [4]], [[], [0, 6]]]


@pytest.mark.parametrize("called", [False, True])
def test_a_model_that_accelerate_has_wrapped_and_unwrapped_is_called_as_before(called):
    """With mixed precision accelerate replaces `forward`; unwrapping binds what was there before to the model."""
    model, inputs = ways_of_calling()["add_adapter: model(...)"][0](), batch(10, 7)
    model._original_forward = model.forward  # as Accelerator.prepare
    model.forward = convert_outputs_to_fp32(model.forward)
    if called:
        model(**inputs)
    model = extract_model_from_parallel(model, keep_fp32_wrapper=False)
    with spied(model, tiny_model("llama")) as calls, torch.no_grad():
        model(**inputs)
        model(*inputs.values())
    assert calls == [[[0, 9], [0, 6]]] * 2


@pytest.mark.parametrize("positions", ["f1+l1", "all"])
def test_forward_of_a_bare_encoder_equals_calling_it(positions):
    model = tiny_model("bert", "base")
    model.add_adapter(ReftConfig(positions=positions))
    randomize(model).eval()
    inputs = batch(8, 5)
    valid = inputs["attention_mask"].bool()
    with torch.no_grad():
        called, forwarded = model(**inputs).last_hidden_state, model.forward(**inputs).last_hidden_state
        plain = tiny_model("bert", "base")(**inputs).last_hidden_state
    torch.testing.assert_close(forwarded[valid], called[valid])
    assert (called - plain)[valid].abs().max() > 1e-3


def test_vectors_of_several_tokens_are_those_of_the_columns_that_a_forward_runs():
    """Columns 4 to 7 of a row whose prompt ends at column 5, in blocks with a vector for two tokens."""
    state = state_of(reft_model(tiny_model("llama"), positions="all").get_base_model())
    whole = find_prompts(torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0]]).bool())
    context = ForwardContext(state, state.layers, Given(), rows=1, columns=4, prompts_of=lambda spec: whole, start=4)
    (spec,) = state.active_specs()
    places = context.of_vectors(2, 2).places(spec, True, torch.zeros(1, 2, 32))
    assert places.columns is None and places.keep.tolist() == [[[True, False]]]
