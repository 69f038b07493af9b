"""A model that is looked at: lent an adapter without parameters, whose places are read or restored, and given back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_reft.blocks import ModelBlocks, present_names
from peft_reft.context.sources import COLLECTED, Collected
from peft_reft.context.state import ModelState
from peft_reft.tuner.config import ReftConfig
from peft_reft.tuner.injection import (
    base_model_of,
    predicts_tokens,
    rebuild_entries,
    reft_layers,
    remove_adapter,
    state_of,
)
from peft_reft.tuner.layer import ReftLayer, attach_layer
from peft_reft.tuner.targets import choose_targets

NAME = "causal_probe"  # of the adapter that is lent


def on_device(value: Any, model: nn.Module) -> Any:
    """Inputs, however nested, where the model's first parameter is."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: on_device(entry, model) for name, entry in value.items()}
    return value


@dataclass(eq=False)
class Probe:
    """A model with the adapter that is lent.

    Attributes:
        base: the model.
        layers: by block, the layers that have it.
    """

    base: Any
    layers: dict[str, ReftLayer]

    def read(self, inputs: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
        """By block, the hidden states at the places of some inputs [B, P, d], and which places there are [B, P]."""
        collected = Collected()
        self.base(**inputs, **{COLLECTED: collected})
        found = {}
        for block, layer in self.layers.items():
            key = (layer.number, NAME)
            if key in collected.found:
                states, keep = collected.found[key]
                found[block] = (states.flatten(1, 2), keep.flatten(1))
        return found

    def restored(self, inputs: Mapping[str, Any], block: str, columns: Sequence[int], states: Tensor) -> Any:
        """The output for one row of inputs, repeated: in row i the state of a block at `columns[i]` is `states[i]`.

        Args:
            inputs: of one row.
            states: [n, d].
        """
        layer = self.layers[block]
        key = (layer.number, NAME)
        keep = torch.ones(len(columns), 1, 1, dtype=torch.bool, device=states.device)
        sources = Collected({key: (states[:, None, None], keep)})
        rows = {
            name: value.expand(len(columns), *value.shape[1:]) if _is_a_row(value) else value
            for name, value in inputs.items()
        }
        places = torch.tensor([[column] for column in columns], device=states.device)
        for other in self.layers.values():
            other._active_adapter = [NAME] if other is layer else []
        try:
            return self.base(**rows, intervention_locations=places, source_inputs=sources)
        finally:
            for other in self.layers.values():
                other._active_adapter = [NAME]


def _is_a_row(value: Any) -> bool:
    return isinstance(value, Tensor) and value.shape[:1] == (1,)


@contextmanager
def probing(
    model: nn.Module,
    positions: str,
    layers: Sequence[int] | int | None = None,
    target_modules: list[str] | str | None = None,
) -> Iterator[Probe]:
    """Lend a model an adapter of the intervention "vanilla"; its own ReFT adapters are switched off meanwhile.

    Raises:
        ValueError: if there is nothing to look at: no blocks are found, or none of that name or number.
    """
    base = base_model_of(model)
    config = ReftConfig(
        r=1,
        intervention="vanilla",
        positions=positions,
        layers_to_transform=layers if layers is None or isinstance(layers, int) else list(layers),
        target_modules=target_modules
        if target_modules is None or isinstance(target_modules, str)
        else [*target_modules],
    )
    state = state_of(base)
    blocks = ModelBlocks(base) if state is None else state.blocks_of(base)
    state = state or ModelState(blocks)
    chosen, _ = choose_targets(config, base, blocks)
    if not chosen:
        raise ValueError(f"target_modules={target_modules!r} names no module of {type(base).__name__}.")
    present = present_names(base)
    names = [name for stack in blocks.stacks() for name in stack] if target_modules is None else []
    ordered = [name for name in names or present if name in chosen]
    own = {layer: (layer._active_adapter, layer._disable_adapters) for layer in reft_layers(base).values()}
    causal = state.causal
    try:
        lent = {}
        for name in ordered:
            width, layout = blocks.shape_of(name)
            lent[name] = attach_layer(base.get_submodule(present[name]), width, layout, state)
            lent[name].add_adapter(NAME, config, 1)
        blocks.forget_trace()
        state.causal = causal or predicts_tokens(base)
        rebuild_entries(base, state)
        for layer in reft_layers(base).values():
            layer._active_adapter, layer._disable_adapters = [NAME], False
        yield Probe(base, lent)
    finally:
        for layer in reft_layers(base).values():
            layer._active_adapter, layer._disable_adapters = own.get(layer, ([], False))
        state.causal = causal
        remove_adapter(base, NAME)
