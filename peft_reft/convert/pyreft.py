"""Reading a checkpoint of pyreft: which block each file is for, which equation, and where R is in it.

The files hold no positions, no activation and no name of the base model: these must be given. What a directory of
ours looks like is known to conversion.py and writing.py; the way back is export.py's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_reft.convert.conversion import SPLIT, Conversion, ConversionError, Edit, assemble, is_orthonormal
from peft_reft.convert.rotation import orthogonal_weight
from peft_reft.convert.structure import Structure
from peft_reft.convert.writing import PYREFT_CONFIG, PYREFT_HEAD, is_pyreft_config
from peft_reft.info.files import read_json, read_tensors
from peft_reft.positions import PositionSpec, parse_positions
from peft_reft.tuner.checkpoint import check_tensors
from peft_reft.tuner.keys import PEFT_PREFIX

KINDS = {  # pyreft's class -> the name here; DiReFT means two different equations
    "LoreftIntervention": "loreft",
    "LoreftIntervention_IdentityInit": "loreft",
    "NoreftIntervention": "noreft",
    "ConsreftIntervention": "consreft",
    "LobireftIntervention": "lobireft",
    "DireftIntervention": "odireft",
    "NodireftIntervention": "direft",
}
WITH_BASIS_ROTATED = ("loreft", "consreft", "lobireft", "odireft")
CONSTANT = ("consreft", "lobireft")
ROTATION = "rotate_layer.parametrizations.weight."


def find_checkpoint(src: Path) -> Path | None:
    """The directory with pyreft's config: `src`, or where pyreft's trainer puts it; None if there is none."""
    for directory in (src, src / "intervenable_model"):
        if is_pyreft_config(directory / PYREFT_CONFIG):
            return directory
    return None


def read_pyreft(
    directory: Path,
    positions: str | None,
    structure: Structure | None,
    *,
    kind: str | None = None,
    act_fn: str | None = None,
    head: bool = True,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
) -> Conversion:
    """The adapter in a directory that pyreft saved; arguments as in `from_pyreft`."""
    if positions is None:
        raise ConversionError(
            f"{directory}: pyreft's files do not say which tokens were edited. Pass the positions of the training run, "
            "such as positions='f2+l2' (--positions f2+l2) for the first two and last two tokens of the prompt."
        )
    spec = parse_positions(positions)
    config = read_json(directory / PYREFT_CONFIG)
    listed: list[Any] = [config.get(name) for name in ("sorted_keys", "representations", "intervention_types")]
    if not all(isinstance(entry, list) for entry in listed) or len({len(entry) for entry in listed if entry}) != 1:
        raise ConversionError(
            f"{directory / 'config.json'}: sorted_keys, representations and intervention_types must be lists of one "
            "length, an entry for each intervention."
        )
    keys, representations, types = listed
    kind = kind_of(types, kind)
    edits: dict[str, dict[int, Edit]] = {}
    for key, representation in zip(keys, representations):
        file = f"intkey_{key}.bin"
        if not isinstance(key, str) or Path(file).name != file:
            raise ConversionError(f"{directory / 'config.json'}: {key!r} is no key of an intervention.")
        block = block_of(representation, structure)
        number = int(match[1]) if (match := re.search(r"#(\d+)$", key)) else 0
        tensors = read_tensors(directory / file)
        if number in edits.setdefault(block, {}):
            raise ConversionError(
                f"{key} and another intervention both edit the output of {block}, the second what the first one left. "
                "An adapter edits a token once, and no other one continues its edit: train them anew as one."
            )
        edits[block][number] = edit_from(tensors, kind, act_fn, file)
    ordered = {block: [found[number] for number in sorted(found)] for block, found in edits.items()}
    ordered = {block: ordered[block] for block in sorted(ordered, key=natural)}
    made = assemble(
        "pyreft",
        kind,
        ordered,
        positions,
        structure,
        head=read_head(directory, ordered, structure) if head else {},
        act_fn=act_fn,
        base_model_name_or_path=base_model_name_or_path,
        task_type=task_type,
    )
    made.notes += notes_on_positions(spec)
    if act_fn is None and kind not in CONSTANT:
        made.notes.append("Pyreft's files do not say whether there was an activation; none (act_fn=None) is assumed.")
    return made


def kind_of(types: list[Any], given: str | None) -> str:
    """The intervention's name here, from the class names in the config, or as given."""
    if given is not None:
        if given not in KINDS.values():
            raise ConversionError(f"kind={given!r} is none of {', '.join(sorted(set(KINDS.values())))}.")
        return given
    names = sorted({str(entry) for entry in types})
    if len(names) > 1:
        raise ConversionError(
            f"The checkpoint mixes interventions: {', '.join(names)}. An adapter has one kind. {SPLIT}"
        )
    match = re.fullmatch(r"<class 'pyreft\.(?:\w+\.)*(\w+)'>", names[0])
    if match is None or match[1] not in KINDS:
        raise ConversionError(
            f"{names[0]} is no intervention of pyreft that is known here ({', '.join(KINDS)}). If it computes one of "
            f"the equations of this package, say which: kind='loreft' (--kind loreft), or another of "
            f"{', '.join(sorted(set(KINDS.values())))}."
        )
    return KINDS[match[1]]


def block_of(representation: Any, structure: Structure | None) -> str:
    """The name of the module whose output an intervention edits, from its entry in the config."""
    layer, component, unit = [*(representation if isinstance(representation, list) else []), None, None, None][:3]
    if unit != "pos" or not isinstance(component, str):
        raise ConversionError(
            f"An intervention on component {component!r} by unit {unit!r} has no counterpart: only tokens ('pos') are "
            "edited here."
        )
    if "." in component:  # a path in the model
        *path, side = re.sub(r"\[(\d+)\]", r".\1", component.removeprefix(PEFT_PREFIX)).split(".")
        if side == "input" and path[-1].isdigit() and int(path[-1]) > 0:
            path[-1] = str(int(path[-1]) - 1)  # a block's input is the output of the block before
        elif side != "output":
            raise ConversionError(
                f"The component {component!r} is not the output of a module, nor the input of a block that has one "
                "before it; nothing else can be edited here."
            )
        name = ".".join(path)
        return structure.module(name) if structure is not None else name
    if component not in ("block_output", "block_input"):
        raise ConversionError(
            f"The component {component!r} is not a block's output, and which module it means depends on pyreft's table "
            "for the model. Write it as that module's path in the checkpoint's config.json, such as "
            "'model.layers[3].mlp.output', which is converted exactly."
        )
    number = layer - (component == "block_input") if isinstance(layer, int) else -1
    if number < 0:
        raise ConversionError(
            f"{component} of layer {layer!r} is not the output of any block; only outputs of blocks can be edited here."
        )
    if structure is None:
        raise ConversionError(
            f"The checkpoint numbers its blocks ({component} of layer {layer}) and an adapter names them. Pass the "
            "base model, model='...' (--model ...): a path or a name on the hub. Only its config is read."
        )
    return structure.block(number)


def edit_from(tensors: Mapping[str, Tensor], kind: str, act_fn: str | None, file: str) -> Edit:
    """One intervention, from the tensors in its file."""
    left = dict(tensors)
    width = left.pop("embed_dim", None)
    left.pop("interchange_dim", None)
    check_tensors(left)
    is_constant, is_rotated = kind in CONSTANT, kind in WITH_BASIS_ROTATED
    source = None if is_constant else pop_first(left, "weight", "learned_source.weight")
    bias = pop_first(left, "learned_source") if is_constant else pop_first(left, "bias", "learned_source.bias")
    if is_rotated:
        basis = left.pop("rotate_layer", None)
        if basis is None and {f"{ROTATION}original", f"{ROTATION}0.base"} <= set(left):
            original, base = left.pop(f"{ROTATION}original"), left.pop(f"{ROTATION}0.base")
            d, r = original.shape if original.dim() == 2 else (0, 0)
            basis = orthogonal_weight(original, base) if base.shape == (d, d) and r <= d else None
        basis = None if basis is None else basis.mT
    else:
        basis = pop_first(left, "proj_layer.weight")
        projected = left.pop("proj_layer.bias", None)
        if projected is not None and bias is not None and kind == "noreft":  # act(W1h + b) − (W2h + b2)
            if act_fn is not None and bool((projected != 0).any()):
                raise ConversionError(
                    f"{file}: the bias of the projection, proj_layer.bias, stands outside of the activation "
                    f"{act_fn!r}, where this package's equation has none. It cannot be converted."
                )
            bias = bias - projected
    lacking = [name for name, t in {"source": source, "bias": bias, "basis": basis}.items() if t is None]
    if lacking != (["source"] if is_constant else []) or left or basis is None or bias is None:
        raise ConversionError(
            f"{file} has the tensors {', '.join(sorted(tensors))}, which are not those of {kind!r}"
            + (f": {', '.join(sorted(left))} would change what it computes" if left else "")
            + ". Name the equation with kind=... (--kind ...) if it is another; a variant with weights of its own "
            "needs a class of its own (peft_reft.register_intervention)."
        )
    made = Edit(basis, bias, source)
    if not made.fits or (width is not None and int(width) != made.shape[1]):
        r, d = made.shape if basis.dim() == 2 else (0, 0)
        raise ConversionError(
            f"{file}: the shapes of {', '.join(sorted(tensors))} do not fit together to rank {r} and width {d}."
        )
    if is_rotated and not is_orthonormal(basis, 1e-4 if basis.dtype in (torch.float32, torch.float64) else 3e-2):
        raise ConversionError(
            f"{file}: rotate_layer has no orthonormal columns, so that it is not the R of {kind!r} and would be "
            "another matrix here."
        )
    return made


def pop_first(tensors: dict[str, Tensor], *names: str) -> Tensor | None:
    """Take the first of these tensors that is there."""
    return next((tensors.pop(name) for name in names if name in tensors), None)


def read_head(directory: Path, blocks: Mapping[str, Any], structure: Structure | None) -> dict[str, Tensor]:
    """What pyreft trained of the model itself, such as a classifier.

    Raises:
        ConversionError: for weights inside of the body: LoRA's, or the body's own.
    """
    file = directory / PYREFT_HEAD
    if not file.is_file():
        return {}
    tensors = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in read_tensors(file).items()}
    if any("lora_" in name for name in tensors):
        raise ConversionError(
            f"{file} holds LoRA's matrices ({next(name for name in tensors if 'lora_' in name)}, ...): pyreft trained "
            "both at once. An adapter here is one method. Save the LoRA part with PEFT in pyreft's environment, load "
            "it into the base model, merge it, and load the ReFT part on top, which is converted without this file "
            "(head=False, --without-head)."
        )
    bodies = {block.split(".")[0] for block in blocks}
    inside = [name for name in tensors if name.split(".")[0] in bodies]
    unknown = [name for name in tensors if structure is not None and not structure.has_module(name.split(".")[0])]
    if inside or unknown:
        raise ConversionError(
            f"{file} holds trained weights of the model's body ({(inside or unknown)[0]}, ...), not of a head alone. "
            "Save that model itself and use it as the base model; the interventions are converted without this file "
            "with head=False (--without-head)."
        )
    check_tensors(tensors)
    return tensors


def notes_on_positions(spec: PositionSpec) -> list[str]:
    """What pyreft did about positions that a spec here does not say."""
    first, last = spec.count("f"), spec.count("l")
    notes = []
    if first or last:
        notes.append(
            f"Prompts of fewer than {2 * max(first, last)} tokens: pyreft edited at most half of such a prompt at each "
            f"end, here {spec} edits as many tokens as there are. For pyreft's tokens pass "
            f"intervention_locations=peft_reft.convert.pyreft_locations(mask, {str(spec)!r}) to the model."
        )
    if last:
        notes.append(
            "Pyreft's ReftClassificationDataset, ReftGenerationDataset, ReftSupervisedDataset and ReftRewardDataset "
            f"left out the last token of the prompt: with them {str(spec)!r} edited one token earlier than l{last} "
            "does here, which no positions can say. Was one of them used, pass pyreft_locations(mask, "
            f"{str(spec)!r}, skip_last=True) in every call."
        )
    if first or last:
        notes.append(
            "Pyreft's data sets put a masked pad token in front of each row (for GLUE behind it). That changes "
            "nothing where positions are rotary or relative, or skip padding; a model with learned absolute positions "
            "(GPT-2, for one) saw each token one place later: put the pad token in front here, too, masked."
        )
    return notes


def natural(name: str) -> list[tuple[int, str]]:
    """Sorts block 10 behind block 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
