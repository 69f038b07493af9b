"""What a model answered: the option, number or letter in a generated text, by two rules each; and whether it is right.

`paper` is the rule that the paper's numbers were scored by, faults included (pyreft 0.1.0, which follows Hu et al.
2023): an option must be spelled exactly, a number is the last one once all commas are deleted, a letter is the first
capital A to E anywhere in the text. `careful` reads the text as a person would. A wide gap between the two means that
the model answers in another format than it was taught, not that it reasons better or worse.
"""

from __future__ import annotations

import re
from typing import Any

from prompts import TRIGGER

TOLERANCE = 1e-3  # how far a number may be from the right one, as in both sources

# A phrase behind which the final answer stands.
_ANNOUNCED = re.compile(r"(?:\banswer\s*(?:is|:|=|would be|should be)|####)\s*:?\s*(?:option\s*)?", re.IGNORECASE)
_GROUPED = r"(?:(?<=[$€£])\d{1,3}(?: \d{3})+(?![\d,/])|\d{1,3}(?:,\d{3})+(?!\d))"
_DECIMAL = rf"(?:{_GROUPED}(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?"
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]])-(?=[$€£.\d])|\A\s*-\s|(?<==\s)-\s)?[$€£]?(?P<inner>(?<=[$€£])-)?(?<![A-Za-z_\d.])"
    rf"(?:(?P<whole>\d+)\s+(?=\d+\s?/\s?\d))?(?P<value>{_DECIMAL})(?:\s?/\s?(?P<divisor>{_DECIMAL}))?"
)
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*(-?[\d.,]+)\s*\}\s*\{\s*([\d.,]+)\s*\}")


# The paper's rules.


def paper_option(text: str) -> str:
    """All that follows the first "the correct answer is ", without white space around it; "" if that is missing."""
    _, found, rest = text.partition(TRIGGER)
    return rest.strip() if found else ""


def paper_number(text: str) -> float | None:
    """The last number once every comma is deleted; None if there is none."""
    found = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
    return float(found[-1]) if found else None


def paper_letter(text: str) -> str:
    """The first capital letter from A to E, be it within a word; "" if there is none."""
    found = re.search("[A-E]", text)
    return found[0] if found else ""


# The careful rules.


def careful_option(text: str, instruction: str) -> str | None:
    """The option that was chosen, spelled as in the instruction's answer format; None if none or it is unclear.

    Case and punctuation do not matter, and the option's text counts as its name.

    >>> careful_option("The correct answer is: Solution2.", "... Answer format: solution1/solution2")
    'solution2'
    """
    names, texts = _options(instruction)
    said = re.split(r"(?:correct|right)?\s*answer is:?", text, maxsplit=1, flags=re.IGNORECASE)[-1]
    if names:
        named = re.search(rf"(?<!\w)(?:{'|'.join(map(re.escape, names))})(?!\w)", said, re.IGNORECASE)
        if named:
            return next(name for name in names if name.lower() == named[0].lower())
    meant = [name for name, words in texts.items() if words and _plain(words) == _plain(said)]
    return meant[0] if len(meant) == 1 else None


def careful_number(text: str) -> float | None:
    """The number that is announced as the answer, or else the last one; None if there is none.

    Commas group thousands, and blanks do behind a currency sign; a minus between two operands is no sign, "3/4" and
    "1 1/2" are fractions, percent and currency signs are left out. Of an equation the right side counts.

    >>> careful_number("5 - 3 = 2, and 2 * 600 = 1,200. The answer is $1,200. That took 3 steps.")
    1200.0
    """
    text = _LATEX_FRACTION.sub(r" \1/\2 ", text.replace("\u2212", "-").replace("\\$", "$"))
    phrases = list(_ANNOUNCED.finditer(text))
    ends = [phrase.start() for phrase in phrases[1:]] + [len(text)]
    for phrase, end in reversed(list(zip(phrases, ends))):
        sentence = re.split(r"\n|\.(?!\d)", text[phrase.end() : end], maxsplit=1)[0]
        numbers = _numbers(sentence.rpartition("=")[2]) or _numbers(sentence)
        if numbers:
            return numbers[0]
    numbers = _numbers(text)
    return numbers[-1] if numbers else None


def careful_letter(text: str, instruction: str = "") -> str | None:
    """The letter that is announced, or stands alone or in brackets, or whose choice was given as text; or None.

    >>> careful_letter("A train needs 4 hours. The answer is (D).")
    'D'
    """
    choices = _choices(instruction)
    phrases = list(_ANNOUNCED.finditer(text))
    for phrase in reversed(phrases):
        letter = _leading_letter(text[phrase.end() :], announced=True)
        if letter:
            return letter
    letter = _leading_letter(text)
    if letter:
        return letter
    bracketed = re.findall(r"\(([A-E])\)", text)
    if bracketed:
        return bracketed[-1]
    said = text[phrases[-1].end() :] if phrases else text
    for same in (lambda words: _plain(words) == _plain(said), lambda words: _numbers(words) == _numbers(said) != []):
        meant = [letter for letter, words in choices.items() if words and same(words)]
        if len(meant) == 1:
            return meant[0]
    return None


# Judging.


def gold_of(row: Any) -> str | float:
    """The right answer of a row: a number where it is one, else the option's or the choice's name.

    It may be stored as text, as a number or as a list with one of these; of GSM8K's own format the part behind "####".

    Raises:
        ValueError: if there is none, or more than one.
    """
    answer = row["answer"]
    if isinstance(answer, (list, tuple)):
        if len(answer) != 1:
            raise ValueError(f"answer={answer!r} of a row is not one answer; a row must have exactly one.")
        answer = answer[0]
    if answer is None or not str(answer).strip():
        raise ValueError(f"answer={row['answer']!r} is no answer; a row must have exactly one.")
    text = str(answer).split("####")[-1].strip()
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return text


def judge(text: str, row: Any) -> dict[str, Any]:
    """A generated answer held against a row's right one: `paper` and `careful` (right or not), `read` and `gold`.

    Which kind of answer it is shows in the right one: a number, a letter from A to E, or the name of an option.
    """
    gold, instruction = gold_of(row), row.get("instruction", "")
    if isinstance(gold, float):
        read: tuple[Any, Any] = paper_number(text), careful_number(text)
        right = [value is not None and abs(value - gold) <= TOLERANCE for value in read]
    elif re.fullmatch("[A-E]", gold):
        read = paper_letter(text), careful_letter(text, instruction)
        right = [value == gold for value in read]
    else:
        read = paper_option(text), careful_option(text, instruction)
        right = [read[0] == gold, read[1] is not None and read[1].lower() == gold.lower()]
    return {"paper": right[0], "careful": right[1], "read": {"paper": read[0], "careful": read[1]}, "gold": gold}


# Reading texts.


def _numbers(text: str) -> list[float]:
    values = []
    for match in _NUMBER.finditer(text):
        value = float(match["value"].replace(",", "").replace(" ", ""))
        if match["divisor"]:
            divisor = float(match["divisor"].replace(",", "").replace(" ", ""))
            if divisor == 0:
                continue
            value /= divisor
        value += float(match["whole"] or 0)
        values.append(-value if match["sign"] or match["inner"] else value)
    return values


def _leading_letter(text: str, announced: bool = False) -> str | None:
    """The letter that a text begins with, in brackets or not; a word of one letter, such as "A train", is none."""
    found = re.match(r"\W*?(\()?([A-Ea-e])([).:,])?(?=\W|\Z)", text)
    if not found:
        return None
    goes_on = not found[1] and not found[3] and re.match(r"\s+\w|'", text[found.end() :])
    return None if goes_on and not (announced and found[2] in "BCDE") else found[2].upper()


def _options(instruction: str) -> tuple[list[str], dict[str, str]]:
    """The names of an instruction's options, and what stands behind each."""
    listed = re.search(r"Answer format:\s*(\S+(?:/\S+)+)", instruction, re.IGNORECASE)
    names = listed[1].split("/") if listed else []
    body = instruction[: listed.start()] if listed else instruction
    texts = {}
    for name in names:
        others = "|".join(re.escape(other) for other in names)
        found = re.search(rf"\b{re.escape(name)}:\s*(.*?)\s*(?=\b(?:{others}):|\Z)", body, re.IGNORECASE | re.DOTALL)
        texts[name] = found[1] if found else ""
    return names, texts


def _choices(instruction: str) -> dict[str, str]:
    """The letters of an instruction's "Answer Choices", and what stands behind each."""
    listed = instruction.rpartition("Answer Choices:")[2] if "Answer Choices:" in instruction else ""
    return dict(re.findall(r"\(([A-E])\)\s*(.*?)\s*(?=\([A-E]\)|\Z)", listed, re.DOTALL))


def _plain(text: str) -> str:
    return " ".join(re.sub(r"[^\w%./+-]+", " ", text.lower()).strip(" .").split())
