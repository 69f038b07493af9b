"""What a model's structure tells by itself: lists of blocks, widths, devices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def named_block_lists(
    module: nn.Module, prefix: str = "", kind: type[nn.Module] = nn.ModuleList
) -> Iterator[tuple[str, nn.Module]]:
    """The outermost lists of modules that look like blocks: not leaves, and with parameters."""
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        entries = list(child.children()) if isinstance(child, kind) else []
        if entries and all(_has_parts(entry) for entry in entries):
            yield path, child
        else:
            yield from named_block_lists(child, path, kind)


def _has_parts(module: nn.Module) -> bool:
    return any(True for _ in module.children()) and any(True for _ in module.parameters())


def _multiplies(module: nn.Module) -> bool:
    """Whether it has matrices, as blocks have whose output is a vector for each place; convolutions have none."""
    return any(parameter.dim() == 2 for parameter in module.parameters())


def size_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def input_embedding(model: Any) -> nn.Module | None:
    """The module that embeds the tokens; None for models that have none, or cannot say which it is."""
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError, TypeError):
        # In this order: a plain module; a class that leaves it open; a getter that asks of which of several inputs.
        return None
    return embedding if isinstance(embedding, nn.Module) else None


def _text_stacks(model: Any) -> list[tuple[str, nn.Module]]:
    """The modules in which to look for one list of blocks each: encoder and decoder, or the home of the text."""
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        names = {module: name for name, module in model.named_modules()}
        stacks = [model.get_encoder(), model.get_decoder()]
        return [(names[stack], stack) for stack in stacks if stack in names]
    embedding = input_embedding(model)
    path = next((name for name, module in model.named_modules() if module is embedding), "")
    # The smallest part of the model that holds both the input embedding and a list of blocks.
    while path:
        path = path.rpartition(".")[0]
        if next(named_block_lists(model.get_submodule(path)), None) is not None:
            break
    return [(path, model.get_submodule(path))]


def structural_stacks(model: nn.Module) -> list[list[str]]:
    """Names of the blocks in the largest list of modules of each stack."""
    stacks = []
    for path, stack in _text_stacks(model):
        found = list(named_block_lists(stack, path))
        found = found or [item for item in named_block_lists(stack, path, nn.Sequential) if _multiplies(item[1])]
        if found:
            name, blocks = max(found, key=lambda item: (_multiplies(item[1]), size_of(item[1])))
            stacks.append([f"{name}.{entry}" for entry, _ in blocks.named_children()])
    return stacks


def block_width(model: nn.Module, name: str) -> int:
    """Width of the vectors that a module puts out: the last dimension of its output.

    Raises:
        ValueError: if it cannot be told from the module or from a config above it.
    """
    module = model.get_submodule(name)
    for attribute in ("out_features", "embedding_dim", "nf"):
        if isinstance(getattr(module, attribute, None), int):
            return int(getattr(module, attribute))
    if isinstance(module, nn.LayerNorm):
        return int(module.normalized_shape[-1])
    path = name
    while path:
        path = path.rpartition(".")[0]
        config: Any = getattr(model.get_submodule(path), "config", None)
        if hasattr(config, "get_text_config"):
            config = config.get_text_config()
        if isinstance(getattr(config, "hidden_size", None), int):
            return int(config.hidden_size)
    leaves = [leaf for _, leaf in module.named_modules() if isinstance(getattr(leaf, "out_features", None), int)]
    if leaves:
        return int(leaves[-1].out_features)
    raise ValueError(
        f"The width of the hidden states that {name!r} ({type(module).__name__}) puts out cannot be told: neither it "
        "nor a config above it says so. Target a module that ends in a linear layer, or set model.config.hidden_size."
    )


def device_and_dtype(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a module computes and in what floating dtype, also if it is offloaded or quantised."""
    tensors = [*module.parameters(), *module.buffers()]
    dtype = next(
        (t.dtype for t in tensors if t.is_floating_point() and t.dtype.itemsize > 1), torch.get_default_dtype()
    )
    for part in module.modules():  # accelerate's hook knows where an offloaded module computes
        execution_device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if execution_device is not None:
            return torch.device(execution_device), dtype
    device = next((t.device for t in tensors if not t.is_meta), None)
    return device or (tensors[0].device if tensors else torch.device("cpu")), dtype
