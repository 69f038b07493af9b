"""Takes docs/images/browser.png: python docs/images/browser.py SITE

SITE is the folder that examples/browser/prepare.py made. Needs selenium, chromium and chromedriver; the answers are
those of the real model. It prints what the page says of its speed.
"""

from __future__ import annotations

import functools
import http.server
import sys
import tempfile
import threading
from pathlib import Path

IMAGES = Path(__file__).resolve().parent
sys.path.insert(0, str(IMAGES.parents[1] / "tests"))

from browser import Page  # noqa: E402


def ask(page: Page, number: int) -> None:
    """Ask the question in the box, and wait for the whole answer, the `number`-th on the page."""
    page.find("#send").click()
    page.wait(lambda: len(page.driver.find_elements("css selector", ".answer")) == number)
    page.wait(lambda: page.find("#send").is_enabled())
    print(page.driver.find_elements("css selector", ".answer")[-1].text, "|", page.find("#status").text, flush=True)


def main() -> None:
    """Ask the base model and the first adapter of the menu, and take the picture."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=sys.argv[1])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as folder:
        page = Page(f"http://127.0.0.1:{server.server_port}/", Path(folder) / "profile", size=(900, 760), patience=1200)
        try:
            page.wait(lambda: page.find("#send").is_enabled() or page.find("#error").text)
            print(page.find("#status").text, page.find("#error").text, flush=True)
            ask(page, 1)
            page.driver.find_elements("css selector", "#adapter option")[1].click()
            page.wait(lambda: page.find("#about").text)
            ask(page, 2)
            page.driver.save_screenshot(str(IMAGES / "browser.png"))
        finally:
            page.driver.quit()
            server.shutdown()


if __name__ == "__main__":
    main()
