"""What a chat template puts before every answer: `chat_prompt_end(tokenizer)`, for `ReftConfig(prompt_end=...)`.

The marker is found by rendering conversations and comparing their tokens, never in a table of templates. Where it lies
in a batch, and what is edited before it, is the work of positions/.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

Message = dict[str, str]

TURNS = 3
COMMON_WORDS = (
    "one two three four five six seven eight nine ten red blue green north south east west".split()  # noqa: SIM905
)
OWN_MARKER = "give the marker yourself, as text or token ids: ReftConfig(prompt_end=...)"


def chat_prompt_end(tokenizer: Any) -> list[int]:
    """The token ids that the tokenizer's chat template puts before every answer.

    With `ReftConfig(prompt_end=chat_prompt_end(tokenizer))` an adapter finds the prompt's end in whole conversations,
    where neither labels nor `generate` mark it.

    The marker is what `add_generation_prompt=True` adds. Of templates that add nothing, as Llama-2's and Mistral's, it
    is what stands between a question and its answer. Tokens that would merge with the answer's first token are left
    out, since they are others in every conversation.

    Args:
        tokenizer: a tokenizer of transformers with a chat template, or a processor that holds one.

    Returns:
        Token ids of at least one token. In a rendered conversation they occur once before each answer, and nowhere else
        in what the template itself writes.

    Raises:
        ValueError: if there is no chat template, if it has no generation prompt and does not set questions apart from
            answers, or if what stands before an answer depends on the turn, as a thinking block may.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            "The tokenizer has no chat template, so nothing is put before an answer. Take the tokenizer of an "
            f"instruction-tuned model, set tokenizer.chat_template, or {OWN_MARKER}."
        )
    template = Template(tokenizer)
    words = distinct_words(tokenizer, 3 * TURNS)
    # A sign at a question's end may merge with the first sign of what follows it.
    chats = [conversation(words, sign) for sign in ("", "?", ".", "!")]
    with_system = [{"role": "system", "content": words[-1]}, *chats[0]]
    if template.accepts(with_system):  # some templates refuse the role
        chats.append(with_system)
    questions = [chat[:end] for chat in chats for end in answers_in(chat)]
    marker = common_end([template.before_answers(question, words) for question in questions])
    for chat in chats:
        starts = [template.answer_start(chat, number, words) for number in answers_in(chat)]
        ends = ends_of(marker, template.ids(chat))
        if len(ends) != TURNS or not all(low < end <= high for low, end, high in zip([0, *starts], ends, starts)):
            raise ValueError(
                f"The chat template has no text of its own before each answer: in a conversation whose answers begin "
                f"at the tokens {starts}, {tokenizer.decode(marker)!r} ends at the tokens {ends}. If the template "
                f"ignores add_generation_prompt, correct tokenizer.chat_template; or {OWN_MARKER}."
            )
    return marker


class Template:
    """A tokenizer's chat template: conversations as text and as tokens."""

    def __init__(self, tokenizer: Any):
        self.renderer = tokenizer
        self.tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor's own
        self.in_parts = False  # whether a message is a list of parts, as in templates of models that see images
        if not self._shows_text():
            self.in_parts = True
            self.in_parts = self._shows_text()

    def _shows_text(self) -> bool:
        question = [{"role": "user", "content": COMMON_WORDS[0]}]
        return self.accepts(question) and COMMON_WORDS[0] in self.text(question)

    def accepts(self, chat: Sequence[Message]) -> bool:
        """Whether the template renders these roles."""
        try:
            self.text(chat)
        except ValueError:
            return False
        return True

    def text(self, chat: Sequence[Message], prompt: bool = False) -> str:
        """The rendered conversation; with `prompt`, made ready for `generate` to answer."""
        messages: list[Any] = list(chat)
        if self.in_parts:
            messages = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in chat]
        try:
            rendered = self.renderer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        except Exception as error:  # jinja2's own classes, and whatever a template raises
            roles = [message["role"] for message in chat]
            raise ValueError(
                f"The chat template does not render a conversation of the roles {roles} ({error}). Correct "
                f"tokenizer.chat_template, or {OWN_MARKER}."
            ) from error
        return str(rendered)

    def ids(self, chat: Sequence[Message], prompt: bool = False) -> list[int]:
        """The tokens of the rendered conversation, in which the template's text already has its special tokens."""
        return self.encode(self.text(chat, prompt))

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def before_answers(self, question: Sequence[Message], answers: Sequence[str]) -> tuple[list[int], int]:
        """What precedes an answer to a conversation that ends in a question.

        Returns:
            The prompt's tokens that are the same before each of these answers, and how many of the last of them the
            generation prompt adds (0 for a template without one).

        Raises:
            ValueError: if the template puts something else before a given answer than before one to be generated.
        """
        asked, prompt = self.text(question), self.text(question, prompt=True)
        stable = self.encode(prompt)
        for answer in answers:
            whole = self.text([*question, {"role": "assistant", "content": answer}])
            start = whole.rfind(answer)
            if not whole.startswith(prompt):
                raise ValueError(
                    f"The chat template ends a prompt for generate with {tail(prompt)!r}, but puts "
                    f"{tail(whole[:start])!r} before an answer that is given: a thinking block may be opened in one of "
                    "them only. Training and generation would edit different tokens. Train on rows of `prompt` and "
                    f"`completion`, whose labels show the prompt's end, or {OWN_MARKER}."
                )
            if prompt == asked and whole[len(prompt) : start].strip():
                raise ValueError(
                    "The chat template has no generation prompt: add_generation_prompt=True adds nothing, and a given "
                    f"answer is preceded by {whole[len(prompt) : start]!r}, which a prompt for generate lacks. Add "
                    f"`{{% if add_generation_prompt %}}...{{% endif %}}` to tokenizer.chat_template, or {OWN_MARKER}."
                )
            stable = common(stable, self.encode(whole))
        return stable, len(stable) - len(common(stable, self.encode(asked)))

    def answer_start(self, chat: Sequence[Message], number: int, words: Sequence[str]) -> int:
        """Column of an answer's first token: where the same conversation with another answer begins to differ."""
        answer = chat[number]
        other = {**answer, "content": next(word for word in words if word != answer["content"])}
        return len(common(self.ids(chat), self.ids([*chat[:number], other, *chat[number + 1 :]])))


def conversation(words: Sequence[str], sign: str = "") -> list[Message]:
    """Questions, which end in a sign, and answers of one word each, no word twice."""
    roles, signs = ("user", "assistant") * TURNS, (sign, "") * TURNS
    return [{"role": role, "content": word + sign} for role, word, sign in zip(roles, words, signs)]


def answers_in(chat: Sequence[Message]) -> list[int]:
    """Numbers of the messages that are answers."""
    return [number for number, message in enumerate(chat) if message["role"] == "assistant"]


def distinct_words(tokenizer: Any, count: int) -> list[str]:
    """Words whose first and last tokens are all different, and known to the tokenizer.

    Common words serve for most vocabularies; small ones offer their own, except those that the template uses.

    Raises:
        ValueError: if there are not so many.
    """
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    words: list[str] = []
    used: set[int] = set()
    for word in candidates(inner, str(tokenizer.chat_template)):
        ids = inner(word, add_special_tokens=False)["input_ids"]
        if ids and inner.unk_token_id not in ids and not used & {ids[0], ids[-1]}:
            words.append(word)
            used |= {ids[0], ids[-1]}
        if len(words) == count:
            return words
    raise ValueError(
        f"The tokenizer knows only {len(words)} words to try the chat template with, and {count} are needed; "
        f"{OWN_MARKER}."
    )


def candidates(tokenizer: Any, template: str) -> Iterator[str]:
    """Common words, then the words of the vocabulary, in the order of their ids."""
    yield from COMMON_WORDS
    for token in range(len(tokenizer)):
        word = tokenizer.decode([token]).strip()
        if word.isalnum() and word not in template:
            yield word


def common(left: Any, right: Any) -> Any:
    """What two sequences have in common at their beginning.

    >>> common([1, 2, 3], [1, 2, 4, 5])
    [1, 2]
    """
    length = next((n for n, (a, b) in enumerate(zip(left, right)) if a != b), min(len(left), len(right)))
    return left[:length]


def common_end(prompts: Sequence[tuple[list[int], int]]) -> list[int]:
    """The tokens at the end of all prompts, no more of them than the generation prompt adds, if it adds any.

    >>> common_end([([7, 1, 2, 3], 2), ([8, 1, 2, 3], 2)]), common_end([([7, 1, 2, 3], 0), ([8, 1, 2, 3], 0)])
    ([2, 3], [1, 2, 3])
    """
    (end, _), *others = prompts
    for ids, _ in others:
        end = common(end[::-1], ids[::-1])[::-1]
    added = max(count for _, count in prompts)
    return end[-added:]


def ends_of(marker: Sequence[int], ids: Sequence[int]) -> list[int]:
    """One past the last token of each occurrence.

    >>> ends_of([1, 2], [0, 1, 2, 1, 2, 3])
    [3, 5]
    """
    size = len(marker)
    return [end for end in range(size, len(ids) + 1) if list(ids[end - size : end]) == list(marker)] if size else []


def tail(text: str) -> str:
    """The end of a text, for a message."""
    return text if len(text) <= 40 else "…" + text[-40:]
