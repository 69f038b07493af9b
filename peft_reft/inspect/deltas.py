"""What a layer's adapters do to the vectors they are given: lengths and angles, in double precision.

Shape letters: B rows, S columns, G position groups, d width, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_reft.context.forward import ForwardContext
from peft_reft.context.subspaces import repeated, strengths
from peft_reft.interventions import edit_of
from peft_reft.tuner.layer import ReftLayer

NAN = float("nan")
ANGLES = ("angle_before", "angle_after", "edit_angle")


@dataclass
class Deltas:
    """What one adapter does, or several together.

    Attributes:
        adapter: its name.
        edited: which tokens it edits [B, S].
        numbers: h_norm, edit_norm, relative, turn and the angles, as in `Inspection.edits`, in [B, S] each.
        terms: the terms of its positions, each with the tokens it names [B, S]; none for locations and sums.
    """

    adapter: str
    edited: Tensor
    numbers: dict[str, Tensor]
    terms: list[tuple[str, Tensor]]


def deltas_of(layer: ReftLayer, h: Tensor, context: ForwardContext, together: str) -> list[Deltas]:
    """What a layer's active adapters do to the vectors of `h`.

    Args:
        layer, h, context: as in a call of `layer.edit`, which refuses what it cannot edit itself.
        together: the name for all of them together, who come last if it is not the name of the only one.
    """
    h = h if h.dim() == 3 else h.reshape(h.shape[0] if h.dim() > 1 else 1, -1, h.shape[-1])
    exact = h.to(torch.float32 if h.device.type == "mps" else torch.float64)
    total, touched = torch.zeros_like(exact), torch.zeros_like(exact[..., 0], dtype=torch.bool)
    unknown = exact.new_full((len(ANGLES), *touched.shape), NAN)
    found = []
    for name in layer.active_adapters:
        if name not in layer.reft_interventions:
            continue
        interventions: Any = layer.reft_interventions[name]
        marks = marks_of(layer, name, layer.share_weights[name], h, context)
        terms = terms_of(layer, name, h, context)
        edited = marks.amax(1) > 0
        for label, rows, keep in directions_of(layer, name, h, context):
            delta, angles = torch.zeros_like(exact), unknown.clone()
            for intervention, mark in zip(interventions, marks.unbind(1)):
                where = mark > 0
                if where.any():
                    own = None if keep is None else keep.unsqueeze(1).expand(*h.shape[:2], -1)[where]
                    edit = edit_of(intervention, h[where], keep=own).to(exact) * mark[where, None] * layer.scaling[name]
                    delta[where] += edit
                    subspace = getattr(intervention, "subspace", None)
                    subspace = subspace[rows] if isinstance(subspace, Tensor) else None
                    angles[:, where] = angles_to(subspace, exact[where], edit)
            numbers = {**lengths(exact, delta, edited), **dict(zip(ANGLES, angles))}
            found.append(Deltas(label, edited, numbers, terms))
            if label == name:
                total += delta
                touched |= edited
    if [name for name in layer.active_adapters if name in layer.reft_interventions] != [together]:
        found.append(Deltas(together, touched, {**lengths(exact, total, touched), **dict(zip(ANGLES, unknown))}, []))
    return found


def directions_of(
    layer: ReftLayer, name: str, h: Tensor, context: ForwardContext
) -> Iterator[tuple[str, slice, Tensor | None]]:
    """The adapter as a whole, then each of its named subspaces if it has several.

    Yields:
        Its name, "adapter:subspace" for a subspace; which rows of R it is; and how strongly each direction acts in each
        row [B, r], None where all act as trained.
    """
    parts = layer.subspaces.get(name, {})
    given = context.given.passed.subspaces
    choices = None if given is None else repeated(given, len(h), context.given.in_generate)
    like = torch.ones(1, device=h.device)
    acting = None
    if parts:
        acting = strengths([parts], [layer.chosen_subspaces.get(name)], choices, range(len(h)), None, like)
    yield name, slice(None), acting
    first = 0
    for part, size in parts.items() if len(parts) > 1 else ():
        mask = like.new_zeros(len(h), sum(parts.values()))
        mask[:, first : first + size] = 1
        yield f"{name}:{part}", slice(first, first + size), mask if acting is None else mask * acting
        first += size


def marks_of(layer: ReftLayer, name: str, share: bool | str, h: Tensor, context: ForwardContext) -> Tensor:
    """How often each of an adapter's groups edits each token of `h` [B, S, d]: [B, G, S]; mostly 0 or 1."""
    spec = layer.position_specs[name]
    places = context.places(spec, share, h)
    if places is None:
        return h.new_zeros(h.shape[0], spec.num_interventions(share), h.shape[1], dtype=torch.float32)
    keep = places.keep.float()
    if places.columns is None:
        return keep
    return keep.new_zeros(*keep.shape[:2], h.shape[1]).scatter_add(2, places.columns, keep)


def terms_of(layer: ReftLayer, name: str, h: Tensor, context: ForwardContext) -> list[tuple[str, Tensor]]:
    """The terms of an adapter's positions, each with the tokens it names [B, S]; none for given locations."""
    if context.locations is not None:
        return []
    marks = marks_of(layer, name, False, h, context)
    return [(str(term), mark > 0) for term, mark in zip(layer.position_specs[name].terms, marks.unbind(1))]


def lengths(h: Tensor, delta: Tensor, edited: Tensor) -> dict[str, Tensor]:
    """Length of `h` [B, S, d], of its edits, of these beside h, and by how much they turn it; 0 where not edited."""
    h_norm, moved = h.norm(dim=-1), h + delta
    edit_norm = torch.where(edited, delta.norm(dim=-1), 0)
    u, v = (w / w.norm(dim=-1, keepdim=True) for w in (h, moved))
    turn = torch.rad2deg(2 * torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1)))  # exact for small angles, too
    return {
        "h_norm": h_norm,
        "edit_norm": edit_norm,
        "relative": torch.where(edited, edit_norm / h_norm, 0),
        "turn": torch.where(edited, turn, 0),
    }


def angles_to(subspace: Any, h: Tensor, delta: Tensor) -> Tensor:
    """The angles of h, h + Δh and Δh [n, d] to the row space of `subspace` [r, d], in degrees: [3, n].

    NaN if there is no such subspace, and for vectors of length 0.
    """
    if not isinstance(subspace, Tensor) or subspace.dim() != 2 or subspace.shape[-1] != h.shape[-1]:
        return h.new_full((len(ANGLES), len(h)), NAN)
    _, sizes, rows = torch.linalg.svd(subspace.to(h.dtype), full_matrices=False)
    rows = rows[sizes > 1e-6 * sizes.max()]
    vectors = torch.stack([h, h + delta, delta])
    inside = vectors @ rows.mT @ rows
    degrees = torch.rad2deg(torch.atan2((vectors - inside).norm(dim=-1), inside.norm(dim=-1)))
    return torch.where(vectors.norm(dim=-1) > 0, degrees, NAN)
