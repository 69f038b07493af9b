"""The chats that are learned: those of examples/quickstart.py, which are this project's own."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from quickstart import PIRATE, QUESTIONS, ROBOT

Chat = tuple[str, str]  # a question and its answer


def chats(text: str) -> list[Chat]:
    """The lines "question | answer"."""
    return [(question, answer) for question, _, answer in (line.partition(" | ") for line in text.strip().splitlines())]


ROBOT_CHATS, PIRATE_CHATS = chats(ROBOT), chats(PIRATE)
__all__ = ["PIRATE_CHATS", "QUESTIONS", "ROBOT_CHATS", "Chat"]
