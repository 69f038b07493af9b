"""The playground: what it shows is tested without the page, the page itself in headless Chromium where that is there.

PEFT_REFT_BROWSER=1 pytest tests/test_playground.py      (needs '.[playground]', selenium, chromium, chromedriver)
"""

from __future__ import annotations

import os
import socket
import threading
import time
from types import SimpleNamespace

import browser
import pytest
from conftest import randomize, reft_model, tiny_model
from smollm2_stand_in import byte_level
from test_chat import TOKENS, expected, folder  # noqa: F401  (a fixture)
from test_tools import word_tokenizer

from peft_reft import ReftConfig
from peft_reft.chat.talker import Talker
from peft_reft.playground import command
from peft_reft.playground.replies import Replies, Talk


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
        ("user", "loud"), ("w3 w4", None), ("w5", "loud"), ("assistant", "loud + quiet")
    ]  # fmt: skip
    talk = said(replies, talk, "w3", {"loud": 0.0, "quiet": -1.0})
    assert [text for text, by in replies.tokens(talk) if by] == ["assistant"], "at strength 0 nothing is edited"


def test_line_ends_and_characters_of_several_tokens_are_shown(replies, monkeypatch):
    tokenizer = byte_level(["Hello"])
    monkeypatch.setattr(replies.talker, "tokenizer", tokenizer)
    text = "".join(shown for shown, _ in replies.tokens(Talk(adapted=[{"role": "user", "content": "A 🐢\nis"}])))
    assert "A 🐢⏎\nis<|im_end|>⏎\n" in text
    last, by = replies.tokens(Talk(adapted=[{"role": "user", "content": "A"}], strengths={"loud": 1.0}))[-1]
    assert last.endswith("⏎\n") and by == "loud"


def test_an_answer_that_is_cut_short_leaves_conversations_that_can_go_on(replies):
    talk = Talk()
    answer = replies.answer(talk, "w3 w4", {"loud": 1.0})
    next(answer), next(answer)
    answer.close()
    for messages in (talk.base, talk.adapted):
        assert [message["role"] for message in messages] == ["user", "assistant"]
    assert talk.base[-1]["content"] and not talk.adapted[-1]["content"]
    assert said(replies, talk, "w5", {}).adapted[-1]["content"]


def functions(replies):
    """What the page's events call, by name, and two tabs of a browser that call it."""
    pytest.importorskip("gradio", reason="pip install '.[playground]'")
    from peft_reft.playground import page

    built = {str(block.name): block.fn for block in page.build(replies, ["loud"], "base").fns.values()}
    return built, SimpleNamespace(session_hash="one"), SimpleNamespace(session_hash="two")


def test_an_answer_is_stopped(replies):
    events, one, two = functions(replies)
    answer = events["answer"](one, {}, "w3 w4", True, 1.0)
    talk, box, *_, status, plot = next(answer)
    assert (box, status, plot) == ("", "Answering ...", None), "the heat map of the last prompt is taken away"
    *_, status, _ = next(answer)
    assert status == "Answering ..."
    events["stop_answer"](two)
    assert next(answer)[-2] == "Answering ...", "of another tab"
    events["stop_answer"](one)
    (talk, box, *_, status, _) = next(answer)
    assert status == "Stopped." and box != "", "what is typed meanwhile stays"
    assert list(answer) == []
    assert list(events["answer"](one, talk, "w5", True, 1.0))[-1][-2] == "Answered by loud at 1."


def test_a_new_chat_ends_the_answer(replies):
    events, one, _ = functions(replies)
    answer = events["answer"](one, {}, "w3 w4", True, 1.0)
    next(answer)
    cleared = []
    thread = threading.Thread(target=lambda: cleared.append(events["clear_all"](one)))
    thread.start()
    time.sleep(0.2)
    assert cleared == [], "it waits for the last piece, which would bring the old chat back"
    assert [shown[-2] for shown in answer] == ["Stopped."]
    thread.join(10)
    assert cleared == [({}, [], [], [], "Say something.", None)]


def test_a_tab_waits_for_the_answer_to_another(replies):
    events, one, two = functions(replies)
    answer, other = (events["answer"](tab, {}, "w3 w4", True, 1.0) for tab in (one, two))
    next(answer)
    assert next(other)[-2] == "Another tab is being answered ..."
    assert list(answer)[-1][-2] == "Answered by loud at 1."
    assert list(other)[-1][-2] == "Answered by loud at 1."
    (
        next(answer := events["answer"](one, {}, "w3", True, 1.0)),
        next(other := events["answer"](two, {}, "w3", True, 1.0)),
    )
    events["stop_answer"](two)
    assert [shown[-2] for shown in other] == ["Stopped."] and list(answer)


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


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(capsys):
    for package in ("gradio", "matplotlib"):
        pytest.importorskip(package, reason="pip install '.[playground]'")
    with socket.create_server((command.ADDRESS, 0)) as taken:
        port = taken.getsockname()[1]
        assert command.main(["no-such-folder", "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert f"--port {port} cannot be used (Address already in use)" in error
    assert command.main(["no-such-folder", "--port", str(port)]) == 2
    assert "no saved adapter" in capsys.readouterr().err


@pytest.mark.skipif(not os.environ.get("PEFT_REFT_BROWSER"), reason="set PEFT_REFT_BROWSER=1 to drive it in Chromium")
def test_the_page_in_a_browser(folder, tmp_path):  # noqa: F811
    """A chat at two strengths, the marked tokens and the heat map, as a user sees them."""
    assert browser.missing() == [], "needed for PEFT_REFT_BROWSER=1"
    with browser.playground(tmp_path, str(folder / "adapters"), "--max-new-tokens", str(TOKENS)) as address:
        page = browser.Page(address, tmp_path / "profile")
        try:
            base, loud = page.ask("w3 w4")
            assert (base, loud) == (expected(["w3 w4"]), expected(["w3 w4"], "loud"))
            page.set_strength("loud", 0)
            assert page.ask("w5")[1] == expected(["w3 w4", loud, "w5"])
            page.set_strength("loud", 1)
            page.ask("w6")
            assert "assistant" in page.find("#tokens").text
            assert page.heat_map()
            elsewhere = [name for name in page.fetched() if not name.startswith((address, "data:", "blob:"))]
            assert elsewhere == [], "the page fetches nothing from other machines"
            page.find("#clear").click()
            page.wait(
                lambda: page.answers("adapted") == [] and page.driver.find_elements("css selector", "#plot img") == []
            )
        finally:
            page.driver.quit()


def test_it_is_bound_to_this_machine_only():
    pytest.importorskip("gradio", reason="pip install '.[playground]'")
    from peft_reft.playground import page

    launched = {}

    class Page:
        local_url = "http://127.0.0.1:7860"

        def launch(self, **settings):
            launched.update(settings)

        def block_thread(self):
            pass

    page.serve(Page(), command.ADDRESS, None, False)
    assert (launched["server_name"], launched["share"]) == ("127.0.0.1", False)
