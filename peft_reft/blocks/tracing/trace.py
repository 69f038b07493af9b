"""One forward of a weightless copy of a model on dummy inputs: what each of its modules was given and returned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from peft_reft.blocks.layout import hidden_state_of
from peft_reft.blocks.structure import input_embedding
from peft_reft.blocks.tracing.dummy_inputs import EntryPoint, dummy_inputs
from peft_reft.blocks.tracing.weightless import call_quietly, weightless_copy


@dataclass
class ModuleCall:
    """One call of a module in a trace.

    Attributes:
        name: the module's.
        inputs: the floating-point tensors it was given.
        output: the first tensor in what it returned, if any.
    """

    name: str
    inputs: list[Tensor]
    output: Tensor | None


@dataclass
class Trace:
    """The calls of all modules in one forward, in the order in which they returned.

    Attributes:
        rows, columns: the shape of the tokens that went in.
        decoder_columns: that of an encoder-decoder's decoder; the same if there is none.
        is_image: whether images went in, and no tokens.
    """

    rows: int
    columns: int
    decoder_columns: int
    is_image: bool
    calls: list[ModuleCall] = field(default_factory=list)

    @cached_property
    def by_name(self) -> dict[str, list[ModuleCall]]:
        """The calls of each module that ran."""
        by_name: dict[str, list[ModuleCall]] = {}
        for call in self.calls:
            by_name.setdefault(call.name, []).append(call)
        return by_name


def trace(
    model: nn.Module,
    entry: EntryPoint,
    rows: int,
    columns: int,
    other_at: int | None = None,
    followed: str | None = None,
) -> Trace:
    """Call a weightless copy of the model on tokens.

    Args:
        other_at: a column (0 or -1) that gets another token than without it.
        followed: the name of a module whose output requires a gradient, so that what is computed from it does, too;
            nothing else does.

    Raises:
        Exception: whatever the model's code raises on such inputs.
    """
    copied = weightless_copy(model)
    part = copied.get_submodule(entry.path)
    inputs = dummy_inputs(part, entry, rows, columns, other_at)
    decoder_ids = inputs.get("decoder_input_ids")
    decoder_columns = columns if decoder_ids is None else decoder_ids.shape[1]
    record = Trace(rows, columns, decoder_columns, is_image="input_ids" not in inputs)
    for name, module in copied.named_modules():

        def hook(_: Any, args: tuple, kwargs: dict, output: Any, name: str = name) -> None:
            given = [t for t in _tensors_in([args, kwargs]) if t.is_floating_point()]
            h = hidden_state_of(output)
            if name == followed and h is not None:
                h.requires_grad_()
            record.calls.append(ModuleCall(name, given, h))

        module.register_forward_hook(hook, with_kwargs=True)
    embedding = input_embedding(copied)
    for module in copied.modules():  # tied embeddings are modules of their own
        if module is embedding or (isinstance(module, nn.Embedding) and _same_table(module, embedding)):
            module.register_forward_hook(_distinct_vectors, prepend=True)
    with torch.set_grad_enabled(followed is not None):
        call_quietly(part, inputs)
    return record


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in a nest of tuples, lists and mappings, in their order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors_in(item)


def _same_table(module: nn.Embedding, embedding: nn.Module | None) -> bool:
    return isinstance(embedding, nn.Embedding) and module.weight.shape == embedding.weight.shape


def _distinct_vectors(module: nn.Module, args: tuple, output: Any) -> Any:
    """Hook of the embedding: each token id gets a vector of its own, so that one can see where it went."""
    if not isinstance(output, Tensor) or not args or not isinstance(args[0], Tensor) or args[0].is_floating_point():
        return output
    waves = torch.arange(1, output.shape[-1] + 1, dtype=torch.float32)
    return torch.sin(waves * (1.0 + args[0].unsqueeze(-1).float())).view(output.shape).to(output.dtype) + output
