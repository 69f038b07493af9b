"""Answers of a model with adapters, piece by piece, with the adapters and strengths that each call names."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from peft_reft.info.files import one_line
from peft_reft.tuner.adapters import set_strength
from peft_reft.tuner.fit import most_tokens, vocabulary_of

Message = dict[str, str]


class StopWhen(StoppingCriteria):
    """Ends a generation when an event is set."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> Any:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


@dataclass
class Talker:
    """A model with adapters that answers conversations.

    Attributes:
        model: a `PeftModel` in eval mode, whose adapters are all there.
        tokenizer: of the base model; without a chat template it is given the last message as it is.
        max_new_tokens: of an answer, which ends earlier where the model takes no more.
        temperature: 0 for the likeliest token.
        repetition_penalty: 1 for none, above 1 tokens that were there become less likely.
    """

    model: Any
    tokenizer: Any
    max_new_tokens: int = 200
    temperature: float = 0.0
    repetition_penalty: float = 1.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def prompt_ids(self, messages: list[Message]) -> list[int]:
        """The tokens of a conversation, ready for the answer.

        Raises:
            ValueError: if the chat template does not take these roles in this order, or the model not so many tokens.
        """
        ids = self._encoded(messages)
        if not ids:
            raise ValueError(
                "The tokenizer and its chat template make no token of the conversation. Say something else."
            )
        most, said = most_tokens(self.model.get_base_model())
        if len(ids) >= most:
            raise ValueError(
                f"The conversation has {len(ids):,} tokens, and the model takes at most {most:,} ({said}), with "
                "those of the answer. Begin a new one, or say less."
            )
        return ids

    def _encoded(self, messages: list[Message]) -> list[int]:
        if getattr(self.tokenizer, "chat_template", None) is None:
            return list(self.tokenizer(messages[-1]["content"])["input_ids"])
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # jinja2's own classes, and whatever a template raises
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(f"The chat template does not take the roles {roles}: {one_line(error)}") from error
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def stream(self, messages: list[Message], strengths: Mapping[str, float]) -> Generator[str, None, None]:
        """The answer to a conversation, in pieces as they are generated.

        Args:
            messages: of a chat, the last of them the user's.
            strengths: of the adapters that edit, by name; none of them: the base model answers.

        The generation ends when the iterator is closed. One answer is generated at a time: a second call waits.

        Raises:
            Exception: what `generate` raised.
        """
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop, failures = threading.Event(), list[BaseException]()

        def work() -> None:
            try:
                with self.using(strengths):
                    self._generate(messages, streamer, stop)
            except BaseException as error:
                failures.append(error)
                streamer.end()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield from (piece for piece in streamer if piece)
        finally:
            stop.set()
            thread.join()
        if failures:
            raise failures[0]

    @contextmanager
    def using(self, strengths: Mapping[str, float]) -> Iterator[None]:
        """The model with these adapters at these strengths, for one caller at a time; none of them: the base model.

        Raises:
            ValueError: for an adapter that is not there, or a strength that is no finite number.
        """
        with self._lock:
            if not strengths:
                with self.model.disable_adapter():
                    yield
                return
            self.model.base_model.set_adapter(list(strengths), inference_mode=True)
            for name, strength in strengths.items():
                set_strength(self.model, strength, name)
            yield

    @torch.no_grad()
    def _generate(self, messages: list[Message], streamer: Any, stop: threading.Event) -> None:
        prompt = self.prompt_ids(messages)
        vocabulary = vocabulary_of(self.model.get_base_model())
        if vocabulary is not None and max(prompt) >= vocabulary:
            raise ValueError(
                f"The tokenizer has the token id {max(prompt)}, and the model's vocabulary has {vocabulary:,} ids. It "
                "is another model's tokenizer: take it out of the adapter's folder, and the base model's own is used."
            )
        ids = torch.tensor([prompt], device=self.model.device)
        sampling = (
            {"do_sample": True, "temperature": self.temperature} if self.temperature > 0 else {"do_sample": False}
        )
        pad = self.tokenizer.pad_token_id
        self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=min(self.max_new_tokens, most_tokens(self.model.get_base_model())[0] - len(prompt)),
            repetition_penalty=self.repetition_penalty,
            pad_token_id=self.tokenizer.eos_token_id if pad is None else pad,
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([StopWhen(stop)]),
            **sampling,
        )
