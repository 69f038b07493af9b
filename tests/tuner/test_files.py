"""Files of adapters: whole at any moment, whoever is killed while writing; and strangers' files opened with care."""

from __future__ import annotations

import json
import os
import random
import signal
import stat
import time
import zipfile

import pytest
import torch
from conftest import batch, logits, reft_model, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_reft import ReftConfig
from peft_reft.info.files import read_adapter, read_json, read_tensors
from peft_reft.tuner.staging import ABANDONED, STAGE, staged, write_text

FILES = ("README.md", "adapter_config.json", "adapter_model.safetensors")
posix = pytest.mark.skipif(os.name == "nt", reason="needs fork, permissions and links of POSIX")


def contents(directory):
    """The files of a directory and below, by their path in it."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def large_model(seed):
    """An adapter of some megabytes, whose writing takes long enough to be interrupted."""
    base = tiny_model("llama", hidden_size=256, intermediate_size=32, num_hidden_layers=2)
    return reft_model(base, seed=seed, r=128, positions="f1+l1")


def sums(directory):
    """The adapter's weights, as the sum of each tensor; raises if the file is not whole."""
    return {name: tensor.sum().item() for name, tensor in load_file(directory / "adapter_model.safetensors").items()}


def in_a_child(work):
    """Run a function in a forked process; returns its id."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return pid


def saves_until(model, directory, stop):
    """Save again and again until there is a file `stop`, a minute at most."""
    end = time.monotonic() + 60
    while time.monotonic() < end and not stop.exists():
        model.save_pretrained(directory)


# Saving.


@posix
def test_every_file_is_whole_after_each_of_forty_kills(tmp_path):
    model = large_model(1)
    model.save_pretrained(tmp_path)
    wanted, chance = sums(tmp_path), random.Random(0)
    sizes = {name: (tmp_path / name).stat().st_size for name in FILES}
    interrupted = 0
    for _ in range(40):
        pid = in_a_child(lambda: saves_until(model, tmp_path, tmp_path / "never"))
        time.sleep(0.02 + 0.1 * chance.random())
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "REFT"
        assert {name: (tmp_path / name).stat().st_size for name in FILES} == sizes
        assert sums(tmp_path) == wanted
        interrupted += len(list(tmp_path.glob(f"{STAGE}*"))) > 0
    assert interrupted, "no kill hit a save, so that nothing was tested"


@posix
def test_a_reader_beside_two_writers_finds_one_adapter_or_the_other(tmp_path):
    models = [large_model(1), large_model(2)]
    wanted = []
    for model in models:
        model.save_pretrained(tmp_path)
        wanted.append(sums(tmp_path))
    assert wanted[0] != wanted[1]
    stop, end = tmp_path / "stop", time.monotonic() + 30
    writers = [in_a_child(lambda model=model: saves_until(model, tmp_path, stop)) for model in models]
    seen = []
    while time.monotonic() < end and (len(seen) < 300 or set(seen) != {0, 1}):
        seen.append(wanted.index(sums(tmp_path)))
        ReftConfig.from_pretrained(str(tmp_path))
        assert "## Representation finetuning" in (tmp_path / "README.md").read_text()
    stop.touch()
    assert [os.waitpid(pid, 0)[1] for pid in writers] == [0, 0]
    assert set(seen) == {0, 1}
    assert sorted(contents(tmp_path)) == sorted([*FILES, "stop"])


@pytest.mark.parametrize(
    "fails", ["peft.peft_model.safe_save_file", "huggingface_hub.repocard.RepoCard.save", "json.dumps"]
)
def test_a_save_that_fails_changes_no_file(fails, tmp_path, monkeypatch):
    reft_model(tiny_model("llama")).save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("# Mine\n")  # to which PEFT would add
    before = contents(tmp_path)

    def fail(*args, **kwargs):
        raise OSError("the disk is full")

    monkeypatch.setattr(fails, fail)
    with pytest.raises(OSError, match="full"):
        reft_model(tiny_model("llama"), seed=2, positions="l2").save_pretrained(tmp_path)
    assert contents(tmp_path) == before and len(before) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES), "nothing temporary is left"


@posix
def test_saving_again_keeps_permissions_and_links(tmp_path):
    model = reft_model(tiny_model("llama"))
    model.save_pretrained(tmp_path / "real")
    (tmp_path / "adapter").mkdir()
    for name in FILES:
        (tmp_path / "real" / name).chmod(0o640)
        (tmp_path / "adapter" / name).symlink_to(tmp_path / "real" / name)
    other = reft_model(tiny_model("llama"), seed=2)
    other.save_pretrained(tmp_path / "adapter")
    other.save_pretrained(tmp_path / "wanted")
    for name in FILES:
        assert (tmp_path / "adapter" / name).is_symlink()
        assert stat.S_IMODE((tmp_path / "real" / name).stat().st_mode) == 0o640
    assert contents(tmp_path / "real") == contents(tmp_path / "wanted")


@posix
def test_a_link_that_leads_to_itself_is_told(tmp_path):
    (tmp_path / "adapter_model.safetensors").symlink_to("adapter_model.safetensors")
    with pytest.raises(OSError, match=r"leads to itself.*adapter_model\.safetensors"):
        reft_model(tiny_model("llama")).save_pretrained(tmp_path)
    assert os.listdir(tmp_path) == ["adapter_model.safetensors"]


def test_several_adapters_and_what_the_user_wrote_beside_them(tmp_path):
    model = reft_model(tiny_model("llama"))
    model.add_adapter("second", ReftConfig(positions="l2"))
    (tmp_path / "second").mkdir()
    for folder in (tmp_path, tmp_path / "second"):
        (folder / "README.md").write_text("# Mine\n")
        (folder / "notes.txt").write_text("keep")
    model.save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "second"):
        assert "# Mine" in (folder / "README.md").read_text() and (folder / "notes.txt").read_text() == "keep"
        assert {*FILES} <= {path.name for path in folder.iterdir()}
    assert read_json(tmp_path / "second" / "adapter_config.json")["positions"] == "l2"


def test_pickles_are_written_whole_too(tmp_path):
    model = reft_model(tiny_model("llama"))
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert sorted(contents(tmp_path)) == ["README.md", "adapter_config.json", "adapter_model.bin"]
    assert len(read_adapter(tmp_path).tensors) == 9


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("name", ["default", "other"])
def test_weights_that_were_saved_before_in_the_other_format_are_not_found_any_more(name, safe, tmp_path):
    folder = tmp_path if name == "default" else tmp_path / name
    for seed, format in ((1, not safe), (2, safe)):
        model = reft_model(tiny_model("llama"), seed=seed, adapter=name)
        model.save_pretrained(tmp_path, safe_serialization=format)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), folder)
    assert torch.equal(logits(loaded, batch(6, 4)), logits(model, batch(6, 4)))
    assert len(list(folder.glob("adapter_model*"))) == 1


def test_an_adapter_that_was_unloaded_is_not_saved_over_a_good_one(tmp_path):
    model = reft_model(tiny_model("llama"))
    model.save_pretrained(tmp_path)
    before = contents(tmp_path)
    model.unload()
    with pytest.raises(ValueError, match=r"'default' is no longer in the model.*unload\(\)"):
        model.save_pretrained(tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("share_layers", [False, True])
def test_a_state_dict_without_the_adapter_is_not_saved_over_a_good_one(share_layers, tmp_path):
    model = reft_model(tiny_model("llama"), share_layers=share_layers)
    own = model.state_dict()
    model.save_pretrained(tmp_path)
    before = contents(tmp_path)
    without = {name: tensor for name, tensor in own.items() if "reft" not in name}
    for given in (without, {f"module.{name}": tensor for name, tensor in own.items()}):
        with pytest.raises(ValueError, match=r"holds weights of 0 of the \d blocks of the ReFT adapter 'default'"):
            model.save_pretrained(tmp_path, state_dict=given)
        model.save_pretrained(tmp_path / "elsewhere", state_dict=given, is_main_process=False)  # which writes nothing
    assert contents(tmp_path) == before
    if not share_layers:
        some = {name: tensor for name, tensor in own.items() if "layers.1." not in name}
        with pytest.raises(ValueError, match="2 of the 3 blocks"):
            model.save_pretrained(tmp_path, state_dict=some)
    model.save_pretrained(tmp_path / "own", state_dict={f"_orig_mod.{name}": tensor for name, tensor in own.items()})
    model.save_pretrained(tmp_path / "adapter", state_dict={n: t for n, t in own.items() if "reft" in n})
    expected = load_file(tmp_path / "adapter_model.safetensors")
    for folder in ("own", "adapter"):
        found = load_file(tmp_path / folder / "adapter_model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)


def test_who_is_not_the_main_process_writes_nothing(tmp_path):
    reft_model(tiny_model("llama")).save_pretrained(tmp_path / "new", is_main_process=False)
    assert contents(tmp_path) == {}


def test_a_file_is_no_directory_to_save_in(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="should be a directory"):
        reft_model(tiny_model("llama")).save_pretrained(tmp_path / "file")
    with pytest.raises(AssertionError, match="should be a directory"):
        ReftConfig().save_pretrained(str(tmp_path / "file"))
    assert contents(tmp_path) == {"file": b"mine"}


def test_other_methods_are_saved_by_peft_s_own_method(tmp_path, monkeypatch):
    monkeypatch.setattr("peft_reft.tuner.saving.staged", None)  # calling it would raise
    model = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    assert PeftModel.from_pretrained(tiny_model("llama"), tmp_path).peft_config["default"].peft_type == "LORA"
    with pytest.raises(TypeError):
        reft_model(tiny_model("llama")).save_pretrained(tmp_path / "reft")


def test_a_config_is_written_whole(tmp_path, monkeypatch):
    ReftConfig(positions="f3").save_pretrained(str(tmp_path))

    def fail(*args):
        raise OSError("the disk is full")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="full"):
        patched.setattr("os.replace", fail)
        ReftConfig(positions="f4").save_pretrained(str(tmp_path))
    assert ReftConfig.from_pretrained(str(tmp_path)).positions == "f3"


def test_what_killed_processes_left_is_removed_after_a_day(tmp_path):
    fresh, old = (tmp_path / f"{STAGE}{name}" for name in ("fresh", "old"))
    for folder in (fresh, old):
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(b"x")
    os.utime(old, times=(time.time() - ABANDONED - 60,) * 2)
    write_text(tmp_path / "a.txt", "a\r\n")
    assert (tmp_path / "a.txt").read_bytes() == b"a\r\n"
    assert fresh.exists() and not old.exists(), "another process may be writing into the fresh one"


def test_nothing_takes_its_place_if_the_block_raises(tmp_path):
    with pytest.raises(KeyError), staged(tmp_path / "new") as stage:
        (stage / "a").write_text("a")
        raise KeyError
    assert contents(tmp_path) == {}


# Reading.


def saved_pickle(path, thing):
    torch.save(thing, path)
    return path


@pytest.mark.parametrize(
    ("thing", "said"),
    [
        ({"a": print}, "holds more than tensors"),
        ([torch.zeros(2)], "does not hold tensors by name"),
        ({"a": 1}, "does not hold tensors by name"),
        ({1: torch.zeros(2)}, "does not hold tensors by name"),
        ({"a": torch.zeros(1).expand(10**6, 10**6)}, "a would take more memory than the file has bytes"),
        ({str(number): torch.zeros(10**4) for number in range(300)}, None),
        ({"a": torch.zeros(2, 2).to_sparse()}, "would take more memory|cannot be read"),
        ({"a": torch.zeros(2, device="meta")}, "would take more memory|cannot be read"),
    ],
)
def test_pickles_hold_plain_tensors_or_are_refused(thing, said, tmp_path):
    path = saved_pickle(tmp_path / "a.bin", thing)
    if said is None:
        assert read_tensors(path).keys() == thing.keys()
        return
    with pytest.raises(ValueError, match=said):
        read_tensors(path)


def test_many_views_of_one_tensor_are_refused(tmp_path):
    one = torch.zeros(10**4)
    path = saved_pickle(tmp_path / "a.bin", {str(number): one.view(-1) for number in range(300)})
    with pytest.raises(ValueError, match="its tensors together would take more memory"):
        read_tensors(path)


def test_a_packed_pickle_is_not_unpacked(tmp_path):
    plain = saved_pickle(tmp_path / "a.bin", {"a": torch.zeros(10**5)})
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(tmp_path / "b.bin", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in source.namelist():
            packed.writestr(name, source.read(name))
    assert (tmp_path / "b.bin").stat().st_size < plain.stat().st_size / 10
    with pytest.raises(ValueError, match="compressed, which torch"):
        read_tensors(tmp_path / "b.bin")


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin"])
@pytest.mark.parametrize("length", [0, 7, 100, -3])
def test_damaged_tensors_are_a_value_error_that_names_the_file(name, length, tmp_path):
    path = tmp_path / name
    save_file({"a": torch.zeros(100)}, path) if name.endswith("s") else torch.save({"a": torch.zeros(100)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: length if length >= 0 else len(whole) + length])
    with pytest.raises(ValueError, match=rf"{name}.*the file is damaged"):
        read_tensors(path)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b'"x"', b"\xff\xfe{", b"[" * 100_000, b'{"r": ' + b"9" * 5000 + b"}"], ids=range(7)
)
def test_what_is_no_json_object_is_a_value_error_that_names_the_file(text, tmp_path):
    (tmp_path / "adapter_config.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"adapter_config\.json' (cannot be read as JSON|holds a)"):
        read_json(tmp_path / "adapter_config.json")


def test_looking_at_names_and_shapes_does_not_read_the_weights(tmp_path):
    """Weights of safetensors are mapped: a file that pretends to be large costs nothing until it is looked at."""
    reft_model(tiny_model("llama")).save_pretrained(tmp_path)
    size = 2**32
    header = json.dumps({"a": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    with open(tmp_path / "adapter_model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)  # a sparse file of 4 GiB
    assert read_adapter(tmp_path).tensors["a"].shape == (size // 4,)
