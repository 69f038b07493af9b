"""Links that lead out of docs/, to files of the repository: an extension ("hook") of mkdocs.

Read in the repository they work. The site has only what lies in docs/: there the file's path is shown in their place.
"""

from __future__ import annotations

import re
from typing import Any

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(\.\./([^)#]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Called by mkdocs for each page.

    >>> on_page_markdown("See [the quickstart](../examples/quickstart.py), or [`setup.py`](../setup.py).")
    'See the quickstart (`examples/quickstart.py`), or `setup.py`.'
    """

    def shown(found: re.Match[str]) -> str:
        text, path = found[1], found[2].rstrip("/")
        return f"`{path}`" if path.endswith(text.strip("`")) else f"{text} (`{path}`)"

    return LINK.sub(shown, markdown)
