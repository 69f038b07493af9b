"""Runs another Python program with REFT registered, so that tools which only know PEFT can load an adapter.

The program sees what it would see under `python PROGRAM`: `sys.argv`, `sys.path[0]` and `__main__`, and its exit
status is that of this process. REFT is unknown in the processes that it starts: a launcher takes this command as the
program to start, as in `accelerate launch -m peft_reft SCRIPT`.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import os
import pkgutil
import shutil
import sys
import sysconfig
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import entry_points
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

LAUNCHERS = {
    "accelerate": "accelerate launch",
    "accelerate-launch": "accelerate launch",
    "accelerate.commands.launch": "accelerate launch",
    "torchrun": "torchrun",
    "torch.distributed.run": "torchrun",
    "torch.distributed.launch": "torchrun",
}
LM_EVAL = {"lm_eval", "lm-eval"}  # its module, its command


class CannotRun(Exception):
    """What was to be run does not exist, or cannot be run so.

    Attributes:
        status: the exit status that Python has in this case.
    """

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status


def run(argv: list[str]) -> Any:
    """Run a program in this process; what it raises, SystemExit included, is left to the caller's caller: Python.

    Args:
        argv: `["-m", module, ...]`, `[path of a script, ...]`, or `[command of an installed package, ...]`, with the
            program's own arguments; a path that exists wins over a command of the same name.

    Returns:
        What the function of a command returned, None for a script or module: in both cases the argument of `sys.exit`.

    Raises:
        CannotRun: before anything is run.
    """
    if argv[0] == "-m":
        prepare_for(argv[1] if len(argv) > 1 else "")
        return run_module(argv[1:])
    if Path(argv[0]).is_file():
        return run_script(argv)
    if Path(argv[0], "__main__.py").is_file():
        return run_folder(argv)
    prepare_for(argv[0])
    return run_command(argv)


def prepare_for(name: str) -> None:
    """Refuse a launcher, whose processes would not know REFT, and let lm-eval know the model class `reft`.

    Args:
        name: of the module or command that is to be run; a file of that name is something else.
    """
    if name in LAUNCHERS:
        raise CannotRun(
            f"{name} starts processes of its own, in which ReFT would be unknown. Run this in place of it, which makes "
            f"ReFT known in each of them: {LAUNCHERS[name]} -m peft_reft SCRIPT ..."
        )
    if name in LM_EVAL and importlib.util.find_spec("lm_eval") is not None:
        importlib.import_module("peft_reft.integrations.lm_eval")


def run_module(argv: list[str]) -> None:
    """As `python -m argv[0] argv[1:]`."""
    if not argv:
        raise CannotRun("-m needs the name of a module, as in: python -m peft_reft -m lm_eval")
    spec = main_spec(argv[0])
    loader: Any = spec.loader
    code = loader.get_code(spec.name) if hasattr(loader, "get_code") else None
    if code is None:
        raise CannotRun(f"{argv[0]!r} has no code of its own and cannot be run.", 1)
    sys.argv = [spec.origin or argv[0], *argv[1:]]
    run_as_main(code, spec.origin, spec)


def main_spec(name: str) -> ModuleSpec:
    """The module to run for `-m name`: that module, or `__main__` in that package."""
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # a package above it exists, and needs something that does not
        spec = None
    except ValueError as error:  # a module that is running has no spec
        raise CannotRun(f"{name!r} cannot be run: {error}", 1) from error
    if spec is None:
        raise CannotRun(f"No module named {name}", 1)
    if spec.submodule_search_locations is None:
        return spec
    if name.endswith("__main__"):
        raise CannotRun("Cannot use package as __main__ module", 1)
    return main_spec(f"{name}.__main__")


def run_script(argv: list[str]) -> None:
    """As `python argv[0] argv[1:]`, for a file: source, bytecode, or an archive with a `__main__.py`."""
    path = os.path.abspath(argv[0])
    if pkgutil.get_importer(path) is not None:
        return run_folder(argv)
    with io.open_code(path) as file:
        code = pkgutil.read_code(file)
    if code is None:
        with io.open_code(path) as file:
            code = compile(file.read(), path, "exec")
    sys.argv = argv[:]
    lead_path_with(os.path.dirname(os.path.realpath(path)))
    run_as_main(code, path, None)


def run_folder(argv: list[str]) -> None:
    """As `python argv[0] argv[1:]`, for a folder or an archive with a `__main__.py`."""
    path = os.path.abspath(argv[0])
    spec = PathFinder.find_spec("__main__", [path])
    if spec is None or spec.loader is None:
        raise CannotRun(f"can't find '__main__' module in {argv[0]!r}", 1)
    loader: Any = spec.loader
    sys.argv = argv[:]
    lead_path_with(path)
    run_as_main(loader.get_code("__main__"), spec.origin, spec)


def run_command(argv: list[str]) -> Any:
    """As the command `argv[0]` of an installed package."""
    name = argv[0]
    found = list(entry_points(group="console_scripts", name=name))
    if not found:
        raise CannotRun(
            f"{name!r} is no file, and no installed package has a command of that name. A module is run with "
            "-m: python -m peft_reft -m MODULE ..."
        )
    function = found[0].load()
    path = shutil.which(name, path=sysconfig.get_path("scripts")) or name
    sys.argv = [path, *argv[1:]]
    lead_path_with(os.path.dirname(os.path.realpath(path)) if os.path.isabs(path) else None)
    return function()


def lead_path_with(folder: str | None) -> None:
    """Replace the current folder, which `python -m` has put first in `sys.path`."""
    if not getattr(sys.flags, "safe_path", False):
        sys.path[:1] = [] if folder is None else [folder]


def run_as_main(code: CodeType, file: str | None, spec: ModuleSpec | None) -> None:
    """Run code as the module `__main__`, which stays until the process ends: threads and exit handlers look there."""
    module = ModuleType("__main__")
    module.__file__ = file
    module.__spec__ = spec
    module.__package__ = None if spec is None else spec.parent
    module.__loader__ = None if spec is None else spec.loader
    module.__dict__["__cached__"] = None if spec is None else spec.cached
    sys.modules["__main__"] = module
    exec(code, module.__dict__)
