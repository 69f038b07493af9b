"""Writing a directory as a whole or not at all: first a temporary sibling, which is renamed when it is complete."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from peft_reft.convert.conversion import Conversion, ConversionError

MARKS = ("adapter_config.json", "intkey_*.bin")  # a directory with one of these is an adapter, and may be replaced


@contextmanager
def new_directory(dst: Path, overwrite: bool, src: Path | None = None) -> Iterator[Path]:
    """A directory to fill, which becomes `dst` when the block ends, and is removed if it raises.

    Args:
        overwrite: replace an adapter that is there; it stays until the new one is complete.
        src: what must not be replaced.

    Raises:
        ConversionError: if there is something at `dst` that is not to be replaced.
    """
    dst = Path(os.path.abspath(dst))
    check_free(dst, overwrite, src)
    dst.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{dst.name}.", dir=dst.parent))
    try:
        made.chmod(0o777 & ~current_umask())
        yield made
        check_free(dst, overwrite, src)
        if dst.exists() and any(dst.iterdir()):
            old = made.with_name(f"{made.name}.old")
            os.rename(dst, old)
            try:
                os.rename(made, dst)
            except OSError:
                os.rename(old, dst)
                raise
            shutil.rmtree(old)
        else:
            os.rename(made, dst)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def check_free(dst: Path, overwrite: bool, src: Path | None) -> None:
    """Raise ConversionError unless a directory can be put at `dst`."""
    if src is not None:
        inner, outer = src.resolve(), dst.resolve()
        if inner == outer or outer in inner.parents or inner in outer.parents:
            raise ConversionError(f"{dst} and the checkpoint {src} lie in one another. Name another directory.")
    if dst.is_symlink() or (dst.exists() and not dst.is_dir()):
        raise ConversionError(f"{dst} is no directory. Name another one.")
    if not dst.exists() or not any(dst.iterdir()):
        return
    if not overwrite:
        raise ConversionError(
            f"{dst} exists. Name another directory, or pass overwrite=True (--overwrite) to replace it."
        )
    if not any(found for mark in MARKS for found in dst.glob(mark)):
        raise ConversionError(f"{dst} holds no adapter, and is not replaced. Name another directory.")


def current_umask() -> int:
    """The permissions that new files of this process lack."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_adapter(made: Conversion, dst: Path, overwrite: bool, src: Path) -> None:
    """Write a PEFT adapter: tensors, config, and a README.md with what could not be translated.

    Raises:
        ConversionError: if there is something at `dst` that is not to be replaced.
    """
    with new_directory(dst, overwrite, src) as directory:
        save_file(made.tensors(), directory / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        notes = "".join(f"- {note}\n" for note in made.notes) or "Everything was translated.\n"
        (directory / "README.md").write_text(
            f"---\nlibrary_name: peft\n---\n\n# A ReFT adapter\n\n## Converted from {made.origin}\n\n{notes}",
            encoding="utf-8",
        )
        made.config.save_pretrained(str(directory))
    made.dst = dst
