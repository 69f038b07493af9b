"""The two files of an app: an adapter's edits (safetensors, a few kilobytes), and what a backbone's graph takes (JSON).

Both say enough to be checked against each other before anything is run. Nothing in them names a folder of the machine
on which they were made.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from peft_reft.export.backbone import Backbone, BakedBackbone
from peft_reft.export.caches import LayerCache, empty_past
from peft_reft.export.graph import Sizes
from peft_reft.export.tensors import EditTensors, read_edits
from peft_reft.info.files import one_line, read_json
from peft_reft.positions import parse_positions
from peft_reft.tuner.staging import staged, write_text

EDITS, BACKBONE = "peft_reft.edits", "peft_reft.backbone"  # the "format" of either file
VERSION = 1
DESCRIPTION = "backbone.json"
NAMES = ("down", "bias", "up")
FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


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
        _check_format(str(path), found, BACKBONE)
        known = {field.name for field in fields(cls)}
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
                f"{self.width} wide: it belongs to another model{_named(edits.base_model)}."
            )
        if edits.base_model and self.base_model and short_name(edits.base_model) != self.base_model:
            raise ValueError(
                f"The adapter was trained on {edits.base_model!r}, and the backbone is {self.base_model!r}. If both "
                "are the same model under two names, save the adapter's tensors anew with base_model=... (on the "
                "command line --base-model)."
            )
        return edits.of(self.blocks)


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


def short_name(name: str | None) -> str:
    """The last part of a model's name: where it lies on a machine is not the business of a file that is passed on.

    >>> short_name("HuggingFaceTB/SmolLM2-135M-Instruct"), short_name("models/smollm2/"), short_name(None)
    ('SmolLM2-135M-Instruct', 'smollm2', '')
    """
    return PurePosixPath((name or "").replace("\\", "/")).name


def save_adapter_tensors(
    model_or_directory: nn.Module | str | Path,
    path: str | Path,
    dtype: torch.dtype = torch.float16,
    *,
    adapter_name: str | None = None,
    blocks: Sequence[str] | None = None,
    base_model: str | None = None,
) -> None:
    """Write an adapter as one small file for programs that run an exported backbone.

    The file holds "down", "bias" and "up" of the edited blocks alone, and in its metadata their names, the positions,
    what the groups are, and the name of the base model: see `load_adapter_tensors`.

    Args:
        model_or_directory: a model with ReFT adapters, or the directory of a saved one.
        path: of the file, such as "pirate.safetensors".
        dtype: of the stored numbers, torch.float16, float32 or bfloat16.
        adapter_name: of a model's adapters; None for the active one.
        blocks: as for `adapter_tensors`.
        base_model: name of the base model, if it is not to be the one that the adapter says; folders are left out.

    Raises:
        ValueError: for an adapter that is more than these tensors, or has numbers that `dtype` cannot hold.
    """
    if dtype not in FLOATS.values():
        raise ValueError(f"dtype={dtype!r} is none of {', '.join(f'torch.{name}' for name in FLOATS)}.")
    found = read_edits(model_or_directory, adapter_name, blocks)
    tensors = {name: getattr(found, name).to(dtype).contiguous() for name in NAMES}
    odd = next((name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())), None)
    if odd is not None:
        raise ValueError(
            f"{odd!r} has the number {float(getattr(found, odd).abs().max()):g}, which {dtype} cannot hold. Save it "
            "with dtype=torch.float32."
        )
    metadata = {
        "format": EDITS,
        "version": str(VERSION),
        "positions": found.positions,
        "share_weights": json.dumps(found.share_weights),
        "blocks": json.dumps(found.blocks),
        "base_model": short_name(base_model if base_model is not None else found.base_model),
    }
    target = Path(path)
    with staged(target.parent) as stage:
        save_file(tensors, stage / target.name, metadata)
        os.chmod(stage / target.name, 0o644)


def load_adapter_tensors(path: str | Path) -> EditTensors:
    """Read a file of `save_adapter_tensors`; `BackboneDescription.inputs` makes a graph's inputs of it.

    Raises:
        ValueError: if it is missing, damaged, or something else.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no file {str(path)!r}.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
    except Exception as error:  # SafetensorError, and what a wrong header leads torch to
        raise ValueError(
            f"{str(path)!r} cannot be read ({one_line(error)}); the file is damaged or was cut off. Fetch it again."
        ) from error
    _check_format(str(path), metadata, EDITS)
    try:
        blocks, share = json.loads(metadata["blocks"]), json.loads(metadata["share_weights"])
        spec = parse_positions(metadata["positions"])
        down, bias, up = (_floating(name, tensors[name]) for name in NAMES)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{str(path)!r} lacks what describes an adapter ({one_line(error)}).") from error
    groups = spec.num_interventions(share) if share in (True, False, "position") else -1
    if down.dim() != 4 or up.shape != down.shape or bias.shape != down.shape[:3] or len(blocks) != len(down):
        raise ValueError(
            f"{str(path)!r} holds tensors of the shapes {list(down.shape)}, {list(bias.shape)} and {list(up.shape)} "
            f"for {len(blocks)} blocks, which are no adapter's: down and up are [blocks, groups, rank, width]."
        )
    if groups != down.shape[1]:
        raise ValueError(
            f"{str(path)!r} has {down.shape[1]} interventions for each block, which does not go with positions="
            f"{str(spec)!r} and share_weights={share!r}."
        )
    if not all(bool(tensor.isfinite().all()) for tensor in (down, bias, up)):
        raise ValueError(f"{str(path)!r} holds numbers that are infinite or NaN.")
    return EditTensors(blocks, down, bias, up, str(spec), share, metadata.get("base_model") or None)


def _floating(name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype not in FLOATS.values():
        raise ValueError(f"{name} is stored as {tensor.dtype}, where edits are one of {', '.join(FLOATS)}")
    return tensor.float()


def _check_format(path: str, found: Any, expected: str) -> None:
    if found.get("format") != expected:
        raise ValueError(
            f"{path!r} is no {expected} file: its format is {found.get('format')!r}. `python -m peft_reft export` "
            "writes both kinds; a PEFT adapter is a folder, which save_adapter_tensors turns into such a file."
        )
    if str(found.get("version")) != str(VERSION):
        raise ValueError(f"{path!r} has version {found.get('version')!r} of its format; this is version {VERSION}.")


def _named(base_model: str | None) -> str:
    return f", {base_model!r}" if base_model else ""
