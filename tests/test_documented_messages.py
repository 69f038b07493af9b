"""What docs/errors.md quotes stands in the sources, and the table of docs/interventions.md is that of the config."""

from __future__ import annotations

import ast
import re
from dataclasses import fields
from pathlib import Path

import peft_reft
from peft_reft import ReftConfig

PACKAGE = Path(peft_reft.__file__).parent
DOCS = PACKAGE.parent / "docs"


def text_of(node: ast.AST) -> str | None:
    """What a string says, with a null character for what is put into it; None for anything else."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or "\0" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (text_of(node.left) or "\0") + (text_of(node.right) or "\0")
    return None


def texts_of_the_sources() -> list[str]:
    found = (text_of(node) for path in PACKAGE.rglob("*.py") for node in ast.walk(ast.parse(path.read_text("utf-8"))))
    return [re.sub(r"\{[^}]*\}", "\0", text) for text in found if text]


def documented() -> list[str]:
    """The messages on the page, without those of other libraries; "…" stands for what differs."""
    page = (DOCS / "errors.md").read_text("utf-8").partition("## Messages of other libraries")[0]
    cells = re.findall(r"^\| (`.*?) \| ", page, re.M)
    return [one or other for cell in cells for one, other in re.findall(r"`` (.+?) ``|`([^`]+)`", cell)]


def test_every_message_of_the_page_stands_in_the_sources():
    texts, messages = texts_of_the_sources(), documented()
    assert len(messages) > 200
    stale = [
        message
        for message in messages
        if not any(all(part.strip() in text for part in re.split(r"…|\.\.\.", message)) for text in texts)
    ]
    assert stale == []


def test_the_table_of_fields_names_those_of_the_config_with_their_defaults():
    page = (DOCS / "interventions.md").read_text("utf-8").partition("## The fields")[2]
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| `(.*?)` \|", page, re.M)
    shown = {name.strip("`"): ast.literal_eval(default) for names, default in rows for name in names.split(", ")}
    config = ReftConfig()
    inherited = {field.name for field in fields(ReftConfig.__base__)}
    assert shown.keys() == {field.name for field in fields(ReftConfig)} - inherited
    assert shown == {name: getattr(config, name) for name in shown}
