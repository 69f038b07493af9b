"""ReftLayer: the interventions of one block, adapters by name.

The layer is a child module next to what the block has, not a wrapper around it: the block keeps its class, its
attributes and the names of its parameters, other adapters can be put inside it, and recorders of hidden states see
the edited ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from peft_reft.blocks import PLAIN, Layout, device_and_dtype
from peft_reft.context.block import CHILD, BlockEntry, attach_block_entry, undo_keep_called
from peft_reft.context.forward import EACH_IMAGE, ForwardContext
from peft_reft.context.state import ModelState
from peft_reft.interventions import Intervention, PartedRows, build_intervention
from peft_reft.positions import PositionSpec, parse_positions
from peft_reft.tuner.config import ReftConfig
from peft_reft.tuner.keys import COLLECTION

cached_spec = lru_cache(parse_positions)  # one object for all blocks and adapters with the same notation
# PEFT's tests look for adapters where its other methods have them, at the targeted module itself. In the block's
# __dict__ these are plain attributes: no submodules, and no parameter changes its name.
SHOWN = ("active_adapters", "adapter_layer_names", "other_param_names", COLLECTION)


def intervention_of(config: ReftConfig, width: int, r: int, init_weights: bool) -> nn.Module:
    """A fresh intervention of an adapter, for hidden states of a width."""
    return build_intervention(
        config.intervention,
        width,
        r,
        dropout=config.dropout,
        act_fn=config.act_fn,
        init_weights=init_weights,
        train_bias=config.train_bias,
        parts=config.parts,
    )


class ReftLayer(nn.Module, BaseTunerLayer):
    """The interventions next to one block.

    Args:
        block: the block whose output they edit.
        state: what the model's layers share.
        width: of the vectors in that output.
        layout: which axis of that output is which.
    """

    adapter_layer_names = (COLLECTION,)
    other_param_names = ("position_specs", "share_weights", "scaling", "subspaces", "chosen_subspaces", "to_be_loaded")

    if TYPE_CHECKING:  # properties of BaseTunerLayer
        active_adapters: list[str]
        disable_adapters: bool

        def delete_adapter(self, adapter_name: str) -> None: ...

    def __init__(self, block: nn.Module, state: ModelState, width: int, layout: Layout = PLAIN):
        super().__init__()
        self.state = state
        self.width = width
        self.layout = layout
        self.is_plain = layout == PLAIN  # as most are: [B, S, d]
        self.number = 0  # among the model's layers
        self.in_features = self.out_features = width  # PEFT's name for it, which every tuner layer has
        self.reft_interventions = nn.ModuleDict()  # adapter -> an intervention per position group
        self.position_specs: dict[str, PositionSpec] = {}
        self.share_weights: dict[str, bool | str] = {}
        self.scaling: dict[str, float] = {}  # strength of the edits: 0 none, 1 as trained
        self.subspaces: dict[str, dict[str, int]] = {}  # ranks by name, for adapters that have parts
        self.chosen_subspaces: dict[str, dict[str, float]] = {}  # their strengths, where not all are on
        self.to_be_loaded: dict[str, bool] = {}  # adapters created to be loaded: their config's `init_weights`
        self._block = (block,)  # in a tuple, so that it is no submodule
        self.cast_input_dtype_enabled = True  # which PEFT's disable_input_dtype_casting switches; nothing is cast here
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        super().__setstate__(attributes)
        self.state.add_layer(self)

    @property
    def block(self) -> nn.Module:
        return self._block[0]

    def add_adapter(
        self, name: str, config: ReftConfig, r: int, prompt_end: Sequence[int] = (), shared: ReftLayer | None = None
    ) -> None:
        """Create the interventions of an adapter, of which there is none of that name.

        Args:
            r: rank in this block.
            prompt_end: `config.prompt_end` as token ids.
            shared: a layer whose interventions are to be used here too.

        With `config.inference_mode` the adapter is created to be loaded: it edits nothing until its weights are there.
        A config that was read from a saved adapter says so too: see `_begin`.
        """
        spec = cached_spec(config.positions, config.turns, tuple(prompt_end))
        if shared is None:
            interventions: nn.Module = nn.ModuleList(
                self._fresh(config, r, spec.num_interventions(config.share_weights))
            )
        else:
            interventions = shared.reft_interventions[name]
        self.reft_interventions[name] = interventions
        self.position_specs[name] = spec
        self.share_weights[name] = config.share_weights
        self.scaling[name] = 1.0
        if config.subspaces:
            self.subspaces[name] = dict(config.subspaces)
        if config.inference_mode:
            self.to_be_loaded[name] = config.init_weights
        if shared is None:
            self._move_adapter_to_device_of_base_layer(name)

    def _fresh(self, config: ReftConfig, r: int, count: int) -> Iterable[nn.Module]:
        for _ in range(count):
            intervention = intervention_of(config, self.width, r, config.init_weights or config.inference_mode)
            if config.frozen_subspaces and isinstance(intervention, PartedRows):
                intervention.frozen = sum(config.parts[: len(config.frozen_subspaces)])
                if not config.inference_mode:
                    intervention.hold()
            if config.inference_mode and isinstance(intervention, Intervention):
                intervention.erase()
            yield intervention

    def edit(self, h: Tensor, context: ForwardContext) -> Tensor:
        """`h` [B, S, d] with the edits of a call, each computed on `h` itself and summed.

        Raises:
            ValueError: if `h` has another width, or no dimension of which positions could be.
        """
        if h.dim() != 3:
            return self.edit(self._as_rows(h, context), context).view(h.shape)
        out, number = h, self.number
        for edit in context.edits_of(self, h):
            factors = edit.blocks.get(number)
            if factors is not None:
                out = edit.add(out, h, factors)
        return out

    def _as_rows(self, h: Tensor, context: ForwardContext) -> Tensor:
        """The output [..., d] of a module without tokens as [B, S, d]: a row is a batch entry, one vector if [B, d]."""
        if context.columns is not None and context.prompts_of is not None:
            self.refuse_to_count(f"the call's {context.columns} tokens", h.shape)
        elif context.inputs is not None:
            self.refuse_to_count(EACH_IMAGE, h.shape)
        rows = h.shape[0] if h.dim() > 1 else 1
        return h.reshape(rows, -1, h.shape[-1])

    def refuse_to_count(self, counted: str, shape: Sequence[int]) -> None:
        """Raise if positions count something that does not lie on one axis of a hidden state of this shape."""
        others = sorted({str(spec) for spec in self.active_specs()} - {"all"})
        if others:
            raise ValueError(
                f"positions={others[0]!r} counts {counted}, but a targeted module returned a tensor of shape "
                f"{tuple(shape)}. Use positions='all', or target other modules."
            )

    def active_specs(self) -> list[PositionSpec]:
        """The position specs of the active adapters that are in this layer."""
        return [self.position_specs[name] for name in self.active_adapters if name in self.position_specs]

    def forward(self, h: Tensor) -> Tensor:
        """The identity: containers such as nn.Sequential run all children, but the block's entry does the edit."""
        return h

    def train(self, mode: bool = True) -> ReftLayer:
        """As `nn.Module.train`, which trainers call before every step; it passes over what is in that mode already."""
        adapters: Any = self.reft_interventions
        if self.training is not mode or adapters.training is not mode:
            self.training = adapters.training = mode
        for groups in adapters._modules.values():
            if groups.training is not mode:
                groups.training = mode
            for intervention in groups._modules.values():
                if intervention.training is not mode or intervention._modules:  # which may be in another mode
                    intervention.train(mode)
        return self

    def _begin(self, names: str | Sequence[str]) -> None:
        """Draw fresh weights for adapters that were created to be loaded and are trained instead.

        With zeros, R among them, they would never learn.
        """
        for name in [names] if isinstance(names, str) else names:
            if name not in self.to_be_loaded:
                continue
            groups: Any = self.reft_interventions[name]
            if any(parameter.is_meta or not parameter.numel() for parameter in groups.parameters()):
                continue  # to come, or sharded
            identity = self.to_be_loaded.pop(name)
            for intervention in groups:
                if isinstance(intervention, Intervention) and not any(bool(p.any()) for p in intervention.parameters()):
                    intervention.reset_parameters(identity)

    def hold(self) -> None:
        """Take back what was switched on of biases and subspaces that keep their values."""
        for groups in self.reft_interventions.values():
            for intervention in groups:  # type: ignore[attr-defined]
                if isinstance(intervention, PartedRows):
                    intervention.hold()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        if requires_grad:
            self._begin(adapter_names)
        super().set_requires_grad(adapter_names, requires_grad)
        self.hold()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        if not inference_mode:
            self._begin(adapter_names)
        super().set_adapter(adapter_names, inference_mode)
        self.hold()
        for name in SHOWN:
            if not hasattr(type(self.block), name):
                self.block.__dict__[name] = () if name == "other_param_names" else getattr(self, name)

    def _all_available_adapter_names(self) -> list[str]:
        """Those of the whole model, of which PEFT takes the next one when it deletes the active one from a layer.

        It asks each layer by itself, and adapters may edit different blocks.
        """
        return [name for name in self.state.adapters() if name not in self.active_adapters]

    # What BaseTunerLayer assumes of layers that wrap a module with a weight.

    @property
    def weight(self) -> Tensor:
        raise AttributeError("A ReFT layer has no weight: it edits the output of its block.")

    @property
    def bias(self) -> Tensor:
        raise AttributeError("A ReFT layer has no bias: it edits the output of its block.")

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: it is called when an adapter of another method on this model is merged. ReFT's own tuner refuses."""

    def unmerge(self) -> None:
        """Nothing: see `merge`."""

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if adapter_name not in self.reft_interventions:
            return
        interventions = self.reft_interventions[adapter_name]
        if not any(parameter.is_meta for parameter in interventions.parameters()):
            interventions.to(device or device_and_dtype(self.block)[0])


def attach_layer(block: nn.Module, width: int, layout: Layout, state: ModelState) -> ReftLayer:
    """The block's ReftLayer, created if it has none yet, with the entry that asks it."""
    layer = block._modules.get(CHILD)
    if not isinstance(layer, ReftLayer):
        layer = ReftLayer(block, state, width, layout)
        block.add_module(CHILD, layer)
    attach_block_entry(block, state)
    return layer


def detach_layer(block: nn.Module) -> None:
    """Remove the block's ReftLayer and its entry."""
    delattr(block, CHILD)
    for name in SHOWN:
        block.__dict__.pop(name, None)
    undo_keep_called(block)
    entry = block.__dict__.get("forward")
    if isinstance(entry, BlockEntry):
        entry.detach()
