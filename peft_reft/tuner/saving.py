"""`PeftModel.save_pretrained` of a model with ReFT adapters writes whole files.

PEFT 0.21 opens README.md, adapter_model.bin and adapter_config.json in their places and empties them before it writes.
A process that is killed meanwhile leaves empty or half files over an adapter that was good, and a server that reloads
its adapters reads them. (adapter_model.safetensors is written beside and renamed by safetensors 0.8 itself.) PEFT calls
no tuner between, so its public method is wrapped here: it saves into a temporary directory inside the one that was
asked for, and the files are renamed into their places (staging.py).

What would make this file unnecessary: PEFT writing each of its files beside its place and renaming it (`os.replace`).
"""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.constants import REPOCARD_NAME
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from peft_reft.blocks import own_name
from peft_reft.tuner.config import ReftConfig
from peft_reft.tuner.injection import reft_layers
from peft_reft.tuner.keys import PEFT_PREFIX, blocks_of, is_intervention
from peft_reft.tuner.staging import staged


def save_whole_files(
    pefts: Any, model: PeftModel, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
) -> None:
    """Around PEFT's own method, by which models without a ReFT adapter are saved as ever."""
    # Other processes of a distributed run write nothing, but take part in gathering the weights.
    passed = inspect.signature(pefts).bind(model, save_directory, *args, **kwargs).arguments
    writes = passed.get("is_main_process", True)
    has_reft = any(isinstance(config, ReftConfig) for config in model.peft_config.values())
    if not has_reft or not writes or os.path.isfile(save_directory):
        return pefts(model, save_directory, *args, **kwargs)
    names = passed.get("selected_adapters") or list(model.peft_config)
    for name in names:
        if isinstance(model.peft_config.get(name), ReftConfig) and not reft_layers(model, name):
            raise ValueError(
                f"The adapter {name!r} is no longer in the model, so that it would be saved without weights: unload() "
                "gives the base model back. Save an adapter before."
            )
        if kwargs.get("state_dict"):  # transformers passes an empty one beside a checkpoint of DeepSpeed's
            check_state_dict(kwargs["state_dict"], model, name)
    folders = {"" if name == "default" else name for name in names}
    with staged(save_directory) as stage:
        # A card that is there already is kept, with sections that are written anew.
        for folder in sorted({"", *folders}):
            card = Path(save_directory, folder, REPOCARD_NAME)
            if card.is_file():
                (stage / folder).mkdir(exist_ok=True)
                shutil.copy(card, stage / folder / REPOCARD_NAME)
        pefts(model, str(stage), *args, **kwargs)
    # Of two files of weights, PEFT reads the safetensors: what an earlier save wrote in the other format goes.
    other = WEIGHTS_NAME if passed.get("safe_serialization", True) else SAFETENSORS_WEIGHTS_NAME
    for folder in folders:
        Path(save_directory, folder, other).unlink(missing_ok=True)


def check_state_dict(state_dict: Mapping[str, Any], model: PeftModel, adapter_name: str) -> None:
    """Raise if what was passed to be saved in place of the model's own weights lacks those of a ReFT adapter.

    PEFT would write what is there over an adapter that was good.
    """
    config = model.peft_config.get(adapter_name)
    if not isinstance(config, ReftConfig):
        return
    names = (own_name(key) for key in state_dict if is_intervention(key, adapter_name))
    found = len(blocks_of(name for name in names if name.startswith(PEFT_PREFIX)))
    wanted = 1 if config.share_layers else len(reft_layers(model, adapter_name))
    if found < wanted:
        raise ValueError(
            f"The state_dict that save_pretrained was passed holds weights of {found} of the {wanted} blocks of the "
            f"ReFT adapter {adapter_name!r}, whose names begin with {PEFT_PREFIX!r}, so that what it saves could not "
            "be loaded. Pass the state dict of this model, without a wrapper around it, as "
            "accelerator.get_state_dict(model) gives it, or none."
        )
