"""What a backbone's graph takes, `backbone.json` beside it, and an adapter's edits as its inputs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_reft.export.backbone import Backbone, BakedBackbone
from peft_reft.export.caches import LayerCache, empty_past
from peft_reft.export.files import FLOATS, NAMES, VERSION, check_format, named, short_name
from peft_reft.export.graph import Sizes
from peft_reft.export.tensors import EditTensors
from peft_reft.info.files import one_line, read_json
from peft_reft.tuner.staging import write_text

BACKBONE = "peft_reft.backbone"  # the "format" of the file
DESCRIPTION = "backbone.json"


@dataclass(frozen=True)
class BackboneDescription:
    """What a program must know of an exported backbone to run it.

    Attributes:
        file: of the graph, beside this description.
        base_model: name of the model, without folders; "" if it has none.
        blocks: names of its L blocks.
        width, vocabulary: d, and how many logits a token gets.
        cache: what its layers keep; None without a cache.
        cache_dtype: of keys and values.
        max_rank, max_groups: r and G of its inputs if these are fixed: smaller adapters are padded. None where the
            graph takes any.
        max_columns: the longest row that the graph takes; None if the model alone limits it.
        baked: positions of the adapter within the graph, which then takes no other.
        baked_sharing: its `share_weights`.
        end_tokens: ids that end an answer.
        dtype: of the backbone's weights.
    """

    file: str
    base_model: str
    blocks: list[str]
    width: int
    vocabulary: int
    cache: list[LayerCache] | None
    cache_dtype: str = "float32"
    max_rank: int | None = None
    max_groups: int | None = None
    max_columns: int | None = None
    baked: str | None = None
    baked_sharing: bool | str | None = None
    end_tokens: tuple[int, ...] = ()
    dtype: str = "float32"

    def save(self, folder: Path) -> None:
        """Write `backbone.json`."""
        cache = None if self.cache is None else [layer._asdict() for layer in self.cache]
        found = {"format": BACKBONE, "version": VERSION, **asdict(self), "cache": cache}
        write_text(folder / DESCRIPTION, json.dumps(found, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> BackboneDescription:
        """Read the description in a folder that `python -m peft_reft export` wrote.

        Raises:
            ValueError: if there is none.
        """
        path = folder / DESCRIPTION
        found = read_json(path)
        check_format(str(path), found, BACKBONE)
        known = {field.name for field in fields(cls)}
        odd = next((name for name, fits in _FITS.items() if name in found and not fits(found[name])), None)
        if odd is not None:
            raise ValueError(f"{str(path)!r} has {odd} = {found[odd]!r}, which does not describe a backbone.")
        try:
            cache = found.get("cache")
            found["cache"] = None if cache is None else [LayerCache(**layer) for layer in cache]
            found["end_tokens"] = tuple(found.get("end_tokens", ()))
            return cls(**{key: value for key, value in found.items() if key in known})
        except TypeError as error:
            raise ValueError(f"{str(path)!r} lacks what describes a backbone ({one_line(error)}).") from error

    def empty_past(self, rows: int = 1) -> list[Tensor] | None:
        """The cache of new rows; None for a backbone without a cache."""
        return None if self.cache is None else empty_past(self.cache, FLOATS[self.cache_dtype], rows)

    def inputs(self, edits: EditTensors, *others: EditTensors) -> dict[str, Tensor]:
        """The tensors of an adapter as this graph takes them: all blocks, padded to its rank and groups.

        Further ranks are zeros. Further groups are zeros, too, but where one intervention is shared by all: these are
        all that one, so that the mask may name it by any of them.

        Several adapters serve rows of their own in one run: their groups follow one another, and the mask of a row is
        zero in the groups of all adapters but its own.

        Raises:
            ValueError: if an adapter belongs to another backbone, or they are larger than the graph's inputs.
        """
        if self.baked is not None:
            raise ValueError(f"This backbone has an adapter inside ({self.baked}) and takes no other.")
        found = [self._own(one) for one in (edits, *others)]
        rank = max(one["bias"].shape[2] for one in found)
        groups = sum(one["bias"].shape[1] for one in found)
        holder = "The adapters together have" if others else "The adapter has"
        for what, size, most in (("rank", rank, self.max_rank), ("position groups", groups, self.max_groups)):
            if most is not None and size > most:
                raise ValueError(
                    f"{holder} {what} {size}, but the backbone was exported for at most {most}. Export it with "
                    f"--max-{'rank' if what == 'rank' else 'groups'} {size}, or train a smaller adapter."
                )
        wide = self.max_rank or rank
        joined = {name: torch.cat([_with_rank(one[name], name, wide) for one in found], dim=1) for name in NAMES}
        more = (self.max_groups or groups) - groups
        if groups == 1:
            return {name: tensor.repeat_interleave(1 + more, dim=1) for name, tensor in joined.items()}
        return {
            name: torch.cat((tensor, tensor.new_zeros(len(tensor), more, *tensor.shape[2:])), dim=1)
            for name, tensor in joined.items()
        }

    def _own(self, edits: EditTensors) -> dict[str, Tensor]:
        """An adapter's tensors for all blocks; refuses those of another backbone."""
        if edits.down.shape[-1] != self.width:
            raise ValueError(
                f"The adapter edits hidden states of width {edits.down.shape[-1]}, but the backbone's are "
                f"{self.width} wide: it belongs to another model{named(edits.base_model)}."
            )
        if edits.base_model and self.base_model and short_name(edits.base_model) != self.base_model:
            raise ValueError(
                f"The adapter was trained on {edits.base_model!r}, and the backbone is {self.base_model!r}. If both "
                "are the same model under two names, save the adapter's tensors anew with base_model=... (on the "
                "command line --base-model)."
            )
        return edits.of(self.blocks)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _list_of(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(isinstance(entry, kind) for entry in value)


_FITS: dict[str, Callable[[Any], bool]] = {  # what a description may say, field by field
    "file": lambda value: isinstance(value, str),
    "base_model": lambda value: isinstance(value, str),
    "blocks": _list_of(str),
    "width": _count,
    "vocabulary": _count,
    "cache": lambda value: value is None or _list_of(dict)(value),
    "cache_dtype": lambda value: isinstance(value, str) and value in FLOATS,
    **dict.fromkeys(("max_rank", "max_groups", "max_columns"), lambda value: value is None or _count(value)),
    "end_tokens": _list_of(int),
}


def _with_rank(tensor: Tensor, name: str, rank: int) -> Tensor:
    """One of an adapter's tensors with zeros behind its own rank."""
    more = rank - tensor.shape[2]
    return F.pad(tensor, (0, more) if name == "bias" else (0, 0, 0, more))


def describe(
    backbone: Backbone, file: str, sizes: Sizes, base_model: str | None = None, dtype: str | None = None
) -> BackboneDescription:
    """The description of a backbone.

    Args:
        backbone: from `exportable`.
        file: name of its graph.
        sizes: which of its inputs' sizes are fixed.
        base_model: name of the model; None for what its config says.
        dtype: of the weights in the file; None for that of the model.
    """
    config: Any = backbone.model.config
    ends = getattr(getattr(backbone.model, "generation_config", None), "eos_token_id", None)
    baked = backbone if isinstance(backbone, BakedBackbone) else None
    own = str(backbone.dtype).removeprefix("torch.")
    return BackboneDescription(
        file=file,
        base_model=short_name(base_model if base_model is not None else getattr(config, "name_or_path", "")),
        blocks=backbone.blocks,
        width=backbone.width,
        vocabulary=backbone.vocabulary,
        cache=backbone.cache,
        cache_dtype=own,
        max_rank=sizes.rank,
        max_groups=sizes.groups,
        max_columns=sizes.columns,
        baked=None if baked is None else baked.positions,
        baked_sharing=None if baked is None else baked.share_weights,
        end_tokens=() if ends is None else tuple(ends) if isinstance(ends, (list, tuple)) else (ends,),
        dtype=dtype or own,
    )
