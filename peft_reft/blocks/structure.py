"""What a model's structure tells by itself: its lists of blocks, the width of what a module returns."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from peft_reft.blocks.compiled import named_children, own_modules, uncompiled

OWN_CODE = "transformers."  # as `transformers_modules.`, code that came with a checkpoint, does not begin
PADDING_METHOD = "_pad_to_"  # how the names of transformers' methods begin that pad tokens to a multiple


def structural_stacks(model: nn.Module) -> list[list[str]]:
    """Names (own) of the blocks in the largest list of modules of each stack; none if there is no such list.

    For models that can be neither read nor traced, such as one without a config.
    """
    stacks = []
    for path, stack in _homes_of_stacks(uncompiled(model)):
        found = list(named_block_lists(stack, path))
        found = found or [item for item in named_block_lists(stack, path, nn.Sequential) if _multiplies(item[1])]
        if found:
            name, blocks = max(found, key=lambda item: (_multiplies(item[1]), size_of(item[1])))
            stacks.append([f"{name}.{entry}" for entry, _ in blocks.named_children()])
    return stacks


def named_block_lists(
    module: nn.Module, prefix: str = "", kind: type[nn.Module] = nn.ModuleList
) -> Iterator[tuple[str, nn.Module]]:
    """The outermost lists of modules that look like blocks: not leaves, and with parameters."""
    for name, child in named_children(module):
        path = f"{prefix}.{name}" if prefix else name
        entries = [entry for _, entry in named_children(child)] if isinstance(child, kind) else []
        if entries and all(_has_parts(entry) for entry in entries):
            yield path, child
        else:
            yield from named_block_lists(child, path, kind)


def _has_parts(module: nn.Module) -> bool:
    return any(True for _ in module.children()) and any(True for _ in module.parameters())


def _multiplies(module: nn.Module) -> bool:
    """Whether it has matrices, as blocks have that return a vector for each place; convolutions have none."""
    return any(parameter.dim() == 2 for parameter in module.parameters())


def size_of(module: nn.Module) -> int:
    """How many parameters a module has."""
    return sum(parameter.numel() for parameter in module.parameters())


def input_embedding(model: Any) -> nn.Module | None:
    """The module that embeds the tokens; None for models that have none, or cannot say which it is."""
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError, TypeError):
        # In this order: a plain module; a class that leaves it open; a getter that asks of which of several inputs.
        return None
    return uncompiled(embedding) if isinstance(embedding, nn.Module) else None


def path_of(model: nn.Module, module: nn.Module | None) -> str:
    """The own name of a module in a model; empty for the model itself, and for a module that is not in it."""
    return next((name for name, found in own_modules(model).items() if found is module), "")


def _homes_of_stacks(model: Any) -> list[tuple[str, nn.Module]]:
    """The modules in which to look for one list of blocks each: encoder and decoder, or the home of the text."""
    modules = own_modules(model)
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        names = {module: name for name, module in modules.items()}
        stacks = [uncompiled(model.get_encoder()), uncompiled(model.get_decoder())]
        return [(names[stack], stack) for stack in stacks if stack in names]
    around = reversed(paths_around(path_of(model, input_embedding(model))))
    # The smallest part of the model that holds both the input embedding and a list of blocks.
    home = next((path for path in around if next(named_block_lists(modules[path]), None) is not None), "")
    return [(home, modules[home])]


def paths_around(name: str) -> list[str]:
    """The names of the modules that one of this name lies in: the model's, and so on down to its parent's.

    >>> paths_around("model.layers.0")
    ['', 'model', 'model.layers']
    """
    parts = name.split(".") if name else []
    return [".".join(parts[:depth]) for depth in range(len(parts))]


def modules_around(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules that one of this own name lies in: the model, and so on down to its parent."""
    modules = own_modules(model)
    return [modules[path] for path in paths_around(name)]


def can_pad(module: nn.Module) -> bool:
    """Whether it is a model of transformers with a method that pads tokens to a multiple, as BigBird's
    `_pad_to_block_size`.
    """
    return is_own_code(module) and any(name.startswith(PADDING_METHOD) for name in dir(type(module)))


def is_own_code(module: nn.Module) -> bool:
    """Whether a module runs code of transformers, and not that of a checkpoint or of a user."""
    return inspect.unwrap(type(module).forward).__module__.startswith(OWN_CODE)


def block_width(model: nn.Module, name: str) -> int:
    """Width of the vectors that a module returns: the last dimension of its output.

    Raises:
        ValueError: if it cannot be told from the module or from a config above it.
    """
    module = own_modules(model)[name]
    for attribute in ("out_features", "embedding_dim", "nf"):
        if isinstance(getattr(module, attribute, None), int):
            return int(getattr(module, attribute))
    if isinstance(module, nn.LayerNorm):
        return int(module.normalized_shape[-1])
    for outer in reversed(modules_around(model, name)):
        config: Any = getattr(outer, "config", None)
        if hasattr(config, "get_text_config"):
            config = config.get_text_config()
        if isinstance(getattr(config, "hidden_size", None), int):
            return int(config.hidden_size)
    leaves = [leaf for _, leaf in module.named_modules() if isinstance(getattr(leaf, "out_features", None), int)]
    if leaves:
        return int(leaves[-1].out_features)
    raise ValueError(
        f"The width of the hidden states that {name!r} ({type(module).__name__}) returns cannot be told: neither it "
        "nor a config above it says so. Target a module that ends in a linear layer, or set model.config.hidden_size."
    )
