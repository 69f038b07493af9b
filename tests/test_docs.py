"""What the documents say is true: their code runs, their commands are the promised ones, their versions fit."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import peft_reft
from peft_reft import ReftConfig
from peft_reft.interventions import REGISTRY, intervention_names
from peft_reft.tuner.register import SUPPORTED_PEFT

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(text: str, *languages: str) -> list[str]:
    """The code blocks of a Markdown text that are marked with one of these languages."""
    return [code for language, code in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M) if language in languages]


def requirements(table: str) -> list[Requirement]:
    """The requirements in a list of pyproject.toml."""
    (listed,) = re.findall(rf"^{table} = \[(.*?)\]$", PYPROJECT, re.S | re.M)
    return [Requirement(text) for text in re.findall(r'"([^"]+)"', listed)]


def constraints() -> dict[str, str]:
    """The pinned versions by package."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return dict(pairs)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_blocks_run_and_print_what_the_document_shows(document, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    registered = dict(REGISTRY)
    text = document.read_text(encoding="utf-8")
    namespace: dict[str, object] = {"__name__": "__main__"}
    try:
        for number, code in enumerate(blocks(text, "python")):
            capsys.readouterr()
            exec(compile(code, f"{document.name}, Python block {number}", "exec"), namespace)
            shown = re.search(re.escape(code) + r"```\n\nIt prints\n\n```text\n(.*?)^```$", text, re.S | re.M)
            if shown:
                assert capsys.readouterr().out == shown[1]
    finally:  # whatever the blocks register is taken back
        REGISTRY.clear()
        REGISTRY.update(registered)


def test_readme_shows_what_its_first_example_prints():
    assert "It prints" in README


def test_first_two_shell_blocks_are_the_two_commands_of_a_fresh_machine():
    quickstart, tests = blocks(README, "bash", "sh", "shell", "console")[:2]
    for command in (quickstart, tests):
        assert command.count("\n") == 1, "a command is one line"
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e ")
    assert '".[examples]"' in quickstart and quickstart.endswith(".venv/bin/python examples/quickstart.py\n")
    assert '".[dev]"' in tests and tests.endswith(".venv/bin/pytest\n")


def test_pinned_versions_lie_in_the_ranges_of_pyproject():
    pinned = constraints()
    ranges = [r for table in ("dependencies", "examples", "dev") for r in requirements(table)]
    assert {"torch", "peft", "transformers", "trl", "datasets"} <= {r.name for r in ranges} & set(pinned)
    for requirement in ranges:
        if requirement.name in pinned:
            assert requirement.specifier.contains(pinned[requirement.name]), requirement
    tools = {requirement.name for requirement in requirements("dev")} - {"peft-reft"}
    assert tools <= set(pinned), "what checks the package is pinned too"


def test_the_range_of_peft_is_stated_once_in_two_places():
    (peft,) = [requirement for requirement in requirements("dependencies") if requirement.name == "peft"]
    assert peft.specifier == SpecifierSet(SUPPORTED_PEFT)


def test_version_is_the_same_everywhere():
    assert f'version = "{peft_reft.__version__}"' in PYPROJECT
    assert version("peft-reft") == peft_reft.__version__
    assert f"## {peft_reft.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_readme_lists_every_intervention_and_only_fields_that_exist():
    listed = set(re.findall(r'^\| `"(\w+)"` \| h \+', README, re.M))
    assert listed == {
        name for name in intervention_names() if REGISTRY[name].__module__ == "peft_reft.interventions.equations"
    }
    table = README.split("The fields of `ReftConfig`")[1].split("Every field")[0]
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| `([^`]*)` \|", table, re.M)
    fields = ReftConfig.__dataclass_fields__
    config = ReftConfig()
    assert len(rows) > 8
    for names, default in rows:
        for name in re.findall(r"\w+", names):
            assert name in fields
            assert getattr(config, name) == eval(default), name


def test_reading_tour_names_every_file_once():
    tour = README.split("## Reading the code")[1].split("## License")[0]
    named = re.findall(r"\(peft_reft/(\w+\.py)\)", tour)
    assert sorted(named) == sorted(path.name for path in (ROOT / "peft_reft").glob("*.py"))


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
