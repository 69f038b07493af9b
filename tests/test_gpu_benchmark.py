"""The GPU benchmark's machinery, on a CPU with a tiny model: what it writes, how it goes on, that it ends."""

import json
import pathlib
import sys
import time

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from benchmarks import common
from benchmarks.gpu import counts, models, run
from benchmarks.gpu.deadline import Deadline, OutOfTime, interleaved
from benchmarks.gpu.record import Figure

TINY = ["--device", "cpu", "--shapes", "tiny", "--rounds", "3", "--seconds", "0", "--tokens", "3", "--adapters", "5"]


@pytest.fixture
def parts(monkeypatch):
    """The parts of the benchmark, to be replaced by others; those of the tiny shape are the plan."""
    monkeypatch.setattr(run, "PARTS", {})
    monkeypatch.setattr(run, "PLAN", [])
    monkeypatch.setattr(run, "SMALL", [("tiny", name) for name in ("one", "two")])
    return run.PARTS


def figures(record, key):
    return {figure["name"]: figure["values"] for figure in record.parts[key]["figures"]}


def test_the_parts_that_need_no_gpu_run_and_write_what_they_print(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(counts, "COMPARED", ("reft", "lora_qv"))
    path = tmp_path / "gpu.json"
    run.main([*TINY, "--output", str(path), "--only", "forward,kernels,generate"])
    written = json.loads(path.read_text())["parts"]
    assert list(written) == ["tiny/forward", "tiny/kernels", "tiny/generate"]
    assert all(part["done"] for part in written.values()), written
    forward, first = written["tiny/forward"]["figures"], capsys.readouterr().out
    assert forward[0]["values"]["reft"]["n"] == 3
    assert forward[1]["values"]["reft"] < 1e-3  # plain hooks make the same edit
    counted = {figure["name"]: figure["values"] for figure in written["tiny/kernels"]["figures"]}
    assert counted["decode step: operations per block beyond base's"]["reft"] == 0
    assert counted["decode step: operations per block beyond base's"]["lora_qv"] > 0
    assert counted["forward: waits for the device beyond base's"]["reft"] == 0
    for part in written.values():
        assert all(str(Figure(**figure)) in first for figure in part["figures"])
    assert "tiny/generate | decode step / base" in path.with_suffix(".md").read_text()


def test_a_part_that_fails_leaves_its_error_and_the_others_go_on(tmp_path, parts):
    def fails(work):
        yield Figure("before", {"reft": 1.0})
        raise ValueError("no such kernel")

    parts |= {"one": fails, "two": lambda work: iter([Figure("a figure", {"reft": 2.0})])}
    path = tmp_path / "gpu.json"
    record = run.main([*TINY, "--output", str(path)])
    assert record.parts["tiny/one"]["error"] == "ValueError: no such kernel"
    assert figures(record, "tiny/one") == {"before": {"reft": 1.0}}
    assert figures(record, "tiny/two") == {"a figure": {"reft": 2.0}}
    # The same command measures what failed again, and keeps what was measured.
    parts |= {"one": lambda work: iter([Figure("now", {"reft": 3.0})]), "two": fails}
    again = run.main([*TINY, "--output", str(path)])
    assert figures(again, "tiny/one") == {"now": {"reft": 3.0}} and again.parts["tiny/one"]["run"] == 1
    assert figures(again, "tiny/two") == {"a figure": {"reft": 2.0}} and again.parts["tiny/two"]["run"] == 0


def test_the_minutes_are_kept_by_a_part_that_looks_at_no_clock(tmp_path, parts):
    def endless(work):
        yield Figure("first", {"reft": 1.0})
        try:
            while True:
                time.sleep(0.01)
        except Exception:  # as a compiler would, and then go on with something slower
            time.sleep(60)

    parts |= {"one": endless, "two": endless}
    begin = time.monotonic()
    record = run.main([*TINY, "--output", str(tmp_path / "gpu.json"), "--minutes", "0.1"])
    assert time.monotonic() - begin < 40
    written = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert written == record.parts and list(written) == ["tiny/one"]
    assert not written["tiny/one"]["done"] and figures(record, "tiny/one") == {"first": {"reft": 1.0}}


@pytest.mark.parametrize(("last", "rounds"), [(1, None), (3, None), (5, 4), (6, 5)])
def test_rounds_stop_at_the_deadline_and_a_median_needs_three(last, rounds):
    """The deadline passes during one call, of which the first is no round."""
    deadline, calls = Deadline(60, time.monotonic()), []

    def function():
        calls.append(1)
        if len(calls) == last:
            deadline.end = 0

    if rounds is None:
        with pytest.raises(OutOfTime):
            interleaved({"one": function}, deadline, rounds=9, seconds=60, warmup=1)
    else:
        assert len(interleaved({"one": function}, deadline, 9, 60, warmup=1).wall["one"]) == rounds


def test_copied_adapters_edit_as_added_ones_and_have_parameters_of_their_own():
    base = models.build(models.SHAPES["tiny"], "cpu")
    inputs = common.batch(2, 16, 128, labelled=False)
    for config in (common.reft_config(), common.lora_config(common.Q_V)):
        model = models.adapted(base, config, "a0").eval()
        assert models.add_copies(model, ["a1", "a2"], seconds=60) == 2
        with torch.no_grad():
            expected, plain = model(**inputs).logits, base(**inputs).logits
            for parameter in (p for name, p in model.named_parameters() if ".a2." in name):
                parameter.zero_()  # an edit of zero, for either method
            got = model(**inputs, adapter_names=["a1", "a2"]).logits
        assert not torch.equal(expected, plain)
        torch.testing.assert_close(got, torch.stack([expected[0], plain[1]]), rtol=0.05, atol=0.02)
        assert not torch.allclose(got[0], plain[0], rtol=0.05, atol=0.02)
