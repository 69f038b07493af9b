"""Writing a converted adapter: a new directory as a whole, an existing one file by file, and of that our files only."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.constants import REPOCARD_NAME
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors.torch import save_file

from peft_reft.convert.conversion import Conversion, ConversionError
from peft_reft.info.files import is_reft_adapter, read_json
from peft_reft.tuner.staging import STAGE, staged

PYREFT_CONFIG, PYREFT_HEAD = "config.json", "pytorch_model.bin"
CONVERTED = "## Converted from "  # the heading by which a card of ours is known


@contextmanager
def new_directory(dst: Path, overwrite: bool, src: Path, pyreft: bool = False) -> Iterator[Path]:
    """A directory to fill, whose files are at `dst` when the block ends; if it raises, `dst` stays what it was.

    Args:
        overwrite: replace an adapter that is there. What else lies there stays.
        src: what must not be replaced.
        pyreft: an adapter in pyreft's form is written, not one in PEFT's.

    Raises:
        ConversionError: if there is something at `dst` that is not to be replaced.
    """
    dst = Path(os.path.abspath(dst))
    check_free(dst, overwrite, src, pyreft)
    if dst.is_dir():  # an empty one, too, which may be where somebody works, or the root of a disk
        with staged(dst) as stage:
            yield stage
            check_free(dst, overwrite, src, pyreft)
            old = {name for name in files_of_ours(dst, pyreft) if not (stage / name).exists()}
        for name in old:
            (dst / name).unlink(missing_ok=True)
        return
    dst.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{dst.name}.", dir=dst.parent))
    try:
        made.chmod(0o777 & ~current_umask())
        yield made
        check_free(dst, overwrite, src, pyreft)
        os.rename(made, dst)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def check_free(dst: Path, overwrite: bool, src: Path, pyreft: bool = False) -> None:
    """Raise ConversionError unless an adapter can be put at `dst`."""
    inner, outer = src.resolve(), dst.resolve()
    if inner == outer or outer in inner.parents or inner in outer.parents:
        raise ConversionError(f"{dst} and the checkpoint {src} lie in one another. Name another directory.")
    if dst.is_symlink() or (dst.exists() and not dst.is_dir()):
        raise ConversionError(f"{dst} is no directory. Name another one.")
    if not is_filled(dst):
        return
    if not overwrite:
        raise ConversionError(
            f"{dst} exists. Name another directory, or pass overwrite=True (--overwrite) to replace it."
        )
    try:
        ours, pyrefts = is_reft_adapter(dst), is_pyreft_config(dst / PYREFT_CONFIG)
    except ValueError as error:
        raise ConversionError(f"{dst} is not replaced: {error} Name another directory, or remove that file.") from error
    if not (ours or pyrefts):
        raise ConversionError(f"{dst} holds no adapter of ReFT's, and is not replaced. Name another directory.")
    other = dst / (PYREFT_CONFIG if pyreft else CONFIG_NAME)
    if other.exists() and not (pyrefts if pyreft else ours):
        raise ConversionError(f"{other} belongs to something else, and is not replaced. Name another directory.")


def is_filled(directory: Path) -> bool:
    """Whether there is something in a directory, if it is one, but for what is being written to it."""
    return directory.is_dir() and any(not entry.name.startswith(STAGE) for entry in directory.iterdir())


def is_pyreft_config(path: Path) -> bool:
    """Whether a file is the config of a checkpoint of pyreft's.

    Raises:
        ValueError: if it cannot be read.
    """
    return path.is_file() and {"sorted_keys", "representations"} <= set(read_json(path))


def files_of_ours(directory: Path, pyreft: bool) -> list[str]:
    """Names of the files that belong to the adapter in a directory, and go when another one takes its place."""
    if not pyreft:
        return [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME]
    if not (directory / PYREFT_CONFIG).is_file():
        return []
    keys: Any = read_json(directory / PYREFT_CONFIG).get("sorted_keys")
    names = [f"intkey_{key}.bin" for key in keys] if isinstance(keys, list) else []
    return [PYREFT_CONFIG, PYREFT_HEAD, *(name for name in names if Path(name).name == name)]


def current_umask() -> int:
    """The permissions that new files of this process lack."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_adapter(made: Conversion, dst: Path, overwrite: bool, src: Path) -> None:
    """Write a PEFT adapter: tensors, config, and a README.md with what could not be translated.

    A README.md that somebody else wrote stays; it gets the section that every saved adapter's has.

    Raises:
        ConversionError: if there is something at `dst` that is not to be replaced.
    """
    with new_directory(dst, overwrite, src) as directory:
        save_file(made.tensors(), directory / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        notes = "".join(f"- {note}\n" for note in made.notes) or "Everything was translated.\n"
        card = dst / REPOCARD_NAME
        if card.is_file() and CONVERTED not in card.read_text(encoding="utf-8", errors="replace"):
            shutil.copy(card, directory / REPOCARD_NAME)
        else:
            (directory / REPOCARD_NAME).write_text(
                f"---\nlibrary_name: peft\n---\n\n# A ReFT adapter\n\n{CONVERTED}{made.origin}\n\n{notes}",
                encoding="utf-8",
            )
        made.config.save_pretrained(str(directory))
    made.dst = dst
