"""Writing files so that no reader finds half of one, nor the files of two adapters for those of one.

A set of files is written to a directory beside their places and then renamed into them, one by one. No system renames
several files in one step, so two things make a set of them. An error between two renames takes back those before it. A
killed process leaves its files in `.placing-...`: readers then raise, and the next writer puts the files in place.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

STAGE = ".saving-"  # how the names of directories begin that files are written to
READY = ".placing-"  # and then, when all files are written and take their places
ABANDONED = 24 * 3600  # seconds after which one of the first kind was left by a process that is gone
PATIENCE = 5.0  # seconds that a reader gives a writer to rename its files


@contextmanager
def staged(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary directory whose files take their places in `directory` when the block ends; none do if it raises.

    A reader, or whoever comes after a process that was killed, finds each file as it was or as it is now, never a part
    of one. If a file cannot take its place, the others get back what they were. A process that is killed between two
    renames leaves some files new and some old; the rest of the new ones then wait in `.placing-…` within `directory`,
    from which the next `staged` puts them in place. Until then `wait_until_whole` raises for readers.

    A file keeps the permissions of the one that it replaces, and a link stays a link. That holds for what is saved now:
    what waits in a `.placing-…` may be a stranger's, and is put nowhere but into `directory` itself.

    Args:
        directory: made if it is missing.
    """
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    for left in target.glob(f"{STAGE}*"):  # by a process that was killed while writing
        with suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > ABANDONED:
                shutil.rmtree(left, ignore_errors=True)
    # Inside of it, so that both are on one file system and a rename is one step.
    stage = Path(tempfile.mkdtemp(prefix=STAGE, dir=target))
    try:
        yield stage
        for left in _waiting_in(target):  # by a process that was killed while renaming
            _put_left_in_place(left, target)
        _put_all_in_place(stage, target)
    finally:
        for directory in (stage, _old_of(stage)):
            shutil.rmtree(directory, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a file as a whole; line ends stay what they are in `text`."""
    with staged(path.parent) as stage, open(stage / path.name, "w", encoding="utf-8", newline="") as file:
        file.write(text)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where to write a file that takes its place at `path` when the block ends; what is there stays if it raises.

    A pipe or a device is written to itself.
    """
    if path.parent.is_dir() and (path.is_file() or not path.exists()):
        with staged(path.parent) as stage:
            yield stage / path.name
    else:
        yield path


def wait_until_whole(directory: Path) -> None:
    """Return when no files are about to take their places in a directory: at once, but for moments of a save.

    Raises:
        ValueError: if a process was killed in such a moment, so that its files are those of two saves.
    """
    end = time.monotonic() + PATIENCE
    while left := _unfinished(directory):
        if time.monotonic() > end:
            raise ValueError(
                f"{str(directory)!r} holds files of two saves: one was interrupted, and the rest of its files are in "
                f"{str(left)!r}. Save the adapter again, or move those files to {str(directory)!r} and remove that "
                "directory."
            )
        time.sleep(0.01)


def _unfinished(directory: Path) -> Path | None:
    """Where files wait that belong into a directory. (Adapters with names are saved from the directory above.)"""
    for root in (directory, directory.parent):
        for left in _waiting_in(root):
            waiting = left / directory.relative_to(root)
            if any(name.parent == Path() for name in _files(waiting)):
                return waiting
    return None


def _waiting_in(directory: Path) -> list[Path]:
    """Where files wait that a process was about to rename; a link to another directory is none of ours."""
    return [left for left in directory.glob(f"{READY}*") if not left.is_symlink()]


def _put_left_in_place(left: Path, target: Path) -> None:
    """Put the files in place that a killed process has left, or a stranger who made them look so: none out of `target`.

    A link in the place of a file is replaced. Files behind a link to another directory stay where they are.
    """
    inside = target.resolve()
    for name in _files(left):
        place = target / name
        if place.parent.resolve() != inside / name.parent or (left / name).is_symlink():
            continue
        if place.is_symlink():
            os.replace(left / name, place)
        else:
            _put_in_place(left / name, place)
    if not _files(left):
        for directory in (left, _old_of(left)):
            shutil.rmtree(directory, ignore_errors=True)


def _files(directory: Path) -> list[Path]:
    """The files in a directory and below, relative to it."""
    # os.walk passes over what another process has removed meanwhile.
    return sorted(
        Path(folder, name).relative_to(directory) for folder, _, names in os.walk(directory) for name in names
    )


def _old_of(stage: Path) -> Path:
    """Where the files that those of a stage replace are kept meanwhile."""
    return stage.with_name(f"{stage.name.replace(READY, STAGE, 1)}-old")


def _put_all_in_place(stage: Path, target: Path) -> None:
    names, old = _files(stage), _old_of(stage)
    for name in names:
        if (target / name).exists():
            (old / name).parent.mkdir(parents=True, exist_ok=True)
            _link(target / name, old / name)
    ready = stage.with_name(stage.name.replace(STAGE, READY, 1))
    stage.rename(ready)
    try:
        for name in names:
            _put_in_place(ready / name, target / name)
    except BaseException:
        for name in names:
            if not (ready / name).exists():
                if (old / name).exists():
                    _put_in_place(old / name, target / name)
                else:
                    (target / name).unlink(missing_ok=True)
        shutil.rmtree(ready)
        raise
    shutil.rmtree(ready, ignore_errors=True)


def _link(file: Path, copy: Path) -> None:
    """A second name for a file's contents, which stays theirs when another file takes the first; or a copy of it."""
    try:
        os.link(os.path.realpath(file), copy)
    except OSError:  # a file system without such links, or a file on another one
        shutil.copy2(file, copy)


def _put_in_place(file: Path, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_symlink():
            # The file that it points to may be on another file system: copy next to that one first.
            real = Path(os.path.realpath(target))
            if real.is_symlink():
                raise OSError(errno.ELOOP, "This link leads to itself", str(target))
            with tempfile.TemporaryDirectory(prefix=STAGE, dir=real.parent) as beside:
                _put_in_place(Path(shutil.copy(file, beside)), real)
            file.unlink()
            return
        if target.exists():
            shutil.copymode(target, file)
        os.replace(file, target)
    except FileNotFoundError:
        if file.exists():
            raise
        # Another process that saves to this directory has put it in place.
