"""Imports point one way: what each file of the package may import, as drawn in CONTRIBUTING.md."""

import ast
import pathlib

import pytest

import peft_reft

PACKAGE = pathlib.Path(peft_reft.__file__).parent
# Each file may import from those in earlier lines only.
ORDER = [
    [
        "orthonormal",
        "prompt",
        "layout",
        "numbering",
        "checkpoint",
        "arguments",
        "root",
        "structure",
        "ownership",
        "stand_in",
    ],
    ["positions", "interventions", "example_inputs", "batching"],
    ["trace"],
    ["sites", "factors", "blocks", "config", "scoring"],
    ["frame", "collator", "cache"],
    ["layer", "host", "generation"],
    ["attach"],
    ["targets", "native", "hotswap"],
    ["model"],
    ["register"],
    ["__init__"],
    # What stands beside the tuner, and is imported by those who use it.
    ["reading"],
    ["info.reading", "info.measuring", "info.words"],
    ["info.adapter"],
    ["info.command"],
    ["info.__init__"],
    ["card", "inspect.batch", "inspect.deltas", "inspect.heatmap"],
    ["inspect.spy", "inspect.tables"],
    ["inspect.edits", "inspect.effects"],
    ["inspect.run"],
    ["inspect.command"],
    ["inspect.__init__"],
    ["convert.rotation", "convert.structure", "convert.locations", "children.__init__", "search.space"],
    ["convert.conversion", "children.sitecustomize", "search.attempt"],
    ["convert.writing", "search.picture"],
    ["convert.pyreft", "search.study"],
    ["convert.adapterhub", "convert.export", "search.__init__"],
    ["convert.__init__"],
    ["convert.command", "lm_eval", "sft", "runner"],
    ["__main__"],
]
MATHEMATICS = ["orthonormal", "interventions", "factors", "positions", "prompt", "sites"]  # know nothing of PEFT


def path_of(name):
    return PACKAGE.joinpath(*name.split(".")).with_suffix(".py")


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
                found.add(node.module or "")
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path_of(name).read_text()))
    return found


def test_every_file_has_its_place():
    files = [path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py")]
    assert sorted(name for line in ORDER for name in line) == sorted(".".join(file.parts) for file in files)


@pytest.mark.parametrize("name", [name for line in ORDER for name in line])
def test_a_file_imports_from_earlier_lines_only(name):
    line = next(number for number, names in enumerate(ORDER) if name in names)
    allowed = {f"peft_reft.{other}".removesuffix(".__init__") for names in ORDER[:line] for other in names}
    assert {module for module in imports_of(name) if module.startswith("peft_reft")} <= allowed


@pytest.mark.parametrize("name", MATHEMATICS)
def test_mathematics_and_index_arithmetic_know_nothing_of_peft(name):
    assert not [module for module in imports_of(name) if module.split(".")[0] == "peft"]


def test_importing_the_package_needs_no_trainer_and_nothing_beside_the_tuner():
    core = [name for line in ORDER[: ORDER.index(["__init__"]) + 1] for name in line]
    modules = {module for name in core for module in imports_of(name)}
    packages = {module.split(".")[0] for module in modules}
    assert not packages & {"trl", "datasets", "accelerate", "pyreft", "pyvene", "adapters", "pandas", "matplotlib"}
    assert {module for module in modules if module.startswith("peft_reft")} <= {
        "peft_reft",
        *(f"peft_reft.{name}" for name in core),
    }
