"""Makes REFT a peft type: the enum member first, then the config, tuner and prefix mappings.

The only file that touches PEFT's tables. PEFT has no entry points: a program that loads a ReFT adapter must import
`peft_reft` first, in each process.
"""

from __future__ import annotations

from importlib.metadata import version

from peft.utils import peft_types

from peft_reft.tuner.versions import check_peft_version, warn_of_untested_versions

NAME = "REFT"


def add_peft_type() -> None:
    """Give the closed enum `PeftType` the member REFT, as its own definition would have made it.

    Raises:
        ImportError: if this PEFT already has a REFT type that is not ours.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    enum = peft_types.PeftType
    if NAME in enum.__members__:
        config_cls = PEFT_TYPE_TO_CONFIG_MAPPING.get(enum[NAME])
        if config_cls is not None and config_cls.__module__.split(".")[0] != __name__.split(".")[0]:
            raise ImportError(
                f"The installed peft {version('peft')} already has a {NAME} type, {config_cls.__module__}."
                f"{config_cls.__qualname__}. Use that one without importing peft_reft, or install a peft without it."
            )
        return
    member = str.__new__(enum, NAME)
    member._name_ = NAME
    member._value_ = NAME
    member.__objclass__ = enum
    member._sort_order_ = len(enum.__members__)
    enum._member_names_.append(NAME)
    enum._member_map_[NAME] = member
    enum._value2member_map_[NAME] = member
    type.__setattr__(enum, NAME, member)


def register() -> None:
    """Enter ReFT's classes into PEFT's mappings; replaces our own entries, should the package be reloaded."""
    from peft import PeftModel
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from transformers.integrations.peft import PeftAdapterMixin

    from peft_reft.tuner.config import ReftConfig
    from peft_reft.tuner.loading import load_by_peft, load_by_transformers, wrap_function
    from peft_reft.tuner.model import ReftModel
    from peft_reft.tuner.saving import save_whole_files

    for table in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING):
        table.pop(peft_types.PeftType[NAME], None)  # PEFT refuses a name that is taken
    peft_types.register_peft_method(name=NAME.lower(), config_cls=ReftConfig, model_cls=ReftModel)
    wrap_function(PeftModel, "load_adapter", load_by_peft)
    wrap_function(PeftAdapterMixin, "load_adapter", load_by_transformers)
    wrap_function(PeftModel, "save_pretrained", save_whole_files)
    warn_of_untested_versions()


check_peft_version(version("peft"))
add_peft_type()
