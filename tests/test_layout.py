"""Imports point one way, by folders: what each may import is drawn in CONTRIBUTING.md."""

import ast
import pathlib
import re
import sys

import pytest

import peft_reft
from peft_reft.tuner import private

PACKAGE = pathlib.Path(peft_reft.__file__).parent
# A folder imports from itself and from those in earlier lines; the names in one line do not know each other.
FLOORS = [
    {"interventions", "positions", "blocks"},
    {"context"},
    {"tuner"},
    {"info"},  # which model cards quote
    {"integrations"},
    {"convert", "export", "inspect", "search", "chat", "playground", "causal"},
]
MATHEMATICS = {"interventions", "positions"}  # plain torch
FREE = {"commands", "command_line"}  # what all commands share; they import nothing of the package
DEPENDENCIES = {"accelerate", "huggingface_hub", "packaging", "peft", "safetensors", "torch", "transformers"}
ALSO = {  # tools that use neighbours
    ("playground", "chat"),
    ("playground", "inspect"),
    ("causal", "inspect"),  # one heat map
}


def imports_of(path: pathlib.Path) -> set[str]:
    """Modules that a file imports when it is imported: not for type checkers only, nor within functions."""
    found = set()

    def visit(node):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            found.update(names - {"peft_reft"})
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


def files_of(folder: str) -> list[pathlib.Path]:
    return sorted((PACKAGE / folder).rglob("*.py"))


FOLDERS = [folder for floor in FLOORS for folder in sorted(floor)]


def test_every_folder_has_its_floor():
    assert sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()) == sorted(FOLDERS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_from_earlier_floors_only(folder):
    floor = next(number for number, names in enumerate(FLOORS) if folder in names)
    allowed = {folder, *(name for names in FLOORS[:floor] for name in names)}
    allowed |= {other for one, other in ALSO if one == folder} | FREE
    for path in files_of(folder):
        used = {module.split(".")[1] for module in imports_of(path) if module.startswith("peft_reft.")}
        assert used <= allowed, path


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_file_of_a_folder_imports_itself_in_a_circle(folder):
    names = {
        ".".join(["peft_reft", *path.relative_to(PACKAGE).with_suffix("").parts]): path for path in files_of(folder)
    }
    names = {name.removesuffix(".__init__"): path for name, path in names.items()}
    rest = {name: imports_of(path) & names.keys() - {name} for name, path in names.items()}
    while rest:
        free = [name for name, needed in rest.items() if not needed & rest.keys()]
        assert free, f"a circle among {sorted(rest)}"
        for name in free:
            del rest[name]


@pytest.mark.parametrize("folder", sorted(MATHEMATICS))
def test_mathematics_and_index_arithmetic_know_nothing_of_peft(folder):
    for path in files_of(folder):
        assert not [module for module in imports_of(path) if module.split(".")[0] in ("peft", "trl", "datasets")], path


def test_importing_the_package_needs_no_trainer_and_no_tool():
    """What the package imports, and what that imports, and so on."""
    paths = {".".join(["peft_reft", *p.relative_to(PACKAGE).with_suffix("").parts]): p for p in PACKAGE.rglob("*.py")}
    paths = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    loaded, rest, packages = set(), {"peft_reft"}, set()
    while rest:
        name = rest.pop()
        loaded.add(name)
        for module in imports_of(paths[name]):
            packages.add(module.split(".")[0])
            parts = module.split(".")
            rest |= {".".join(parts[: depth + 1]) for depth in range(len(parts))} & paths.keys() - loaded
    assert packages <= {*sys.stdlib_module_names, *DEPENDENCIES, "peft_reft"}
    assert not {"peft_reft.search", "peft_reft.chat", "peft_reft.playground", "peft_reft.lm_eval"} & loaded
    assert {f"peft_reft.{folder}" for folder in ("interventions", "positions", "blocks", "context", "tuner")} <= loaded


@pytest.mark.parametrize(
    "word", ["sys._getframe", "currentframe", "f_locals", "getrefcount", "torch._C.", "sitecustomize"]
)
def test_nothing_is_inferred_from_callers_or_from_private_parts_of_torch(word):
    assert [path for path in PACKAGE.rglob("*.py") if word in path.read_text()] == []


def test_the_package_and_the_documents_list_the_same_private_parts():
    page = (PACKAGE.parent / "docs" / "upstream.md").read_text(encoding="utf-8")
    said = [private.__doc__ or "", page.partition("## What is used until then")[2]]
    code, document = ({part.strip("*") for part in re.findall(r"\b_[a-zA-Z]\w+\*?", text)} for text in said)
    assert code == document and "_gradient_checkpointing_func" in code
