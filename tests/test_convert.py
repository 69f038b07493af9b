"""Checkpoints that pyreft and AdapterHub made (tests/checkpoints) give the logits that they gave there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import randomize, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaModel, RobertaForSequenceClassification

from peft_reft import ReftConfig, get_interventions
from peft_reft.convert import (
    ConversionError,
    adapterhub_locations,
    convert,
    from_adapterhub,
    from_pyreft,
    main,
    pyreft_locations,
    to_pyreft,
    writing,
)
from peft_reft.convert.rotation import orthogonal_parameters, orthogonal_weight

CHECKPOINTS = Path(__file__).parent / "checkpoints"
PYREFT, ADAPTERHUB, BASE = (CHECKPOINTS / name for name in ("pyreft", "adapterhub", "base"))
KINDS = {
    "loreft": "loreft",
    "noreft": "noreft",
    "consreft": "consreft",
    "lobireft": "lobireft",
    "direft": "odireft",
    "nodireft": "direft",
}


def base(name, dtype=torch.float32):
    """The model that a stored checkpoint belongs to."""
    if "roberta" in name:
        return RobertaForSequenceClassification.from_pretrained(BASE / "roberta").eval()
    cls = LlamaModel if "bare" in name else LlamaForCausalLM
    return cls.from_pretrained(BASE / "llama", dtype=dtype).eval()


def model_of(name):
    return BASE / ("roberta" if "roberta" in name else "llama")


@torch.no_grad()
def outputs(model, stored, **kwargs):
    """Logits (or hidden states) at the tokens that are not padding."""
    output = model(input_ids=stored["input_ids"], attention_mask=stored["attention_mask"], **kwargs)
    return real(output.logits if hasattr(output, "logits") else output.last_hidden_state, stored)


def real(logits, stored):
    return (logits[stored["attention_mask"].bool()] if logits.dim() == 3 else logits).float()


def difference(directory, stored, name, dtype=torch.float64, **kwargs):
    """max|dlogits| between an adapter and what was stored, after a check that the adapter does something.

    In double precision what differs is the rounding of the stored logits, the same on every machine.
    """
    model = base(name, dtype)
    plain = outputs(model, stored)
    model = PeftModel.from_pretrained(model, directory).eval()
    if dtype == torch.float64:
        model = model.double()
    found, wanted = outputs(model, stored, **kwargs), real(stored["logits"], stored)
    assert (found - plain).abs().max() > 0.1
    return (found - wanted).abs().max().item()


def copy(source, tmp_path):
    return Path(shutil.copytree(source, tmp_path / "copy"))


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(path, change):
    tensors = torch.load(path, weights_only=True)
    change(tensors)
    torch.save(tensors, path)


# The logits of the original libraries.


@pytest.mark.parametrize("weights", ["shared", "separate"])
@pytest.mark.parametrize("kind", KINDS)
def test_pyreft_gives_the_same_logits(kind, weights, tmp_path):
    name = f"{kind}-{weights}"
    made = from_pyreft(PYREFT / name, tmp_path / "new", positions="f2+l2", model=model_of(name))
    assert (made.config.intervention, made.config.share_weights) == (KINDS[kind], weights == "shared")
    assert (made.config.r, made.config.layers_to_transform, made.config.task_type) == (3, [0, 2], "CAUSAL_LM")
    assert difference(tmp_path / "new", load_file(PYREFT / name / "logits.safetensors"), name) < 1e-5


@pytest.mark.parametrize(
    ("name", "positions", "act_fn"),
    [
        ("loreft-relu", "f2+l2", "relu"),
        ("loreft-square", "f2+l2", None),
        ("direft-square", "f2+l2", None),
        ("consreft-decay", "f2+l2", None),
        ("loreft-path", "f2+l2", None),
        ("loreft-mlp-path", "f2+l2", None),
        ("loreft-block-input", "f2+l2", None),
        ("loreft-roberta", "f2+l1", None),
    ],
)
def test_pyreft_in_its_other_forms(name, positions, act_fn, tmp_path):
    from_pyreft(PYREFT / name, tmp_path / "new", positions=positions, model=model_of(name), act_fn=act_fn)
    assert difference(tmp_path / "new", load_file(PYREFT / name / "logits.safetensors"), name) < 1e-5


@pytest.mark.parametrize("name", ["loreft-bfloat16", "direft-bfloat16"])
def test_pyreft_in_bfloat16(name, tmp_path):
    made = from_pyreft(PYREFT / name, tmp_path / "new", positions="f2+l2", model=model_of(name))
    assert {tensor.dtype for tensor in made.tensors().values()} == {torch.bfloat16, torch.float32}, "mixed, as it was"
    stored = load_file(PYREFT / name / "logits.safetensors")
    largest = stored["logits"].float().abs().max()
    assert difference(tmp_path / "new", stored, name, torch.bfloat16) < 0.02 * largest


@pytest.mark.parametrize("weights", ["shared", "separate"])
@pytest.mark.parametrize("kind", ["loreft", "noreft", "direft"])
def test_adapterhub_gives_the_same_logits(kind, weights, tmp_path):
    name = f"{kind}-{weights}"
    made = from_adapterhub(ADAPTERHUB / name, tmp_path / "new", kind=kind)
    assert (made.config.intervention, made.config.positions) == (kind, "f2+l2")
    assert made.config.share_weights == (weights == "shared") and made.config.task_type == "CAUSAL_LM"
    assert difference(tmp_path / "new", load_file(ADAPTERHUB / name / "logits.safetensors"), name) < 1e-5


@pytest.mark.parametrize(
    ("name", "kind", "positions"),
    [
        ("loreft-default", None, "f3"),
        ("loreft-suffix", None, "l2"),
        ("loreft-safetensors", None, "f2+l2"),
        ("loreft-square", None, "f2+l2"),
        ("loreft-bare", None, "f2+l2"),
        ("loreft-roberta", None, "f2+l2"),
        ("noreft-leakyrelu", "noreft", "f2+l2"),
    ],
)
def test_adapterhub_in_its_other_forms(name, kind, positions, tmp_path):
    made = from_adapterhub(ADAPTERHUB / name, tmp_path / "new", kind=kind)
    assert made.config.positions == positions
    assert difference(tmp_path / "new", load_file(ADAPTERHUB / name / "logits.safetensors"), name) < 1e-5


def test_direft_and_noreft_of_adapterhub_differ_by_what_they_compute_only(tmp_path):
    stored = load_file(ADAPTERHUB / "direft-shared" / "logits.safetensors")
    from_adapterhub(ADAPTERHUB / "direft-shared", tmp_path / "new", kind="noreft")
    assert difference(tmp_path / "new", stored, "direft-shared") > 0.1
    with pytest.raises(ConversionError, match=r"in the same way.*kind='direft'.*kind='noreft'"):
        from_adapterhub(ADAPTERHUB / "direft-shared")
    with pytest.raises(ConversionError, match="orthogonality=true, which is 'loreft'"):
        from_adapterhub(ADAPTERHUB / "loreft-shared", kind="direft")


# Where the tokens are.


@pytest.mark.parametrize(("name", "skip_last"), [("loreft-short", False), ("loreft-short-one-less", True)])
def test_pyrefts_halved_and_shifted_positions_as_locations(name, skip_last, tmp_path):
    made = from_pyreft(PYREFT / name, tmp_path / "new", positions="f2+l2", model=model_of(name))
    stored = load_file(PYREFT / name / "logits.safetensors")
    assert difference(tmp_path / "new", stored, name) > 0.1, "positions alone cannot say it"
    locations = pyreft_locations(stored["attention_mask"], "f2+l2", skip_last=skip_last)
    assert difference(tmp_path / "new", stored, name, intervention_locations=locations) < 1e-5
    assert any("fewer than 4 tokens" in note and "pyreft_locations" in note for note in made.notes)
    assert any("skip_last=True" in note for note in made.notes)
    # Rows of the stored batch: prompts of 3 to 8 tokens. From 4 on the positions say the same, if counted to the end.
    model = PeftModel.from_pretrained(base(name), tmp_path / "new").eval()
    long = {key: stored[key][1:] for key in ("input_ids", "attention_mask", "logits")}
    off = (outputs(model, long) - real(long["logits"], long)).abs().max()
    assert (off < 1e-5) if not skip_last else (off > 0.1)


def test_pyreft_locations_are_those_that_pyreft_made(tmp_path):
    for name in ("loreft-short", "loreft-short-one-less", "loreft-separate"):
        stored = load_file(PYREFT / name / "logits.safetensors")
        found = pyreft_locations(stored["attention_mask"], "f2+l2", skip_last="less" in name)
        theirs = stored["unit_locations"][[0, 2]].transpose(0, 1)  # [prefix or suffix, row, position] -> [row, ...]
        assert columns(found) == columns(theirs.masked_fill(stored["attention_mask"][0, 0] == 0 and theirs == 0, -1))
    for weights in ("shared", "separate"):
        for item in json.loads((PYREFT / f"generation-dataset-{weights}.json").read_text()):
            is_prompt = torch.tensor([[i != 0 and y == -100 for i, y in zip(item["input_ids"], item["labels"])]])
            found = columns(pyreft_locations(is_prompt, "f2+l2", skip_last=True))[0]
            theirs = [{place for place in line if place > 0} for line in item["intervention_locations"]]
            if weights == "shared" or sum(is_prompt[0]) < 3:  # one list for both, named for every intervention
                assert set().union(*found) == theirs[0] == theirs[1]
            else:
                assert found == theirs


def columns(locations):
    """The columns of each row and group, as sets."""
    return [[{place for place in group if place >= 0} for group in row] for row in locations.tolist()]


def test_adapterhubs_overlapping_ends_as_locations(tmp_path):
    name = "loreft-short"
    made = from_adapterhub(ADAPTERHUB / name, tmp_path / "new")
    stored = load_file(ADAPTERHUB / name / "logits.safetensors")
    assert difference(tmp_path / "new", stored, name) > 0.1
    locations = adapterhub_locations(stored["attention_mask"], "f2+l2")
    assert difference(tmp_path / "new", stored, name, intervention_locations=locations) < 1e-5
    assert any("fewer than 4 tokens" in note and "adapterhub_locations" in note for note in made.notes)
    assert any("behind the answer" in note for note in made.notes)


def test_locations_follow_left_padding_and_refuse_what_they_do_not_know():
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    assert pyreft_locations(mask, "f1+l2").tolist() == [[[2, -1], [5, 6]], [[0, -1], [5, 6]]]
    assert pyreft_locations(mask, "l1", skip_last=True).tolist() == [[[5]], [[5]]]
    assert adapterhub_locations(mask, "f6+l3").tolist()[0] == [[2, 3, -1, -1, -1, -1], [4, 5, 6, -1, -1, -1]]
    with pytest.raises(ValueError, match=r"'m2'.*fN and lM"):
        pyreft_locations(mask, "m2")
    with pytest.raises(ValueError, match="Row 0 of the mask has gaps"):
        adapterhub_locations(torch.tensor([[1, 0, 1]]), "f1")


def test_pyrefts_positions_have_to_be_told_and_fit(tmp_path):
    with pytest.raises(ConversionError, match=r"do not say which tokens.*positions='f2\+l2'"):
        from_pyreft(PYREFT / "loreft-shared", model=model_of("llama"))
    with pytest.raises(ConversionError, match=r"2 interventions per block, but positions='l2' has 1 term"):
        from_pyreft(PYREFT / "loreft-separate", positions="l2", model=model_of("llama"))
    with pytest.raises(ValueError, match=r"positions='l2\+f2'"):
        from_pyreft(PYREFT / "loreft-separate", positions="l2+f2", model=model_of("llama"))


# Names and numbers of blocks.


@pytest.mark.parametrize("spelling", ["layer.{}.comp.block_output.unit.pos.nunit.1#{}", "layer.{}.repr.{}"])
def test_older_keys_of_pyreft(spelling, tmp_path):
    source = copy(PYREFT / "loreft-separate", tmp_path)
    spelling = spelling.replace("repr.{}", "repr.block_output.unit.pos.nunit.1#{}")
    config = json.loads((source / "config.json").read_text())
    keys = []
    for key in config["sorted_keys"]:
        layer, number = re.fullmatch(r"layer_(\d+)_comp_block_output_unit_pos_nunit_1#(\d+)", key).groups()
        keys.append(spelling.format(layer, number))
        (source / f"intkey_{key}.bin").rename(source / f"intkey_{keys[-1]}.bin")
    older = [entry[:9] for entry in config["representations"]]  # older releases wrote fewer entries
    edit_json(source / "config.json", sorted_keys=keys, representations=older)
    from_pyreft(source, tmp_path / "new", positions="f2+l2", model=model_of("llama"))
    stored = load_file(source / "logits.safetensors")
    assert difference(tmp_path / "new", stored, "llama") < 1e-5


def test_pyrefts_trainer_puts_the_checkpoint_a_directory_lower(tmp_path):
    shutil.copytree(PYREFT / "loreft-shared", tmp_path / "run" / "intervenable_model")
    made = convert(tmp_path / "run", tmp_path / "new", positions="f2+l2", model=model_of("llama"))
    assert list(made.edits) == ["model.layers.0", "model.layers.2"]


def test_numbered_blocks_need_the_model_and_paths_do_not(tmp_path):
    with pytest.raises(ConversionError, match=r"numbers its blocks.*model='...' \(--model ...\)"):
        from_pyreft(PYREFT / "loreft-shared", positions="f2+l2")
    from_pyreft(PYREFT / "loreft-path", tmp_path / "new", positions="f2+l2")
    assert difference(tmp_path / "new", load_file(PYREFT / "loreft-path" / "logits.safetensors"), "llama") < 1e-5


def test_what_does_not_fit_one_adapter_is_split_into_two(tmp_path):
    source = copy(PYREFT / "loreft-separate", tmp_path)
    told = json.loads((source / "config.json").read_text())
    lists = ("sorted_keys", "representations", "intervention_types")
    file = source / "intkey_layer_2_comp_block_output_unit_pos_nunit_1#1.bin"
    whole = file.read_bytes()
    edit_tensors(file, lambda t: t.update({"rotate_layer": t["rotate_layer"][:, :2], "weight": t["weight"][:2]}))
    edit_tensors(file, lambda t: t.update(bias=t["bias"][:2]))
    with pytest.raises(ConversionError, match=r"'model.layers.2' have the ranks \[2, 3\].*copies of the directory"):
        from_pyreft(source, positions="f2+l2", model=BASE / "llama")
    file.write_bytes(whole)
    mixed = [*told["intervention_types"][:3], "<class 'pyreft.interventions.DireftIntervention'>"]
    edit_json(source / "config.json", intervention_types=mixed)
    with pytest.raises(ConversionError, match=r"mixes interventions.*copies of the directory"):
        from_pyreft(source, positions="f2+l2", model=BASE / "llama")
    for positions, part in (("f2", slice(2)), ("l2", slice(2, 4))):
        edit_json(source / "config.json", **{name: told[name][part] for name in lists})
        from_pyreft(source, tmp_path / positions, positions=positions, model=BASE / "llama")
    model = PeftModel.from_pretrained(base("llama"), tmp_path / "f2", adapter_name="f2")
    model.load_adapter(tmp_path / "l2", adapter_name="l2")
    model.base_model.set_adapter(["f2", "l2"])
    stored = load_file(source / "logits.safetensors")
    assert (outputs(model.eval(), stored) - real(stored["logits"], stored)).abs().max() < 1e-5


def test_every_way_to_name_the_model():
    for model in (BASE / "llama", str(BASE / "llama"), base("llama"), base("llama").config):
        made = from_pyreft(PYREFT / "loreft-shared", positions="f2+l2", model=model)
        assert list(made.edits) == ["model.layers.0", "model.layers.2"]
    made = from_pyreft(PYREFT / "loreft-shared", positions="f2+l2", model=base("llama").model)
    assert list(made.edits) == ["layers.0", "layers.2"]
    broken = base("llama").config
    broken.hidden_act = "twist"
    with pytest.raises(ValueError, match=r"No LlamaForCausalLM can be built.*Pass the model itself"):
        from_pyreft(PYREFT / "loreft-shared", positions="f2+l2", model=broken)
    with pytest.raises(ValueError, match=r"model='no/model': its config cannot be read"):
        from_pyreft(PYREFT / "loreft-shared", positions="f2+l2", model="no/model")


def test_a_model_that_does_not_fit_is_refused():
    with pytest.raises(ConversionError, match=r"16 wide.*'model.layers.0' in LlamaForCausalLM are 32"):
        from_pyreft(PYREFT / "loreft-shared", positions="f2+l2", model=tiny_model("llama"))
    with pytest.raises(ValueError, match=r"edits block 2, but LlamaForCausalLM has 1 block"):
        from_pyreft(PYREFT / "loreft-shared", positions="f2+l2", model=tiny_model("llama", num_hidden_layers=1))
    with pytest.raises(ValueError, match=r"T5ForConditionalGeneration has 2 stacks"):
        from_pyreft(PYREFT / "loreft-shared", positions="f2+l2", model=tiny_model("t5"))
    with pytest.raises(ValueError, match=r"edits 'model.layers.0', which GPT2LMHeadModel does not have"):
        from_pyreft(PYREFT / "loreft-path", positions="f2+l2", model=tiny_model("gpt2"))


def test_an_adapter_of_a_bare_model_moves_to_one_with_a_head(tmp_path):
    from_adapterhub(ADAPTERHUB / "loreft-bare", tmp_path / "new", model=BASE / "llama")
    stored = load_file(ADAPTERHUB / "loreft-bare" / "logits.safetensors")
    model = PeftModel.from_pretrained(base("llama"), tmp_path / "new").eval()
    with torch.no_grad():
        inputs = {name: stored[name] for name in ("input_ids", "attention_mask")}
        hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]
    assert (real(hidden, stored) - real(stored["logits"], stored)).abs().max() < 1e-5


def test_an_encoder_and_a_decoder_are_named_and_told_apart(tmp_path):
    source = copy(ADAPTERHUB / "loreft-shared", tmp_path)

    def rename(tensors):
        for name in list(tensors):
            side = "encoder" if ".layers.0." in name else "decoder"
            tensors[re.sub(r"model\.layers\.\d", f"{side}.block.0", name)] = tensors.pop(name)

    edit_tensors(source / "pytorch_adapter.bin", rename)
    made = from_adapterhub(source, head=False)
    assert made.config.target_modules == {"encoder.block.0", "decoder.block.0"}
    assert any("several stacks" in note and "intervention_locations" in note for note in made.notes)


def test_all_blocks_are_not_numbered_and_ranks_may_differ(tmp_path):
    made = from_adapterhub(ADAPTERHUB / "loreft-default")
    assert (made.config.layers_to_transform, made.config.target_modules, made.config.r) == (None, None, 1)
    source = copy(PYREFT / "loreft-shared", tmp_path)

    def cut(tensors):
        tensors.update(weight=tensors["weight"][:2], bias=tensors["bias"][:2])
        tensors["rotate_layer"] = tensors["rotate_layer"][:, :2]

    edit_tensors(source / "intkey_layer_2_comp_block_output_unit_pos_nunit_1#0.bin", cut)
    made = from_pyreft(source, tmp_path / "new", positions="f2+l2", model=BASE / "llama")
    assert (made.config.r, made.config.rank_pattern) == (3, {"model.layers.2": 2})
    loaded = get_interventions(PeftModel.from_pretrained(base("llama"), tmp_path / "new"))
    assert {name: tuple(found[0].subspace.shape) for name, found in loaded.items()} == {
        "model.layers.0": (3, 16),
        "model.layers.2": (2, 16),
    }


def test_other_components_are_refused_with_a_way_out(tmp_path):
    with pytest.raises(ConversionError, match=r"'mlp_output'.*'model.layers\[3\].mlp.output'"):
        from_pyreft(PYREFT / "loreft-mlp-output", positions="f2+l2", model=BASE / "llama")
    source = copy(PYREFT / "loreft-block-input", tmp_path)
    listed = json.loads((source / "config.json").read_text())["representations"]
    for change, message in (
        ([0, "block_input"], "block_input of layer 0 is not the output of any block"),
        ([0, "model.layers[0].input"], "not the output of a module, nor the input of a block that has one"),
        ([1, "block_output"], "both edit the output of model.layers.1"),
        ([1, "block_input", "h.pos"], "by unit 'h.pos' has no counterpart"),
    ):
        edit_json(source / "config.json", representations=[[*change, *listed[0][len(change) :]], listed[1]])
        with pytest.raises(ConversionError, match=re.escape(message)):
            from_pyreft(source, positions="f2+l2", model=BASE / "llama")


def test_the_input_of_a_block_named_by_its_path_is_the_output_of_the_block_before(tmp_path):
    source = copy(PYREFT / "loreft-path", tmp_path)
    first, third = json.loads((source / "config.json").read_text())["representations"]
    assert third[1] == "model.layers[2].output"
    edit_json(source / "config.json", representations=[first, [2, "model.layers[3].input", *third[2:]]])
    from_pyreft(source, tmp_path / "new", positions="f2+l2")
    assert difference(tmp_path / "new", load_file(PYREFT / "loreft-path" / "logits.safetensors"), "llama") < 1e-5


# What a stranger may send.


class Malicious:
    """A pickle of it runs a command when it is opened."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


def test_a_malicious_pickle_runs_nothing(tmp_path):
    marker = tmp_path / "it-ran"
    source = copy(PYREFT / "loreft-shared", tmp_path)
    bad = {"weight": torch.zeros(3, 16), "bias": Malicious(marker)}
    torch.save(bad, source / "intkey_layer_0_comp_block_output_unit_pos_nunit_1#0.bin")
    with pytest.raises(ValueError, match=r"nunit_1#0.bin' holds more than tensors"):
        from_pyreft(source, tmp_path / "new", positions="f2+l2", model=BASE / "llama")
    other = Path(shutil.copytree(ADAPTERHUB / "loreft-shared", tmp_path / "other"))
    torch.save(bad, other / "pytorch_adapter.bin")
    with pytest.raises(ValueError, match=r"pytorch_adapter.bin' holds more than tensors"):
        from_adapterhub(other, tmp_path / "new")
    assert not marker.exists() and not (tmp_path / "new").exists()
    torch.load(other / "pytorch_adapter.bin", weights_only=False)
    assert marker.exists(), "the pickle is what it is meant to be"


def test_damaged_and_incomplete_checkpoints(tmp_path):
    source = copy(PYREFT / "loreft-shared", tmp_path)
    file = source / "intkey_layer_0_comp_block_output_unit_pos_nunit_1#0.bin"
    told = {"positions": "f2+l2", "model": BASE / "llama"}
    file.write_bytes(file.read_bytes()[:700])
    with pytest.raises(ValueError, match=r"damaged|more than tensors"):
        from_pyreft(source, **told)
    torch.save([1, 2], file)
    with pytest.raises(ValueError, match="does not hold tensors by name"):
        from_pyreft(source, **told)
    file.unlink()
    with pytest.raises(ValueError, match=r"nunit_1#0\.bin' is missing"):
        from_pyreft(source, **told)
    keys = json.loads((source / "config.json").read_text())["sorted_keys"]
    edit_json(source / "config.json", sorted_keys=["/../../secret", keys[1]])
    with pytest.raises(ConversionError, match="is no key of an intervention"):
        from_pyreft(source, **told)
    edit_json(source / "config.json", sorted_keys=keys[:1])
    with pytest.raises(ConversionError, match="lists of one length"):
        from_pyreft(source, **told)
    (source / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        from_pyreft(source, **told)


def test_a_forks_gate_changes_the_function_and_is_refused(tmp_path):
    source = copy(PYREFT / "loreft-shared", tmp_path)
    gate = {"gate_func.weight": torch.randn(1, 16), "gate_func.bias": torch.randn(1)}
    edit_tensors(source / "intkey_layer_0_comp_block_output_unit_pos_nunit_1#0.bin", lambda t: t.update(gate))
    told = {"positions": "f2+l2", "model": BASE / "llama"}
    with pytest.raises(ConversionError, match=r"gate_func.bias, gate_func.weight would change what it computes"):
        from_pyreft(source, **told)
    for name in (
        "fork.interventions.GatedLoreft",
        "__main__.LoreftIntervention",
        "pyreft.interventions.SubloreftIntervention",
    ):
        edit_json(source / "config.json", intervention_types=[f"<class '{name}'>"] * 2)
        with pytest.raises(ConversionError, match=rf"{re.escape(name)}.*kind='loreft'"):
            from_pyreft(source, **told)
    with pytest.raises(ConversionError, match="gate_func"):
        from_pyreft(source, kind="loreft", **told)


def test_a_class_of_ones_own_with_a_known_equation(tmp_path):
    source = copy(PYREFT / "direft-shared", tmp_path)
    edit_json(source / "config.json", intervention_types=["<class '__main__.Mine'>"] * 2)
    from_pyreft(source, tmp_path / "new", positions="f2+l2", model=BASE / "llama", kind="odireft")
    assert difference(tmp_path / "new", load_file(source / "logits.safetensors"), "llama") < 1e-5
    with pytest.raises(ConversionError, match="not those of 'direft'"):
        from_pyreft(source, positions="f2+l2", model=BASE / "llama", kind="direft")
    with pytest.raises(ConversionError, match="kind='lora' is none of"):
        from_pyreft(source, positions="f2+l2", model=BASE / "llama", kind="lora")


def test_what_is_no_rotation_or_has_a_bias_in_the_way_is_refused(tmp_path):
    told = {"positions": "f2+l2", "model": BASE / "llama"}
    source = copy(PYREFT / "loreft-shared", tmp_path)
    file = source / "intkey_layer_0_comp_block_output_unit_pos_nunit_1#0.bin"
    edit_tensors(file, lambda t: t.update(rotate_layer=t["rotate_layer"] * 1.5))
    with pytest.raises(ConversionError, match="no orthonormal columns"):
        from_pyreft(source, **told)
    edit_tensors(file, lambda t: t.update(bias=torch.zeros(2)))
    with pytest.raises(ConversionError, match="do not fit together to rank 3 and width 16"):
        from_pyreft(source, **told)
    with pytest.raises(ConversionError, match=r"proj_layer.bias, stands outside of the activation 'relu'"):
        from_pyreft(PYREFT / "noreft-shared", act_fn="relu", **told)


def test_an_activation_that_is_not_told_is_a_note():
    made = from_pyreft(PYREFT / "loreft-relu", positions="f2+l2", model=BASE / "llama")
    assert any("act_fn=None" in note for note in made.notes)
    made = from_pyreft(PYREFT / "loreft-relu", positions="f2+l2", model=BASE / "llama", act_fn="relu")
    assert not any("act_fn" in note for note in made.notes)


def test_directions_that_weight_decay_took_are_told():
    made = from_pyreft(PYREFT / "consreft-decay", positions="f2+l2", model=BASE / "llama")
    assert next(note for note in made.notes if "directions" in note).startswith(
        "3 of the 3 directions in model.layers.0"
    )
    assert not made.edits["model.layers.0"][0].basis.any() and made.edits["model.layers.2"][0].basis.any()


# Heads and other methods.


@pytest.mark.parametrize("library", ["pyreft", "adapterhub"])
def test_a_trained_classifier_comes_along(library, tmp_path):
    source = CHECKPOINTS / library / "loreft-roberta"
    told = {"positions": "f2+l1", "model": BASE / "roberta"} if library == "pyreft" else {}
    made = convert(source, tmp_path / "new", **told)
    assert made.config.modules_to_save == ["classifier"] and made.config.task_type == "SEQ_CLS"
    made = convert(source, tmp_path / "less", head=False, **told)
    assert made.config.modules_to_save is None and any("No trained head" in note for note in made.notes)
    stored = load_file(source / "logits.safetensors")
    assert difference(tmp_path / "less", stored, "roberta") > 0.1, "the head is part of what was trained"
    part = copy(source, tmp_path)
    file = next(part.glob("pytorch_model*.bin"))
    edit_tensors(file, lambda tensors: tensors.pop("classifier.dense.bias"))
    with pytest.raises(ConversionError, match=r"only a part of the head.*classifier.dense.bias is missing"):
        convert(part, tmp_path / "part", **{"model": BASE / "roberta", **told})


def test_lora_matrices_and_trained_bodies_are_refused(tmp_path):
    source = copy(PYREFT / "loreft-path", tmp_path)
    told = {"positions": "f2+l2", "model": BASE / "llama"}
    for name, message in (
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight", "holds LoRA's matrices"),
        ("model.layers.0.mlp.up_proj.weight", "trained weights of the model's body"),
        ("score.weight", "trained weights of the model's body"),  # a causal language model has no such head
    ):
        torch.save({name: nn.Parameter(torch.zeros(2, 16))}, source / "pytorch_model.bin")
        with pytest.raises(ConversionError, match=rf"{message}.*--without-head"):
            from_pyreft(source, **told)
    assert from_pyreft(source, head=False, **told).head == {}


def test_adapterhubs_unions_other_methods_and_flexible_heads_are_refused(tmp_path):
    with pytest.raises(ConversionError, match=r"a union of reft \+ lora"):
        from_adapterhub(ADAPTERHUB / "union")
    source = copy(ADAPTERHUB / "loreft-roberta", tmp_path)
    torch.save({"heads.told.1.weight": torch.zeros(3, 16)}, source / "pytorch_model_head.bin")
    with pytest.raises(ConversionError, match=r"heads.told.1.weight, a head that.*--without-head"):
        from_adapterhub(source)
    assert from_adapterhub(source, head=False).head == {}
    file = source / "adapter_config.json"
    config = json.loads(file.read_text())["config"]
    for changes, message in (
        ({"architecture": None}, "is no ReFT adapter: its architecture is 'a bottleneck"),
        ({"architecture": "lora"}, "is no ReFT adapter: its architecture is 'lora'"),
        ({"output_reft": False}, "output_reft=False"),
        ({"prefix_positions": 0, "suffix_positions": 0}, "edit nothing"),
        ({"non_linearity": "twist"}, "'twist' is not an activation"),
        ({"tied_weights": True}, "does not belong to these tensors"),
    ):
        edit_json(file, config={**config, **changes})
        with pytest.raises(ConversionError, match=re.escape(message)):
            from_adapterhub(source, head=False)


def test_adapterhubs_frozen_head_and_unused_units_stay_behind():
    made = from_adapterhub(ADAPTERHUB / "loreft-default")
    assert not made.head and any("freezes it" in note for note in made.notes)
    assert any(note.startswith("Unit 1 of each block was left out") for note in made.notes)
    made = from_adapterhub(ADAPTERHUB / "loreft-suffix")
    assert any(note.startswith("Unit 0 of each block was left out") for note in made.notes)
    assert not any("left out: 'f" in note for note in from_adapterhub(ADAPTERHUB / "loreft-shared").notes)


# Back to pyreft.


@pytest.mark.parametrize("weights", ["shared", "separate"])
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind, weights, tmp_path):
    source = PYREFT / f"{kind}-{weights}"
    told = {"positions": "f2+l2", "model": BASE / "llama"}
    there = from_pyreft(source, tmp_path / "ours", **told)
    to_pyreft(tmp_path / "ours", tmp_path / "theirs")
    ours, theirs = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "theirs", source))
    assert {**ours, "transformers_version": theirs["transformers_version"]} == theirs
    assert sorted(p.name for p in (tmp_path / "theirs").glob("*.bin")) == sorted(p.name for p in source.glob("*.bin"))
    for file in source.glob("intkey_*.bin"):
        first, second = (torch.load(path / file.name, weights_only=True) for path in (source, tmp_path / "theirs"))
        assert set(second) == set(first) - ({"proj_layer.bias"} if "noreft" in kind or "nodi" in kind else set())
        if kind == "loreft":
            assert all(torch.equal(first[name], second[name]) for name in first), "to the last bit"
        assert all(
            (first[name].shape, first[name].dtype) == (second[name].shape, second[name].dtype) for name in second
        )
    again = from_pyreft(tmp_path / "theirs", tmp_path / "again", **told)
    for name, tensor in there.tensors().items():
        exact = "basis" not in name or kind in ("loreft", "noreft", "nodireft")
        assert torch.allclose(again.tensors()[name], tensor, rtol=0, atol=0 if exact else 1e-6), name
    assert difference(tmp_path / "again", load_file(source / "logits.safetensors"), "llama") < 1e-5


def test_any_adapter_goes_to_pyreft_and_back(tmp_path):
    for kind in sorted(set(KINDS.values())):
        config = ReftConfig(r=3, intervention=kind, positions="f2+l2", share_weights=False, task_type="CAUSAL_LM")
        model = randomize(get_peft_model(base("llama"), config)).eval()
        model.save_pretrained(tmp_path / kind / "ours")
        made = to_pyreft(tmp_path / kind / "ours", tmp_path / kind / "theirs")
        assert any("'f2+l2'" in note and "unit_locations" in note for note in made.notes)
        from_pyreft(tmp_path / kind / "theirs", tmp_path / kind / "again", positions="f2+l2", model=BASE / "llama")
        stored = load_file(PYREFT / "loreft-shared" / "logits.safetensors")
        with torch.no_grad():
            stored["logits"] = model(input_ids=stored["input_ids"], attention_mask=stored["attention_mask"]).logits
        assert difference(tmp_path / kind / "again", stored, "llama") < 1e-5


def test_the_names_of_subspaces_are_noted_as_lost(tmp_path):
    config = ReftConfig(r=3, subspaces={"german": 2, "formal": 1}, positions="f2", task_type="CAUSAL_LM")
    get_peft_model(base("llama"), config).save_pretrained(tmp_path / "ours")
    made = to_pyreft(tmp_path / "ours", tmp_path / "theirs")
    assert any("{'german': 2, 'formal': 1} are rows of the rotation" in note for note in made.notes)


def test_a_head_goes_to_pyreft_and_back(tmp_path):
    from_adapterhub(ADAPTERHUB / "loreft-roberta", tmp_path / "ours")
    to_pyreft(tmp_path / "ours", tmp_path / "theirs")
    from_pyreft(tmp_path / "theirs", tmp_path / "again", positions="f2+l2", model=BASE / "roberta")
    stored = load_file(ADAPTERHUB / "loreft-roberta" / "logits.safetensors")
    assert difference(tmp_path / "again", stored, "roberta") < 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share_layers": True}, "no counterpart of share_layers"),
        ({"share_weights": "position"}, "no counterpart of share_weights='position'"),
        ({"target_modules": ["mlp"]}, "cannot name these"),
        ({"trainable_token_indices": [3]}, "no counterpart of trainable_token_indices"),
    ],
)
def test_what_pyreft_has_no_place_for(settings, message, tmp_path):
    get_peft_model(base("llama"), ReftConfig(r=2, **settings)).save_pretrained(tmp_path / "ours")
    with pytest.raises(ConversionError, match=message):
        to_pyreft(tmp_path / "ours", tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


@pytest.mark.parametrize("targets", [["encoder.block.0", "decoder.block.1"], ["encoder.block.0.layer.1"]])
def test_pyreft_numbers_the_blocks_of_one_stack(targets, tmp_path):
    model = get_peft_model(tiny_model("t5"), ReftConfig(r=2, target_modules=targets, task_type="SEQ_2_SEQ_LM"))
    model.save_pretrained(tmp_path / "ours")
    with pytest.raises(ConversionError, match="numbers the blocks of one stack"):
        to_pyreft(tmp_path / "ours", tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


@pytest.mark.parametrize("option", [{"head": False}, {"base_model_name_or_path": "x"}])
def test_options_that_an_export_does_not_take_are_refused(option, tmp_path):
    get_peft_model(base("llama"), ReftConfig(r=2)).save_pretrained(tmp_path / "ours")
    with pytest.raises(ConversionError, match=f"{next(iter(option))}=.*leave it out"):
        convert(tmp_path / "ours", tmp_path / "theirs", to="pyreft", **option)
    assert not (tmp_path / "theirs").exists()


def test_names_from_a_file_steer_no_terminal(tmp_path):
    made = from_adapterhub(ADAPTERHUB / "loreft-roberta", tmp_path / "ours")
    made.notes.append("left out: a\x1b]0;evil\x07")
    assert "a\\x1b]0;evil\\x07" in str(made) and "\x1b" not in str(made)


# R as torch stores it.


@pytest.mark.parametrize("shape", [(8, 3), (3, 8), (5, 5), (6, 1)])
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_rotation_is_that_of_torch(shape, decay):
    linear = nn.utils.parametrizations.orthogonal(nn.Linear(shape[1], shape[0], bias=False))
    optimizer = torch.optim.AdamW(linear.parameters(), lr=0.1, weight_decay=decay)
    for _ in range(5):
        optimizer.zero_grad()
        (linear.weight * torch.randn(shape)).sum().backward()
        optimizer.step()
    stored = linear.state_dict()
    original, square = (stored[f"parametrizations.weight.{name}"] for name in ("original", "0.base"))
    assert (orthogonal_weight(original, square) - linear.weight).abs().max() < 1e-6
    at_first = square[:, : shape[1]] if shape[0] >= shape[1] else square[:, : shape[0]].mT
    assert (at_first - linear.weight).abs().max() > 0.01, "trained, so that base alone is not it"


@pytest.mark.parametrize(("d", "r", "zeros"), [(8, 3, []), (8, 3, [1]), (8, 3, [0, 1, 2]), (5, 5, [])])
def test_rotation_is_stored_so_that_torch_gives_it_back(d, r, zeros):
    columns = torch.linalg.qr(torch.randn(d, r))[0]
    columns[:, zeros] = 0
    original, square = orthogonal_parameters(columns)
    assert (square @ square.mT - torch.eye(d)).abs().max() < 1e-6
    linear = nn.utils.parametrizations.orthogonal(nn.Linear(r, d, bias=False))
    linear.load_state_dict({"parametrizations.weight.original": original, "parametrizations.weight.0.base": square})
    assert (linear.weight - columns).abs().max() < 1e-6


# The destination.


def test_the_destination_is_whole_or_not_there(tmp_path, monkeypatch):
    told = {"positions": "f2+l2", "model": BASE / "llama"}
    dst = tmp_path / "new"

    def fail(*args, **kwargs):
        raise OSError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(ReftConfig, "save_pretrained", fail)
        with pytest.raises(OSError, match="full"):
            from_pyreft(PYREFT / "loreft-shared", dst, **told)
    assert list(tmp_path.iterdir()) == []
    from_pyreft(PYREFT / "loreft-shared", dst, **told)
    first = {path.name: path.read_bytes() for path in dst.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(first)
    with pytest.raises(ConversionError, match=r"exists.*overwrite=True \(--overwrite\)"):
        from_pyreft(PYREFT / "consreft-shared", dst, **told)
    for where, name in ((writing, "save_file"), (os, "replace")):
        with monkeypatch.context() as patched:
            patched.setattr(where, name, fail)
            with pytest.raises(OSError, match="full"):
                from_pyreft(PYREFT / "consreft-shared", dst, overwrite=True, **told)
        assert {path.name: path.read_bytes() for path in dst.iterdir()} == first
    assert [path.name for path in tmp_path.iterdir()] == ["new"], "nothing temporary is left"
    from_pyreft(PYREFT / "consreft-shared", dst, overwrite=True, **told)
    assert json.loads((dst / "adapter_config.json").read_text())["intervention"] == "consreft"
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert dst.stat().st_mode & 0o777 == 0o777 & ~writing.current_umask()


def test_what_is_no_adapter_is_not_replaced(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("years")
    with pytest.raises(ConversionError, match="holds no adapter of ReFT's, and is not replaced"):
        from_adapterhub(ADAPTERHUB / "loreft-shared", tmp_path / "work", overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConversionError, match="is no directory"):
        from_adapterhub(ADAPTERHUB / "loreft-shared", tmp_path / "file", overwrite=True)
    source = copy(ADAPTERHUB / "loreft-shared", tmp_path)
    for dst in (source, source / "inside", tmp_path):
        with pytest.raises(ConversionError, match="lie in one another"):
            from_adapterhub(source, dst, overwrite=True)
    (tmp_path / "empty").mkdir()
    from_adapterhub(source, tmp_path / "empty")
    assert (tmp_path / "empty" / "adapter_config.json").is_file()


def test_the_card_keeps_the_notes(tmp_path):
    made = from_adapterhub(ADAPTERHUB / "loreft-default", tmp_path / "new")
    card = (tmp_path / "new" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\n---\n") and "## Converted from AdapterHub" in card
    assert made.notes and all(note in card for note in made.notes)


# Recognising, and the command line.


def test_formats_are_recognised_by_their_files(tmp_path):
    assert convert(PYREFT / "loreft-path", tmp_path / "a", positions="f2+l2").origin == "pyreft"
    assert convert(ADAPTERHUB / "loreft-shared", tmp_path / "b").origin == "AdapterHub"
    assert convert(tmp_path / "b", tmp_path / "c", to="pyreft").origin == "PEFT"
    with pytest.raises(ConversionError, match="is a ReFT adapter of PEFT already"):
        convert(tmp_path / "b", tmp_path / "d")
    with pytest.raises(ConversionError, match=r"positions='f1': leave it out"):
        convert(ADAPTERHUB / "loreft-shared", tmp_path / "d", positions="f1")
    with pytest.raises(ConversionError, match=r"kind='loreft': leave it out"):
        convert(tmp_path / "b", tmp_path / "d", to="pyreft", kind="loreft")
    with pytest.raises(ConversionError, match="Convert it to one first"):
        convert(ADAPTERHUB / "loreft-shared", tmp_path / "d", to="pyreft")
    with pytest.raises(ConversionError, match="to='onnx' is no format"):
        convert(ADAPTERHUB / "loreft-shared", tmp_path / "d", to="onnx")
    get_peft_model(base("llama"), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ConversionError, match="is an adapter of PEFT's type LORA"):
        convert(tmp_path / "lora", tmp_path / "d")
    with pytest.raises(ConversionError, match="no checkpoint that is known here"):
        convert(BASE / "llama", tmp_path / "d")
    with pytest.raises(ConversionError, match="is no directory"):
        convert(tmp_path / "nothing", tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_command_line(tmp_path, capsys):
    source, dst = str(PYREFT / "loreft-separate"), str(tmp_path / "new")
    assert main([source, dst, "--positions", "f2+l2", "--model", str(BASE / "llama")]) == 0
    told = capsys.readouterr().out
    for line in (
        "from:       pyreft",
        "kind:       loreft",
        "rank:       3",
        "blocks:     2: model.layers.0, model.layers.2",
        "positions:  f2+l2, separate weights for prefix and suffix",
        f"written to: {dst}",
        "note: Prompts of fewer than 4 tokens",
    ):
        assert line in told
    model = AutoModelForCausalLM.from_pretrained(dst)  # the config names its base model
    assert get_interventions(model)["model.layers.2"][1].subspace.shape == (3, 16)
    assert main([source, str(tmp_path / "other")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--positions f2+l2" in error
    for argv, status in (([source], 2), (["--help"], 0)):
        with pytest.raises(SystemExit) as end:
            main(argv)
        assert end.value.code == status
    assert main([str(ADAPTERHUB / "direft-shared"), dst, "--kind", "direft"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([str(ADAPTERHUB / "direft-shared"), dst, "--kind", "direft", "--overwrite"]) == 0
    assert "positions:  f2+l2, shared weights" in capsys.readouterr().out
    assert main([str(ADAPTERHUB / "loreft-roberta"), str(tmp_path / "r"), "--without-head"]) == 0
    assert "head:" not in capsys.readouterr().out
    assert main([dst, str(tmp_path / "back"), "--to", "pyreft"]) == 0
    assert "unit_locations" in capsys.readouterr().out and (tmp_path / "back" / "config.json").is_file()


def test_as_a_program(tmp_path):
    command = [sys.executable, "-m", "peft_reft", "convert", str(ADAPTERHUB / "loreft-default"), str(tmp_path / "new")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "positions:  f3, shared weights" in done.stdout
