"""What benchmarks/smollm2 counts: leading tokens of a recital, the robot's answers, capitals; and a climb that ends."""

import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from benchmarks import common
from benchmarks.smollm2 import few_shot, memorisation
from benchmarks.study.methods import Method


def test_a_recital_counts_to_its_first_wrong_token():
    pairs = [([7, 8], [1, 2, 3]), ([7, 8], [4, 5, 6])]
    guesses = torch.tensor([[0, 1, 2, 3, 0], [0, 4, 0, 6, 0]])  # column i guesses token i + 1
    logits = torch.nn.functional.one_hot(guesses, 9).float()
    assert memorisation.leading(logits, pairs) == [3, 1]
    assert memorisation.leading(logits.roll(1, 1), pairs) == [0, 0]


def test_a_climb_ends_when_the_string_is_recited_and_generate_says_it():
    base = common.llama(64, 2, 64, 24)
    model = Method("reft", {"r": 4, "positions": "l1+d"}).apply(base, "CAUSAL_LM", 0)
    prompt, string = [5, 6], [3, 9, 4]
    assert memorisation.generated(model, prompt, string) < 3
    found = memorisation.climb(model, [(prompt, string)], 3e-2, 200)
    assert found["recited"] == 3 and found["steps"] < 200
    assert memorisation.generated(model.eval(), prompt, string) == 3


def test_the_robot_speaks_in_capitals_from_its_first_word():
    texts = ("BEEP. ALL IS WELL. BOOP.", "BEEP. All is well. BOOP.", "ALL IS WELL. BEEP.")
    assert [few_shot.is_robot(text) for text in texts] == [True, False, False]
    assert few_shot.capitals(["AB 1", "ab!"]) == 0.5
