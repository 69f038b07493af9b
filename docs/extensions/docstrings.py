"""Docstrings as the API reference shows them: an extension of mkdocstrings' reader, griffe.

A field of ReftConfig is described in its `metadata`, where PEFT and the command line find it as well; here
it becomes the field's docstring. And examples (`>>>`) become blocks of code.
"""

from __future__ import annotations

import ast
import re
from importlib import import_module
from typing import Any

import griffe

EXAMPLE = re.compile(r"^>>> .*?(?=\n\s*\n|\Z)", re.S | re.M)


class Docstrings(griffe.Extension):
    """Its methods are called by griffe for what it reads."""

    def on_attribute_instance(self, *, node: Any, attr: griffe.Attribute, **kwargs: Any) -> None:
        """Give `name: type = field(..., metadata={"help": "..."})` its help, and show its default."""
        call = getattr(node, "value", None)
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "field"):
            return
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        if "metadata" in given and attr.docstring is None:
            # From the class itself: parts of a text may have names, such as that of the notation.
            config = getattr(import_module(attr.module.path), attr.parent.name)
            attr.docstring = griffe.Docstring(config.__dataclass_fields__[attr.name].metadata["help"], parent=attr)
        if "default" in given:
            attr.value = ast.unparse(given["default"])
        elif "default_factory" in given:
            attr.value = ast.unparse(given["default_factory"]) + "()"

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Fence the examples of a docstring."""
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(lambda found: f"```pycon\n{found[0]}\n```", obj.docstring.value)
