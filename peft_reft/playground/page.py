"""The page: two chats, a switch and a slider per adapter, the prompt's tokens, and the heat map."""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any

from peft_reft.playground.replies import Replies, Talk, adapter_colors

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when Gradio is imported

import gradio as gr

# The themes of Gradio fetch their fonts from the network.
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])


@dataclass
class Visit:
    """A tab of a browser.

    Attributes:
        answering: held while it is given an answer.
        stop: ends that answer when it is set.
    """

    answering: threading.Lock = field(default_factory=threading.Lock)
    stop: threading.Event = field(default_factory=threading.Event)


def build(replies: Replies, names: list[str], base: str) -> Any:
    """The page as a `gradio.Blocks`.

    Args:
        replies: what it shows.
        names: of the adapters; the first of them is switched on.
        base: name of the base model.
    """
    visits: defaultdict[str | None, Visit] = defaultdict(Visit)  # by Gradio's name of the session
    writing = threading.Lock()  # one answer at a time
    with gr.Blocks(title="peft-reft playground", analytics_enabled=False) as page:
        talk = gr.State({})  # a `Talk` as its fields
        gr.Markdown(f"### {', '.join(names)} on {base}")
        with gr.Row():
            left = gr.Chatbot(label="base model", elem_id="base", render_markdown=False, height=340)
            right = gr.Chatbot(label="with adapters", elem_id="adapted", render_markdown=False, height=340)
        with gr.Row():
            message = gr.Textbox(show_label=False, placeholder="Say something", elem_id="message", scale=8)
            send = gr.Button("Send", variant="primary", elem_id="send", scale=1)
            stop = gr.Button("Stop", elem_id="stop", scale=1)
            clear = gr.Button("New chat", elem_id="clear", scale=1)
        status = gr.Markdown("Say something.", elem_id="status")
        switches, sliders = [], []
        for number, name in enumerate(names):
            with gr.Row():
                switches.append(gr.Checkbox(number == 0, label=name, elem_id=f"on-{name}", scale=1))
                sliders.append(
                    gr.Slider(
                        -1,
                        2,
                        1,
                        step=0.05,
                        label=f"strength of {name}",
                        elem_id=f"strength-{name}",
                        scale=5,
                        info="0: the base model, 1: as trained",
                    )
                )
        tokens = gr.HighlightedText(
            label="the last prompt; coloured: edited",
            elem_id="tokens",
            color_map=adapter_colors(names),
            show_legend=True,
            show_inline_category=False,
        )
        show = gr.Button("Heat map of the last prompt", elem_id="heat")
        plot = gr.Plot(show_label=False, elem_id="plot")

        def answer(request: gr.Request, said: dict[str, Any], text: str, *settings: Any) -> Iterator[tuple[Any, ...]]:
            talk, visit = Talk(**said), visits[request.session_hash]
            visit.stop.clear()

            def shown(status: str) -> tuple[Any, ...]:  # not the message: the next one may be typed meanwhile
                return asdict(talk), gr.skip(), talk.base, talk.adapted, gr.skip(), status, gr.skip()

            if not text.strip():
                yield shown("Say something.")
                return
            on, strengths = settings[: len(names)], settings[len(names) :]
            chosen = {name: float(strength) for name, is_on, strength in zip(names, on, strengths) if is_on}
            with visit.answering:
                while not writing.acquire(timeout=0.5):
                    if visit.stop.is_set():
                        yield shown("Stopped.")
                        return
                    yield shown("Another tab is being answered ...")
                try:
                    with closing(replies.answer(talk, text, chosen)) as pieces:  # ended before the next may be written
                        next(pieces)  # the message is part of the conversation now, and the old heat map of no use
                        yield asdict(talk), "", talk.base, talk.adapted, replies.tokens(talk), "Answering ...", None
                        for _ in pieces:
                            if visit.stop.is_set():
                                yield shown("Stopped.")
                                return
                            yield shown("Answering ...")
                except ValueError as error:
                    yield shown(str(error))
                    return
                finally:
                    writing.release()
            by = " + ".join(f"{name} at {strength:g}" for name, strength in chosen.items()) or "the base model alone"
            yield shown(f"Answered by {by}.")

        def stop_answer(request: gr.Request) -> None:
            visits[request.session_hash].stop.set()

        def clear_all(request: gr.Request) -> tuple[Any, ...]:
            stop_answer(request)
            with visits[request.session_hash].answering:  # its last piece is shown before the chat is empty
                return {}, [], [], [], "Say something.", None

        def heat_map(said: dict[str, Any]) -> Any:
            try:
                return replies.heat_map(Talk(**said))
            except ValueError as error:
                raise gr.Error(str(error)) from error

        inputs, outputs = [talk, message, *switches, *sliders], [talk, message, left, right, tokens, status, plot]
        asked = [send.click, message.submit]
        gr.on(asked, answer, inputs, outputs, concurrency_limit=None, api_visibility="private")
        show.click(heat_map, [talk], [plot], concurrency_limit=1, api_visibility="private")
        stop.click(stop_answer, None, None, concurrency_limit=None, api_visibility="private")
        everything = [talk, left, right, tokens, status, plot]
        clear.click(clear_all, None, everything, concurrency_limit=None, api_visibility="private")
    return page


def serve(page: Any, address: str, port: int | None, open_browser: bool) -> None:
    """Serve the page until Ctrl-C.

    Args:
        page: from `build`.
        address: of this machine, for itself only.
        port: None for the first free one from 7860 on.
        open_browser: show it there.
    """
    page.launch(
        server_name=address,
        server_port=port,
        share=False,
        inbrowser=open_browser,
        theme=THEME,
        ssr_mode=False,
        footer_links=[],
        quiet=True,
        prevent_thread_lock=True,
    )
    print(f"The playground is at {page.local_url} for this machine only; Ctrl-C ends it.", flush=True)
    page.block_thread()
