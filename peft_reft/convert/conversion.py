"""What a conversion makes: the config and tensors of a PEFT adapter, and what could not be translated.

Where interventions came from is known to pyreft.py and adapterhub.py, which hand over `Edit`s by block; how a
directory is written is known to writing.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from peft_reft.blocks.numbering import block_number, group_by_stack
from peft_reft.convert.structure import Structure
from peft_reft.positions import parse_positions
from peft_reft.tuner.config import ReftConfig
from peft_reft.tuner.keys import PEFT_PREFIX, FileKey
from peft_reft.tuner.sizes import printable

WITH_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # task types whose head PEFT trains and saves in any case
SPLIT = (
    "Convert it as two adapters, from copies of the directory whose config.json lists a part of the interventions each "
    "(in sorted_keys, representations and intervention_types), and activate both."
)


class ConversionError(ValueError):
    """A checkpoint that cannot be converted as it is; the message says why, and what to do."""


@dataclass
class Edit:
    """The tensors of one intervention, in this package's equation h + basisᵀ(act(source h + bias) − basis h).

    Attributes:
        basis: [r, d], rows of R or of W2.
        bias: [r], b or the constant.
        source: [r, d], or None where the equation has only a constant.
    """

    basis: Tensor
    bias: Tensor
    source: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(r, d)."""
        return self.basis.shape[0], self.basis.shape[1]

    @property
    def fits(self) -> bool:
        """Whether the shapes belong to one another."""
        if self.basis.dim() != 2 or not 1 <= self.basis.shape[0] <= self.basis.shape[1]:
            return False
        return self.bias.shape == self.shape[:1] and (self.source is None or self.source.shape == self.shape)

    def tensors(self) -> dict[str, Tensor]:
        """By the names that an intervention's parameters have in this package."""
        if self.source is None:
            return {"basis": self.basis, "weight": self.bias}
        return {"basis": self.basis, "weight": self.source, "bias": self.bias}


@dataclass
class Conversion:
    """A converted adapter.

    Attributes:
        origin: the library whose checkpoint it was, "pyreft" or "AdapterHub"; "PEFT" for an export.
        config: the adapter's config.
        edits: its interventions by name of the block, one or one per position group.
        head: trained modules of the model itself, such as a classifier, by name of the tensor.
        notes: what could not be translated exactly, or had to be assumed; one sentence or two each.
        dst: where it was written, None if nowhere.
    """

    origin: str
    config: ReftConfig
    edits: dict[str, list[Edit]]
    head: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    dst: Path | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The state dict of the adapter, as PEFT saves it."""
        own = {
            str(FileKey(block, group, name)): tensor.detach().clone().contiguous()
            for block, edits in self.edits.items()
            for group, edit in enumerate(edits)
            for name, tensor in edit.tensors().items()
        }
        return own | {
            f"{PEFT_PREFIX}{name}": tensor.detach().clone().contiguous() for name, tensor in self.head.items()
        }

    def __str__(self) -> str:
        config = self.config
        groups = {len(edits) for edits in self.edits.values()}
        shared = "shared weights" if groups == {1} else "separate weights for prefix and suffix"
        ranks = sorted({edit.shape[0] for edits in self.edits.values() for edit in edits})
        lines = [
            f"from:       {self.origin}",
            f"kind:       {config.intervention}" + (f" with {config.act_fn}" if config.act_fn else ""),
            f"rank:       {', '.join(map(str, ranks))}",
            f"blocks:     {len(self.edits)}: {', '.join(self.edits)}",
            f"positions:  {config.positions}, {shared}",
        ]
        if self.head:
            lines.append(f"head:       {', '.join(config.modules_to_save or [])}")
        if self.dst is not None:
            lines.append(f"written to: {self.dst}")
        return printable("\n".join([*lines, *(f"note: {note}" for note in self.notes)]))


def assemble(
    origin: str,
    kind: str,
    edits: Mapping[str, list[Edit]],
    positions: str,
    structure: Structure | None,
    *,
    head: Mapping[str, Tensor] | None = None,
    act_fn: str | None = None,
    dropout: float = 0.0,
    every_block: bool = False,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
) -> Conversion:
    """Put interventions and a head together to an adapter.

    Args:
        edits: by name of the block in the base model.
        structure: of the base model, where it is known.
        every_block: whether these are all blocks of the model, as far as the checkpoint tells.

    Raises:
        ConversionError: if they do not fit each other, the positions or the model.
    """
    groups = refuse_misfits(edits, positions, structure)
    rank = {block: found[0].shape[0] for block, found in edits.items()}
    usual = Counter(rank.values()).most_common(1)[0][0]
    if structure is not None and structure.has_blocks(edits):
        own, all_of_them = True, structure.has_all_blocks(edits)
    else:
        own, all_of_them = every_block, every_block
    numbers = sorted({number for number in map(block_number, edits) if number is not None})
    modules = list(dict.fromkeys(name.split(".")[0] for name in head or {}))
    if structure is not None:
        refuse_parts(modules, head or {}, structure)
    task_type = task_type or (structure.task_type if structure else None)
    without_head = task_type in WITH_HEAD and not head
    config = ReftConfig(
        task_type=None if without_head else task_type,
        base_model_name_or_path=base_model_name_or_path or (structure.path if structure else None),
        inference_mode=True,
        r=usual,
        intervention=kind,
        positions=positions,
        share_weights=groups == {1},
        layers_to_transform=numbers if own and not all_of_them else None,
        target_modules=None if own else list(edits),
        modules_to_save=modules or None,
        rank_pattern={block: r for block, r in rank.items() if r != usual},
        dropout=dropout,
        act_fn=act_fn,
        init_weights=act_fn is None,  # a fresh adapter with an activation cannot start from zero, and would warn
    )
    made = Conversion(origin, config, dict(edits), dict(head or {}))
    if without_head:
        made.notes.append(
            "No trained head is converted, so that the base model's own is used: if it was trained too, the logits are "
            f"others. task_type={task_type!r} is left out of the config, since PEFT then wants the head's weights."
        )
    if len(group_by_stack(list(edits))) > 1:
        made.notes.append(
            "Blocks of several stacks are edited. Here a decoder behind an encoder counts positions over its own "
            "prompt, usually the start token alone; the original counted over all of the row's tokens. Hand its "
            "columns to the model as intervention_locations where that matters."
        )
    for block, found in edits.items():
        vanished = sum(int((edit.basis == 0).all(1).sum()) for edit in found)
        if vanished:
            made.notes.append(
                f"{vanished} of the {sum(edit.shape[0] for edit in found)} directions in {block} are zero, and so edit "
                "nothing, as in the original: weight decay does that to torch's orthogonal parametrisation."
            )
    return made


def refuse_misfits(edits: Mapping[str, list[Edit]], positions: str, structure: Structure | None) -> set[int]:
    """How many interventions a block has, in a set of one.

    Raises:
        ConversionError: if the interventions do not fit each other, the positions or the model.
    """
    groups = {len(found) for found in edits.values()}
    terms = len(parse_positions(positions).terms)
    if len(groups) != 1 or not groups <= {1, terms}:
        raise ConversionError(
            f"The checkpoint has {' or '.join(map(str, sorted(groups)))} interventions per block, but "
            f"positions={positions!r} has {terms} term(s): one intervention is shared by all terms, and more are one "
            "per term, as in 'f2+l2'. Pass the positions that it was trained with."
        )
    for block, found in edits.items():
        ranks = sorted({edit.shape[0] for edit in found})
        if len(ranks) > 1:
            raise ConversionError(
                f"The interventions of {block!r} have the ranks {ranks}, and an adapter has one per block. {SPLIT}"
            )
        width = structure.width_of(block) if structure is not None else found[0].shape[1]
        if structure is not None and width != found[0].shape[1]:
            raise ConversionError(
                f"The checkpoint's hidden states are {found[0].shape[1]} wide, those of {block!r} in "
                f"{structure.name} are {width}. Pass the model that it was trained on."
            )
    return groups


def refuse_parts(modules: list[str], head: Mapping[str, Tensor], structure: Structure) -> None:
    """Raise ConversionError if a module of the head is there in part."""
    lacking = structure.tensors_of(modules) - set(head)
    if lacking:
        raise ConversionError(
            f"The checkpoint has only a part of the head {modules}: {', '.join(sorted(lacking))} is missing. An "
            "adapter holds such modules as a whole; convert it without (head=False, --without-head) and set them "
            "yourself."
        )


def is_orthonormal(rows: Tensor, tolerance: float) -> bool:
    """Whether the rows [r, d] that are not zero have length 1 and stand at right angles."""
    rows = rows.double()
    wanted = torch.diag_embed((rows != 0).any(1).double())
    return bool((rows @ rows.mT - wanted).abs().max() <= tolerance)
