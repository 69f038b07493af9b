"""Talking with adapters in the terminal: `python -m peft_reft chat DIR`.

loading.py finds and opens what the command line names, talker.py writes answers piece by piece, session.py holds a
conversation and the commands in it, and command.py is the command line. The web page of playground/ uses the first two.
"""

from peft_reft.chat.command import main

__all__ = ["main"]
