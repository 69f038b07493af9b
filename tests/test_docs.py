"""What the documents say is true: their code runs, their commands are the promised ones, their versions fit."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import document_model
import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from transformers import GenerationMixin

import peft_reft
from peft_reft.interventions import REGISTRY
from peft_reft.tuner.versions import TESTED, supported

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
RUN_SHELL = {"chat.md"}  # pages whose shell blocks are commands of this package, quick enough to run
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def code_blocks(text: str) -> list[tuple[str, str]]:
    """The code blocks of a Markdown text with their languages."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M)


def blocks(text: str, *languages: str) -> list[str]:
    """The code blocks that are marked with one of these languages."""
    return [code for language, code in code_blocks(text) if language in languages]


def requirements(table: str) -> list[Requirement]:
    """The requirements in a list of pyproject.toml."""
    (listed,) = re.findall(rf"^{table} = \[(.*?)\]$", PYPROJECT, re.S | re.M)
    return [Requirement(text) for text in re.findall(r'"([^"]+)"', listed)]


def constraints() -> dict[str, str]:
    """The pinned versions by package."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return dict(pairs)


@pytest.fixture(scope="session")
def model_of_the_documents(tmp_path_factory):
    """A folder with SmolLM2, or with its stand-in; made once."""
    make = document_model.real_model if document_model.is_wanted() else document_model.stand_in
    return make(tmp_path_factory.mktemp("models") / "smollm2")


def run_shell(code: str, folder: Path) -> None:
    """Run a shell block as a reader would, with this Python as `python`."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    root = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": root}
    command = ["bash", "-euo", "pipefail", "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{code}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.fixture
def no_cache_is_lost(monkeypatch):
    """Fail where a page generates in training mode with gradient checkpointing, TRL's default: answers are nonsense.

    The stand-in's answers are nonsense anyway, so that nothing else would show it.
    """
    generate = GenerationMixin.generate

    @functools.wraps(generate)
    def checked(self, *args, **kwargs):
        checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in self.modules())
        assert not (self.training and checkpointed), "call model.eval() before it generates"
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "generate", checked)


@pytest.mark.usefixtures("no_cache_is_lost")
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_code_blocks_run_and_print_what_the_document_shows(document, tmp_path, monkeypatch, capsys, request):
    """Python blocks in order, in one empty folder; shell blocks of the pages in `RUN_SHELL` as well.

    Output after "It prints" is compared. Output after "With SmolLM2 it prints" was made with the real model: other
    machines round differently, so that single words may differ.
    """
    monkeypatch.chdir(tmp_path)
    text = document.read_text(encoding="utf-8")
    if document_model.NAME in text:
        Path(document_model.NAME).parent.mkdir()
        Path(document_model.NAME).symlink_to(request.getfixturevalue("model_of_the_documents"))
    registered = dict(REGISTRY)
    namespace: dict[str, object] = {"__name__": "__main__"}
    try:
        for number, (language, code) in enumerate(code_blocks(text)):
            if language == "bash" and document.name in RUN_SHELL:
                run_shell(code, tmp_path)
            if language != "python":
                continue
            capsys.readouterr()
            exec(compile(code, f"{document.name}, block {number}", "exec"), namespace)
            shown = re.search(re.escape(code) + r"```\n\nIt prints\n\n```text\n(.*?)^```$", text, re.S | re.M)
            if shown:
                lines = capsys.readouterr().out.splitlines()
                printed = "\n".join(line for line in lines if not line.startswith("{'"))  # not a trainer's logs
                assert printed == shown[1].rstrip("\n")
    finally:  # whatever the blocks register is taken back
        REGISTRY.clear()
        REGISTRY.update(registered)


def test_first_two_shell_blocks_are_the_two_commands_of_a_fresh_machine():
    quickstart, tests = blocks(README, "bash", "sh", "shell", "console")[:2]
    for command in (quickstart, tests):
        assert command.count("\n") == 1, "a command is one line"
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e ")
    assert '".[examples]"' in quickstart and quickstart.endswith(".venv/bin/python examples/quickstart.py\n")
    assert '".[dev]"' in tests and tests.endswith(".venv/bin/pytest -n 2 --dist worksteal\n")


def test_pinned_versions_lie_in_the_ranges_of_pyproject():
    pinned = constraints()
    ranges = [r for table in ("dependencies", "examples", "dev") for r in requirements(table)]
    assert {"torch", "peft", "transformers", "trl", "datasets"} <= {r.name for r in ranges} & set(pinned)
    for requirement in ranges:
        if requirement.name in pinned:
            assert requirement.specifier.contains(pinned[requirement.name]), requirement
    tools = {requirement.name for requirement in requirements("dev")} - {"peft-reft"}
    assert tools <= set(pinned), "what checks the package is pinned too"


def test_the_ranges_that_are_checked_are_those_of_pyproject():
    stated = {r.name: r.specifier for table in ("dependencies", "examples") for r in requirements(table)}
    assert stated["peft"] == SpecifierSet(supported("peft").removeprefix("peft"))
    for package, (low, _) in TESTED.items():
        assert SpecifierSet(f">={low}") in [SpecifierSet(str(one)) for one in stated[package]], package


def test_version_is_the_same_everywhere():
    assert f'version = "{peft_reft.__version__}"' in PYPROJECT
    assert version("peft-reft") == peft_reft.__version__
    assert f"## {peft_reft.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "examples" / "README.md"], ids=lambda path: str(path.name))
def test_links_to_files_and_sections_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)]+)\)", document.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        path = document.parent / name if name else document
        assert path.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target
