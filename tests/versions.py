"""Runs the test suite on the oldest and on the newest versions that the package accepts, each in its own environment.

    python tests/versions.py                                        # all sets; the table goes to docs/versions.md
    python tests/versions.py --only oldest --folder environments    # one set; its environment is kept and used again
    python tests/versions.py --only oldest tests/test_generate.py   # some tests; the table is printed only

The newest set is constraints.txt; the others have pins of their own in its place. Another Python is tried with
`--python python3.13`. The exit status is 1 if a test failed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "versions.md"
REASONS = "## What the failures are"
NAMED = ("torch", "transformers", "peft", "trl")  # packages whose versions stand in the table
# By set, the pins that differ from constraints.txt. transformers 5.4 to 5.12 fail in speculative decoding, continuous
# batching or TRL. Another torch than the pinned one brings several gigabytes of CUDA.
SETS: dict[str, dict[str, str]] = {
    "oldest": {"torch": "2.11.0", "transformers": "5.16.1", "peft": "0.21.0", "trl": "1.16.0"},
    "newest": {},
    "newest-torch": {"torch": "2.14.1"},
    # For its own adapter methods this one wants a newer PEFT than there is, for which constraints.txt waits.
    "newest-transformers": {"transformers": "5.24.0"},
}


class Result(NamedTuple):
    """One set: `versions` by package, `counts` by outcome, `failures` as (test, first line of the error)."""

    name: str
    versions: dict[str, str]
    counts: dict[str, int]
    seconds: int
    failures: list[tuple[str, str]]


def constraints(changes: dict[str, str]) -> str:
    """constraints.txt with other pins for some packages."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    for package, version in changes.items():
        pinned = [number for number, line in enumerate(lines) if line.partition("==")[0] == package]
        if not pinned:
            raise SystemExit(f"constraints.txt has no pin of {package} that {package}=={version} could replace.")
        lines[pinned[0]] = f"{package}=={version}"
    return "\n".join(lines) + "\n"


def environment(folder: Path, interpreter: str, changes: dict[str, str]) -> Path:
    """The Python of an environment with the package's dependencies; an earlier run's environment is used again."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        subprocess.run([interpreter, "-m", "venv", folder], check=True)
    pins = folder / "constraints.txt"
    pins.write_text(constraints(changes))
    subprocess.run([python, "-m", "pip", "install", "-q", "-c", pins, "-e", f"{ROOT}[dev]"], check=True)
    return python


def installed(python: Path) -> dict[str, str]:
    """Versions of Python and of the packages of `NAMED`."""
    code = (
        "import json, platform, sys; from importlib.metadata import version; "
        "print(json.dumps({'Python': platform.python_version(), **{name: version(name) for name in sys.argv[1:]}}))"
    )
    return json.loads(subprocess.run([python, "-c", code, *NAMED], check=True, capture_output=True, text=True).stdout)


def run_tests(name: str, python: Path, tests: list[str], report: Path) -> Result:
    """Run tests in the project's folder; what pytest prints is shown as it comes."""
    begin = time.monotonic()
    pytest = ["-m", "pytest", "-n", "2", "--dist", "worksteal", "-p", "no:cacheprovider"]
    command = [python, *pytest, f"--junitxml={report}", *tests]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    if not report.exists():
        raise SystemExit(f"pytest ended without a report; the command was: {' '.join(map(str, command))}")
    counts, failures = outcomes(report)
    return Result(name, installed(python), counts, round(time.monotonic() - begin), failures)


def outcomes(report: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Counts of passed, failed and skipped tests in a JUnit report, and the failures."""
    counts, failures = {"passed": 0, "failed": 0, "skipped": 0}, []
    for case in xml.etree.ElementTree.parse(report).getroot().iter("testcase"):
        wrong = [child for child in case if child.tag in ("failure", "error")]
        skipped = any(child.tag == "skipped" for child in case)
        counts["failed" if wrong else "skipped" if skipped else "passed"] += 1
        if wrong:
            message = (wrong[0].get("message") or "").strip().splitlines() or [""]
            failures.append((f"{case.get('classname')}::{case.get('name')}", message[0]))
    return counts, failures


def table(results: list[Result]) -> str:
    """The sets as Markdown, with their failures below."""
    packages = ["Python", *NAMED]
    lines = [["set", *packages, "passed", "failed", "skipped", "minutes"], ["---"] * (len(packages) + 5)]
    for result in results:
        counts = [str(result.counts[outcome]) for outcome in ("passed", "failed", "skipped")]
        lines.append(
            [result.name, *(result.versions[name] for name in packages), *counts, f"{result.seconds / 60:.0f}"]
        )
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    for result in results:
        if result.failures:
            text += f"\n\nFailed on the {result.name} set:\n"
            text += "".join(f"\n- `{test}`: {message.replace('|', chr(92) + '|')}" for test, message in result.failures)
    return text + "\n"


def page(results: list[Result], command: str) -> str:
    """The page with a new table; what was written under `REASONS` is kept."""
    written = PAGE.read_text() if PAGE.exists() else ""
    return (
        "# Versions\n\nThe whole test suite on the oldest and on the newest versions that the package accepts, each "
        f"in its own environment: `{command}`, {datetime.date.today().isoformat()}.\n\n{table(results)}"
        + "".join(f"\n{REASONS}{reasons}" for reasons in written.partition(REASONS)[2:] if reasons)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="*", help="paths of tests (default: all)")
    parser.add_argument("--only", choices=SETS, help="one set")
    parser.add_argument(
        "--folder", type=Path, help="where environments are made and kept (default: a temporary folder)"
    )
    parser.add_argument("--python", action="append", metavar="PYTHON", help="interpreter; may be given several times")
    parser.add_argument("--prepare", action="store_true", help="make the environments and stop")
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        for interpreter in arguments.python or [sys.executable]:
            label = "" if not arguments.python else f" {Path(interpreter).name}"
            for name in [arguments.only] if arguments.only else SETS:
                key = re.sub(r"[^\w.]", "-", f"{name}{label}")
                python = environment(folder / key, interpreter, SETS[name])
                print(f"{name}{label}: {installed(python)}", flush=True)
                if not arguments.prepare:
                    results.append(run_tests(f"{name}{label}", python, arguments.tests, folder / f"{key}.xml"))
    if results:
        print(table(results))
        if not arguments.tests:
            PAGE.write_text(page(results, " ".join(["python", *sys.argv])))
    return int(any(result.failures for result in results))


if __name__ == "__main__":
    sys.exit(main())
