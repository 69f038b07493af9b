"""The data of the study: docstrings of Python's standard library, labelled by module family, split by file.

Text, labels and splits only; knows no model and no method. A text is the first paragraph of a docstring. All texts of
a file fall into one split, and a text that occurs in two files (case, blanks and punctuation aside) is left out of
both, so that nothing that is tested was trained on.

>>> from benchmarks.study.task import load
>>> task = load()
>>> len(task.families), len(task.train), len(task.validation), len(task.test)
(10, 789, 300, 488)
"""

from __future__ import annotations

import ast
import functools
import hashlib
import random
import re
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

# Family -> its modules and packages, by the first part of the path below the standard library. Names that a version of
# Python does not have are not found, and do no harm.
FAMILIES = {
    "asyncio": "asyncio selectors",
    "debugging": "bdb cmd code dis faulthandler inspect pdb pydoc profile pstats symtable trace traceback tracemalloc",
    "editor": "idlelib",
    "files": "bz2 fileinput filecmp fnmatch genericpath glob gzip lzma ntpath os pathlib posixpath shutil tarfile "
    "tempfile zipfile _compression _pyio",
    "importing": "importlib imp modulefinder pkgutil runpy zipimport",
    "mail": "email imaplib mailbox mailcap nntplib poplib quopri smtplib",
    "mathematics": "_pydecimal bisect calendar colorsys fractions heapq numbers random statistics",
    "processes": "concurrent multiprocessing queue sched subprocess threading",
    "testing": "doctest unittest",
    "web": "cgi ftplib html http socketserver telnetlib urllib webbrowser wsgiref xmlrpc",
}
SPLITS = ("train", "validation", "test")
SHARES = (0.5, 0.2, 0.3)
SIZES = (80, 30, 50)  # texts per family and split
FROM_ONE_FILE = 40  # so that no family is one module
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages"}


class Example(NamedTuple):
    """One text, the number of its family, and the file that it is from."""

    text: str
    label: int
    file: str


@dataclass(frozen=True)
class Task:
    """The three splits, each in a fixed random order."""

    families: list[str]
    train: list[Example]
    validation: list[Example]
    test: list[Example]

    @property
    def fingerprint(self) -> str:
        """Changes with any text or label: versions of Python have different docstrings."""
        parts = (self.train, self.validation, self.test)
        return hashlib.sha256(repr([[tuple(example) for example in part] for part in parts]).encode()).hexdigest()[:12]


def normalized(text: str) -> str:
    """What two texts have in common that differ in case, blanks and punctuation only."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def docstrings(path: Path) -> list[str]:
    """All docstrings of a source file, in its order; none of a file that cannot be read or parsed."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return [text for text in found if text]


def first_paragraph(docstring: str) -> str:
    return " ".join(re.split(r"\n\s*\n", docstring.strip())[0].split())


@functools.cache
def library() -> dict[str, list[str]]:
    """File, relative to the standard library -> its docstrings."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in root.rglob("*.py") if not SKIPPED & set(path.relative_to(root).parts))
    found = {path.relative_to(root).as_posix(): docstrings(path) for path in files}
    return {name: texts for name, texts in found.items() if texts}


def labelled() -> dict[str, list[Example]]:
    """Family -> its texts of at least seven words, those left out that occur in more than one file."""
    family_of = {module: family for family, modules in FAMILIES.items() for module in modules.split()}
    names = list(FAMILIES)
    examples: dict[tuple[str, str], Example] = {}  # by file and normalized text: a file counts each text once
    for file, texts in library().items():
        family = family_of.get(file.split("/")[0].removesuffix(".py"))
        if family is not None:
            for text in map(first_paragraph, texts):
                if len(normalized(text).split()) >= 7:
                    examples.setdefault((file, normalized(text)), Example(text, names.index(family), file))
    files_with = Counter(text for _, text in examples)
    kept: dict[str, list[Example]] = {family: [] for family in FAMILIES}
    for (_, text), example in examples.items():
        if files_with[text] == 1:
            kept[names[example.label]].append(example)
    return kept


def load(split: int = 0, sizes: tuple[int, int, int] = SIZES) -> Task:
    """The task.

    Args:
        split: which of the random divisions of the files.
        sizes: texts per family in train, validation and test, at most: a family with too few has fewer.
    """
    rng = random.Random(f"split {split}")
    parts: tuple[list[Example], ...] = ([], [], [])
    for examples in labelled().values():
        by_file: dict[str, list[Example]] = {}
        for example in examples:
            by_file.setdefault(example.file, []).append(example)
        for texts in by_file.values():
            rng.shuffle(texts)
            del texts[FROM_ONE_FILE:]
        # The largest files first, up to chance; each goes where most is missing.
        order = sorted(by_file, key=lambda file: -len(by_file[file]) * rng.uniform(0.5, 1.5))
        taken: tuple[list[Example], ...] = ([], [], [])
        for file in order:
            emptiest = min(range(3), key=lambda part: len(taken[part]) / SHARES[part])
            taken[emptiest].extend(by_file[file])
        for part, examples_of_part, size in zip(parts, taken, sizes):
            rng.shuffle(examples_of_part)
            part.extend(examples_of_part[:size])
    for part in parts:
        rng.shuffle(part)
    return Task(list(FAMILIES), *parts)
