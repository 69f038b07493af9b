"""Tools that only know PEFT: programs run by `python -m peft_reft`, and what loads an adapter's folder by its path."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from conftest import EOS, PAD, logits, reft_model, tiny_model
from peft import AutoPeftModelForCausalLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, pipeline

from peft_reft import __main__ as command_line
from peft_reft import info
from peft_reft.commands import COMMANDS, this_python
from peft_reft.integrations import runner
from peft_reft.integrations.runner import CannotRun

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
PROBE = """
import json, os, subprocess, sys
import __main__
seen = {"argv": sys.argv, "path": sys.path[0], "name": __name__, "file": __file__, "package": __package__}
seen |= {"spec": __spec__ and __spec__.name, "main": vars(__main__) is globals()}
with open("seen.json", "w") as file:
    json.dump(seen, file)
"""


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A folder with the same program as script, module, package, folder; the current one, as `python -m` has it."""
    for path in ("script.py", "sub/script.py", "package/__main__.py", "folder/__main__.py"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(PROBE)
    (tmp_path / "package" / "__init__.py").write_text("")
    monkeypatch.chdir(tmp_path)
    for name, value in (("argv", ["unset"]), ("path", [str(tmp_path), *sys.path])):
        monkeypatch.setattr(sys, name, value)
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    return tmp_path


HOW = [["script.py"], ["sub/script.py"], ["-m", "script"], ["-m", "package"], ["-m", "sub.script"], ["folder"]]


@pytest.mark.parametrize("how", HOW, ids=" ".join)
def test_a_program_sees_what_it_sees_under_python_itself(how, programs):
    subprocess.run([sys.executable, *how, "-m", "--flag"], check=True, env={**os.environ, "PYTHONPATH": ""})
    expected = json.loads(Path("seen.json").read_text())
    Path("seen.json").unlink()
    runner.run([*how, "-m", "--flag"])
    assert json.loads(Path("seen.json").read_text()) == expected
    assert expected["argv"][1:] == ["-m", "--flag"]


def test_the_command_of_a_package_is_called_and_its_result_is_the_exit_status(programs, monkeypatch):
    (programs / "tool.py").write_text("import sys\ndef main():\n    return sys.argv, sys.path[0]\n")
    found = EntryPoint("a-tool", "tool:main", "console_scripts")
    monkeypatch.setattr(runner, "entry_points", lambda group, name: [found] if name == found.name else [])
    monkeypatch.setattr(runner.shutil, "which", lambda name, path=None: f"/somewhere/bin/{name}")
    assert command_line.main(["a-tool", "--x"]) == (["/somewhere/bin/a-tool", "--x"], "/somewhere/bin")


@pytest.mark.parametrize(
    ("how", "status", "message"),
    [
        (["nothing.py"], 2, "'nothing.py' is no file, and no installed package"),
        (["-m", "nothing"], 1, "No module named nothing"),
        (["-m", "package.nothing.more"], 1, "No module named package.nothing.more"),
        (["-m"], 2, "needs the name of a module"),
        (["--nothing"], 2, "unknown option '--nothing'"),
    ],
    ids=str,
)
def test_what_does_not_exist_ends_with_pythons_own_status(how, status, message, programs, capsys):
    assert command_line.main(how) == status
    assert message in capsys.readouterr().err


def test_errors_and_exit_statuses_are_the_programs_own(programs):
    (programs / "needs.py").write_text("import not_there")
    (programs / "ends.py").write_text("raise SystemExit(7)")
    with pytest.raises(ModuleNotFoundError, match="not_there"):
        runner.run(["-m", "needs"])
    with pytest.raises(SystemExit, match="7"):
        runner.run(["ends.py"])
    with pytest.raises(CannotRun, match="no file"):
        runner.run([str(programs / "sub")])  # a folder, but without __main__.py


@pytest.mark.parametrize("arguments", [[], ["--help"]], ids=str)
def test_the_list_of_commands_does_not_wait_for_torch(arguments):
    command = [sys.executable, "-X", "importtime", "-m", "peft_reft", *arguments]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    assert "peft_reft.commands" in imported
    assert not imported & {"torch", "peft", "transformers"}
    assert "\n  chat " in (done.stdout if arguments else done.stderr)
    assert done.returncode == (0 if arguments else 2)


def test_another_program_of_the_same_arguments_imports_the_package(tmp_path):
    """A package that imports peft_reft, run with -m and nothing more."""
    (tmp_path / "tool").mkdir()
    (tmp_path / "tool" / "__init__.py").write_text("from peft_reft import ReftConfig")
    (tmp_path / "tool" / "__main__.py").write_text("import tool; print(tool.ReftConfig().peft_type.value)")
    path = os.pathsep.join([str(tmp_path), str(Path(command_line.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-m", "tool"], env={**ENVIRONMENT, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "REFT", done.stderr


@pytest.mark.parametrize(
    ("python", "shell", "typed"),
    [
        ("/home/me/.venv/bin/python", "/home/me/.venv/bin/python", "python"),
        ("/home/me/.venv/bin/python", "/usr/bin/python", ".venv/bin/python"),
        ("/opt/other/bin/python", "/usr/bin/python", "/opt/other/bin/python"),
        ("", None, "python"),
    ],
)
def test_commands_to_type_name_the_python_that_runs(python, shell, typed, monkeypatch):
    monkeypatch.setattr(sys, "executable", python)
    monkeypatch.setattr(os, "getcwd", lambda: "/home/me")
    monkeypatch.setattr("shutil.which", lambda name: shell)
    assert this_python() == typed


def test_a_mistyped_command_is_answered_with_the_one_that_was_meant(capsys):
    assert command_line.main(["inspekt", "adapter"]) == 2
    assert "Did you mean the command 'inspect'?" in capsys.readouterr().err
    assert command_line.main(["zzz"]) == 2
    assert "Did you mean" not in capsys.readouterr().err


def test_commands_are_listed_and_called(capsys, monkeypatch):
    assert command_line.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in COMMANDS)
    assert command_line.main([]) == 2
    monkeypatch.setitem(sys.modules, "peft_reft.info", type("info", (), {"main": staticmethod(lambda argv: argv)}))
    assert command_line.main(["info", "-m", "x"]) == ["-m", "x"]
    monkeypatch.setitem(sys.modules, "trl", None)
    for name in ("peft_reft.sft", "peft_reft.integrations.sft"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert command_line.main(["sft"]) == 1
    assert "needs 'trl', which is not installed: pip install 'peft-reft[examples]'" in capsys.readouterr().err


def test_ctrl_c_while_a_command_is_imported_ends_as_one_while_it_runs(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    for owner, name in ((command_line.importlib, "import_module"), (info, "main")):
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, interrupt)
            assert command_line.main(["info", "adapter"]) == 130
    assert capsys.readouterr().err == "\n\n"


def test_a_file_named_as_a_launcher_is_run(programs):
    (programs / "torchrun").write_text(PROBE)
    runner.run(["torchrun"])
    assert json.loads(Path("seen.json").read_text())["argv"] == ["torchrun"]


@pytest.mark.parametrize(
    ("how", "instead"),
    [
        (["accelerate", "launch", "script.py"], "accelerate launch -m peft_reft SCRIPT"),
        (["-m", "torch.distributed.run", "script.py"], "torchrun -m peft_reft SCRIPT"),
    ],
    ids=["accelerate", "torchrun"],
)
def test_a_launcher_is_refused_with_the_way_to_start_it(how, instead, programs, capsys):
    assert command_line.main(how) == 2
    assert instead in capsys.readouterr().err


# What loads a folder.


def word_tokenizer():
    words = {"<pad>": PAD, "<eos>": EOS, "<unk>": 2, **{f"w{i}": i for i in range(3, 90)}, "user": 90, "assistant": 91}
    backend = Tokenizer(models.WordLevel(words | {f"x{i}": i for i in range(92, 100)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model, an adapter, and both in one folder, as docs/tools.md makes it."""
    folder = tmp_path_factory.mktemp("tools")
    base = tiny_model("llama")
    for name in ("base", "whole"):
        base.save_pretrained(folder / name)
        word_tokenizer().save_pretrained(folder / name)
    base.name_or_path = str(folder / "base")
    model = reft_model(base, task_type="CAUSAL_LM", positions="f1+l2")
    for name in ("adapter", "whole"):
        model.save_pretrained(folder / name)
    return folder


def answer(model, text, tokens=6):
    tokenizer = word_tokenizer()
    inputs = tokenizer(text, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", ["adapter", "whole"])
@pytest.mark.parametrize("loader", [AutoModelForCausalLM, AutoPeftModelForCausalLM])
def test_a_folder_is_loaded_by_its_path(loader, name, folder):
    inputs = {"input_ids": torch.randint(3, 90, (2, 7))}
    expected = logits(reft_model(tiny_model("llama"), task_type="CAUSAL_LM", positions="f1+l2"), inputs)
    torch.testing.assert_close(logits(loader.from_pretrained(folder / name).eval(), inputs), expected)
    assert (expected - logits(tiny_model("llama"), inputs)).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["adapter", "whole"])
def test_a_pipeline_generates_with_it_in_batches(name, folder):
    texts = ["w3 w4 w5 w6 w7", "w8 w9"]
    model = reft_model(tiny_model("llama"), task_type="CAUSAL_LM", positions="f1+l2")
    run = pipeline(
        "text-generation", model=str(folder / name), tokenizer=AutoTokenizer.from_pretrained(folder / "base")
    )
    settings = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False, "batch_size": 2}
    got = [generated[0]["generated_text"].strip() for generated in run(texts, **settings)]
    assert got == [answer(model, text) for text in texts]
    with model.disable_adapter():
        assert got != [answer(model, text) for text in texts]


def ask(port, model):
    """The answer of a server to a chat of one message."""
    question = {
        "model": model,
        "messages": [{"role": "user", "content": "w3 w4 w5"}],
        "max_tokens": 6,
        "temperature": 0,
    }
    request = urllib.request.Request(
        f"http://localhost:{port}/v1/chat/completions",
        json.dumps({**question, "stream": False}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)["choices"][0]["message"]["content"]


def test_transformers_serve_answers_with_the_adapter(folder, tmp_path):
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package, reason="pip install -c constraints.txt 'transformers[serving]'")
    port = 20000 + os.getpid() % 20000
    with open(tmp_path / "log", "w") as log:
        command = [sys.executable, "-m", "peft_reft", "transformers", "serve", "--port", str(port), "--device", "cpu"]
        server = subprocess.Popen(command, env=ENVIRONMENT, cwd=tmp_path, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 120
        while "running on" not in (tmp_path / "log").read_text():
            assert server.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(0.2)
        model = reft_model(tiny_model("llama"), task_type="CAUSAL_LM", positions="f1+l2")
        expected = answer(model, "user w3 w4 w5 assistant")
        assert ask(port, str(folder / "whole")) == expected
        assert ask(port, str(folder / "base")) != expected
    finally:
        server.terminate()
        server.wait(30)


LOADS = """
import os, sys
from peft import PeftConfig
with open(f"seen by {os.environ.get('RANK', '0')}", "w") as file:
    print(PeftConfig.from_pretrained(sys.argv[1]).positions, __name__, sys.argv[2:], file=file)
"""


def test_a_program_loads_an_adapter_and_ends_with_its_own_status(folder, tmp_path):
    """For real, once."""
    (tmp_path / "script.py").write_text(f"{LOADS}\nsys.exit(3)")
    command = [sys.executable, "-m", "peft_reft", "script.py", str(folder / "adapter"), "--flag"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert (tmp_path / "seen by 0").read_text() == "f1+l2 __main__ ['--flag']\n"


@pytest.mark.parametrize("program", [["script.py"], ["-m", "script"]], ids=["script", "module"])
def test_processes_of_a_launcher_know_reft(program, folder, tmp_path):
    (tmp_path / "script.py").write_text(LOADS)
    launcher = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(20000 + os.getpid() % 20000)]
    if program == ["script.py"]:
        launcher = ["accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
    command = [sys.executable, "-m", *launcher, "-m", "peft_reft", *program, str(folder / "adapter"), "--flag"]
    environment = {**ENVIRONMENT, "HF_HOME": str(tmp_path)}  # a configuration of accelerate's that somebody made
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ranks = [0, 1] if launcher[0] == "torch.distributed.run" else [0]
    assert [(tmp_path / f"seen by {rank}").read_text() for rank in ranks] == [
        "f1+l2 __main__ ['--flag']\n" for _ in ranks
    ]
