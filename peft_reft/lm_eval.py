"""The public name of integrations/lm_eval.py; importing it registers the model class `reft` with lm-eval."""

from peft_reft.integrations.lm_eval import ReftLM, positions_of, scoring_locations

__all__ = ["ReftLM", "positions_of", "scoring_locations"]
