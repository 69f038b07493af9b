"""Adapters and their base model side by side in a local web page: `python -m peft_reft playground DIR [DIR ...]`.

replies.py is what the page shows, without the page; page.py lays it out with Gradio, which is imported there only.
"""

from peft_reft.playground.command import main

__all__ = ["main"]
