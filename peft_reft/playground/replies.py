"""What the playground shows: two conversations, the tokens of the last prompt with their editors, and its heat map."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from peft_reft.chat.talker import Message, Talker
from peft_reft.inspect import inspect_adapter
from peft_reft.integrations.edited_tokens import edited_columns

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Run = tuple[str, "str | None"]


@dataclass
class Talk:
    """Two conversations with the same questions.

    Attributes:
        base: messages of the one with the base model.
        adapted: messages of the one with the adapters.
        strengths: of the adapters that gave the last answer.
    """

    base: list[Message] = field(default_factory=list)
    adapted: list[Message] = field(default_factory=list)
    strengths: dict[str, float] = field(default_factory=dict)

    @property
    def prompt(self) -> list[Message]:
        """What the adapters were asked last: their conversation up to the last question."""
        return self.adapted[:-1] if self.adapted and self.adapted[-1]["role"] == "assistant" else self.adapted


@dataclass
class Replies:
    """A talker, and what it has to say.

    Attributes:
        talker: the model with its adapters.
        system: a system message, or None.
    """

    talker: Talker
    system: str | None = None

    def answer(self, talk: Talk, question: str, strengths: Mapping[str, float]) -> Generator[Talk, None, None]:
        """Both answers to a question, piece by piece: first the base model's, then the adapters'.

        Args:
            talk: what was said before; it grows.
            question: the user's message.
            strengths: of the adapters that are switched on.

        Raises:
            ValueError: if the chat template refuses the conversation, which is then as before.
        """
        for messages in (talk.base, talk.adapted):
            self.talker.prompt_ids(self.with_system([*messages, {"role": "user", "content": question}]))
        talk.strengths = dict(strengths)
        for messages in (talk.base, talk.adapted):  # both at once, so that one that is cut short can go on
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": ""}]
        yield talk
        for messages, edits in ((talk.base, {}), (talk.adapted, talk.strengths)):
            with closing(self.talker.stream(self.with_system(messages[:-1]), edits)) as pieces:
                for piece in pieces:
                    messages[-1]["content"] += piece
                    yield talk

    def tokens(self, talk: Talk) -> list[Run]:
        """The last prompt as text, in runs of tokens that the same adapters edit, each with their names, or None.

        An adapter at strength 0 edits nothing. Line ends are shown as ⏎ too, since one alone would not be seen.
        """
        ids = self._prompt_ids(talk)
        configs = {name: self.talker.model.peft_config[name] for name, strength in talk.strengths.items() if strength}
        edited = {name: edited_columns(config, ids) for name, config in configs.items()}

        def editors(column: int) -> str:
            return " + ".join(name for name, columns in edited.items() if column in columns)

        runs: list[Run] = []
        for by, columns in groupby(range(len(ids)), key=editors):
            text: str = self.talker.tokenizer.decode([ids[column] for column in columns])
            runs.append((text.replace("\n", "⏎\n"), by or None))
        return runs

    def heat_map(self, talk: Talk) -> Figure:
        """How far the adapters move each token of the last prompt, in each block.

        Raises:
            ValueError: if there is no prompt yet, or no adapter edited it.
        """
        if not talk.adapted:
            raise ValueError("There is no prompt yet: send a message first.")
        if not talk.strengths:
            raise ValueError("No adapter edited the last prompt: switch one on and send a message.")
        ids = torch.tensor([self._prompt_ids(talk)], device=self.talker.model.device)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with self.talker.using(talk.strengths):
            return inspect_adapter(self.talker.model, batch, self.talker.tokenizer, effects=False).plot()

    def with_system(self, messages: list[Message]) -> list[Message]:
        """A conversation behind the system message, if there is one."""
        return [*([] if self.system is None else [{"role": "system", "content": self.system}]), *messages]

    def _prompt_ids(self, talk: Talk) -> list[int]:
        return self.talker.prompt_ids(self.with_system(talk.prompt)) if talk.adapted else []


def adapter_colors(names: list[str]) -> dict[str, Any]:
    """A colour per adapter; tokens that several edit keep the page's own."""
    palette = ["#f4a261", "#2a9d8f", "#e9c46a", "#8ab17d", "#e76f51", "#6d9dc5"]
    return {name: palette[number % len(palette)] for number, name in enumerate(names)}
