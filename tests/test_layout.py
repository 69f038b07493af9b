"""Imports point one way: what each file of the package may import, as drawn in CONTRIBUTING.md."""

import ast
import pathlib

import pytest

import peft_reft

PACKAGE = pathlib.Path(peft_reft.__file__).parent
# Each file may import from those in earlier lines only.
ORDER = [
    ["orthonormal", "prompt", "layout", "numbering", "checkpoint", "arguments", "root", "structure", "ownership"],
    ["positions", "interventions", "trace", "batching"],
    ["sites", "factors", "blocks", "config"],
    ["frame", "collator"],
    ["layer", "host", "generation"],
    ["attach"],
    ["targets"],
    ["model"],
    ["register"],
    ["__init__"],
]
MATHEMATICS = ["orthonormal", "interventions", "factors", "positions", "prompt", "sites"]  # know nothing of PEFT


def imports_of(name):
    """Modules that a file of the package imports when it runs (not for type checkers only, nor within functions)."""
    found = set()

    def visit(node):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.module == "peft_reft":
                found.update(f"peft_reft.{alias.name}" for alias in node.names)
            else:
                found.add(node.module)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse((PACKAGE / f"{name}.py").read_text()))
    return found


def test_every_file_has_its_place():
    assert sorted(name for line in ORDER for name in line) == sorted(path.stem for path in PACKAGE.glob("*.py"))


@pytest.mark.parametrize("name", [name for line in ORDER for name in line])
def test_a_file_imports_from_earlier_lines_only(name):
    line = next(number for number, names in enumerate(ORDER) if name in names)
    allowed = {f"peft_reft.{other}" for names in ORDER[:line] for other in names}
    assert {module for module in imports_of(name) if module.startswith("peft_reft")} <= allowed


@pytest.mark.parametrize("name", MATHEMATICS)
def test_mathematics_and_index_arithmetic_know_nothing_of_peft(name):
    assert not [module for module in imports_of(name) if module.split(".")[0] == "peft"]


def test_the_package_needs_no_trainer():
    modules = {module.split(".")[0] for path in PACKAGE.glob("*.py") for module in imports_of(path.stem)}
    assert not modules & {"trl", "datasets", "accelerate", "pyreft", "pyvene", "adapters"}
