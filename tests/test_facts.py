"""README's measured facts are those of the result files, with the commands that measured them."""

import json
import pathlib
import shutil
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from benchmarks import facts


def test_readme_has_the_table_of_the_result_files():
    assert facts.in_text(facts.README.read_text()) == facts.table(), "python -m benchmarks.facts writes it anew"


def test_the_table_follows_the_newest_file_and_its_commands(tmp_path):
    folder = tmp_path / "results"
    ignored = shutil.ignore_patterns("*.png", "*.md")
    shutil.copytree(facts.RESULTS, folder, ignore=ignored)
    before = facts.table(folder)
    assert (
        "| tensor operations added to a decode step | 0 | 96 | `python benchmarks/overhead.py --only decode` |"
        in before
    )
    content = facts.newest("overhead", folder)
    content["parts"]["moved"] = content["parts"].pop("decode")
    for row in content["parts"]["moved"]["rows"]:
        row["values"] = {"reft": 3, "lora_qv": 50}
    (folder / "overhead_aaa_2999-01-01.json").write_text(json.dumps(content))
    assert facts.table(folder) != before
    assert "| 3 | 50 | `python benchmarks/overhead.py --only moved` |" in facts.table(folder)


def test_figures_of_a_gpu_are_found_where_each_method_has_its_own(tmp_path):
    gpu = facts.newest("gpu")
    (tmp_path / "gpu_any_2999-01-01.json").write_text(json.dumps(gpu))
    row = ("135M/resident", "resident: MiB on the device", "words", "MiB")
    found = facts.of_gpu(tmp_path, *row)
    figures = [f["values"] for f in gpu["parts"]["135M/resident"]["figures"] if f["name"] == row[1]]
    assert [found.reft, found.lora] == [f"{v:,.0f} MiB" for figure in figures for v in figure.values()]
    assert found.command == "python -m benchmarks.gpu --only 135M/resident"
    gpu["parts"]["135M/resident"]["figures"].clear()
    (tmp_path / "gpu_any_2999-01-01.json").write_text(json.dumps(gpu))
    with pytest.raises(KeyError, match="no figure 'resident: MiB on the device' of both methods"):
        facts.of_gpu(tmp_path, *row)


def test_each_command_names_a_program_that_is_there():
    for fact in facts.facts():
        program = fact.command.split()[2 if " -m " in fact.command else 1]
        folder = facts.README.parent / program.replace(".", "/")
        paths = [folder.with_suffix(".py"), folder / "__main__.py"]
        if program.endswith(".py"):
            paths = [facts.README.parent / program]
        assert any(path.exists() for path in paths), fact.command
