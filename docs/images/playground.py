"""Takes docs/images/playground.png: python docs/images/playground.py DIR

DIR has the adapters of examples/quickstart.py ("quickstart-output"). Needs '.[playground]', selenium, chromium and
chromedriver; the answers are those of the real model.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

IMAGES = Path(__file__).resolve().parent
sys.path.insert(0, str(IMAGES.parents[1] / "tests"))

from browser import Page, playground  # noqa: E402


def main() -> None:
    """Chat, and take the picture."""
    adapters = Path(sys.argv[1]).resolve()
    with (
        tempfile.TemporaryDirectory() as folder,
        playground(
            adapters.parent, str(adapters), "--max-new-tokens", "40", "--repetition-penalty", "1.15", patience=900
        ) as address,
    ):
        page = Page(address, Path(folder) / "profile", size=(1200, 1480), patience=900)
        try:
            print(page.ask("What do you think about dogs?"))
            page.heat_map()
            page.driver.save_screenshot(str(IMAGES / "playground.png"))
        finally:
            page.driver.quit()


if __name__ == "__main__":
    main()
