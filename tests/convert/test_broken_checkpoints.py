"""Checkpoints that are broken, or made to harm: converted, or refused with ConversionError; none runs code."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, RobertaForSequenceClassification

from peft_reft.convert import ConversionError, convert, from_adapterhub, from_pyreft, to_pyreft

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
SOURCES = {  # the checkpoint, the base model that its conversion needs, and what else
    "pyreft": ("pyreft/loreft-shared", "llama", {"positions": "f2+l2"}),
    "pyreft, rotated": ("pyreft/direft-separate", "llama", {"positions": "f2+l2"}),
    "pyreft, with a head": ("pyreft/loreft-roberta", "roberta", {"positions": "f2+l2"}),
    "AdapterHub": ("adapterhub/loreft-separate", "llama", {}),
    "AdapterHub, safetensors": ("adapterhub/loreft-safetensors", None, {}),
    "AdapterHub, with a head": ("adapterhub/loreft-roberta", None, {}),
    "PEFT": (None, None, {"to": "pyreft"}),
}
VALUES = (None, True, -1, 0, 10**30, 1e400, "", "x" * 300, "os.system", [], [[]], {}, [None], {"a": {}})


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """An adapter of this package, for the way back."""
    path = tmp_path_factory.mktemp("ours") / "adapter"
    from_adapterhub(CHECKPOINTS / "adapterhub" / "loreft-shared", path)
    return path


@pytest.fixture(scope="module")
def bases():
    """The base models, by name."""
    classes = {"llama": LlamaForCausalLM, "roberta": RobertaForSequenceClassification}
    return {name: cls.from_pretrained(CHECKPOINTS / "base" / name) for name, cls in classes.items()}


@pytest.fixture(params=SOURCES)
def checkpoint(request, ours, bases, tmp_path):
    """A copy of a sound checkpoint, with what `convert` is to be told about it."""
    source, base, told = SOURCES[request.param]
    path = Path(shutil.copytree(CHECKPOINTS / source if source else ours, tmp_path / "src"))
    told = {**told, "model": bases[base]} if base else told
    convert(path, tmp_path / "sound", **told)
    return path, told


def outcome(path, told, dst):
    """Whether it was "converted" or "refused"; any other error fails the test, as does what a refused one leaves."""
    try:
        convert(path, dst, **told)
    except ConversionError as error:
        assert str(error) and not dst.exists()
        return "refused"
    shutil.rmtree(dst)
    return "converted"


def outcomes(checkpoint, tmp_path, names, mutations, chance, tries):
    """The outcome of each of so many mutations, each of one file that is put back afterwards."""
    path, told = checkpoint
    found = []
    for _ in range(tries):
        name = chance.choice(names)
        whole = (path / name).read_bytes()
        chance.choice(mutations)(path / name, chance)
        found.append(outcome(path, told, tmp_path / "dst"))
        (path / name).write_bytes(whole)
    assert outcome(path, told, tmp_path / "dst") == "converted", "the checkpoint itself is sound"
    return found


def names_of(path, *endings):
    files = [file.name for file in path.iterdir() if file.name.endswith(endings)]
    return sorted(name for name in files if name not in ("logits.safetensors", "head_config.json"))


# Bytes.


def cut(file, chance):
    file.write_bytes(file.read_bytes()[: chance.randrange(file.stat().st_size)])


def flip(file, chance):
    data = bytearray(file.read_bytes())
    for _ in range(chance.choice((1, 3, 100))):
        data[chance.randrange(len(data))] = chance.randrange(256)
    file.write_bytes(data)


def noise(file, chance):
    file.write_bytes(chance.randbytes(chance.choice((0, 1, 10, 1000))))


def test_damaged_bytes_are_refused_or_harmless(checkpoint, tmp_path):
    files = names_of(checkpoint[0], ".json", ".bin", ".safetensors")
    found = outcomes(checkpoint, tmp_path, files, (cut, flip, noise), random.Random(0), 25)
    assert found.count("refused") >= 8


# JSON.


def places(thing, path=()):
    """The path of every value in nested lists and dictionaries."""
    entries = thing.items() if isinstance(thing, dict) else enumerate(thing) if isinstance(thing, list) else ()
    for key, value in entries:
        yield (*path, key)
        yield from places(value, (*path, key))


def change_json(file, chance):
    """Another value, or none, at some place of a file."""
    thing = json.loads(file.read_text())
    *outer, last = chance.choice(list(places(thing)))
    parent = thing
    for key in outer:
        parent = parent[key]
    if chance.random() < 0.25:
        del parent[last]
    else:
        parent[last] = chance.choice(VALUES)
    file.write_text(json.dumps(thing))


def test_values_of_any_kind_in_a_config_are_refused_or_harmless(checkpoint, tmp_path):
    config = [name for name in ("adapter_config.json", "config.json") if (checkpoint[0] / name).exists()]
    found = outcomes(checkpoint, tmp_path, config, (change_json,), random.Random(0), 40)
    assert found.count("refused") >= 5


# Tensors.


def spoilt(tensor, chance):
    """A tensor of another kind, shape or content."""
    ways = (
        lambda t: t.long(),
        lambda t: t.bool(),
        lambda t: t.to(torch.complex64),
        lambda t: t.to(torch.float8_e5m2),
        lambda t: t * float("nan"),
        lambda t: t / 0,
        lambda t: t.flatten()[:1].squeeze().clone(),
        lambda t: t.mT.contiguous() if t.dim() == 2 else t[None].clone(),
        lambda t: t.flatten()[:0].clone(),
        lambda t: t.expand(2, *t.shape).clone(),
        lambda t: t.flatten().repeat(2),
        lambda t: torch.zeros(3, 5, 7),
        lambda t: torch.zeros_like(t),
        lambda t: torch.full_like(t, 1e30),
    )
    return chance.choice(ways)(tensor)


def change_tensors(file, chance):
    """One tensor spoilt, gone, renamed or doubled."""
    is_pickle = file.suffix == ".bin"
    tensors = torch.load(file, weights_only=True) if is_pickle else load_file(file)
    name = chance.choice(sorted(tensors))
    what = chance.random()
    if what < 0.7:
        tensors[name] = spoilt(tensors[name], chance)
    elif what < 0.8:
        del tensors[name]
    else:
        names = ("", "a", ".", f"{name}.x", f"x.{name}", name.replace("0", "²"), name.replace("0", "9" * 5000))
        other = chance.choice(names)
        tensors[other] = tensors.pop(name) if what < 0.9 else tensors[name].clone()
    torch.save(tensors, file) if is_pickle else save_file(tensors, file)


def test_tensors_of_any_kind_are_refused_or_harmless(checkpoint, tmp_path):
    files = names_of(checkpoint[0], ".bin", ".safetensors")
    found = outcomes(checkpoint, tmp_path, files, (change_tensors,), random.Random(0), 40)
    assert found.count("refused") >= 15


@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.complex64, "nan"], ids=str)
def test_every_tensor_must_be_finite_floating_point(kind, checkpoint, tmp_path):
    path, told = checkpoint
    for name in names_of(path, ".bin", ".safetensors"):
        whole = (path / name).read_bytes()
        tensors = torch.load(path / name, weights_only=True) if name.endswith(".bin") else load_file(path / name)
        if set(tensors) == {"lm_head.weight"}:  # not converted
            continue
        for key in tensors:
            if key in ("embed_dim", "interchange_dim"):  # pyreft's counters
                continue
            changed = tensors[key] * float("nan") if kind == "nan" else tensors[key].to(kind)
            changed = {**tensors, key: changed}
            torch.save(changed, path / name) if name.endswith(".bin") else save_file(changed, path / name)
            with pytest.raises(ConversionError):
                convert(path, tmp_path / "dst", **told)
        (path / name).write_bytes(whole)
    assert not (tmp_path / "dst").exists()


# Pickles that run code, and files that are not there.


class Harmful:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def test_no_pickle_runs_code(checkpoint, tmp_path):
    path, told = checkpoint
    trace = tmp_path / "it ran"
    pickles = names_of(path, ".bin")
    if not pickles:  # a pickle in the place of the safetensors
        for file in names_of(path, ".safetensors"):
            (path / file).unlink()
        pickles = ["adapter_model.bin" if told else "pytorch_adapter.bin"]
    for name in pickles:
        for save in (torch.save, lambda thing, file: file.write_bytes(pickle.dumps(thing))):
            whole = (path / name).read_bytes() if (path / name).exists() else b""
            save({"a": Harmful(trace)}, path / name)
            with pytest.raises(ConversionError, match=r"holds more than tensors, and is not opened"):
                convert(path, tmp_path / "dst", **told)
            (path / name).write_bytes(whole)
    pickle.loads(pickle.dumps(Harmful(trace)))
    assert trace.exists(), "opened with pickle it does run"


def test_missing_files_are_refused(checkpoint, tmp_path):
    path, told = checkpoint
    refused = 0
    for name in names_of(path, ".json", ".bin", ".safetensors"):
        (path / name).rename(tmp_path / "away")
        refused += outcome(path, told, tmp_path / "dst") == "refused"
        (tmp_path / "away").rename(path / name)
    assert refused >= 2


@pytest.mark.parametrize("function", [from_pyreft, from_adapterhub, to_pyreft, convert])
def test_no_directory_is_refused(function, tmp_path):
    with pytest.raises(ConversionError):
        function(tmp_path / "none", tmp_path / "dst")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConversionError):
        function(tmp_path / "empty", tmp_path / "dst")
    assert not (tmp_path / "dst").exists()
