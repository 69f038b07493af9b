"""Makes ReFT known in the Python processes that a program run by `python -m peft_reft` starts.

Python imports a module of this name at start, if there is one on its path; runner.py puts this folder there. Nothing
is imported before the process itself imports what it would be needed for. Standard library only: most processes
never import PEFT, and some belong to environments without this package.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

# After the import of the first, the second is imported too.
AFTER = {"peft": "peft_reft", "lm_eval.models": "peft_reft.integrations.lm_eval"}


class Follower(MetaPathFinder):
    """Lets the modules of `AFTER` be found as usual, and imports what follows them once they have run."""

    def __init__(self) -> None:
        self.searching: set[str] = set()

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        if name not in AFTER or name in self.searching:
            return None
        self.searching.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.searching.discard(name)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                follow(AFTER[name])

            loader.exec_module = exec_module
        return spec


def follow(name: str) -> None:
    """Import a module of peft_reft; a program that does not need it runs on without."""
    try:
        importlib.import_module(name)
    except ImportError as error:
        if error.name != "peft_reft":  # another environment, which has no peft_reft, is none of its business
            warnings.warn(f"ReFT is not known in this process: {error}")


def install() -> None:
    """Follow the imports of this process; those that it did already are followed at once."""
    if not any(type(finder).__name__ == Follower.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, Follower())
        for name in AFTER.keys() & sys.modules.keys():
            follow(AFTER[name])


def make_way() -> None:
    """Run the `sitecustomize` of the machine or the environment, which this one stands in front of."""
    own = sys.modules.pop("sitecustomize")
    here = os.path.dirname(os.path.realpath(__file__))
    sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry) != here]
    try:
        importlib.import_module("sitecustomize")
    except ImportError as error:
        if error.name != "sitecustomize":
            raise
    finally:
        sys.modules.setdefault("sitecustomize", own)


if __name__ == "sitecustomize":
    install()
    make_way()
