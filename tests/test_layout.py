"""Imports point one way, by folders: what each may import is drawn in CONTRIBUTING.md."""

import ast
import pathlib

import pytest

import peft_reft

PACKAGE = pathlib.Path(peft_reft.__file__).parent
# A folder imports from itself and from those in earlier lines; the names in one line do not know each other.
FLOORS = [
    {"interventions", "positions", "blocks"},
    {"context"},
    {"tuner"},
    {"integrations", "info"},
    {"convert", "export", "inspect", "search", "chat", "playground"},
]
MATHEMATICS = {"interventions", "positions"}  # plain torch
# Two tools are used by neighbours: a model card says what `info` finds, and a chat marks tokens as trainers see them.
ALSO = {("integrations", "info"), ("info", "integrations"), ("playground", "chat"), ("playground", "inspect")}


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
            inside = node.module == "peft_reft"
            found.update(f"peft_reft.{alias.name}" for alias in node.names) if inside else found.add(node.module or "")
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
    allowed |= {other for one, other in ALSO if one == folder}
    for path in files_of(folder):
        used = {module.split(".")[1] for module in imports_of(path) if module.startswith("peft_reft.")}
        assert used & set(FOLDERS) <= allowed, path


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
    core = [
        path for folder in ("interventions", "positions", "blocks", "context", "tuner") for path in files_of(folder)
    ]
    packages = {module.split(".")[0] for path in core for module in imports_of(path)}
    assert not packages & {"trl", "datasets", "accelerate", "pyreft", "pyvene", "adapters", "pandas", "matplotlib"}


@pytest.mark.parametrize(
    "word", ["sys._getframe", "currentframe", "f_locals", "getrefcount", "torch._C.", "sitecustomize"]
)
def test_nothing_is_inferred_from_callers_or_from_private_parts_of_torch(word):
    assert [path for path in PACKAGE.rglob("*.py") if word in path.read_text()] == []
