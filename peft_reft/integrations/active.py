"""Which ReFT adapters of a model are in use, for the notices of other libraries."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from peft_reft.positions import parse_positions
from peft_reft.tuner.config import ReftConfig
from peft_reft.tuner.layer import ReftLayer


def active_configs(model: nn.Module) -> list[ReftConfig]:
    """Configs of the ReFT adapters that are active and not disabled, in the order of their names.

    Args:
        model: a `PeftModel`, or a model that adapters were added to with transformers' `add_adapter`.
    """
    names = {name for layer in _layers(model) if not layer.disable_adapters for name in layer.active_adapters}
    configs = getattr(model, "peft_config", {})
    found = (configs.get(name) for name in sorted(names))
    return [config for config in found if isinstance(config, ReftConfig)]


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of ReFT adapters that are being trained."""
    return [parameter for layer in _layers(model) for parameter in layer.parameters() if parameter.requires_grad]


def positions_that_need_the_end(model: nn.Module) -> str | None:
    """The positions of an active adapter that depend on where the prompt ends, if nothing in the tokens says where.

    Returns:
        The first of them, such as "f1+l1"; None if every adapter edits first tokens only ("fN"), or has a `prompt_end`.
    """
    for config in active_configs(model):
        if config.prompt_end is None and parse_positions(config.positions).depends_on_the_end:
            return config.positions
    return None


def _layers(model: nn.Module) -> Iterator[ReftLayer]:
    return (module for module in model.modules() if isinstance(module, ReftLayer))
