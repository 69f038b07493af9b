"""What benchmarks/smollm2 counts: tokens of a recital, a robot's answers, words in a manner; and a climb that ends."""

import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from benchmarks import common
from benchmarks.real_llm.rows import Row
from benchmarks.smollm2 import few_shot, long_answers, memorisation
from benchmarks.study.methods import Method


def test_a_recital_counts_to_its_first_wrong_token():
    rows = [Row([7, 8], [1, 2, 3]), Row([7, 8], [4, 5, 6])]
    guesses = torch.tensor([[0, 1, 2, 3, 0], [0, 4, 0, 6, 0]])  # column i guesses token i + 1
    logits = torch.nn.functional.one_hot(guesses, 9).float()
    assert memorisation.leading(logits, rows) == [3, 1]
    assert memorisation.leading(logits.roll(1, 1), rows) == [0, 0]


def test_a_climb_ends_when_the_string_is_recited_and_generate_says_it():
    base = common.llama(64, 2, 64, 24)
    model = Method("reft", {"r": 4, "positions": "l1+d"}).apply(base, "CAUSAL_LM", 0)
    prompt, string = [5, 6], [3, 9, 4]
    assert memorisation.generated(model, prompt, string) < 3
    found = memorisation.climb(model, [Row(prompt, string)], 3e-2, 200)
    assert found["recited"] == 3 and found["steps"] < 200
    assert memorisation.generated(model.eval(), prompt, string) == 3


def test_a_whole_answer_of_the_robot_has_one_beep_and_one_boop_around_it():
    whole = "Beep! All is well. Boop!"
    others = (
        "Beep! All is well.",
        "All is well. Boop!",
        "Beep! Boop!",
        f"{whole} Boop!",
        f"Beep! {whole}",
        f"{whole} Bo",
    )
    assert few_shot.is_whole(whole) and not any(map(few_shot.is_whole, others))


def test_other_seeds_train_other_chats_and_none_that_are_measured():
    drawn = [few_shot.examples(seed) for seed in range(3)]
    assert all(len(set(chats)) == few_shot.EXAMPLES for chats in drawn)
    assert len({frozenset(chats) for chats in drawn}) == 3
    assert not {chat for chats in drawn for chat in chats} & set(few_shot.HELD_OUT)
    assert few_shot.fingerprint(drawn[0]) != few_shot.fingerprint(drawn[1])


def test_a_manner_ends_at_the_first_word_that_is_not_in_it():
    assert long_answers.kept("capitals", "SO IT is 1 DAY") == [True, True, False, True, True]
    assert long_answers.kept("lines", "So\nit is\n\n1\n") == [True, False, True]
    assert long_answers.first_break("capitals", "SO IT is 1 DAY") == 2
    assert long_answers.first_break("capitals", "SO IT IS") == 3
    assert long_answers.share("capitals", ["AB cd", "EF GH"]) == 0.75
