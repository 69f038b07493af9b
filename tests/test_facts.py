"""README's measured facts are those of the result files, with the commands that measured them."""

import json
import pathlib
import shutil
import sys

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


def test_each_command_names_a_program_that_is_there():
    for fact in facts.facts():
        program = fact.command.split()[2 if " -m " in fact.command else 1]
        path = program if program.endswith(".py") else program.replace(".", "/") + ".py"
        assert (facts.README.parent / path).exists(), fact.command
