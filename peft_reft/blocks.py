"""A model's blocks: finding them, their width, and the hidden state in what they return.

No table of architectures: the blocks are where the model keeps its text, in the largest list of modules.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput


def named_block_lists(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    """The outermost lists of modules that look like blocks: not leaves, and with parameters."""
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        is_list = isinstance(child, nn.ModuleList) and len(child) > 0
        if is_list and all(any(True for _ in b.children()) and any(True for _ in b.parameters()) for b in child):
            yield path, child
        else:
            yield from named_block_lists(child, path)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _text_stacks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules in which to look for one list of blocks each: encoder and decoder, or the home of the text."""
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        names = {module: name for name, module in model.named_modules()}
        stacks = [model.get_encoder(), model.get_decoder()]
        return [(names[stack], stack) for stack in stacks if stack in names]
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        embedding = None
    path = next((name for name, module in model.named_modules() if module is embedding), "")
    # The smallest part of the model that holds both the input embedding and a list of blocks.
    while path:
        path = path.rpartition(".")[0]
        if next(named_block_lists(model.get_submodule(path)), None) is not None:
            break
    return [(path, model.get_submodule(path))]


def find_blocks(model: nn.Module) -> list[list[str]]:
    """Names of the blocks of each of the model's stacks, in their order.

    Raises:
        ValueError: if there is no list of blocks; the message lists the modules one could name instead.
    """
    stacks = []
    for path, stack in _text_stacks(model):
        lists = list(named_block_lists(stack, path))
        if lists:
            name, blocks = max(lists, key=lambda item: _size(item[1]))
            stacks.append([f"{name}.{i}" for i in range(len(blocks))])
    if not stacks:
        candidates = [name for name, module in model.named_modules() if name and any(True for _ in module.parameters())]
        shown = ", ".join(candidates[:20]) + (", ..." if len(candidates) > 20 else "")
        raise ValueError(
            f"No list of blocks was found in {type(model).__name__}. Name the modules whose output is to be edited "
            f"in ReftConfig(target_modules=[...]); candidates: {shown or 'none, the model has no parameters'}."
        )
    return stacks


def block_number(name: str) -> int | None:
    """The number of the block that a module is or lies in: the first numbered part of its name.

    >>> block_number("model.layers.3.mlp"), block_number("lm_head")
    (3, None)
    """
    match = re.match(r"(?:.*?\.)??(\d+)(?:\.|$)", name)
    return int(match[1]) if match else None


def group_by_stack(names: list[str]) -> list[list[str]]:
    """Names of modules, grouped by the stack of blocks they lie in: by what stands before the block's number."""
    stacks: dict[str, list[str]] = {}
    for name in names:
        match = re.match(r"((?:.*?\.)??)\d+(?:\.|$)", name)
        stacks.setdefault(match[1] if match else "", []).append(name)
    return list(stacks.values())


def pick_layers(stacks: list[list[str]], layers: int | list[int] | None) -> list[str]:
    """The modules that `layers_to_transform` names, stack by stack, in the model's order.

    Args:
        stacks: names of modules; within a stack block numbers count from 0.
        layers: block numbers, negative ones counted from the end of each stack; None for all.

    Raises:
        ValueError: if a number names no block in any stack.
    """
    if layers is None:
        return [name for stack in stacks for name in stack]
    wanted = [layers] if isinstance(layers, int) else list(layers)
    picked, found = [], set()
    for stack in stacks:
        numbers = {name: block_number(name) for name in stack}
        depth = 1 + max((n for n in numbers.values() if n is not None), default=-1)
        named = {n: depth + n if n < 0 else n for n in wanted}
        found |= {n for n, number in named.items() if number in numbers.values()}
        picked += [name for name, number in numbers.items() if number in named.values()]
    missing = [n for n in wanted if n not in found]
    if missing:
        depths = " and ".join(str(len(stack)) for stack in stacks)
        raise ValueError(
            f"layers_to_transform={layers!r} names blocks that do not exist: {missing}. The model has {depths} "
            f"block(s); number them 0 to {max(len(stack) for stack in stacks) - 1}, or from the end with -1, -2, ..."
        )
    return picked


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
        config = getattr(model.get_submodule(path), "config", None)
        if hasattr(config, "get_text_config"):
            config = config.get_text_config()
        if isinstance(getattr(config, "hidden_size", None), int):
            return int(config.hidden_size)
    leaves = [leaf for _, leaf in module.named_modules() if isinstance(getattr(leaf, "out_features", None), int)]
    if leaves:
        return int(leaves[-1].out_features)  # type: ignore[arg-type]
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


def edit_hidden_state(output: Any, edit: Callable[[Tensor], Tensor]) -> Any:
    """What a block returned with its hidden state replaced: a tensor, or the first of a tuple, list or ModelOutput."""
    if isinstance(output, Tensor):
        return edit(output)
    if isinstance(output, ModelOutput):
        name = next(iter(output))
        return type(output)(**{**output, name: edit(output[name])})
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        values = [edit(output[0]), *output[1:]]
        return type(output)(*values) if hasattr(output, "_fields") else type(output)(values)
    raise TypeError(f"A block returned {type(output).__name__}, in which no hidden state can be told.")
