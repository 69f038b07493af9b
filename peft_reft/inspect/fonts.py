"""Which font has a character, so that emoji and other scripts are drawn; their names in words where none has.

matplotlib falls back from one font to the next, character by character, if a text is given several families. Its last
resort is a font of numbered boxes, which says nothing to a reader and is never used here. The extra `inspect` brings
Noto Emoji (in `manimgx-fonts`), so that emoji are drawn on a machine without fonts of its own.
"""

from __future__ import annotations

import functools
import importlib.util
import unicodedata
from collections.abc import Sequence
from pathlib import Path

BOXES = "Last Resort"  # matplotlib's font of numbered boxes
PACKAGE, FONTS = "manimgx_fonts", ("NotoEmoji*.ttf", "NotoSansSymbols*.ttf")


def lettering(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Texts that can be drawn, and the font families that draw them, in the order matplotlib should try them.

    Characters that no font has become words: "🐢" without a font is "‹turtle›". Line ends stay.
    """
    own = default_families()
    characters = sorted(set("".join(texts)))
    fonts = {c: own[0] if c == "\n" else family_of(c, tuple(own)) for c in characters}
    more = dict.fromkeys(family for family in fonts.values() if family is not None and family not in own)
    written = ["".join(c if fonts[c] is not None else in_words(c) for c in text) for text in texts]
    return written, [*own, *more]


def in_words(character: str) -> str:
    """
    >>> in_words("🐢"), in_words("日")
    ('‹turtle›', '‹U+65E5›')
    """
    name = unicodedata.name(character, "")
    says_something = bool(name) and not any(letter.isdigit() for letter in name)
    return f"‹{name.lower()}›" if says_something else f"‹U+{ord(character):04X}›"


def default_families() -> list[str]:
    """Names of the fonts that matplotlib's settings choose."""
    from matplotlib import font_manager, rcParams

    families = rcParams["font.family"]
    families = [families] if isinstance(families, str) else families
    paths = [font_manager.findfont(font_manager.FontProperties(family=[family])) for family in families]
    return [font_manager.get_font(path).family_name for path in paths]


@functools.cache
def family_of(character: str, own: tuple[str, ...]) -> str | None:
    """The first font that has a character: one of `own`, of the package of fonts, or any that is installed."""
    from matplotlib import font_manager

    add_package_fonts()
    entries = sorted(font_manager.fontManager.ttflist, key=lambda entry: entry.name not in own)
    for entry in entries:
        if not entry.name.startswith(BOXES) and draws(entry.fname, character):
            return entry.name
    return None


def draws(path: str, character: str) -> bool:
    """Whether a font has an outline for a character; fonts of bitmaps and of colours alone do not."""
    from matplotlib import font_manager

    try:
        font = font_manager.get_font(path)
        if font.get_char_index(ord(character)) == 0:
            return False
        left, bottom, right, top = font.load_char(ord(character)).bbox
    except (OSError, RuntimeError, ValueError):
        return False
    return character.isspace() or (right > left and top > bottom)


@functools.cache
def add_package_fonts() -> None:
    """Make the fonts of `manimgx-fonts` known to matplotlib, if that package is installed."""
    from matplotlib import font_manager

    found = importlib.util.find_spec(PACKAGE)
    for folder in (found.submodule_search_locations or []) if found is not None else []:
        for pattern in FONTS:
            for path in sorted(Path(folder).glob(pattern)):
                font_manager.fontManager.addfont(path)
