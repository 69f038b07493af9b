"""Backbones for ExecuTorch, in an environment of its own: lowering takes minutes, and the package is a large one.

python -m venv et && et/bin/pip install executorch==1.5.1 torch==2.13.0 -c constraints.txt transformers peft pytest -e .
et/bin/python -m pytest tests/export/test_executorch.py
"""

import pytest
import torch
from conftest import randomize, reft_model, tiny_model

from peft_reft import ReftConfig
from peft_reft.export import (
    export_backbone,
    exportable,
    greedy_answer,
    load_adapter_tensors,
    open_backbone,
    save_adapter_tensors,
)

pytest.importorskip("executorch")
PROMPT, TOKENS = [5, 9, 31, 44, 7, 80], 6
ADAPTERS = {"one": ("f2+d2", False), "two": ("l1", True)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["pte", "pte-portable"])
def test_one_file_answers_for_every_adapter(kind, tmp_path):
    base = tiny_model("llama", num_hidden_layers=2)
    base.generation_config.eos_token_id = None
    settings = {"positions": "f2+d2", "share_weights": False, "layers_to_transform": [1]}
    model = reft_model(base, adapter="one", r=3, task_type="CAUSAL_LM", **settings)
    model.add_adapter("two", ReftConfig(r=1, positions="l1", intervention="direft", task_type="CAUSAL_LM"))
    randomize(model, "two", seed=4, scale=1.0)
    export_backbone(exportable(model), tmp_path, kind, max_rank=4, max_groups=2, max_columns=24)
    assert (b"XnnpackBackend" in (tmp_path / "backbone.pte").read_bytes()) == (kind == "pte")
    run, description = open_backbone(tmp_path)
    ids, seen = torch.tensor([PROMPT]), set()
    for adapter, (positions, share) in ADAPTERS.items():
        model.set_adapter(adapter)
        save_adapter_tensors(model, tmp_path / "a.safetensors", torch.float32, adapter_name=adapter)
        tensors = description.inputs(load_adapter_tensors(tmp_path / "a.safetensors"))
        for strength in (1.0, 0.0):
            past = description.empty_past()
            got = greedy_answer(run, PROMPT, tensors, positions, share, past, TOKENS, strength)
            with model.disable_adapter() if strength == 0 else torch.no_grad():
                found = model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False
                )
            assert got == found[0, len(PROMPT) :].tolist()
            seen.add(tuple(got))
    assert len(seen) == 3
