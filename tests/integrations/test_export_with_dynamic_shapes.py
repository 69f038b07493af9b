"""torch.export with dynamic shapes; and a failed export leaves nothing to later calls."""

import warnings

import pytest
import torch
from conftest import batch, logits, reft_model, tiny_model
from transformers import GenerationConfig
from transformers.integrations.executorch import (
    TorchExportableModuleForDecoderOnlyLM,
    register_dynamic_cache_export_support,
)

CONFIG = {"r": 2, "task_type": "CAUSAL_LM"}


class LogitsOnly(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


@pytest.mark.parametrize("positions", ["f1+l1", "f2+l2", "all"])
def test_an_export_with_dynamic_shapes_edits_rows_of_any_length(positions):
    model = reft_model(tiny_model("llama"), positions=positions, **CONFIG)
    rows, columns = torch.export.Dim("rows", min=2, max=16), torch.export.Dim("columns", min=4, max=64)
    shapes = {"input_ids": {0: rows, 1: columns}, "attention_mask": {0: rows, 1: columns}}
    first = batch(8, 8)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(
            LogitsOnly(model), tuple(first.values()), dynamic_shapes=shapes, strict=False
        ).module()
        for inputs in (first, batch(12, 5, 7), batch(4, 2, side="left"), batch(9, 3, side="left")):
            valid = inputs["attention_mask"].bool()
            got, expected = exported(*inputs.values()), logits(model, inputs)
            torch.testing.assert_close(got[valid], expected[valid], rtol=1e-4, atol=1e-4)
            assert (expected - logits(tiny_model("llama"), inputs))[valid].abs().max() > 1e-3


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("inner", [False, True], ids=["peft", "inner"])
def test_the_model_itself_is_exported_with_dynamic_shapes(inner, cache):
    register_dynamic_cache_export_support()
    base = tiny_model("llama", num_hidden_layers=2, use_cache=cache)
    model = reft_model(base, positions="f2+l2", **CONFIG)
    some = torch.export.Dim.AUTO
    shapes = {name: {0: some, 1: some} for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        exported = torch.export.export(
            base if inner else model, (), batch(8, 8), dynamic_shapes=shapes, strict=False
        ).module()
    for inputs in (batch(12, 5, 7), batch(9, 3, side="left")):
        valid = inputs["attention_mask"].bool()
        got, expected = exported(**inputs), logits(model, inputs)
        torch.testing.assert_close(got.logits[valid], expected[valid], rtol=1e-4, atol=1e-4)
        assert (got.get("past_key_values") is not None) == cache
        with model.disable_adapter():
            assert (expected - logits(model, inputs))[valid].abs().max() > 1e-3


def test_the_static_cache_of_transformers_exporter_answers_as_generate():
    base = tiny_model("llama", num_hidden_layers=2)
    base.generation_config = GenerationConfig(
        use_cache=True, cache_implementation="static", cache_config={"batch_size": 1, "max_cache_len": 32}
    )
    model = reft_model(base, positions="f2+l2", **CONFIG)
    prompt, tokens = batch(7)["input_ids"], 5
    settings = {"max_new_tokens": tokens, "do_sample": False, "cache_implementation": None}
    expected = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **settings)
    columns = torch.export.Dim("columns", max=31)
    exported = TorchExportableModuleForDecoderOnlyLM(base).export(
        prompt, dynamic_shapes={"input_ids": {1: columns}, "cache_position": {0: columns}}, strict=False
    )
    run, row, new = exported.module(), prompt, prompt
    for _ in range(tokens):
        new = run(input_ids=new, cache_position=torch.arange(row.shape[1] - new.shape[1], row.shape[1]))[:, -1:].argmax(
            -1
        )
        row = torch.cat([row, new], dim=1)
    assert row.tolist() == expected.tolist()
    with model.disable_adapter():
        assert (
            model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **settings).tolist()
            != row.tolist()
        )


def test_an_export_that_fails_leaves_nothing_to_the_next_call():
    model = reft_model(tiny_model("llama"), positions="f1+l1", **CONFIG)
    inputs = batch(8, 6)
    expected = logits(model, inputs)
    backbone = logits(model.get_base_model().model, inputs)

    def fail(*args):
        raise RuntimeError("in the middle of a trace")

    handle = model.get_base_model().lm_head.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError):
        torch.export.export(LogitsOnly(model), tuple(inputs.values()), strict=False)
    handle.remove()
    torch.testing.assert_close(logits(model, inputs), expected)
    torch.testing.assert_close(logits(model.get_base_model().model, inputs), backbone)
