"""What a model's modules put out, seen by running a stand-in for the model on a few tokens."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from peft_reft.blocks.layout import hidden_state_of
from peft_reft.blocks.structure import input_embedding
from peft_reft.blocks.tracing.example_inputs import Entry, example_inputs
from peft_reft.blocks.tracing.stand_in import call_quietly, stand_in


@dataclass
class Event:
    """One call of a module in a run.

    Attributes:
        name: the module's.
        inputs: the floating-point tensors it was given.
        output: the first tensor in what it returned, if any.
    """

    name: str
    inputs: list[Tensor]
    output: Tensor | None


@dataclass
class Run:
    """The calls of all modules in one forward, in the order in which they returned.

    Attributes:
        rows, columns: the shape of the tokens that went in.
        decoder_columns: that of an encoder-decoder's decoder; the same if there is none.
        is_image: whether images went in, and no tokens.
    """

    rows: int
    columns: int
    decoder_columns: int
    is_image: bool = False
    events: list[Event] = field(default_factory=list)

    def calls(self) -> dict[str, list[Event]]:
        """The calls by the modules' names."""
        calls: dict[str, list[Event]] = {}
        for event in self.events:
            calls.setdefault(event.name, []).append(event)
        return calls


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in a nest of tuples, lists and mappings, in their order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


def run(model: nn.Module, entry: Entry, rows: int, columns: int, first_token: int = 0) -> Run:
    """Run a stand-in for the model on tokens.

    Args:
        first_token: which of the usable token ids the rows begin with.

    Raises:
        Exception: whatever the model's code raises on such inputs.
    """
    clone = stand_in(model)
    part = clone.get_submodule(entry.path)
    record = _record(part, rows, columns)
    for name, module in clone.named_modules():

        def hook(_: Any, args: tuple, kwargs: dict, output: Any, name: str = name) -> None:
            inputs = [t for t in tensors_in([args, kwargs]) if t.is_floating_point()]
            record.events.append(Event(name, inputs, hidden_state_of(output)))

        module.register_forward_hook(hook, with_kwargs=True)
    embedding = input_embedding(clone)
    for module in clone.modules():  # tied embeddings are modules of their own
        if module is embedding or (isinstance(module, nn.Embedding) and _same_table(module, embedding)):
            module.register_forward_hook(_distinct_vectors, prepend=True)
    with torch.no_grad():
        call_quietly(part, example_inputs(part, entry, rows, columns, record.decoder_columns, first_token))
    return record


def _record(module: nn.Module, rows: int, columns: int) -> Run:
    """An empty record of a run with tokens of this shape."""
    names = inspect.signature(type(module).forward).parameters
    return Run(rows, columns, columns + 5 if "decoder_input_ids" in names else columns, "input_ids" not in names)


def is_read(model: nn.Module, entry: Entry, name: str, rows: int, columns: int) -> bool:
    """Whether what the model puts out (its logits, mostly) depends on a module's output in a differentiable way.

    True also where that cannot be told.
    """
    clone = stand_in(model)
    part = clone.get_submodule(entry.path)

    def follow(_: Any, args: tuple, output: Any) -> None:
        h = hidden_state_of(output)
        if h is not None:
            h.requires_grad_()  # nothing else does, so that only what is worked out from it will

    clone.get_submodule(name).register_forward_hook(follow)
    inputs = example_inputs(part, entry, rows, columns, _record(part, rows, columns).decoder_columns)
    try:
        with torch.enable_grad():
            output = call_quietly(part, inputs)
    except Exception:  # code that writes to what requires gradients
        return True
    result = hidden_state_of(output)
    return result is None or result.requires_grad


def _same_table(module: nn.Embedding, embedding: nn.Module | None) -> bool:
    return isinstance(embedding, nn.Embedding) and module.weight.shape == embedding.weight.shape


def _distinct_vectors(module: nn.Module, args: tuple, output: Any) -> Any:
    """Hook of the embedding: each token id gets a vector of its own, so that one can tell where it went."""
    if not isinstance(output, Tensor) or not args or not isinstance(args[0], Tensor) or args[0].is_floating_point():
        return output
    waves = torch.arange(1, output.shape[-1] + 1, dtype=torch.float32)
    return torch.sin(waves * (1.0 + args[0].unsqueeze(-1).float())).view(output.shape).to(output.dtype) + output
