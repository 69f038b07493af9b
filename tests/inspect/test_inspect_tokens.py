"""Names of tokens in tables and pictures: characters of several tokens, emoji, and scripts that no font has."""

from __future__ import annotations

import io

import pytest
from matplotlib.figure import Figure
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from peft_reft.inspect import fonts
from peft_reft.inspect.fonts import family_of, in_words, lettering
from peft_reft.inspect.heatmap import draw, shown
from peft_reft.inspect.tokens import name_of, names_of


@pytest.fixture(scope="module")
def bytes_tokenizer():
    """A byte-level tokenizer without merges: every byte is a token."""
    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_tokens_of_one_character_are_named_by_it_and_their_place_in_it(bytes_tokenizer):
    ids = bytes_tokenizer("a🐢é b")["input_ids"]
    assert names_of(ids, bytes_tokenizer) == [
        *["a", "🐢 (1/4)", "🐢 (2/4)", "🐢 (3/4)", "🐢 (4/4)", "é (1/2)", "é (2/2)", " ", "b"]
    ]


def test_a_token_of_no_whole_character_is_named_by_its_id(bytes_tokenizer):
    ids = bytes_tokenizer("🐢")["input_ids"]
    assert names_of([*ids[:2], 3], bytes_tokenizer) == [f"#{ids[0]}", f"#{ids[1]}", bytes_tokenizer.decode([3])]
    assert name_of(ids[0], bytes_tokenizer) == f"#{ids[0]}"
    assert names_of(ids, None) == [str(token) for token in ids]


def test_labels_show_blanks_and_line_ends_and_keep_the_place_in_a_character():
    assert [shown(token) for token in (" a", "\n", "\x07", " 🐢 (1/3)")] == ["␣a", "\\n", "\\x07", "␣🐢 (1/3)"]
    assert shown("y" * 40) == "y" * 15 + "…"


def test_characters_of_matplotlib_s_own_font_need_no_other():
    assert lettering(["a ␣\nb", "😀"]) == (["a ␣\nb", "😀"], ["DejaVu Sans"])


def test_a_character_without_a_font_becomes_words(monkeypatch):
    unassigned = "\U000e0fff"
    assert in_words("🐢") == "‹turtle›" and in_words(unassigned) == "‹U+E0FFF›"
    assert lettering([f"a{unassigned}"]) == (["a‹U+E0FFF›"], ["DejaVu Sans"])
    monkeypatch.setattr(fonts, "family_of", lambda character, own: None if character == "🐢" else own[0])
    assert lettering(["🐢 (1/3)"]) == (["‹turtle› (1/3)"], ["DejaVu Sans"])


def test_boxes_with_numbers_are_never_drawn():
    assert not str(family_of("\U000e0fff", ("DejaVu Sans",))).startswith("Last Resort")
    for family in lettering(["🐢🎉日"])[1]:
        assert not family.startswith("Last Resort")


def picture_of(token):
    """The pixels of a heat map whose only token is `token`."""
    row = {"prompt": 0, "stack": "", "block": "layers.0", "call": 0, "adapter": "a", "position": 0, "part": "prompt"}
    figure: Figure = draw([{**row, "token": token, "edited": True, "relative": 1.0}], [], [], "relative", "a", None, 2)
    picture = io.BytesIO()
    figure.savefig(picture, format="rgba")
    return picture.getvalue()


def test_emoji_are_drawn_with_the_font_of_the_extra():
    pytest.importorskip("manimgx_fonts", reason="the extra `inspect` is not installed, which brings a font of emoji")
    texts, families = lettering(["🐢 (1/3)", "🎉"])
    assert texts == ["🐢 (1/3)", "🎉"] and families[0] == "DejaVu Sans" and len(families) > 1
    assert picture_of("🐢") != picture_of("🎉"), "two boxes would look alike"
