"""Which modules are a model's blocks, and where the tokens' vectors are in what they return.

Knows torch's modules and transformers' classes. What is edited, and at which tokens, is left to others.
"""

from peft_reft.blocks.compiled import own_modules, own_name, present_names
from peft_reft.blocks.configs import configs_of
from peft_reft.blocks.declared import takes_no_text
from peft_reft.blocks.device import device_and_dtype
from peft_reft.blocks.find import ModelBlocks
from peft_reft.blocks.layout import NOT_TOKENS, PLAIN, Layout, edit_hidden_state
from peft_reft.blocks.limits import refuse_unsound
from peft_reft.blocks.numbering import block_number, group_by_stack, pick_layers
from peft_reft.blocks.structure import block_width, input_embedding, paths_around

__all__ = [
    "NOT_TOKENS",
    "PLAIN",
    "Layout",
    "ModelBlocks",
    "block_number",
    "block_width",
    "configs_of",
    "device_and_dtype",
    "edit_hidden_state",
    "group_by_stack",
    "input_embedding",
    "own_modules",
    "own_name",
    "paths_around",
    "pick_layers",
    "present_names",
    "refuse_unsound",
    "takes_no_text",
]
