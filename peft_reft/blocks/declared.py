"""Blocks as the classes of transformers declare them, where a declaration and the structure together are enough.

`can_record_outputs` of a model class names the class of module whose output it records as `hidden_states`. That is a
block; what it does not say is the shape of that output, nor that these are all the blocks. So a declaration counts only
for a plain stack: one list of blocks in the model (one for each side of an encoder-decoder), each made of norms and of
parts that map hidden states to hidden states, fed with tokens alone, in code of transformers' own. Then a block returns
[B, S, hidden_size]; the sweep of tests/test_architectures.py compares that with a trace for every type. Anything else,
such as several streams for a token or images beside the tokens, is left to `tracing`.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from peft_reft.blocks.compiled import named_children, own_modules, uncompiled
from peft_reft.blocks.structure import can_pad, input_embedding, is_own_code, modules_around, named_block_lists, path_of

NO_TEXT = ("pixel_values", "input_features", "input_values", "image", "audio", "video", "bbox")  # arguments' beginnings


@dataclass(frozen=True)
class DeclaredStack:
    """A stack of blocks that each return [B, S, width].

    Attributes:
        names: the blocks' own names, in their order.
        width: the number of elements of a token's vector.
    """

    names: list[str]
    width: int


def declared_stacks(model: nn.Module) -> list[DeclaredStack]:
    """The stacks of a model's blocks, encoder first; none where its classes do not declare enough."""
    whole: Any = uncompiled(model)
    if not isinstance(whole, PreTrainedModel) or not _takes_tokens_alone(whole):
        return []
    if whole.config.is_encoder_decoder:
        sides: dict[str, Any] = {
            "encoder": uncompiled(whole.get_encoder()),
            "decoder": uncompiled(whole.get_decoder()),
        }
    else:
        # The smallest model around the embedding that declares what it records.
        around = reversed(modules_around(whole, path_of(whole, input_embedding(whole))))
        sides = {"alone": next((module for module in around if _recorded_classes(module)), None)}
    lists = list(named_block_lists(whole))
    if len(lists) != len(sides) or any(not isinstance(side, PreTrainedModel) for side in sides.values()):
        return []
    stacks = [_stack_in(whole, side, kind, dict(lists)) for kind, side in sides.items()]
    return [stack for stack in stacks if stack is not None] if None not in stacks else []


def _takes_tokens_alone(model: PreTrainedModel) -> bool:
    """Whether each row of the hidden states stands for one row of ids and nothing else."""
    arguments = inspect.signature(type(model).forward).parameters
    return (
        "input_ids" in arguments
        and not any(name.startswith(NO_TEXT) for name in arguments)
        and getattr(model.config, "num_codebooks", 1) == 1
    )


def _recorded_classes(module: Any) -> tuple[type[nn.Module], ...]:
    """The classes whose output, or the first of whose outputs, a model records as hidden states; none if it says more
    than that, such as where in the model they have to be.
    """
    declared = module.can_record_outputs.get("hidden_states") if isinstance(module, PreTrainedModel) else None
    classes = []
    for entry in declared if isinstance(declared, (list, tuple)) else [declared]:
        if isinstance(entry, OutputRecorder):
            if entry.index or entry.layer_name or entry.class_name:
                return ()
            entry = entry.target_class
        if not isinstance(entry, type):  # nothing, or the ending of a module's name
            return ()
        classes.append(entry)
    return tuple(classes)


def _stack_in(whole: nn.Module, side: Any, kind: str, lists: dict[str, nn.Module]) -> DeclaredStack | None:
    """The stack of a model or of one of its sides; None if its classes do not declare enough."""
    classes = _recorded_classes(side)
    inside = {name: found for name, found in lists.items() if found in set(side.modules())}
    if not classes or len(inside) != 1:
        return None
    ((name, blocks),) = inside.items()
    around = [module for module in modules_around(whole, name) if isinstance(module, PreTrainedModel)]
    if not all(map(is_own_code, around)) or any(map(can_pad, around)):
        return None
    children = [block for _, block in named_children(blocks)]
    recorded = [module for module in own_modules(side).values() if isinstance(module, classes)]
    width = side.config.get_text_config(decoder=kind == "decoder").hidden_size
    is_stack = {id(block) for block in children} == {id(module) for module in recorded} and all(
        is_own_code(block) and _is_plain_block(block, width) for block in children
    )
    return DeclaredStack([f"{name}.{entry}" for entry, _ in blocks.named_children()], width) if is_stack else None


def _is_plain_block(block: nn.Module, width: int) -> bool:
    """Whether a block is made of norms and of parts that map hidden states [B, S, width] to hidden states."""
    own = [parameter for parameter in block.parameters(recurse=False) if parameter.dim() > 1]
    parts = [child for _, child in named_children(block) if any(p.dim() > 1 for p in child.parameters())]
    return not own and bool(parts) and all(_maps_hidden_states(part, width) for part in parts)


def _maps_hidden_states(part: nn.Module, width: int) -> bool:
    """Whether a part has a matrix that reads hidden states and one that writes them, or is one of these itself."""
    fits = [width in sizes for module in part.modules() for sizes in _matrix_sizes(module)]
    return sum(fits) >= 2 or all(fits)


def _matrix_sizes(module: nn.Module) -> list[tuple[int, ...]]:
    """The numbers of inputs and outputs, in either order, of the matrices that a module has itself."""
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(sizes[0], int) and isinstance(sizes[1], int):  # also of a quantised layer, whose weight is none
        return [(sizes[0], sizes[1])]
    return [tuple(parameter.shape[-2:]) for parameter in module.parameters(recurse=False) if parameter.dim() > 1]


def takes_no_text(module: Any) -> bool:
    """Whether transformers declares of a module that it takes images, sounds or other inputs, and no text."""
    declared = getattr(module, "input_modalities", None)
    return declared is not None and "text" not in ([declared] if isinstance(declared, str) else declared)
