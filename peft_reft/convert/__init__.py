"""Other people's adapters: checkpoints of pyreft and of AdapterHub as PEFT adapters, and back to pyreft's form.

This file has the functions to call; the formats are known to pyreft.py, adapterhub.py and export.py. Nothing of a
checkpoint is executed, and a destination is written as a whole or not at all. None of the two libraries is needed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peft.utils import CONFIG_NAME

from peft_reft.convert.adapterhub import is_adapterhub, read_adapterhub
from peft_reft.convert.conversion import Conversion, ConversionError, Edit
from peft_reft.convert.export import read_adapter, write_pyreft
from peft_reft.convert.locations import adapterhub_locations, pyreft_locations
from peft_reft.convert.pyreft import find_checkpoint, read_pyreft
from peft_reft.convert.structure import ModelLike, Structure
from peft_reft.convert.writing import write_adapter
from peft_reft.info.files import one_line, read_json
from peft_reft.tuner import register as _register  # noqa: F401  (ReftConfig needs the peft type)

__all__ = [
    "Conversion",
    "ConversionError",
    "Edit",
    "adapterhub_locations",
    "convert",
    "from_adapterhub",
    "from_pyreft",
    "main",
    "pyreft_locations",
    "to_pyreft",
]
PathLike = str | os.PathLike[str]


def from_pyreft(
    src: PathLike,
    dst: PathLike | None = None,
    *,
    positions: str | None = None,
    model: ModelLike | None = None,
    kind: str | None = None,
    act_fn: str | None = None,
    head: bool = True,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Convert what pyreft's `ReftModel.save` or its trainer wrote into a PEFT adapter.

    Args:
        src: the directory with config.json and intkey_*.bin, or the trainer's output directory around it.
        dst: the adapter's directory to be; None to write nothing.
        positions: which tokens were edited, as in `ReftConfig`; pyreft's files do not say it.
        model: the base model, of which only the structure is looked at: a path or hub name (the config is read), a
            config, or a model. Needed where the checkpoint numbers its blocks, which is the usual form.
        kind: the intervention by its name in this package, for classes that are not pyreft's own.
        act_fn: the activation it was trained with, which pyreft's files do not say either.
        head: whether to take the model's own trained weights along (pytorch_model.bin: a classifier).
        base_model_name_or_path: for the config; None for `model`, if that is a name.
        task_type: PEFT's; None to read it off the model's class.
        overwrite: replace an adapter at `dst`.

    Returns:
        What was made, with `notes` on all that could not be translated exactly.

    Raises:
        ConversionError: a ValueError that says why the checkpoint cannot be converted, and what to do.
        ValueError: if `model` is no model whose blocks can be found.
    """
    source = Path(src)
    structure = None if model is None else Structure(model)
    with reading(source):
        directory = find_checkpoint(source)
        if directory is None:
            raise ConversionError(
                f"{source} holds no checkpoint of pyreft: a config.json with sorted_keys and representations, in it or "
                "in its directory intervenable_model."
            )
        made = read_pyreft(
            directory,
            positions,
            structure,
            kind=kind,
            act_fn=act_fn,
            head=head,
            base_model_name_or_path=base_model_name_or_path,
            task_type=task_type,
        )
    if dst is not None:
        write_adapter(made, Path(dst), overwrite, source)
    return made


def from_adapterhub(
    src: PathLike,
    dst: PathLike | None = None,
    *,
    kind: str | None = None,
    model: ModelLike | None = None,
    head: bool = True,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Convert what AdapterHub's `save_adapter` wrote into a PEFT adapter.

    Args:
        src: the directory with adapter_config.json and pytorch_adapter.bin or adapter.safetensors.
        dst: the adapter's directory to be; None to write nothing.
        kind: "noreft" or "direft" for a checkpoint that is not LoReFT: AdapterHub's files do not tell them apart.
        model: as in `from_pyreft`; needed only to move an adapter to a model whose blocks have longer or shorter names
            (saved from LlamaModel, used with LlamaForCausalLM).
        head: whether to take the model's trained head along.
        base_model_name_or_path: for the config; None for `model`, if that is a name, or what the checkpoint says.
        task_type: PEFT's; None to read it off the model's class.
        overwrite: replace an adapter at `dst`.

    Returns, Raises: as `from_pyreft`.
    """
    source = Path(src)
    structure = None if model is None else Structure(model)
    with reading(source):
        made = read_adapterhub(
            source,
            structure,
            kind=kind,
            head=head,
            base_model_name_or_path=base_model_name_or_path,
            task_type=task_type,
        )
    if dst is not None:
        write_adapter(made, Path(dst), overwrite, source)
    return made


def to_pyreft(src: PathLike, dst: PathLike, *, overwrite: bool = False) -> Conversion:
    """Convert an adapter of this package into the form in which pyreft 0.1.0 saves one.

    Args:
        src: a directory that PEFT saved.
        dst: the directory to be, with config.json and intkey_*.bin.
        overwrite: replace an adapter at `dst`.

    Returns, Raises: as `from_pyreft`. Position, activation and precision are not in pyreft's files; `notes` say what
    to hand to pyreft instead.
    """
    with reading(Path(src)):
        made = read_adapter(Path(src))
    write_pyreft(made, Path(dst), overwrite, Path(src))
    return made


def convert(
    src: PathLike,
    dst: PathLike,
    *,
    to: str = "peft",
    positions: str | None = None,
    model: ModelLike | None = None,
    kind: str | None = None,
    act_fn: str | None = None,
    head: bool = True,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Convert a checkpoint, whose format is recognised by its files.

    Args:
        src: a directory of pyreft's or AdapterHub's; with `to="pyreft"` an adapter of this package.
        dst: the directory to be.
        to: "peft" or "pyreft".
        overwrite: replace an adapter at `dst`.

    The other arguments are those of `from_pyreft` and `from_adapterhub`; what a format says itself must not be passed.

    Returns, Raises: as `from_pyreft`.
    """
    source = Path(src)
    if to not in ("peft", "pyreft"):
        raise ConversionError(f"to={to!r} is no format to convert to; use 'peft' or 'pyreft'.")
    if not source.is_dir():
        raise ConversionError(f"{source} is no directory. A checkpoint on the hub has to be downloaded first.")
    with reading(source):
        adapter_config = source / CONFIG_NAME
        config = read_json(adapter_config) if adapter_config.is_file() else {}
        is_pyreft = find_checkpoint(source) is not None
    if config.get("peft_type") == "REFT":
        if to == "peft":
            raise ConversionError(
                f"{source} is a ReFT adapter of PEFT already. Use to='pyreft' (--to pyreft) to export it."
            )
        given = {
            "positions": positions,
            "model": model,
            "kind": kind,
            "head": None if head else False,
            "base_model_name_or_path": base_model_name_or_path,
            "act_fn": act_fn,
            "task_type": task_type,
        }
        _refuse(given, f"{source} says itself what it is")
        return to_pyreft(source, dst, overwrite=overwrite)
    if to == "pyreft":
        raise ConversionError(
            f"{source} is no ReFT adapter of PEFT. Convert it to one first, and that one to pyreft's form."
        )
    shared = {
        "model": model,
        "kind": kind,
        "head": head,
        "base_model_name_or_path": base_model_name_or_path,
        "task_type": task_type,
        "overwrite": overwrite,
    }
    if is_adapterhub(config):
        _refuse({"positions": positions, "act_fn": act_fn}, f"AdapterHub's config in {source} says it itself")
        return from_adapterhub(source, dst, **shared)  # type: ignore[arg-type]
    if is_pyreft:
        return from_pyreft(source, dst, positions=positions, act_fn=act_fn, **shared)  # type: ignore[arg-type]
    found = (
        f"an adapter of PEFT's type {config['peft_type']}"
        if "peft_type" in config
        else "no checkpoint that is known here"
    )
    raise ConversionError(
        f"{source} is {found}. Known are pyreft's (config.json with sorted_keys, and intkey_*.bin) and AdapterHub's "
        "(adapter_config.json with model_class, and pytorch_adapter.bin or adapter.safetensors)."
    )


@contextmanager
def reading(source: Path) -> Iterator[None]:
    """Whatever a broken file leads to while it is read becomes a ConversionError."""
    try:
        yield
    except ConversionError:
        raise
    except ValueError as error:  # says itself what is wrong with which file
        raise ConversionError(str(error)) from error
    except Exception as error:
        raise ConversionError(
            f"{source} cannot be converted: its files do not hold what they should ({one_line(error)})."
        ) from error


def _refuse(given: dict[str, object], reason: str) -> None:
    """Raise ConversionError if an option was passed that has no place."""
    passed = [name for name, value in given.items() if value is not None]
    if passed:
        raise ConversionError(f"{', '.join(f'{name}={given[name]!r}' for name in passed)}: leave it out, {reason}.")


def main(argv: list[str]) -> int:
    """`python -m peft_reft convert`: see command.py."""
    from peft_reft.convert.command import run

    return run(argv)
