"""The parameters of a saved adapter, by block and intervention. Its files are opened by files.py."""

from __future__ import annotations

import re

from torch import Tensor

from peft_reft.blocks.numbering import block_number
from peft_reft.info.files import SavedAdapter
from peft_reft.tuner.keys import INTERVENTIONS, parse_file_key

AUTO_CLASSES = {  # the class of transformers that makes the base model, by task type
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}

# Parameters by block, number of the intervention in it, and name.
Parameters = dict[str, dict[int, dict[str, Tensor]]]


def interventions_of(saved: SavedAdapter) -> tuple[Parameters, dict[str, Tensor]]:
    """The parameters of an adapter's interventions, blocks in their order, and what else is stored by name.

    Raises:
        ValueError: if there is no intervention.
    """
    found: Parameters = {}
    others = {}
    for key, tensor in saved.tensors.items():
        parts = parse_file_key(key)
        if parts is None:
            others[key] = tensor
        else:
            found.setdefault(parts.block, {}).setdefault(parts.group, {})[parts.parameter] = tensor
    if not found and saved.config.get("intervention") != "vanilla":  # which has no parameters
        raise ValueError(
            f"{str(saved.file)!r} holds no weights of a ReFT adapter: none of its {len(others)} tensors lies below "
            f"{INTERVENTIONS!r}. Save the adapter with PeftModel.save_pretrained."
        )
    # As the model runs them, not as the letters of their names: by stack and number.
    order = sorted(found, key=lambda name: (re.sub(r"\d+", "", name), block_number(name) or 0, name))
    return {name: found[name] for name in order}, others
