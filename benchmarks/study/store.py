"""Finished cells on disk: one JSON object a line, appended when a cell is done, so that nothing is run twice.

Knows nothing of what a cell is but its key. A line of another setup (other data, sizes or steps) is kept, and not read.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Store:
    """The results of one folder.

    Args:
        folder: made if need be; the file is `cells.jsonl`.
        setup: what all cells of this run have in common, as a short string.
    """

    def __init__(self, folder: Path, setup: str):
        self.path = folder / "cells.jsonl"
        self.setup = setup
        self.cells: dict[str, dict[str, Any]] = {}
        self.others = 0
        folder.mkdir(parents=True, exist_ok=True)
        text = self.path.read_text() if self.path.exists() else ""
        if text and not text.endswith("\n"):  # a line that a killed run did not finish
            text = text[: text.rfind("\n") + 1]
            os.truncate(self.path, len(text.encode()))
        for line in text.splitlines():
            cell = json.loads(line)
            if cell["setup"] == setup:
                self.cells[cell["key"]] = cell
            else:
                self.others += 1

    def add(self, key: str, cell: dict[str, Any]) -> None:
        """Store a finished cell; it is on disk when this returns."""
        self.cells[key] = {"key": key, "setup": self.setup, **cell}
        with self.path.open("a") as file:
            file.write(json.dumps(self.cells[key]) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def of(self, part: str) -> list[dict[str, Any]]:
        """The finished cells of a part of the study."""
        return [cell for cell in self.cells.values() if cell["part"] == part]
