"""What a saved adapter is said to be, without its model, is what the loaded model has."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from conftest import BLOCKS, HIDDEN, randomize, reft_model, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from reference import EQUATIONS, ORTHONORMAL, gram_schmidt
from safetensors.torch import load_file, save_file

from peft_reft import ReftConfig, get_interventions
from peft_reft.info import adapter_info, main
from peft_reft.info.words import positions_in_words
from peft_reft.positions import parse_positions


def saved(path, family="llama", **settings):
    """An adapter with random weights, saved; the model that has it."""
    model = reft_model(tiny_model(family), **settings)
    model.save_pretrained(path)
    return model


def own_numbers(model) -> dict[str, list[dict[str, torch.Tensor]]]:
    """By block: the parameters of each of its interventions."""
    return {
        block: [dict(module.named_parameters()) for module in modules]
        for block, modules in get_interventions(model).items()
    }


@pytest.mark.parametrize("share_weights", [True, False, "position"])
@pytest.mark.parametrize("kind", sorted(EQUATIONS))
def test_numbers_are_those_of_the_loaded_model(tmp_path, kind, share_weights):
    saved(tmp_path, intervention=kind, positions="f2+l1", share_weights=share_weights, rank_pattern={"layers.1": 2})
    info = adapter_info(tmp_path)
    loaded = own_numbers(PeftModel.from_pretrained(tiny_model("llama"), tmp_path))
    assert [block.name for block in info.blocks] == list(loaded) and len(loaded) == BLOCKS
    assert [block.rank for block in info.blocks] == [4, 2, 4]
    for block in info.blocks:
        modules = loaded[block.name]
        assert (block.width, block.interventions) == (HIDDEN, len(modules))
        assert len(modules) == {True: 1, False: 2, "position": 3}[share_weights]
        assert block.parameters == sum(p.numel() for parameters in modules for p in parameters.values())
        for name, norm in block.norms.items():
            together = torch.cat([parameters[name].flatten() for parameters in modules])
            assert norm == pytest.approx(together.double().norm().item())
        gains, shifts, errors = [], [], []
        for parameters in modules:  # the equation's affine map, as a matrix and a vector
            up = parameters["basis"].detach().double()
            up = gram_schmidt(up) if kind in ORTHONORMAL else up
            constant = parameters.get("bias", parameters["weight"]).detach().double()
            source = parameters["weight"].detach().double() if "bias" in parameters else 0 * up
            down = source - (up if kind in ("loreft", "noreft", "consreft") else 0)
            gains.append(torch.linalg.matrix_norm(up.T @ down, 2).item())
            shifts.append((up.T @ constant).norm().item())
            errors.append((up @ up.T - torch.eye(len(up))).abs().max().item())
        assert block.gain == pytest.approx(max(gains), rel=1e-5, abs=1e-9)
        assert block.shift == pytest.approx(max(shifts), rel=1e-5)
        if kind in ORTHONORMAL:
            assert 0 < block.orthonormality < 1e-6  # of R in single precision
        else:
            assert block.orthonormality is None and max(errors) > 0.1
    assert info.parameters == sum(block.parameters for block in info.blocks)
    assert info.size == (tmp_path / "adapter_model.safetensors").stat().st_size
    assert info.dtypes == ["float32"] and info.finite and info.other_parameters == 0


def test_a_fresh_adapter_moves_nothing_and_a_trained_one_does(tmp_path):
    model = get_peft_model(tiny_model("llama"), ReftConfig())
    model.save_pretrained(tmp_path)
    assert all(block.gain < 1e-6 and block.shift == 0 for block in adapter_info(tmp_path).blocks)
    randomize(model).save_pretrained(tmp_path)
    assert all(block.gain > 1 and block.shift > 0.1 for block in adapter_info(tmp_path).blocks)


@pytest.mark.parametrize(
    ("positions", "words"),
    [
        ("f1+l1", "the first token and the last token of the prompt"),
        ("f7+m2+l3", "the first 7 tokens, 2 tokens in the middle and the last 3 tokens of the prompt"),
        ("e3", "every 3rd token of the prompt"),
        ("all+d", "every token of the prompt, and every generated token"),
        ("d12", "every 12th generated token"),
    ],
)
def test_positions_in_words(positions, words):
    assert positions_in_words(parse_positions(positions)) == words


def test_what_is_shared_and_what_else_is_stored(tmp_path):
    torch.manual_seed(0)
    model = saved(
        tmp_path, "bert", share_layers=True, positions="f1+l2", share_weights=False, modules_to_save=["decoder"]
    )
    info = adapter_info(tmp_path)
    (block,) = info.blocks
    assert block.interventions == 2 and "the same for all blocks" in info.weights and "f1, l2" in info.weights
    assert f"stored at {next(iter(get_interventions(model)))}" in info.blocks_in_words()
    decoder = dict(model.base_model.model.cls.predictions.decoder.modules_to_save["default"].named_parameters())
    assert info.other_parameters == sum(parameter.numel() for parameter in decoder.values())
    assert all("decoder" in name for name in info.other_tensors)


def test_blocks_are_in_the_order_of_their_numbers(tmp_path):
    model = reft_model(tiny_model("llama", num_hidden_layers=12), r=1)
    model.save_pretrained(tmp_path)
    assert [block.name for block in adapter_info(tmp_path).blocks] == [f"model.layers.{n}" for n in range(12)]


def test_what_transformers_own_methods_saved_is_read_too(tmp_path):
    model = tiny_model("llama")
    model.add_adapter(ReftConfig(r=2))
    model.save_pretrained(tmp_path)
    info = adapter_info(tmp_path)
    assert [block.name for block in info.blocks] == list(get_interventions(model)) and info.blocks[0].rank == 2


def test_a_pickle_of_tensors_is_read_and_one_that_does_more_is_refused_unopened(tmp_path):
    model = saved(tmp_path)
    safe = adapter_info(tmp_path)
    model.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    pickled = adapter_info(tmp_path / "pickled")
    assert pickled.file == "adapter_model.bin" and pickled.blocks == safe.blocks

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    (tmp_path / "pickled" / "adapter_model.bin").write_bytes(pickle.dumps({"key": Evil()}))
    with pytest.raises(ValueError, match="holds more than tensors"):
        adapter_info(tmp_path / "pickled")
    assert not (tmp_path / "executed").exists()


def refused(directory, capsys) -> str:
    assert main([str(directory)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


def test_what_is_no_reft_adapter_is_refused_in_one_line(tmp_path, capsys):
    assert "is no directory" in refused(tmp_path / "nowhere", capsys)
    refused("a" * 5000, capsys)
    model = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"]), adapter_name="lora")
    model.save_pretrained(tmp_path)
    message = refused(tmp_path, capsys)
    assert "has no adapter_config.json" in message and repr(str(tmp_path / "lora")) in message
    assert "'LORA'" in refused(tmp_path / "lora", capsys)
    path = tmp_path / "broken"
    saved(path)
    weights = path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert "cannot be read" in refused(path, capsys)
    save_file({"something": torch.zeros(2)}, weights)
    assert "none of its 1 tensors" in refused(path, capsys)
    config = path / "adapter_config.json"
    whole = config.read_text()
    config.write_text(whole.replace('"f1+l1"', '"x9"'))
    assert "'x9' is no term" in refused(path, capsys)
    config.write_text(whole)
    weights.unlink()
    assert "no adapter_model.safetensors" in refused(path, capsys)
    config.write_text("{")
    assert "cannot be read as JSON" in refused(path, capsys)


def test_settings_and_tensors_of_other_types_are_refused_or_shown(tmp_path, capsys):
    saved(tmp_path)
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    whole, tensors = json.loads(config.read_text()), load_file(weights)
    for value in (["a"], 5):
        config.write_text(json.dumps({**whole, "task_type": value}))
        assert f"task_type is {value!r}" in refused(tmp_path, capsys)
    config.write_text(json.dumps(whole))
    for dtype in (torch.float8_e4m3fn, torch.bool):
        save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, weights)
        assert main([str(tmp_path)]) == 0
        assert "loreft" in capsys.readouterr().out


def test_a_stranger_s_names_steer_no_terminal(tmp_path, capsys):
    saved(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = config["intervention"] = "\x1b[2J\x07"
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.isascii() is False  # ‖ and the like stay
    assert main([str(tmp_path)]) == 0
    assert not {"\x1b", "\x07"} & set(capsys.readouterr().out)
    config["base_model_name_or_path"] = strange = "é\x9b2J\x7f\u202e\ud800"
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert main([str(tmp_path), "--json"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out)["base_model"] == strange and "é" in out
    assert all(c.isprintable() or c == "\n" for c in out)


def test_damaged_numbers_are_told(tmp_path, capsys):
    saved(tmp_path, intervention="loreft")
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values()))[0] = float("nan")
    save_file(tensors, weights)
    info = adapter_info(tmp_path)
    assert info.finite is False and "infinite or NaN" in str(info)
    assert main([str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["finite"] is False


def test_the_command_prints_text_or_json(tmp_path, capsys):
    saved(tmp_path, positions="f2+l2", task_type="CAUSAL_LM")
    assert main([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for told in ("LoReFT(h) = h + Rᵀ(Wh + b - Rh)", "the first 2 tokens and the last 2 tokens", "model.layers.2"):
        assert told in text
    assert main([str(tmp_path), "--json"]) == 0
    fields = json.loads(capsys.readouterr().out)
    assert fields["parameters"] == adapter_info(tmp_path).parameters
    assert fields["config"]["positions"] == fields["positions"] == "f2+l2"


def test_a_command_whose_reader_has_gone_ends_without_a_traceback(tmp_path):
    saved(tmp_path, positions="f2+l1")
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "peft_reft", "info", tmp_path], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert done.returncode == 141
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr
