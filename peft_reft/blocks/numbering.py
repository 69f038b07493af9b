"""The numbers of blocks, and what `layers_to_transform` picks by them."""

from __future__ import annotations

import re


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
