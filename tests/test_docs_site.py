"""The documentation site: it builds without a warning, nothing is missing in it, and what it shows is what there is."""

from __future__ import annotations

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


# Messages of other libraries.


def test_messages_of_peft_are_as_the_errors_page_has_them():
    page = (DOCS / "errors.md").read_text(encoding="utf-8").split("## Messages of other libraries")[1]
    config = peft_reft.ReftConfig(task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="is not compatible with the `PeftMixedModel`"):
        get_peft_model(tiny_model("llama"), config, mixed=True)
    with pytest.warns(UserWarning, match="Adapter name 'ref' should not be contained in the prefix 'reft_'"):
        get_peft_model(tiny_model("llama"), config, adapter_name="ref")
    for part in ("PeftMixedModel", "Adapter name 'ref'", "KeyError: 'REFT'"):
        assert part in page
