"""ReftLayer: the interventions of one block, adapters by name, and the hook through which the block's output passes.

The layer is a child module *beside* what the block has, not a wrapper around it: the block keeps its class, its
attributes and the names of its parameters, other adapters can be put inside it, and recorders of hidden states see
the edited ones.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from peft_reft.blocks import OWN, PLAIN, Layout, device_and_dtype, edit_hidden_state
from peft_reft.context.frame import Frame, frame_of_block
from peft_reft.interventions.equations import Factors, build_intervention, edit_of, low_rank_edit
from peft_reft.positions.notation import PositionSpec, parse_positions
from peft_reft.positions.places import Sites, add_edit
from peft_reft.tuner.config import ReftConfig
from peft_reft.tuner.ownership import nobody_elses

SHOWN = ("active_adapters", "adapter_layer_names", "other_param_names", "reft_interventions")  # on the block, too
cached_spec = lru_cache(parse_positions)  # one object for all blocks and adapters with the same notation
CHILD = "reft"  # the layer's name below its block; must not hold the prefix "reft_", by which PEFT skips modules


class Groups(nn.ModuleList):
    """The interventions of one block and adapter, one per position group.

    The dictionaries in which torch keeps a module's hooks would weigh as much as the interventions' own objects where
    thousands of adapters are resident; here they come into being when somebody looks for one.
    """

    _hooks = tuple(name for name, value in vars(nn.Module()).items() if isinstance(value, OrderedDict))

    def __init__(self, modules: Iterable[nn.Module]):
        super().__init__(modules)
        for name in self._hooks:
            del self.__dict__[name]

    def __getattr__(self, name: str) -> Any:
        return self.__dict__.setdefault(name, OrderedDict()) if name in Groups._hooks else super().__getattr__(name)


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
        self.reft_interventions = nn.ModuleDict()  # adapter name -> Groups, one intervention per position group
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
        spec = cached_spec(config.positions, config.turns, tuple(prompt_end))
        if shared is None:
            interventions = Groups(
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

    def edit(self, h: Tensor, frame: Frame | None, owned: bool = False) -> Tensor:
        """`h` with the edits of all active adapters, each computed on `h` itself and summed.

        Args:
            owned: `h` may be written to.
        """
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
        if frame is None or (frame.columns is None and h.dim() != 3):
            return self._edit_without_tokens(h, names, frame)
        edits = (
            ((name, self._sites(name, h, frame), frame.factors(self, name)) for name in names)
            if rows is None
            else self._edits_by_row(rows, h, frame)
        )
        out = h
        owned = owned and (rows is not None or len(names) == 1)  # the edits of rows touch none but their own
        for name, sites, factors in edits:
            if sites is not None:
                out = add_edit(out, h, sites, self._edit_of(name, factors), owned)
                owned = not torch.is_grad_enabled()
        return out

    def _edit_without_tokens(self, h: Tensor, names: Sequence[str], frame: Frame | None) -> Tensor:
        """`h` [..., d] edited outside of a call that knows its tokens."""
        specs = {str(self.position_specs[name]) for name in names}
        if frame is not None and (specs != {"all"} or frame.call.adapter_names is not None):
            return self.edit(as_rows(h, specs), frame).reshape(h.shape)
        if specs != {"all"}:
            raise ValueError(
                f"positions={sorted(specs - {'all'})[0]!r} counts tokens, but the block of a ReFT adapter ran outside "
                "of its model's forward, where there are none. Call the model as a whole, or use positions='all'."
            )
        out = h  # nothing to count: every vector is edited
        for name in names:
            strength = torch.full((), float(self.scaling[name]), device=h.device)
            edit = self._edit_of(name, None)(h.reshape(1, 1, -1, self.width), strength)
            out = out + edit.view(h.shape).to(h.dtype)
        return out

    def _sites(self, name: str, h: Tensor, frame: Frame) -> Sites | None:
        """Where an adapter edits `h` [B, S, d], with its strength."""
        sites = frame.sites(self.position_specs[name], self.share_weights[name], h)
        scale = self.scaling[name]
        return sites if sites is None or scale == 1 else sites._replace(keep=sites.keep * scale)

    def _edits_by_row(self, names: Sequence[str], h: Tensor, frame: Frame) -> Iterator[tuple[str, Sites | None, Any]]:
        """The edits of a batch whose rows have adapters of their own: one gather, batched products and one scatter
        for all that multiply with the same kinds of factors.

        Yields:
            For each kind: one of its adapters, the places, and the factors [B, G, r, d].
        """
        own: Any = self.reft_interventions._modules
        # What the grouping depends on, which most blocks have in common.
        rows = tuple(
            (name, frame.batch_of(self, name), self.scaling[name], id(self.position_specs[name]))
            if name in own
            else None
            for name in names
        )
        key = (rows, self.training, h.shape[1], h.device, frame.pool)
        for members, sites in frame.once(key, lambda: self._passes(rows, h, frame)):
            some = next(name for name in members if name is not None)
            yield some, sites, frame.factors_by_row(self, members)

    def _passes(
        self, rows: Sequence[tuple[Any, ...] | None], h: Tensor, frame: Frame
    ) -> list[tuple[list[str | None], Sites | None]]:
        """Which rows can be edited together: their adapters (None for the other rows), and where."""
        passes: dict[Any, list[str | None]] = {}
        for number, row in enumerate(rows):
            if row is not None:
                passes.setdefault(self._pass_of(row[0], frame), [None] * len(rows))[number] = row[0]
        found = []
        for members in passes.values():
            wanted = [
                None if name is None else (self.position_specs[name], self.share_weights[name], self.scaling[name])
                for name in members
            ]
            found.append((members, frame.sites_by_row(wanted, h)))
        return found

    def _pass_of(self, name: str, frame: Frame) -> Any:
        """Adapters of the same pass can be run together, each on rows of its own."""
        factors = frame.factors(self, name)
        first: Any = self.reft_interventions[name][0]  # type: ignore[index]
        if factors is None or (self.training and first.dropout):
            return name
        bounded = self.position_specs[name].widths() is not None
        return first.act_fn, factors.projection is not None, bounded, first.basis.dtype

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
            device = selected.device.type
            if torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    edits = low_rank_edit(selected, factors, keep)
            else:
                edits = low_rank_edit(selected, factors, keep)
            dropout = interventions[0].dropout if self.training else 0.0
            return F.dropout(edits, dropout) if dropout else edits

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
    if isinstance(output, Tensor) and layer.layout == PLAIN and output.dim() <= 3:
        owned = False
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            references = sys.getrefcount(output)  # a statement of its own: arguments on their way to a call count too
            owned = nobody_elses(output, references)
        return layer.edit(output, frame, owned)
    if layer.layout.pool:
        return edit_hidden_state(
            output, lambda h: layer.layout.edit(h, None, lambda part: edit_pooled(layer, part, frame))
        )
    columns = None if frame is None else frame.columns
    return edit_hidden_state(output, lambda h: layer.layout.edit(h, columns, lambda part: layer.edit(part, frame)))


def edit_pooled(layer: ReftLayer, h: Tensor, frame: Frame | None) -> Tensor:
    """`h` [B, S, d] with its edits, where its S vectors are not those of the call's tokens."""
    if frame is not None:
        return layer.edit(h, frame.of_vectors(layer.layout.pool, h.shape[1]))
    if layer.layout.pool == OWN:  # run once more in the backward pass, by a checkpoint around several blocks
        return layer.edit(h, Frame.alone())
    return layer.edit(h, None)


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
