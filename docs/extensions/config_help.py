"""Shows the fields of ReftConfig in the API reference: an extension of mkdocstrings' reader, griffe.

A field's description stands in its `metadata`, where PEFT, the model card and the command line find it as well; the
reference reads docstrings. So each field gets its description as its docstring.
"""

from __future__ import annotations

import ast
from typing import Any

import griffe


class ConfigHelp(griffe.Extension):
    """Gives attributes `name: type = field(..., metadata={"help": "..."})` a docstring, and shows their default."""

    def on_attribute_instance(self, *, node: Any, attr: griffe.Attribute, **kwargs: Any) -> None:
        """Called by griffe for each attribute it reads."""
        call = getattr(node, "value", None)
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "field"):
            return
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        if "metadata" in given and attr.docstring is None:
            attr.docstring = griffe.Docstring(ast.literal_eval(given["metadata"])["help"], parent=attr)
        if "default" in given:
            attr.value = ast.unparse(given["default"])
        elif "default_factory" in given:
            attr.value = ast.unparse(given["default_factory"]) + "()"
