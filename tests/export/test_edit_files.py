"""Adapters as small files: what they hold, what they weigh, and what is refused."""

import json
import re
from dataclasses import replace

import pytest
import torch
from conftest import randomize, reft_model, tiny_model
from safetensors import safe_open
from safetensors.torch import save_file

from peft_reft import ReftConfig
from peft_reft.export import (
    BackboneDescription,
    adapter_tensors,
    exportable,
    load_adapter_tensors,
    save_adapter_tensors,
)
from peft_reft.export.description import describe
from peft_reft.export.files import short_name
from peft_reft.export.graph import Sizes

SETTINGS = {"r": 3, "positions": "f2+l1", "task_type": "CAUSAL_LM"}


@pytest.fixture
def model():
    return reft_model(tiny_model("llama"), share_weights=False, layers_to_transform=[0, 2], **SETTINGS)


def close(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], **tolerance)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"share_weights": False, "layers_to_transform": [1]},
        {"share_weights": "position"},
        {"intervention": "consreft"},
        {"intervention": "lobireft", "layers_to_transform": [-1]},
        {"rank_pattern": {"layers.1": 2}},
        {"share_layers": True},
        {"share_layers": True, "layers_to_transform": [0, 1]},
    ],
    ids=str,
)
def test_a_saved_adapter_gives_the_tensors_of_the_model(settings, tmp_path):
    base = tiny_model("llama")
    base.save_pretrained(tmp_path / "base")
    base.config._name_or_path = str(tmp_path / "base")
    model = reft_model(base, **{**SETTINGS, **settings})
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    close(adapter_tensors(tmp_path / "adapter"), adapter_tensors(model), rtol=1e-5, atol=1e-6)
    assert adapter_tensors(model)["up"].abs().max() > 0.1


def test_a_file_holds_the_edited_blocks_alone_and_what_makes_the_mask(model, tmp_path):
    save_adapter_tensors(model, tmp_path / "a.safetensors", base_model="/home/someone/models/tiny")
    assert (tmp_path / "a.safetensors").stat().st_size < 3000
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {
            "format": "peft_reft.edits",
            "version": "1",
            "positions": "f2+l1",
            "share_weights": "false",
            "blocks": '["model.layers.0", "model.layers.2"]',
            "base_model": "tiny",  # never a folder of somebody's machine
        }
        assert file.get_tensor("down").dtype == torch.float16
        assert file.get_tensor("down").shape == (2, 2, 3, 32)
    found = load_adapter_tensors(tmp_path / "a.safetensors")
    blocks = [f"model.layers.{number}" for number in range(3)]
    close(found.of(blocks), adapter_tensors(model), rtol=2e-3, atol=2e-3)
    save_adapter_tensors(model, tmp_path / "b.safetensors", torch.float32)
    close(load_adapter_tensors(tmp_path / "b.safetensors").of(blocks), adapter_tensors(model), rtol=0, atol=0)


def test_one_of_several_adapters_is_named(model):
    model.add_adapter("other", ReftConfig(**SETTINGS, share_weights=False, layers_to_transform=[0, 2]))
    randomize(model, "other", seed=9)
    assert not torch.equal(adapter_tensors(model)["up"], adapter_tensors(model, "other")["up"])
    with pytest.raises(ValueError, match="'third'"):
        adapter_tensors(model, "third")


def test_numbers_too_large_for_half_precision_are_refused(model, tmp_path):
    randomize(model, scale=1e6)
    with pytest.raises(ValueError, match=r"dtype=torch.float32"):
        save_adapter_tensors(model, tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()
    save_adapter_tensors(model, tmp_path / "a.safetensors", torch.float32)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, "float16"], ids=str)
def test_types_of_numbers_that_no_file_may_hold_are_refused(dtype, model, tmp_path):
    with pytest.raises(ValueError, match=r"is none of torch\.float32"):
        save_adapter_tensors(model, tmp_path / "a.safetensors", dtype)
    assert not (tmp_path / "a.safetensors").exists()


def test_what_is_more_than_edits_is_refused(tmp_path):
    saves_head = reft_model(tiny_model("llama"), modules_to_save=["lm_head"], **SETTINGS)
    with pytest.raises(ValueError, match="modules_to_save"):
        adapter_tensors(saves_head)
    saves_head.save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match=r"more than its interventions: .*lm_head"):
        adapter_tensors(tmp_path / "a")
    turns = reft_model(tiny_model("llama"), turns="all", prompt_end=[5], **SETTINGS)
    with pytest.raises(ValueError, match="turns='all'"):
        adapter_tensors(turns)
    with pytest.raises(ValueError, match="no saved adapter"):
        adapter_tensors(tmp_path)
    bad = randomize(reft_model(tiny_model("llama"), **SETTINGS), scale=float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        adapter_tensors(bad)


def test_an_adapter_of_some_blocks_needs_to_know_them_all(model, tmp_path):
    model.peft_config["default"].base_model_name_or_path = "nowhere/to-be-found"
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match=r"blocks=\[...\]"):
        adapter_tensors(tmp_path / "a")
    blocks = exportable(model, cache=False).blocks
    close(adapter_tensors(tmp_path / "a", blocks=blocks), adapter_tensors(model), rtol=1e-5, atol=1e-6)


def test_a_cut_off_file_and_files_of_other_kinds_are_refused(model, tmp_path):
    path = tmp_path / "a.safetensors"
    save_adapter_tensors(model, path)
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="damaged or was cut off"):
            load_adapter_tensors(path)
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"no peft_reft.edits file"):
        load_adapter_tensors(path)
    with pytest.raises(ValueError, match="no file"):
        load_adapter_tensors(tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"version": "2"}, "version '2'"),
        ({"positions": "f2"}, "does not go with positions='f2'"),
        ({"positions": "sofa"}, "lacks what describes"),
        ({"blocks": '["model.layers.0"]'}, "for 1 blocks"),
        ({"blocks": "["}, "lacks what describes"),
        ({"blocks": "[" * 100_000}, "lacks what describes an adapter .RecursionError"),
        ({"share_weights": '"perhaps"'}, "share_weights='perhaps'"),
        ({"share_weights": "1"}, "share_weights=1"),
        ({"positions": "all", "share_weights": '"position"'}, "positions='all' and share_weights='position'"),
        ({"blocks": "null"}, "its blocks are None"),
        ({"blocks": "[0, 1, 2]"}, r"its blocks are \[0, 1, 2\], where each has a name of its own"),
        ({"blocks": '["a", "a", "b"]'}, "where each has a name of its own"),
    ],
)
def test_metadata_that_does_not_fit_the_tensors_is_refused(changed, why, model, tmp_path):
    path = tmp_path / "a.safetensors"
    save_adapter_tensors(model, path)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in ("down", "bias", "up")}
    save_file(tensors, path, {**metadata, **changed})
    with pytest.raises(ValueError, match=why):
        load_adapter_tensors(path)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "folder"])
def test_what_is_no_file_of_edits_is_not_replaced(name, model, tmp_path):
    """Such as the weights of the adapter itself, which were gone then."""
    model.save_pretrained(tmp_path)
    (tmp_path / "folder").mkdir()
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    for source in (tmp_path, model):
        with pytest.raises(ValueError, match=f"{name}' is there already, and is no file of an adapter's edits"):
            save_adapter_tensors(source, tmp_path / name)
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    save_adapter_tensors(tmp_path, tmp_path / "edits.safetensors", torch.float32)
    save_adapter_tensors(tmp_path, tmp_path / "edits.safetensors")  # an older one of its kind
    assert load_adapter_tensors(tmp_path / "edits.safetensors").positions == model.peft_config["default"].positions


def description(model, **changes) -> BackboneDescription:
    return replace(describe(exportable(model), "backbone.onnx", Sizes(), "tiny"), **changes)


def edits(model, tmp_path, base_model="tiny"):
    save_adapter_tensors(model, tmp_path / "a.safetensors", base_model=base_model)
    return load_adapter_tensors(tmp_path / "a.safetensors")


def test_a_description_is_read_as_it_was_written(model, tmp_path):
    written = description(model, max_rank=8)
    written.save(tmp_path)
    assert BackboneDescription.load(tmp_path) == written
    assert str(tmp_path) not in (tmp_path / "backbone.json").read_text()
    (tmp_path / "backbone.json").write_text(json.dumps({"format": "peft_reft.backbone", "version": 1}))
    with pytest.raises(ValueError, match="lacks what describes a backbone"):
        BackboneDescription.load(tmp_path)
    written.save(tmp_path)
    said = json.loads((tmp_path / "backbone.json").read_text())
    for name, value in (
        ("width", "32"),
        ("blocks", None),
        ("cache_dtype", "int8"),
        ("cache_dtype", ["float32"]),
        ("end_tokens", 5),
        ("max_rank", 0),
    ):
        (tmp_path / "backbone.json").write_text(json.dumps({**said, name: value}))
        with pytest.raises(ValueError, match=re.escape(f"has {name} = {value!r}, which does not describe a backbone")):
            BackboneDescription.load(tmp_path)


def test_a_smaller_adapter_is_padded_and_a_larger_one_refused(model, tmp_path):
    found = edits(model, tmp_path)
    padded = description(model, max_rank=5, max_groups=3).inputs(found)
    assert padded["down"].shape == (3, 3, 5, 32) and padded["bias"].shape == (3, 3, 5)
    torch.testing.assert_close(padded["up"][:, :2, :3], description(model).inputs(found)["up"])
    assert padded["up"][:, 2:].abs().max() == padded["up"][:, :, 3:].abs().max() == 0
    with pytest.raises(ValueError, match=r"rank 3, but the backbone was exported for at most 2.*--max-rank 3"):
        description(model, max_rank=2).inputs(found)
    with pytest.raises(ValueError, match=r"position groups 2, .* at most 1.*--max-groups 2"):
        description(model, max_groups=1).inputs(found)
    with pytest.raises(ValueError, match=r"together have position groups 4, .* at most 3.*--max-groups 4"):
        description(model, max_groups=3).inputs(found, found)
    with pytest.raises(ValueError, match="has an adapter inside"):
        description(model, baked="f2+l1").inputs(found)


def test_an_adapter_of_another_backbone_is_refused(model, tmp_path):
    own = description(model)
    with pytest.raises(ValueError, match="trained on 'other', and the backbone is 'tiny'"):
        own.inputs(edits(model, tmp_path, base_model="other"))
    wider = reft_model(tiny_model("llama", hidden_size=64), **SETTINGS)
    with pytest.raises(ValueError, match="width 64, but the backbone's are 32 wide"):
        own.inputs(edits(wider, tmp_path))
    deeper = reft_model(tiny_model("llama", num_hidden_layers=5), **SETTINGS)
    with pytest.raises(ValueError, match=r"edits 'model.layers.3', but the backbone's 3 blocks"):
        own.inputs(edits(deeper, tmp_path))
    gpt2 = reft_model(tiny_model("gpt2"), **SETTINGS)
    with pytest.raises(ValueError, match=r"edits 'transformer.h.0'"):
        own.inputs(edits(gpt2, tmp_path))


def test_names_lose_their_folders():
    assert [short_name(name) for name in ("a/b", "/home/x/models/b/", r"C:\models\b", "b")] == ["b"] * 4
