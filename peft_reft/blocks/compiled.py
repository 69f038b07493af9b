"""Modules that `torch.compile` has wrapped, such as the blocks after accelerate's `compile_regions`.

Each is an `OptimizedModule` with the module that it wraps as its child `_orig_mod`. Blocks are found, and
named, as the modules inside.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

WRAPPED = "_orig_mod"


def own_name(name: str) -> str:
    """A module's name in the base model, without the parts that `torch.compile` adds.

    >>> own_name("model.layers.0._orig_mod.mlp")
    'model.layers.0.mlp'
    """
    return ".".join(part for part in name.split(".") if part != WRAPPED)


def uncompiled(module: nn.Module) -> nn.Module:
    """The module inside a compiled one; any other module itself."""
    # A child, not any attribute: `compile_regions` keeps the whole model of before as a plain attribute of this name.
    inner = next((child for name, child in module.named_children() if name == WRAPPED), None)
    return module if inner is None else uncompiled(inner)


def named_children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """As `module.named_children()`, with what is inside compiled children in their place."""
    for name, child in module.named_children():
        yield name, uncompiled(child)


def own_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model by their names in the base model; what is inside compiled modules in their place.

    A module with several names, as where an encoder and a decoder share one, is there under each.
    """
    found = model.named_modules(remove_duplicate=False)
    return {own_name(name): module for name, module in found}  # what is inside a compiled module comes after it


def present_names(model: nn.Module) -> dict[str, str]:
    """The names that modules have in this model, for `get_submodule`, by their names in the base model."""
    return {own_name(name): name for name, _ in model.named_modules(remove_duplicate=False)}
