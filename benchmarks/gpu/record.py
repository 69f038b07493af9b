"""Figures that are printed and written as soon as they are known."""

from __future__ import annotations

import json
import os
import traceback
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import common
from benchmarks.gpu.deadline import Deadline
from benchmarks.gpu.models import LABELS


class Figure(NamedTuple):
    """One line of the table.

    Attributes:
        name: what is measured, with its unit, or "a / b" for a ratio.
        values: by method, a number or a spread (`common.spread`).
        milliseconds: what the ratios are made of, by method.
        note: what else there is to say.
    """

    name: str
    values: dict[str, Any]
    milliseconds: dict[str, Any] | None = None
    note: str = ""

    def __str__(self) -> str:
        shown = ", ".join(f"{LABELS.get(name, name)} {common.show(value)}" for name, value in self.values.items())
        times = ", ".join(f"{LABELS.get(n, n)} {v['median']:.2f}" for n, v in (self.milliseconds or {}).items())
        return f"{self.name}: {shown}{f' [ms: {times}]' if times else ''}{f' ({self.note})' if self.note else ''}"


class Record:
    """The result file: a JSON of parts, each with its figures, the run that measured it, and how it ended.

    Args:
        path: of the JSON file, beside which the table is written as Markdown; None to print only.
        run: `common.environment()` and the command.
    """

    def __init__(self, path: Path | None, run: dict[str, Any], deadline: Deadline):
        self.path = path
        self.deadline = deadline
        found = json.loads(path.read_text()) if path is not None and path.exists() else {"runs": [], "parts": {}}
        self.runs: list[dict[str, Any]] = [*found["runs"], run]
        self.parts: dict[str, dict[str, Any]] = found["parts"]

    def has(self, key: str) -> bool:
        """Whether a part was measured to its end."""
        return self.parts.get(key, {}).get("done", False)

    def begin(self, key: str) -> None:
        self.parts[key] = {"run": len(self.runs) - 1, "begin": self._now(), "done": False, "figures": []}

    def add(self, key: str, figure: Figure) -> None:
        """Print and write one figure of a part that was begun."""
        self.parts[key]["figures"].append(figure._asdict())
        self._print(key, str(figure))
        self.write()

    def end(self, key: str, error: BaseException | None = None) -> None:
        """Close a part; one that failed is measured again the next time."""
        part = self.parts[key]
        part["seconds"] = round(self.deadline.elapsed() - part.pop("begin"), 1)
        part["done"] = error is None
        if error is not None:
            part["error"] = f"{type(error).__name__}: {error}"[:2000]
            if isinstance(error, Exception):  # where the time was over says nothing
                part["traceback"] = traceback.format_exception(error)[-6:]
            self._print(key, f"did not end: {part['error'][:400]}")
        self.write()

    def write(self) -> None:
        """Write both files; a run that is killed meanwhile leaves the old or the new ones, never half of one."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            content = json.dumps({"runs": self.runs, "parts": self.parts}, indent=1) + "\n"
            for path, text in ((self.path, content), (self.path.with_suffix(".md"), self.markdown())):
                partial = path.with_name(path.name + ".partial")
                partial.write_text(text)
                os.replace(partial, path)

    def markdown(self) -> str:
        """All figures as a table, and where they come from."""
        lines, origins = [], {}
        for key, part in self.parts.items():
            origins.setdefault(part["run"], []).append(key)
            for value in part["figures"]:
                figure = Figure(**value)
                cells = [common.show(figure.values.get(name)) for name in LABELS]
                others = [f"{n} {common.show(v)}" for n, v in figure.values.items() if n not in LABELS]
                if figure.milliseconds:
                    name = next(iter(figure.milliseconds))
                    others.append(f"{LABELS.get(name, name)} {figure.milliseconds[name]['median']:.2f} ms")
                note = figure.note.partition("\n")[0]
                lines.append([key, figure.name, *cells, ", ".join([*others, *filter(None, [note])])])
            if not part["done"]:
                lines.append([key, "did not end", *[""] * len(LABELS), part.get("error", "")[:200].replace("\n", " ")])
        table = common.markdown_table(["part", "figure", *LABELS.values(), "note"], lines)
        runs = [f"- {', '.join(keys)}: {self._run(number)}" for number, keys in origins.items()]
        return "\n".join(["# What ReFT costs on a GPU", "", table, "", *runs, ""])

    def _run(self, number: int) -> str:
        return f"`{self.runs[number]['command']}`: {common.heading(self.runs[number])}"

    def _now(self) -> float:
        return round(self.deadline.elapsed(), 1)

    def _print(self, key: str, text: str) -> None:
        print(f"[{self._now():6.1f} s] {key}: {text}", flush=True)
