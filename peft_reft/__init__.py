"""peft-reft: representation finetuning (ReFT) as a tuner type of Hugging Face PEFT.

Importing the package makes REFT known to PEFT: pass a `ReftConfig` wherever you pass a `LoraConfig`.
"""
# ruff: noqa: E402 (the list of commands comes before the slow imports)

from peft_reft import commands as _commands

_commands.answer_at_once()  # ends the process if it is `python -m peft_reft` alone

from peft_reft.tuner import register as _register  # isort: skip  # first: the classes below need the peft type
from peft_reft import integrations as _integrations
from peft_reft.integrations.chat_template import chat_prompt_end
from peft_reft.integrations.collator import ReftDataCollator
from peft_reft.interventions import Intervention, register_intervention
from peft_reft.tuner.adapters import get_interventions, set_strength, set_subspaces
from peft_reft.tuner.config import ReftConfig
from peft_reft.tuner.model import ReftModel

__version__ = "0.1.0"
__all__ = [
    "Intervention",
    "ReftConfig",
    "ReftDataCollator",
    "ReftModel",
    "chat_prompt_end",
    "get_interventions",
    "register_intervention",
    "set_strength",
    "set_subspaces",
]

_register.register()
_integrations.register()
