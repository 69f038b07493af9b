"""ReftLayer: the interventions of one block, adapters by name, and the hook through which the block's output passes.

The layer is a child module *beside* what the block has, not a wrapper around it: the block keeps its class, its
attributes and the names of its parameters, other adapters can be put inside it, and recorders of hidden states see
the edited ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from peft_reft.config import ReftConfig
from peft_reft.factors import batch_factors, fingerprint, stack_factors, values_on_cpu
from peft_reft.frame import Frame, frame_of_block
from peft_reft.interventions import Factors, build_intervention, edit_of, low_rank_edit
from peft_reft.layout import PLAIN, Layout, edit_hidden_state
from peft_reft.positions import PositionSpec, parse_positions
from peft_reft.sites import add_edit
from peft_reft.structure import device_and_dtype

SHOWN = ("active_adapters", "adapter_layer_names", "other_param_names", "reft_interventions")  # on the block, too
CHILD = "reft"  # the layer's name below its block; must not hold the prefix "reft_", by which PEFT skips modules


class ReftLayer(nn.Module, BaseTunerLayer):
    """The interventions beside one block.

    Args:
        block: the block whose output they edit.
        width: of the vectors in that output.
        layout: where in that output they stand.
    """

    adapter_layer_names = ("reft_interventions",)
    other_param_names = ("position_specs", "share_weights", "scaling", "being_loaded")

    if TYPE_CHECKING:  # properties of BaseTunerLayer
        active_adapters: list[str]
        disable_adapters: bool

    def __init__(self, block: nn.Module, width: int, layout: Layout = PLAIN):
        super().__init__()
        self.width = width
        self.layout = layout
        self.in_features = self.out_features = width  # PEFT's name for it, which every tuner layer has
        self.reft_interventions = nn.ModuleDict()  # adapter name -> ModuleList, one intervention per position group
        self.position_specs: dict[str, PositionSpec] = {}
        self.share_weights: dict[str, bool | str] = {}
        self.scaling: dict[str, float] = {}  # strength of the edits: 0 none, 1 as trained
        self.being_loaded: dict[str, bool] = {}  # adapters whose weights are still to come from a checkpoint
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
        else:
            interventions = shared.reft_interventions[name]  # type: ignore[assignment]
        self.reft_interventions[name] = interventions
        self.position_specs[name] = spec
        self.share_weights[name] = config.share_weights
        self.scaling[name] = 1.0
        if shared is None:
            self._move_adapter_to_device_of_base_layer(name)

    def edit(self, h: Tensor, frame: Frame | None) -> Tensor:
        """`h` with the edits of all active adapters, each computed on `h` itself and summed."""
        if frame is not None and not frame.edits:
            return h
        rows = frame.adapters_by_row(h.shape[0]) if frame is not None else None
        names = self.active_adapters if rows is None else dict.fromkeys(rows)
        names = [name for name in names if name in self.reft_interventions]  # others belong to other blocks
        if not names:
            return h
        if h.shape[-1] != self.width:
            raise ValueError(
                f"A block put out vectors of width {h.shape[-1]}, but adapter {names[0]!r} was made for width "
                f"{self.width}. Exclude that block with exclude_modules, or target other modules."
            )
        if frame is not None and frame.columns is None and h.dim() != 3:
            specs = {str(self.position_specs[name]) for name in names}
            return self.edit(as_rows(h, specs), frame).reshape(h.shape)
        if frame is not None and rows is not None:
            return self._edit_rows(h, rows, frame)
        out = h
        for name in names:
            out = self._add_edit(out, h, name, frame)
        return out

    def _add_edit(self, out: Tensor, h: Tensor, name: str, frame: Frame | None) -> Tensor:
        spec, scale = self.position_specs[name], self.scaling[name]
        if (frame is None or frame.columns is None) and str(spec) == "all":  # nothing to count: every vector
            vectors = h.reshape(1, 1, -1, self.width)
            edit = self._edit_of(name, None)(vectors, torch.full((), float(scale), device=h.device))
            return out + edit.view(h.shape).to(h.dtype)
        if frame is None:
            raise ValueError(
                f"positions={str(spec)!r} counts tokens, but the block of a ReFT adapter ran outside of its model's "
                "forward, where there are none. Call the model as a whole, or use positions='all'."
            )
        sites = frame.sites(spec, self.share_weights[name], h)
        if sites is None:
            return out
        if scale != 1:
            sites = sites._replace(keep=sites.keep * scale)
        return add_edit(out, h, sites, self._edit_of(name, frame.factors(self, name)))

    def _edit_rows(self, h: Tensor, names: Sequence[str], frame: Frame) -> Tensor:
        """`h` with each row's edit by its own adapter: one gather, batched products and one scatter for all that
        multiply with the same kinds of factors.
        """
        passes: dict[Any, list[str | None]] = {}
        for row, name in enumerate(names):
            if name in self.reft_interventions:
                passes.setdefault(self._pass_of(name, frame), [None] * len(names))[row] = name
        out = h
        for members in passes.values():
            wanted = [
                None if name is None else (self.position_specs[name], self.share_weights[name], self.scaling[name])
                for name in members
            ]
            sites = frame.sites_by_row(tuple(wanted), h)
            if sites is None:
                continue
            factors = [None if name is None else frame.factors(self, name) for name in members]
            some = next(name for name in members if name is not None)
            together = stack_factors(factors) if any(f is not None for f in factors) else None
            out = add_edit(out, h, sites, self._edit_of(some, together))
        return out

    def _pass_of(self, name: str, frame: Frame) -> Any:
        """Adapters of the same pass can be run together, each on rows of its own."""
        factors = frame.factors(self, name)
        first: Any = self.reft_interventions[name][0]  # type: ignore[index]
        if factors is None or (self.training and first.dropout.p):
            return name
        bounded = self.position_specs[name].widths() is not None
        return first.act_fn, factors.projection is not None, bounded, first.basis.weight.dtype

    def _edit_of(self, name: str, factors: Factors | None) -> Callable[[Tensor, Tensor], Tensor]:
        """The function that maps vectors [B, G, P, d] to their edits.

        Args:
            factors: [G, r, d], or [B, G, r, d] by row; None to call the interventions as modules.
        """
        interventions: Any = self.reft_interventions[name]

        def edit(selected: Tensor, keep: Tensor) -> Tensor:
            if factors is None:
                groups = zip(interventions, selected.unbind(1))
                return torch.stack([edit_of(module, h) for module, h in groups], dim=1) * keep
            with torch.autocast(selected.device.type, enabled=False):
                return cast("Tensor", interventions[0].dropout(low_rank_edit(selected, factors, keep)))

        return edit

    def forward(self, h: Tensor) -> Tensor:
        """The identity: containers such as nn.Sequential run all their children, but the block's hook does the edit."""
        return h

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode)
        # Whoever looks for adapters where PEFT's other methods have them, at the targeted module itself, finds them
        # too. In the block's __dict__ they are plain attributes: no submodules, and no parameter changes its name.
        for name in SHOWN:
            if not hasattr(type(self.block), name):
                self.block.__dict__[name] = () if name == "other_param_names" else getattr(self, name)

    # What BaseTunerLayer assumes of layers that wrap a module with a weight.

    @property
    def weight(self) -> Tensor:
        raise AttributeError("A ReFT layer has no weight: it edits what its block puts out.")

    @property
    def bias(self) -> Tensor:
        raise AttributeError("A ReFT layer has no bias: it edits what its block puts out.")

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if adapter_name not in self.reft_interventions:
            return
        interventions = self.reft_interventions[adapter_name]
        if not any(parameter.is_meta for parameter in interventions.parameters()):
            interventions.to(device or device_and_dtype(self.block)[0])


def as_rows(h: Tensor, specs: set[str]) -> Tensor:
    """The output [..., d] of a module without tokens as [B, S, d]: a row is a batch entry, of one vector if [B, d].

    Raises:
        ValueError: if some spec of `specs` counts positions and there is no dimension of which they could be.
    """
    if h.dim() > 3 and specs != {"all"}:
        raise ValueError(
            f"positions={sorted(specs - {'all'})[0]!r} counts the vectors of a sequence [B, S, d], but a targeted "
            f"module put out a tensor of shape {tuple(h.shape)}. Use positions='all', or target other modules."
        )
    rows = h.shape[0] if h.dim() > 1 else 1
    return h.reshape(rows, -1, h.shape[-1])


def edit_block_output(block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of a block: its output passes through its `ReftLayer`."""
    layer = getattr(block, CHILD)
    if layer.disable_adapters:
        return output
    frame = frame_of_block((*args, *kwargs.values()))
    columns = None if frame is None else frame.columns
    return edit_hidden_state(output, lambda h: layer.layout.edit(h, columns, lambda part: layer.edit(part, frame)))


def attach_layer(block: nn.Module, width: int, layout: Layout = PLAIN) -> ReftLayer:
    """The block's ReftLayer, created and hooked up if it has none yet."""
    layer = getattr(block, CHILD, None)
    if not isinstance(layer, ReftLayer):
        layer = ReftLayer(block, width, layout)
        block.add_module(CHILD, layer)
        # First of the block's hooks: before whatever records hidden states.
        block.register_forward_hook(edit_block_output, prepend=True, with_kwargs=True)
    return layer


def detach_layer(block: nn.Module) -> None:
    """Remove the block's ReftLayer and its hook."""
    delattr(block, CHILD)
    for name in SHOWN:
        block.__dict__.pop(name, None)
    for key, hook in list(block._forward_hooks.items()):
        if hook is edit_block_output:
            del block._forward_hooks[key]
            block._forward_hooks_with_kwargs.pop(key, None)


class FactorCache:
    """Works out the factors of many layers for one forward; keeps the last ones for as long as nothing changes."""

    def __init__(self) -> None:
        self.key: Any = None
        self.factors: dict[tuple[int, str], Factors] = {}
        self.seen: Tensor | None = None

    def __call__(self, layers: Sequence[ReftLayer], names: Sequence[str] | None) -> dict[tuple[int, str], Factors]:
        """The factors by layer (its id) and adapter.

        Args:
            names: the adapters that take part; None for the active ones.
        """
        entries: dict[int, tuple[tuple[int, str], Any]] = {}
        owners = []
        for layer in layers:
            if layer.disable_adapters:
                continue
            for name in layer.active_adapters if names is None else names:
                if name in layer.reft_interventions:
                    interventions = layer.reft_interventions[name]
                    owners.append(((id(layer), name), id(interventions)))
                    entries[id(interventions)] = ((id(layer), name), interventions)  # layers may share them
        key = None if torch.compiler.is_compiling() else fingerprint(entries.values())
        if key is not None and key == self.key and self._unwritten(entries.values()):
            return self.factors
        worked_out = batch_factors((shared, interventions) for shared, (_, interventions) in entries.items())
        factors = {owner: worked_out[shared] for owner, shared in owners if shared in worked_out}
        self.key, self.factors = (None, {}) if key is None else (key, factors)
        self.seen = None if key is None else values_on_cpu(entries.values())
        return factors

    def _unwritten(self, entries: Iterable[Any]) -> bool:
        """Whether the parameters hold what they held, as far as one can see without waiting for a device."""
        seen, values = self.seen, values_on_cpu(entries)
        return seen is None or values is None or torch.equal(seen, values)

    def __reduce__(self) -> Any:
        return FactorCache, ()  # a copied or pickled model starts without
