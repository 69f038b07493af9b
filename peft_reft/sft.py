"""The public name of integrations/sft.py: `python -m peft_reft sft`."""

from peft_reft.integrations.sft import main

__all__ = ["main"]
