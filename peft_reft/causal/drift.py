"""How far an edit's effect at later blocks leaves the subspace that it was made in.

At the block itself the change of h lies in the rows of R, whatever was learned. Every later block computes with it: the
guarantee ends there, and `edit_drift` measures what is left of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_reft.blocks import present_names
from peft_reft.blocks.layout import hidden_state_of
from peft_reft.blocks.numbering import block_number
from peft_reft.causal.accuracy import evaluating
from peft_reft.causal.probe import on_device
from peft_reft.tuner.injection import base_model_of, editing_layers, reft_layers, state_of
from peft_reft.tuner.layer import ReftLayer


@torch.no_grad()
def edit_drift(model: nn.Module, inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """How much of an edit's effect stays in the subspace that it was made in, block by block.

    Each edited block edits alone, and what every block returns is compared with a run without any edit.

    Args:
        model: with active ReFT adapters.
        inputs: of a call of the model.

    Returns:
        A row for each edited block, each block from there on, and `places`, "edited" for the tokens that are edited and
        "other" for the rest, as far as they change:

        - edited, block, depth: names of the block that edits and of the one looked at, and its number.
        - places: "edited" or "other".
        - norm: root mean square of ‖Δh‖ over these tokens.
        - inside: the part of ‖Δh‖² that lies in the subspace, between 0 and 1: 1 at the block itself, whatever was
          learned; a random direction has r / d.
        - chance: r / d.

    Raises:
        ValueError: if no ReFT adapter is active, or an intervention has no `subspace`.
    """
    base = base_model_of(model)
    layers, state = editing_layers(base), state_of(base)
    if not layers or state is None:
        raise ValueError("No ReFT adapter is active in this model, so there is no edit to follow.")
    present = present_names(base)
    followed = {*layers, *(present[name] for stack in state.blocks_of(base).stacks() for name in stack)}
    names = [name for name, _ in base.named_modules() if name in followed]
    inputs = on_device(dict(inputs), model)
    mask, rows = inputs.get("attention_mask"), []
    valid = mask.flatten() != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None
    with evaluating(model):
        switched = {layer: layer._disable_adapters for layer in reft_layers(base).values()}
        try:
            for layer in switched:
                layer._disable_adapters = True
            unedited = _outputs(base, inputs, names)
            for edited, layer in layers.items():
                layer._disable_adapters = False
                rows += _rows(edited, names, unedited, _outputs(base, inputs, names), _projection(layer), valid)
                layer._disable_adapters = True
        finally:
            for layer, value in switched.items():
                layer._disable_adapters = value
    return rows


def _outputs(base: Any, inputs: Mapping[str, Any], names: list[str]) -> dict[str, Tensor]:
    """The hidden states that modules return, after the edits of adapters, whose hooks come first."""
    found: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            h = hidden_state_of(output)
            if h is not None:
                found[name] = h.double() if h.device.type != "mps" else h.float()

        return hook

    handles = [base.get_submodule(name).register_forward_hook(note(name)) for name in names]
    try:
        base(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _projection(layer: ReftLayer) -> Tensor:
    """An orthonormal basis [r, d] of all directions that a layer's active adapters edit."""
    found = []
    for name in layer.active_adapters:
        groups: Any = layer.reft_interventions._modules.get(name)
        for intervention in groups or ():
            subspace = getattr(intervention, "subspace", None)
            if not isinstance(subspace, Tensor):
                raise ValueError(f"{type(intervention).__name__} has no `subspace`, in which its edit could stay.")
            found.append(subspace.double() if subspace.device.type != "mps" else subspace)
    _, sizes, rows = torch.linalg.svd(torch.cat(found), full_matrices=False)
    return rows[sizes > 1e-6 * sizes.max()]


def _rows(
    edited: str,
    names: list[str],
    before: dict[str, Tensor],
    after: dict[str, Tensor],
    basis: Tensor,
    valid: Tensor | None,
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    here = (after[edited] - before[edited]).flatten(0, -2).norm(dim=-1) > 0
    tokens = torch.ones_like(here) if valid is None or len(valid) != len(here) else valid.to(here.device)
    for name in names[names.index(edited) :]:
        change = (after[name] - before[name]).flatten(0, -2)
        if change.shape[-1] != basis.shape[-1] or len(change) != len(here):
            continue  # another width, or not one vector per token
        for places, mask in (("edited", here), ("other", ~here & tokens)):
            total = change[mask].square().sum()
            if total > 0:
                inside = (change[mask] @ basis.to(change).mT).square().sum() / total
                rows.append(
                    {
                        "edited": edited,
                        "block": name,
                        "depth": block_number(name),
                        "places": places,
                        "norm": float((total / mask.sum()).sqrt()),
                        "inside": float(inside),
                        "chance": len(basis) / basis.shape[-1],
                    }
                )
    return rows
