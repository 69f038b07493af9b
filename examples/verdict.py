"""Whether the quickstart's answers are what they should be; if not, what is wrong with them, and why.

Three things are checked: that answers have the trained manner, that they are sound (neither empty, nor cut, nor one
phrase over and over, nor the same for every question), and that strength 0 and loading change nothing.
"""

from __future__ import annotations

import re
from collections import Counter

PIRATE_WORDS = re.compile(r"\b(arr+|aye|ahoy|matey|ye|yer|me hearty|cap'n|grog|landlubber|o')(?![a-z])", re.I)
ROBOT_WORDS = re.compile(r"\b(beep|boop)\b", re.I)
CUT = " [...]"  # the end of an answer that had not ended by itself
FLAWS = {  # what is wrong with an answer -> why
    "empty": "The adapter ends answers before they begin. Train it with fewer steps or a lower --learning-rate.",
    "repeats itself": "The adapter was pushed too far. Train it with fewer steps or a lower --learning-rate.",
    "is cut": "The adapter has not learned where an answer ends. Train it longer: --steps 40.",
    "is the same for another question": "The adapter no longer hears the question. Train it with fewer steps or a "
    "lower --learning-rate.",
}


def counted(texts: list[str], words: re.Pattern) -> int:
    """How many of the texts have one of the words."""
    return sum(words.search(text) is not None for text in texts)


def share(texts: list[str], words: re.Pattern) -> str:
    """The same in words."""
    return f"{counted(texts, words)} of {len(texts)}"


def repeats(text: str) -> bool:
    """Whether more than a third of a text's words stand a fixed distance behind an equal one, as in a loop.

    >>> repeats("Arr, the sea! Arr, the sea! Arr,"), repeats("DANGER. DANGER. STAY AWAY, HUMAN."), repeats("🌐🌐🌐")
    (True, False, True)
    """
    words = re.findall(r"\w+|[^\w\s!-~]", text.lower()) or list(text)  # symbols beyond ASCII count as words
    if len(words) < 3:
        return False
    loops = (sum(a == b for a, b in zip(words, words[distance:])) for distance in range(1, len(words) // 2 + 1))
    return max(loops) > len(words) / 3


def flaws(answers: list[str]) -> list[str | None]:
    """What is wrong with the form of each answer, a key of `FLAWS`; None for a sound one.

    >>> flaws(["Arr, matey!", "", "Aye aye aye aye", "Arr, the wind" + CUT, "Arr, matey!"])
    [None, 'empty', 'repeats itself', 'is cut', 'is the same for another question']
    """
    found: list[str | None] = []
    for number, answer in enumerate(answers):
        text = answer.removesuffix(CUT)
        if not text.strip():
            found.append("empty")
        elif repeats(text):
            found.append("repeats itself")
        elif answer.endswith(CUT):
            found.append("is cut")
        else:
            found.append("is the same for another question" if answer in answers[:number] else None)
    return found


def unsound(answers: list[str], most: int) -> list[str]:
    """What is wrong and why, once for each flaw and with an example, if more than `most` of the answers have one."""
    found = flaws(answers)
    kinds = Counter(flaw for flaw in found if flaw is not None)
    if kinds.total() <= most:
        return []
    first = {flaw: answers[found.index(flaw)] for flaw in kinds}
    return [f"{kinds[flaw]} of {len(answers)} answers: {flaw}, as {first[flaw]!r}. {FLAWS[flaw]}" for flaw in kinds]


def verdict(
    base: list[str], pirate: list[str], robot: str, unchanged: bool, equal: bool, losses: list[float]
) -> list[str]:
    """What is not as it should be, and why; nothing if all is well.

    Args:
        base, pirate: answers to the questions, of the base model and of the adapter.
        robot: the answer of the second adapter, from the batch of three.
        unchanged: whether strength 0 answered as the base model.
        equal: whether the loaded adapter answered as the trained one.
        losses: of the pirate's training, as they were logged.
    """
    found = []
    form = unsound(pirate, most=len(pirate) // 3)
    if counted(pirate, PIRATE_WORDS) < len(pirate) * 2 / 3 or counted(base, PIRATE_WORDS) > len(base) / 3:
        fell = f"The loss went from {losses[0]:.2f} to {losses[-1]:.2f}"
        if losses[-1] > 0.7 * losses[0]:
            why = f"{fell}: too little was learned. Train longer (--steps 40) or faster (--learning-rate 4e-3)."
        elif form:
            why = f"{fell}: the chats were learned, but the answers are not sound."
        else:
            why = f"{fell}: the chats were learned, but not as a way of talking. Try another --seed or fewer --steps."
        heard = (
            f"{share(pirate, PIRATE_WORDS)} answers have words of a pirate, of the base's {share(base, PIRATE_WORDS)}"
        )
        found.append(f"{heard}. {why}")
    found += form
    if not ROBOT_WORDS.search(robot):
        found.append(f"The second adapter did not answer as a robot, but {robot!r}. Train longer: --steps 40.")
    elif repeats(robot):
        found.append(f"The second adapter repeats itself: {robot!r}. {FLAWS['repeats itself']}")
    if not unchanged:
        found.append("At strength 0 the model did not answer as the base model, which is a fault of peft-reft.")
    if not equal:
        found.append("The loaded adapter answered other than the trained one, which is a fault of peft-reft.")
    return found
