"""The playground as a user meets it: the command in a process of its own, its page in headless Chromium."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking hide-scrollbars"


def missing() -> list[str]:
    """What of the packages and programs needed here is not installed."""
    packages = [name for name in ("gradio", "matplotlib", "selenium") if importlib.util.find_spec(name) is None]
    return packages + [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]


@contextmanager
def playground(folder: Path, *arguments: str, patience: float = 300) -> Iterator[str]:
    """A running playground; the address of its page.

    Args:
        folder: where it is run and leaves its log.
        arguments: of the command, such as an adapter's folder.
        patience: seconds to wait for it.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "peft_reft", "playground", *arguments, "--port", str(port), "--no-browser"]
    log = folder / "playground.log"
    with open(log, "w") as file:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        server = subprocess.Popen(command, env=environment, cwd=folder, stdout=file, stderr=file)
    try:
        end = time.monotonic() + patience
        while "The playground is at" not in log.read_text():
            if server.poll() is not None or time.monotonic() > end:
                raise RuntimeError(log.read_text())
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


class Page:
    """The page in headless Chromium.

    Args:
        address: of the page.
        profile: an empty folder for Chromium.
        size: width and height of the window, in pixels.
        patience: seconds to wait for anything.
        flags: of Chromium, without the dashes.
    """

    def __init__(
        self,
        address: str,
        profile: Path,
        size: tuple[int, int] = (1280, 1500),
        patience: float = 300,
        flags: str = FLAGS,
    ):
        from selenium import webdriver
        from selenium.webdriver.support.wait import WebDriverWait

        options = webdriver.ChromeOptions()
        options.binary_location = str(shutil.which("chromium"))
        for flag in flags.split():
            options.add_argument(f"--{flag}")
        options.add_argument(f"--user-data-dir={profile}")
        options.add_argument(f"--window-size={size[0]},{size[1]}")
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
        self.waiting = WebDriverWait(self.driver, patience)
        self.driver.set_page_load_timeout(patience)
        self.driver.get(address)

    def wait(self, condition: Callable[[], Any]) -> Any:
        """What the condition gives, once that is true."""
        return self.waiting.until(lambda _: condition())

    def find(self, selector: str) -> Any:
        """The first element of a CSS selector, once it is there."""
        return self.wait(lambda: self.driver.find_elements("css selector", selector))[0]

    def answers(self, chat: str) -> list[str]:
        """The answers in a chat, "base" or "adapted"."""
        found = self.driver.find_elements("css selector", f"#{chat} [data-testid=bot]")
        return [element.text.strip() for element in found]

    def ask(self, text: str) -> tuple[str, str]:
        """Send a message, and wait for both answers: the base model's and the adapters'."""
        before = len(self.answers("adapted"))
        self.find("#message textarea").send_keys(text)
        self.find("#send").click()
        self.wait(lambda: len(self.answers("adapted")) == before + 1)
        self.wait(lambda: self.find("#status").text.strip().startswith("Answered"))
        return self.answers("base")[-1], self.answers("adapted")[-1]

    def set_strength(self, adapter: str, strength: float) -> None:
        """Type a number into an adapter's slider."""
        number = self.find(f"#strength-{adapter} input[type=number]")
        number.send_keys("\ue009", "a")  # Ctrl-A
        number.send_keys("\ue000", str(strength), "\ue004")  # released; Tab

    def heat_map(self) -> str:
        """Ask for the heat map; the address of its picture."""
        self.find("#heat").click()
        return str(self.find("#plot img").get_attribute("src"))

    def fetched(self) -> list[str]:
        """The addresses of everything that the page has loaded."""
        script = "return performance.getEntriesByType('resource').map(entry => entry.name)"
        return list(self.driver.execute_script(script))
