"""ReftLayer: the interventions of one block, adapters by name, and the hook through which the block's output passes.

The layer is a child module *beside* what the block has, not a wrapper around it: the block keeps its class, its
attributes and the names of its parameters, other adapters can be put inside it, and recorders of hidden states see
the edited ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from peft_reft.blocks import device_and_dtype, edit_hidden_state
from peft_reft.config import ReftConfig
from peft_reft.interventions import Factors, Intervention, Source, build_intervention, edit_of, low_rank_edit
from peft_reft.positions import PositionSpec, parse_positions
from peft_reft.scope import Frame, frame_of_block
from peft_reft.sites import add_edit

CHILD = "reft"  # the layer's name below its block; must not hold the prefix "reft_", by which PEFT skips modules


class ReftLayer(nn.Module, BaseTunerLayer):
    """The interventions beside one block.

    Args:
        block: the block whose output they edit.
        width: the last dimension of that output.
    """

    adapter_layer_names = ("reft_interventions",)
    other_param_names = ("position_specs", "share_weights", "never_ran")

    def __init__(self, block: nn.Module, width: int):
        super().__init__()
        self.width = width
        self.reft_interventions = nn.ModuleDict()  # adapter name -> ModuleList, one intervention per position group
        self.position_specs: dict[str, PositionSpec] = {}
        self.share_weights: dict[str, bool | str] = {}
        self.never_ran: dict[str, bool] = {}  # adapters that exist but have edited nothing yet
        self._block = (block,)  # in a tuple, so that it is no submodule
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self.merged_adapters: list[str] = []

    @property
    def block(self) -> nn.Module:
        return self._block[0]

    def add_adapter(
        self, name: str, config: ReftConfig, r: int, prompt_end: Sequence[int] = (), shared: ReftLayer | None = None
    ) -> None:
        """Create the interventions of an adapter; an existing one of that name is replaced.

        Args:
            r: rank in this block.
            prompt_end: `config.prompt_end` as token ids.
            shared: a layer whose interventions are to be used here too.
        """
        spec = parse_positions(config.positions, config.turns, prompt_end)
        if shared is None:
            interventions = nn.ModuleList(
                build_intervention(
                    config.intervention,
                    self.width,
                    r,
                    dropout=config.dropout,
                    act_fn=config.act_fn,
                    init_weights=config.init_weights,
                )
                for _ in range(spec.num_interventions(config.share_weights))
            )
        elif shared.width == self.width:
            interventions = shared.reft_interventions[name]  # type: ignore[assignment]
        else:
            raise ValueError(
                f"share_layers=True needs blocks of one width, but found {shared.width} and {self.width}. "
                "Choose blocks of one width with layers_to_transform or target_modules, or do not share."
            )
        self.reft_interventions[name] = interventions
        self.position_specs[name] = spec
        self.share_weights[name] = config.share_weights
        self.never_ran[name] = True
        if shared is None:
            self._move_adapter_to_device_of_base_layer(name)

    def edit(self, h: Tensor, frame: Frame | None) -> Tensor:
        """`h` with the edits of all active adapters, each computed on `h` itself and summed."""
        out = h
        for name in self.active_adapters:
            if name not in self.reft_interventions:
                continue  # an adapter of other blocks
            if h.shape[-1] != self.width:
                raise ValueError(
                    f"A block put out vectors of width {h.shape[-1]}, but adapter {name!r} was made for width "
                    f"{self.width}. Exclude that block with exclude_modules, or target other modules."
                )
            out = self._add_edit(out, h, name, frame)
        return out

    def _add_edit(self, out: Tensor, h: Tensor, name: str, frame: Frame | None) -> Tensor:
        self.never_ran.pop(name, None)
        spec = self.position_specs[name]
        if (frame is None or frame.columns is None) and str(spec) == "all":  # nothing to count: every vector
            vectors = h.reshape(1, 1, -1, self.width)
            edit = self._edit_of(name, None)(vectors, torch.ones((), device=h.device))
            return out + edit.view(h.shape).to(h.dtype)
        if frame is None:
            raise ValueError(
                f"positions={str(spec)!r} counts tokens, but the block of a ReFT adapter ran outside of its model's "
                "forward, where there are none. Call the model as a whole, or use positions='all'."
            )
        sites = frame.sites(spec, self.share_weights[name], h)
        if sites is None:
            return out
        return add_edit(out, h, sites, self._edit_of(name, frame.factors(self, name)))

    def _edit_of(self, name: str, factors: Factors | None) -> Callable[[Tensor, Tensor], Tensor]:
        """The function that maps vectors [B, G, P, d] to their edits.

        Args:
            factors: what the call worked out for all layers together, if it could.
        """
        interventions = self.reft_interventions[name]

        def edit(selected: Tensor, keep: Tensor) -> Tensor:
            if factors is None:
                groups = zip(interventions, selected.unbind(1))
                return torch.stack([edit_of(module, h) for module, h in groups], dim=1) * keep
            with torch.autocast(selected.device.type, enabled=False):
                return interventions[0].dropout(low_rank_edit(selected, factors, keep))

        return edit

    def forward(self, h: Tensor) -> Tensor:
        """The identity: containers such as nn.Sequential run all their children, but the block's hook does the edit."""
        return h

    # What BaseTunerLayer assumes of layers that wrap a module with a weight.

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        raise AttributeError("A ReFT layer has no weight: it edits what its block puts out.")

    @property
    def bias(self) -> Tensor:  # type: ignore[override]
        raise AttributeError("A ReFT layer has no bias: it edits what its block puts out.")

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if adapter_name not in self.reft_interventions:
            return
        interventions = self.reft_interventions[adapter_name]
        if not any(parameter.is_meta for parameter in interventions.parameters()):
            interventions.to(device or device_and_dtype(self.block)[0])


def edit_block_output(block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of a block: its output passes through its `ReftLayer`."""
    layer = getattr(block, CHILD)
    if layer.disable_adapters:
        return output
    frame = frame_of_block((*args, *kwargs.values()))
    return edit_hidden_state(output, lambda h: layer.edit(h, frame))


def attach_layer(block: nn.Module, width: int) -> ReftLayer:
    """The block's ReftLayer, created and hooked up if it has none yet."""
    layer = getattr(block, CHILD, None)
    if not isinstance(layer, ReftLayer):
        layer = ReftLayer(block, width)
        block.add_module(CHILD, layer)
        block.register_forward_hook(edit_block_output, prepend=True, with_kwargs=True)  # before whatever records hidden states
    return layer


def detach_layer(block: nn.Module) -> None:
    """Remove the block's ReftLayer and its hook."""
    delattr(block, CHILD)
    for key, hook in list(block._forward_hooks.items()):
        if hook is edit_block_output:
            del block._forward_hooks[key]
            block._forward_hooks_with_kwargs.pop(key, None)


def batch_factors(layers: Sequence[ReftLayer]) -> dict[tuple[int, str], Factors]:
    """Work out `Factors` for all layers and active adapters together: one orthonormalisation per kind and shape.

    Interventions of the user's own, and parameters that are not there to be read before their module runs (sharded,
    offloaded), are left out; `ReftLayer` then calls the modules themselves.
    """
    batches: dict[tuple[Any, ...], list[tuple[tuple[int, str], list[Intervention]]]] = {}
    for layer in layers:
        for name in layer.active_adapters:
            if layer.disable_adapters or name not in layer.reft_interventions:
                continue
            interventions = list(layer.reft_interventions[name])
            key = _batch_key(interventions)
            if key is not None:
                batches.setdefault(key, []).append(((id(layer), name), interventions))
    factors = {}
    for (groups, *_), members in batches.items():
        flat = [intervention for _, interventions in members for intervention in interventions]
        up = flat[0].basis.combine(torch.stack([i.basis.weight for i in flat]))
        linear = isinstance(flat[0].source, Source)
        weight = torch.stack([i.source.weight for i in flat]) if linear else None
        bias = torch.stack([i.source.bias if linear else i.source.weight for i in flat])
        batch = flat[0].combine(up, weight, bias)
        split = [part if not isinstance(part, Tensor) else part.unflatten(0, (-1, groups)).unbind(0) for part in batch]
        for number, (owner, _) in enumerate(members):
            parts = [part[number] if isinstance(part, tuple) else part for part in split]
            if groups == 1:
                parts = [part.squeeze(0) if isinstance(part, Tensor) else part for part in parts]
            factors[owner] = Factors(*parts)
    return factors


def _batch_key(interventions: list[Any]) -> tuple[Any, ...] | None:
    """What interventions must have in common to be worked out together; None if they cannot be."""
    first = interventions[0]
    if not isinstance(first, Intervention) or _own_equation(type(first)):
        return None
    r, d = first.shape
    for intervention in interventions:
        for parameter in intervention.parameters():
            if type(parameter) is not nn.Parameter or parameter.is_meta or not parameter.numel():
                return None
    weight = first.basis.weight
    return (len(interventions), first.orthonormal, first.replaces, first.has_source, first.act_fn, r, d, weight.dtype, weight.device)


def _own_equation(cls: type[Intervention]) -> bool:
    """Whether a subclass does more than choose among the built-in equations."""
    return any(getattr(cls, name) is not getattr(Intervention, name) for name in ("forward", "edit", "combine"))
