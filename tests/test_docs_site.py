"""The documentation site: it builds without a warning, nothing is missing in it, and what it shows is what there is."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_model
from peft import get_peft_model

import peft_reft

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
NAVIGATION = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1].split("\nextra_css:")[0]
ANY = "…"  # stands for a value in a message


def load(path: Path):
    """A module that is no part of a package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look for it there
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[path.stem]
    return module


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
    pytest.importorskip("material", reason="the extra `docs` is not installed")
    pytest.importorskip("mkdocstrings", reason="the extra `docs` is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    reference = (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
    for name in peft_reft.__all__:
        assert f'id="peft_reft.{name}"' in reference, f"{name} has no entry in the reference"
    assert "the number of edited directions per intervention" in reference, "the fields of ReftConfig lack their help"
    assert "&gt;&gt;&gt;" in reference or 'class="gp">' in reference, "examples are shown as code"
    assert not list((tmp_path / "site").rglob("*.md"))


def test_every_page_is_in_the_navigation():
    listed = re.findall(r"([\w/-]+\.md)$", NAVIGATION, re.M)
    assert sorted(listed) == sorted(path.name for path in PAGES)


def test_every_picture_exists_and_is_shown():
    shown = set()
    for page in PAGES:
        for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            assert (DOCS / target).is_file(), f"{page.name} shows {target}, which does not exist"
            shown.add(Path(target).name)
    drawn = {path.name for path in (DOCS / "images").iterdir() if path.suffix in (".svg", ".png")}
    assert drawn == shown


def test_pictures_of_positions_are_what_the_package_says():
    pictures = load(DOCS / "images" / "positions.py").PICTURES
    assert len(pictures) > 5
    for name, draw in pictures.items():
        assert draw() == (DOCS / "images" / name).read_text(encoding="utf-8"), "run python docs/images/positions.py"


def test_links_out_of_the_docs_become_paths():
    links = load(DOCS / "extensions" / "repository_links.py")
    given = "See [the quickstart](../examples/quickstart.py#top), [`a.py`](../b/a.py), [here](x.md) and ![p](../p.png)."
    wanted = "See the quickstart (`examples/quickstart.py`), `b/a.py`, [here](x.md) and ![p](../p.png)."
    assert links.on_page_markdown(given) == wanted


# Errors and warnings.


def text_of(node: ast.AST) -> str:
    """A string as it is built in the sources, `…` for what is put in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else ANY for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    return ANY


def names_in(node: ast.AST) -> set[str]:
    return {found.id for found in ast.walk(node) if isinstance(found, ast.Name)}


def speaks(text: str) -> bool:
    """Whether a text says anything but which command speaks."""
    return re.search(r"[a-z] [a-z]", text.replace("python -m peft_reft", "")) is not None


@functools.cache
def messages() -> dict[str, str]:
    """Text of every error that the package raises, and every warning and complaint it prints, by its place."""
    trees = {path: ast.parse(path.read_text("utf-8")) for path in sorted((ROOT / "peft_reft").rglob("*.py"))}
    constants, functions = {}, {}
    for tree in trees.values():
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                constants[node.targets[0].id] = re.sub(r"\{[^}]*\}", ANY, text_of(node.value))
            elif isinstance(node, ast.FunctionDef):
                returned = [n.value for n in ast.walk(node) if isinstance(n, ast.Return) and n.value is not None]
                functions[node.name] = ANY.join(map(text_of, returned))
    found = {}
    for path, tree in trees.items():
        local = {
            node.targets[0].id: node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise):
                call, says_something = node.exc, True
            else:
                call = node
                says_something = isinstance(node, ast.Call) and (
                    ast.unparse(node.func).split(".")[-1] in ("warn", "warn_once")
                    or any(ast.unparse(keyword.value) == "sys.stderr" for keyword in node.keywords)
                )
            if not says_something or not isinstance(call, ast.Call) or not call.args:
                continue
            message = call.args[0]
            text = text_of(message)
            if not speaks(text):  # made elsewhere: by a constant, a function or a few lines above
                names = names_in(message)
                names |= {name for given in names if given in local for name in names_in(local[given])}
                text = ANY.join((constants | functions).get(name, "") for name in sorted(names))
            if speaks(text):
                found[f"{path.relative_to(ROOT)}:{node.lineno}"] = text
    return found


def cores() -> list[str]:
    """The messages of errors.md: what stands in backticks in the first column of its tables of the package's own."""
    page = (DOCS / "errors.md").read_text(encoding="utf-8").split("## Messages of other libraries")[0]
    rows = [row for row in re.findall(r"^\| (.*?) \| .* \|$", page, re.M) if row.startswith("`")]
    return [core for row in rows for core in re.findall(r"`([^`]+)`", row)]


def says(text: str, core: str) -> bool:
    return re.search(".*".join(map(re.escape, core.split(ANY))), text, re.S) is not None


def test_messages_are_found_in_the_sources():
    texts = list(messages().values())
    assert len(texts) > 150
    for core in ("A ReFT adapter cannot be merged", "No list of blocks was found", "edited no token at all"):
        assert any(says(text, core) for text in texts), core
    assert not any(says(text, "A ReFT adapter can be merged") for text in texts)


def test_every_message_of_the_errors_page_exists():
    texts = list(messages().values())
    listed = cores()
    assert len(listed) > 100
    assert [core for core in listed if len(core.replace(ANY, "")) < 10] == [], "too short to mean one message"
    assert [core for core in listed if not any(says(text, core) for text in texts)] == []


def test_every_message_of_the_package_is_on_the_errors_page():
    listed = cores()
    assert [f"{at}: {text}" for at, text in messages().items() if not any(says(text, core) for core in listed)] == []


def test_messages_of_peft_are_as_the_errors_page_has_them():
    page = (DOCS / "errors.md").read_text(encoding="utf-8").split("## Messages of other libraries")[1]
    config = peft_reft.ReftConfig(task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="is not compatible with the `PeftMixedModel`"):
        get_peft_model(tiny_model("llama"), config, mixed=True)
    with pytest.raises(AttributeError, match="object has no attribute 'add_weighted_adapter'"):
        get_peft_model(tiny_model("llama"), config).add_weighted_adapter(["default"], [1.0], "both")
    with pytest.warns(UserWarning, match="Adapter name 'ref' should not be contained in the prefix 'reft_'"):
        get_peft_model(tiny_model("llama"), config, adapter_name="ref")
    for part in ("PeftMixedModel", "add_weighted_adapter", "Adapter name 'ref'", "KeyError: 'REFT'"):
        assert part in page
