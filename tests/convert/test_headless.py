"""AdapterHub's adapters of models without a head, for models with one: the names of the blocks grow."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, RobertaForSequenceClassification

from peft_reft.convert import from_adapterhub

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
BARE = CHECKPOINTS / "adapterhub" / "loreft-bare"
LLAMA, ROBERTA = (CHECKPOINTS / "base" / name for name in ("llama", "roberta"))


@torch.no_grad()
def last_hidden_states(model, stored):
    inputs = {name: stored[name] for name in ("input_ids", "attention_mask")}
    return model(**inputs, output_hidden_states=True).hidden_states[-1][stored["attention_mask"].bool()]


@pytest.mark.parametrize("given", ["path", "config", "model"])
def test_an_adapter_of_a_bare_llama_works_below_a_head(given, tmp_path):
    base = LlamaForCausalLM.from_pretrained(LLAMA).eval()
    made = from_adapterhub(BARE, tmp_path / "new", model={"path": LLAMA, "config": base.config, "model": base}[given])
    assert set(made.edits) <= {f"model.layers.{number}" for number in range(3)} and made.config.task_type == "CAUSAL_LM"
    stored = load_file(BARE / "logits.safetensors")  # of a model without a head: its last hidden states
    wanted = stored["logits"][stored["attention_mask"].bool()]
    plain = last_hidden_states(base, stored)
    found = last_hidden_states(PeftModel.from_pretrained(base, tmp_path / "new").eval(), stored)
    assert (found - wanted).abs().max() < 1e-5 < 0.1 < (plain - wanted).abs().max()


def test_an_adapter_of_a_bare_encoder_works_below_a_classifier(tmp_path):
    """As `RobertaModel` has saved it: blocks `encoder.layer.N`, no head."""
    whole = CHECKPOINTS / "adapterhub" / "loreft-roberta"
    bare = Path(shutil.copytree(whole, tmp_path / "bare"))
    tensors = torch.load(bare / "pytorch_adapter.bin", weights_only=True)
    assert all(name.startswith("roberta.encoder.") for name in tensors)
    torch.save({name.removeprefix("roberta."): t for name, t in tensors.items()}, bare / "pytorch_adapter.bin")
    config = json.loads((bare / "adapter_config.json").read_text())
    (bare / "adapter_config.json").write_text(json.dumps({**config, "model_class": "RobertaModel"}))
    for name in ("head_config.json", "pytorch_model_head.bin"):
        (bare / name).unlink()
    base = RobertaForSequenceClassification.from_pretrained(ROBERTA)
    made, wanted = from_adapterhub(bare, model=base), from_adapterhub(whole, model=base, head=False)
    assert list(made.edits) == list(wanted.edits)
    assert all(torch.equal(made.tensors()[name], tensor) for name, tensor in wanted.tensors().items())


def test_without_the_model_a_note_says_what_to_do(tmp_path):
    made = from_adapterhub(BARE, tmp_path / "new")
    (note,) = [note for note in made.notes if "LlamaModel" in note]
    assert "(layers.1)" in note and "--model" in note
    base = tiny_model("llama", "base", hidden_size=16)  # the names fit a model without a head
    assert set(made.edits) <= {name for name, _ in base.named_modules()}
    with_head = from_adapterhub(BARE, model=LLAMA)
    assert not [note for note in with_head.notes if "LlamaModel" in note]
