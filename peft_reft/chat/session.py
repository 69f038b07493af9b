"""A conversation in the terminal: what is said, who answers at what strength, and the commands that change it."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field

from peft_reft.chat.talker import Message, Talker

HELP = """\
/strength X    how strongly the adapter edits: 0 is the base model, 1 as trained, also more or less; alone: show it
/adapter NAME  let another adapter answer; without a name: list them
/base          let the base model answer, until /adapter
/new           forget the conversation
/help          this list
/quit          end (or Ctrl-D); Ctrl-C ends an answer"""


@dataclass
class Session:
    """A conversation.

    Attributes:
        talker: what answers.
        adapters: names of the adapters that there are.
        system: a system message, or None.
        adapter: the name of the one that answers; None for the base model.
        strength: of its edits.
        messages: what was said so far, without the system message.
    """

    talker: Talker
    adapters: list[str]
    system: str | None = None
    adapter: str | None = None
    strength: float = 1.0
    messages: list[Message] = field(default_factory=list)

    @property
    def speaker(self) -> str:
        """Who answers, with the strength if that is not as trained."""
        if self.adapter is None:
            return "base"
        return self.adapter if self.strength == 1 else f"{self.adapter} {self.strength:g}"

    def answer(self, text: str) -> Iterator[str]:
        """The answer to a message, in pieces; a part that was shown stays in the conversation if it is cut short.

        Raises:
            ValueError: if the chat template refuses the conversation, which is then as before.
        """
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        strengths = {} if self.adapter is None else {self.adapter: self.strength}
        asked = [*system, *self.messages, {"role": "user", "content": text}]
        self.talker.prompt_ids(asked)
        self.messages.append(asked[-1])
        said = ""
        try:
            for piece in self.talker.stream(asked, strengths):
                said += piece
                yield piece
        finally:
            self.messages.append({"role": "assistant", "content": said.strip()})

    def command(self, line: str) -> str | None:
        """Do what a line that begins with "/" says; returns what there is to say about it, None to end."""
        name, _, argument = line[1:].strip().partition(" ")
        argument = argument.strip()
        if name in ("quit", "exit"):
            return None
        if name == "help":
            return HELP
        if name == "base":
            self.adapter = None
            return "The base model answers."
        if name == "new":
            self.messages.clear()
            return "The conversation begins anew."
        if name == "adapter":
            return self._choose(argument)
        if name == "strength":
            return self._set_strength(argument)
        return f"/{name} is no command.{suggestion(name, known_commands(), '/')} /help lists them."

    def _choose(self, name: str) -> str:
        if name in self.adapters:
            self.adapter = name
            return f"{self.speaker} answers."
        known = f"The adapters are {', '.join(self.adapters)}."
        return known if not name else f"There is no adapter {name!r}.{suggestion(name, self.adapters)} {known}"

    def _set_strength(self, text: str) -> str:
        if not text:
            return f"The strength is {self.strength:g}; /strength 0.5 changes it."
        try:
            strength = float(text)
            if strength - strength != 0:  # inf and nan
                raise ValueError
        except ValueError:
            return f"{text!r} is no strength; give a number, as in /strength 0.5"
        self.strength = strength
        return f"The strength is {strength:g}." + (
            " The base model answers; /adapter changes that." * (not self.adapter)
        )


def known_commands() -> list[str]:
    """Names of the commands, as the help lists them."""
    return [line.split()[0][1:] for line in HELP.splitlines()]


def suggestion(name: str, known: list[str], lead: str = "") -> str:
    """A question after the name that was probably meant, or nothing.

    >>> suggestion("strenght", ["strength", "quit"], "/"), suggestion("x", ["quit"])
    (' Did you mean /strength?', '')
    """
    close = difflib.get_close_matches(name, known, 1)
    return f" Did you mean {lead}{close[0]}?" if close else ""
