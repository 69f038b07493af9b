"""The playground: what it shows is tested without the page, the page itself in headless Chromium where that is there.

    PEFT_REFT_BROWSER=1 pytest tests/test_playground.py      (needs '.[playground]', selenium, chromium, chromedriver)

With PEFT_REFT_SCREENSHOT=FILE the test in the browser also leaves a picture of the page.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from conftest import randomize, reft_model, tiny_model
from test_chat import TOKENS, expected, folder  # noqa: F401  (a fixture)
from test_tools import ENVIRONMENT, word_tokenizer

from peft_reft import ReftConfig
from peft_reft.chat.talker import Talker
from peft_reft.playground import command
from peft_reft.playground.replies import Replies, Talk


def browser_missing() -> str | None:
    """Why the page cannot be tested in a browser; None if it can."""
    if not os.environ.get("PEFT_REFT_BROWSER"):
        return "set PEFT_REFT_BROWSER=1 to drive the page in headless Chromium"
    missing = [name for name in ("gradio", "matplotlib", "selenium") if importlib.util.find_spec(name) is None]
    missing += [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"missing: {', '.join(missing)}" if missing else None


@pytest.fixture
def replies():
    model = reft_model(tiny_model("llama"), adapter="loud", task_type="CAUSAL_LM", positions="f1+l2")
    model.add_adapter("quiet", ReftConfig(task_type="CAUSAL_LM", positions="l1"))
    randomize(model, "quiet", seed=2)
    return Replies(Talker(model.eval(), word_tokenizer(), max_new_tokens=TOKENS))


def said(replies, talk, question, strengths):
    return list(replies.answer(talk, question, strengths))[-1]


def test_both_answers_and_both_conversations(replies):
    talk = said(replies, Talk(), "w3 w4", {"loud": 1.0})
    base, adapted = (messages[-1]["content"].strip() for messages in (talk.base, talk.adapted))
    assert (base, adapted) == (expected(["w3 w4"]), expected(["w3 w4"], "loud"))
    assert base != adapted
    talk = said(replies, talk, "w5", {"loud": 0.5})
    assert talk.base[-1]["content"].strip() == expected(["w3 w4", base, "w5"])
    assert talk.adapted[-1]["content"].strip() == expected(["w3 w4", adapted, "w5"], "loud", 0.5)


def test_answers_grow_piece_by_piece(replies):
    _, *lengths = (len(talk.base[-1]["content"]) for talk in replies.answer(Talk(), "w3 w4", {}))
    assert lengths == sorted(lengths) and len(set(lengths)) > 2


def test_without_an_adapter_both_sides_are_the_base_model(replies):
    talk = said(replies, Talk(), "w3 w4", {})
    assert talk.base == talk.adapted


def test_two_adapters_at_once_are_neither_of_them(replies):
    answers = [
        said(replies, Talk(), "w3 w4", strengths).adapted[-1]["content"]
        for strengths in ({"loud": 1.0}, {"quiet": 1.0}, {"loud": 1.0, "quiet": 1.0})
    ]
    assert len(set(answers)) == 3


def test_each_token_of_the_last_prompt_has_its_editors(replies):
    assert replies.tokens(Talk()) == []
    talk = said(replies, Talk(), "w3 w4 w5", {"loud": 1.0, "quiet": 1.0})
    assert replies.tokens(talk) == [
        ("user", "loud"), ("w3", None), ("w4", None), ("w5", "loud"), ("assistant", "loud + quiet")
    ]  # fmt: skip


def test_the_heat_map_shows_the_last_prompt(replies):
    pytest.importorskip("matplotlib")
    talk = said(replies, Talk(), "w3 w4 w5", {"loud": 1.0})
    axes = replies.heat_map(talk).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["user", "w3", "w4", "w5", "assistant"]


@pytest.mark.parametrize(("strengths", "message"), [(None, "send a message first"), ({}, "switch one on")])
def test_a_heat_map_of_nothing_is_refused(strengths, message, replies):
    talk = Talk() if strengths is None else said(replies, Talk(), "w3", strengths)
    with pytest.raises(ValueError, match=message):
        replies.heat_map(talk)


def test_what_is_missing_is_said_before_anything_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert command.main(["no-such-folder"]) == 1
    assert "needs gradio and matplotlib: pip install 'peft-reft[playground]'" in capsys.readouterr().err


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def page(folder, tmp_path):  # noqa: F811
    """The address of a running playground."""
    port = free_port()
    adapters = os.environ.get("PEFT_REFT_PLAYGROUND", str(folder / "adapters"))
    options = ["--port", str(port), "--no-browser", "--max-new-tokens", os.environ.get("PEFT_REFT_TOKENS", str(TOKENS))]
    with open(tmp_path / "log", "w") as log:
        arguments = [sys.executable, "-m", "peft_reft", "playground", adapters, *options]
        server = subprocess.Popen(arguments, env=ENVIRONMENT, cwd=tmp_path, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 300
        while "The playground is at" not in (tmp_path / "log").read_text():
            assert server.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.skipif(browser_missing() is not None, reason=str(browser_missing()))
def test_the_page_in_a_browser(page, tmp_path):
    """A chat at two strengths, the marked tokens and the heat map, as a user sees them."""
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.wait import WebDriverWait

    assert urllib.request.urlopen(page, timeout=60).status == 200
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"):
        options.add_argument(f"--{flag}")
    options.add_argument("--disable-background-networking")
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    options.add_argument("--window-size=1280,1500")
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        driver.set_page_load_timeout(120)
        driver.get(page)
        wait = WebDriverWait(driver, 300)

        def find(selector):
            return wait.until(lambda _: driver.find_elements(By.CSS_SELECTOR, selector))

        def answers(chat):
            return [found.text.strip() for found in driver.find_elements(By.CSS_SELECTOR, f"#{chat} .bot .message")]

        def ask(text, count):
            find("#message textarea")[0].send_keys(text)
            find("#send")[0].click()
            wait.until(
                lambda _: len(answers("adapted")) == count and not driver.find_elements(By.CSS_SELECTOR, ".generating")
            )
            return answers("base")[-1], answers("adapted")[-1]

        base, loud = ask("w3 w4", 1)
        assert (base, loud) == (expected(["w3 w4"]), expected(["w3 w4"], "loud"))

        number = find("#strength-loud input[type=number]")[0]
        number.send_keys(Keys.CONTROL, "a")
        number.send_keys("0", Keys.TAB)
        _, sober = ask("w5", 2)
        assert sober == expected(["w3 w4", loud, "w5"])

        assert "assistant" in find("#tokens")[0].text
        find("#heat")[0].click()
        assert find("#plot img")[0].get_attribute("src")
        if os.environ.get("PEFT_REFT_SCREENSHOT"):
            driver.save_screenshot(os.environ["PEFT_REFT_SCREENSHOT"])
        outside = driver.execute_script("return performance.getEntriesByType('resource').map(r => r.name)")
        assert [name for name in outside if not name.startswith(page)] == [], "the page fetches nothing from elsewhere"
    finally:
        driver.quit()
