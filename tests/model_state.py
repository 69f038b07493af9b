"""What an adapter could leave on a model."""

from __future__ import annotations

from torch import nn


def state_of(model: nn.Module) -> dict:
    """All that an adapter could leave on a model: modules, their attributes and hooks, the state dict's keys."""
    return {
        "modules": [(name, type(module).__name__) for name, module in model.named_modules()],
        "attributes": {name: sorted(module.__dict__) for name, module in model.named_modules()},
        "hooks": {
            name: [len(v) for k, v in sorted(module.__dict__.items()) if k.endswith("_hooks") and hasattr(v, "__len__")]
            for name, module in model.named_modules()
        },
        "weights": sorted(model.state_dict()),
        "trained": sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad),
    }


def assert_as_before(model: nn.Module, before: dict) -> None:
    now = state_of(model)
    for what, value in before.items():
        assert now[what] == value, what
