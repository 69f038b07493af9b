"""Writing an adapter of this package as pyreft saves one: config.json and one intkey_*.bin per intervention."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from torch import Tensor

from peft_reft.blocks import group_by_stack
from peft_reft.convert.conversion import Conversion, ConversionError, Edit, is_orthonormal
from peft_reft.convert.pyreft import KINDS, ROTATION, WITH_BASIS_ROTATED
from peft_reft.convert.rotation import orthogonal_parameters
from peft_reft.convert.writing import PYREFT_CONFIG, PYREFT_HEAD, new_directory
from peft_reft.info.files import read_adapter as read_adapter_files
from peft_reft.info.reading import interventions_of
from peft_reft.interventions.orthonormal import orthonormal_rows
from peft_reft.tuner.checkpoint import check_tensors
from peft_reft.tuner.config import ReftConfig
from peft_reft.tuner.keys import PEFT_PREFIX

CLASSES = {kind: name for name, kind in reversed(KINDS.items())}


def read_adapter(directory: Path) -> Conversion:
    """An adapter that PEFT saved.

    Raises:
        ConversionError: if it has what pyreft has no place for.
    """
    config = ReftConfig.from_pretrained(str(directory))
    refused = {
        "share_layers": config.share_layers,
        "share_weights='position'": config.share_weights == "position",
        "trainable_token_indices": bool(config.trainable_token_indices),
        f"intervention={config.intervention!r}": config.intervention not in CLASSES,
    }
    for name, is_refused in refused.items():
        if is_refused:
            raise ConversionError(f"{directory}: pyreft has no counterpart of {name}, so that it cannot be exported.")
    saved = read_adapter_files(directory)
    check_tensors(saved.tensors)
    parameters, others = interventions_of(saved)
    edits = {
        block: [edit_from(groups[group], f"{saved.file}, {block}") for group in sorted(groups)]
        for block, groups in parameters.items()
    }
    return Conversion(
        "PEFT", config, edits, {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in others.items()}
    )


def edit_from(tensors: dict[str, Tensor], where: str) -> Edit:
    """One intervention, from its parameters."""
    if set(tensors) == {"basis", "weight", "bias"}:
        made = Edit(tensors["basis"], tensors["bias"], tensors["weight"])
    elif set(tensors) == {"basis", "weight"} and tensors["weight"].dim() == 1:
        made = Edit(tensors["basis"], tensors["weight"])
    else:
        raise ConversionError(f"{where}: {', '.join(sorted(tensors))} are not the parameters of an intervention.")
    if not made.fits:
        raise ConversionError(f"{where}: the shapes of {', '.join(sorted(tensors))} do not fit together.")
    return made


def write_pyreft(made: Conversion, dst: Path, overwrite: bool, src: Path) -> None:
    """Write an adapter as pyreft 0.1.0 with pyvene 0.1.8 does, and note what its files cannot say.

    Raises:
        ConversionError: for edits of other modules than blocks, or if there is something at `dst`.
    """
    kind = made.config.intervention
    # The only number in such a name is its last part.
    numbers = {b: int(b.rsplit(".")[-1]) for b in made.edits if re.fullmatch(r"(?:[^.]*[^.\d][^.]*\.)*\d+", b)}
    if len(numbers) != len(made.edits) or len(group_by_stack(list(numbers))) != 1:
        raise ConversionError(
            f"The adapter edits {', '.join(made.edits)}; pyreft numbers the blocks of one stack, and cannot name these."
        )
    listed = [
        (numbers[block], group, edits[group])
        for group in range(max(map(len, made.edits.values())))
        for block, edits in made.edits.items()
    ]
    keys = [f"layer_{number}_comp_block_output_unit_pos_nunit_1#{group}" for number, group, _ in listed]
    config = {
        "intervention_constant_sources": [True] * len(keys),
        "intervention_dimensions": [edit.shape[1] for _, _, edit in listed],
        "intervention_types": [f"<class 'pyreft.interventions.{CLASSES[kind]}'>"] * len(keys),
        "mode": "parallel",
        "representations": [
            [number, "block_output", "pos", 1, edit.shape[0], *[None] * 9] for number, _, edit in listed
        ],
        "sorted_keys": keys,
    }
    try:
        tensors = {key: pyreft_tensors(edit, kind) for key, (_, _, edit) in zip(keys, listed)}
    except ValueError as error:
        raise ConversionError(f"{src} cannot be exported: {error}") from error
    with new_directory(dst, overwrite, src, pyreft=True) as directory:
        for key, stored in tensors.items():
            torch.save(stored, directory / f"intkey_{key}.bin")
        if made.head:
            torch.save(made.head, directory / PYREFT_HEAD)
        (directory / PYREFT_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    made.dst = dst
    made.notes += notes(made)


def pyreft_tensors(edit: Edit, kind: str) -> dict[str, Tensor]:
    """The state dict that pyreft's class of this kind saves."""
    d = edit.shape[1]
    source = {} if edit.source is None else {"weight": edit.source, "bias": edit.bias}
    if kind == "loreft":
        return {**source, "rotate_layer": rotation(edit).mT.contiguous()}
    tensors = {"embed_dim": torch.tensor(d), "interchange_dim": torch.tensor(d)}
    tensors |= {f"learned_source.{name}": tensor for name, tensor in source.items()} or {"learned_source": edit.bias}
    if kind not in WITH_BASIS_ROTATED:
        return tensors | {"proj_layer.weight": edit.basis}
    original, base = orthogonal_parameters(rotation(edit).mT)
    return tensors | {f"{ROTATION}original": original, f"{ROTATION}0.base": base}


def rotation(edit: Edit) -> Tensor:
    """R [r, d]; rows that are orthonormal already are left as they are, to the last bit."""
    return edit.basis if is_orthonormal(edit.basis, 1e-5) else orthonormal_rows(edit.basis).detach()


def notes(made: Conversion) -> list[str]:
    """What pyreft's files cannot say."""
    config = made.config
    found = [
        f"Pyreft's files hold no positions: hand the columns of {config.positions!r} to every forward as "
        "unit_locations, in the order of sorted_keys."
    ]
    if config.act_fn is not None:
        found.append(f"They hold no activation either: build the interventions with act_fn={config.act_fn!r}.")
    if config.subspaces:
        found.append(f"Pyreft's subspaces have no names: {config.subspaces} are rows of the rotation, in this order.")
    if config.intervention in ("noreft", "direft"):
        found.append(
            "ReftModel.load of pyreft 0.1.0 cannot build this class (KeyError: 'add_bias'): make the model with "
            "get_reft_model and add_bias=False, and call load_state_dict with each file."
        )
    elif config.intervention in ("loreft", "odireft"):
        found.append(
            "ReftModel.load of pyreft 0.1.0 rounds the learned source to bfloat16 and leaves out act_fn; for float32 "
            "make the model with get_reft_model and dtype=torch.float32, and call load_state_dict with each file."
        )
    if made.head:
        found.append(f"{', '.join(config.modules_to_save or ['The head'])}: load it with include_model=True.")
    return found
