"""Reading a checkpoint of AdapterHub's `adapters`: its ReFT units, its positions and its head.

Its keys name the blocks and its config says the positions, but not whether W2h was subtracted: DiReFT and NoReFT look
the same on disk.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.activations import ACT2FN

from peft_reft.convert.conversion import Conversion, ConversionError, Edit, assemble
from peft_reft.convert.pyreft import natural
from peft_reft.convert.rotation import orthogonal_weight
from peft_reft.convert.structure import Structure, task_of
from peft_reft.info.files import read_json, read_tensors
from peft_reft.tuner.checkpoint import check_tensors

KEY = re.compile(r"(?P<block>.+)\.reft_layer\.refts\.(?P<adapter>[^.]+)\.units\.(?P<unit>[01])\.(?P<tensor>.+)")
ROTATION = "projection.parametrizations.weight."
ACTIVATIONS = {"leakyrelu": "leaky_relu"}  # AdapterHub's own name -> transformers' name


def is_adapterhub(config: Mapping[str, Any]) -> bool:
    """Whether an adapter_config.json is AdapterHub's, and not PEFT's."""
    return "peft_type" not in config and isinstance(config.get("config"), dict) and "model_class" in config


def read_adapterhub(
    directory: Path,
    structure: Structure | None,
    *,
    kind: str | None = None,
    head: bool = True,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
) -> Conversion:
    """The adapter in a directory that AdapterHub saved; arguments as in `from_adapterhub`."""
    saved = read_json(directory / "adapter_config.json")
    if not is_adapterhub(saved):
        raise ConversionError(f"{directory / 'adapter_config.json'} is not a config of AdapterHub's.")
    config = saved["config"]
    refuse_other_methods(config, directory)
    kind = kind_of(config, kind)
    first, last = config.get("prefix_positions", 0), config.get("suffix_positions", 0)
    if not (isinstance(first, int) and isinstance(last, int) and min(first, last) >= 0 and first + last > 0):
        raise ConversionError(
            f"prefix_positions={first!r} and suffix_positions={last!r} edit nothing; there must be a token to edit."
        )
    positions = "+".join([f"f{first}"] * (first > 0) + [f"l{last}"] * (last > 0))
    tied = bool(config.get("tied_weights"))
    units = read_units(find(directory, "adapter.safetensors", "pytorch_adapter.bin"), kind)
    used = [0] if tied else [unit for unit, count in enumerate((first, last)) if count]
    edits = {}
    for block in sorted(units, key=natural):
        missing = [unit for unit in used if unit not in units[block]]
        if missing or (tied and len(units[block]) > 1):
            raise ConversionError(
                f"{block} has the units {sorted(units[block])}, but tied_weights={tied} and {positions!r} need {used}; "
                "the config does not belong to these tensors."
            )
        name = structure.module(block) if structure is not None else block
        edits[name] = [units[block][unit] for unit in used]
    every_block = config.get("layers") == "all" and len({re.sub(r"\.?\d+$", "", block) for block in edits}) == 1
    model_class = str(saved.get("model_class"))
    found, head_notes = read_head(directory, model_class, list(edits), structure) if head else ({}, [])
    made = assemble(
        "AdapterHub",
        kind,
        edits,
        positions,
        structure,
        head=found,
        act_fn=activation(config.get("non_linearity")),
        dropout=float(config.get("dropout") or 0.0),
        every_block=every_block,
        base_model_name_or_path=base_model_name_or_path
        or (None if structure and structure.path else saved.get("model_name")),
        task_type=task_type or (structure.task_type if structure else None) or task_of(model_class),
    )
    made.notes += head_notes
    if structure is None and is_headless(model_class):
        made.notes.append(
            f"The blocks are named as in {model_class} ({next(iter(edits))}). For a model with a head, where their "
            "names are longer, convert the checkpoint with that model: model='...' (--model ...)."
        )
    if made.config.task_type in ("CAUSAL_LM", None) and last:
        made.notes.append(
            f"AdapterHub counted l{last} from the end of the whole row, in training behind the answer: its suffix "
            "learned at the end of the answers, and was used at the end of prompts. Here it is the end of the prompt "
            "in both."
        )
    if first and last and not tied:
        made.notes.append(
            f"Rows of fewer than {first + last} tokens: AdapterHub gave tokens in both ends to the suffix, here most "
            "of them are the prefix's. For AdapterHub's choice pass intervention_locations="
            f"peft_reft.convert.adapterhub_locations(mask, {positions!r}) to the model."
        )
    if not tied and len(used) == 1:
        made.notes.append(f"Unit {1 - used[0]} of each block was left out: {positions!r} never used it.")
    return made


def is_headless(model_class: str) -> bool:
    """Whether a class of transformers is a model without a head, such as LlamaModel."""
    return model_class.endswith("Model") and task_of(model_class) is None


def refuse_other_methods(config: Mapping[str, Any], directory: Path) -> None:
    """Raise ConversionError if a config is not that of ReFT alone."""
    architecture = config.get("architecture")
    if architecture == "union":
        parts = [str(part.get("architecture", "bottleneck")) for part in config.get("configs", [])]
        raise ConversionError(
            f"{directory} is a union of {' + '.join(parts)}, trained together. An adapter here is one method: there is "
            "no exact translation of a part of it. Train the ReFT part alone, or use AdapterHub for the union."
        )
    if architecture != "reft":
        raise ConversionError(
            f"{directory} is no ReFT adapter: its architecture is {architecture or 'a bottleneck (none is named)'!r}. "
            "Only 'reft' can be converted."
        )
    if config.get("output_reft", True) is not True:
        raise ConversionError(f"{directory}: output_reft={config['output_reft']!r} is not ReFT on the blocks' outputs.")


def kind_of(config: Mapping[str, Any], given: str | None) -> str:
    """The intervention's name here, from the config or as given."""
    if config.get("orthogonality"):
        if given not in (None, "loreft"):
            raise ConversionError(f"kind={given!r}, but the checkpoint has orthogonality=true, which is 'loreft'.")
        return "loreft"
    if given not in ("noreft", "direft"):
        raise ConversionError(
            f"kind={given!r}: AdapterHub saves DiReFT and NoReFT in the same way, config and tensors, so that nobody "
            "but you can tell which one this is (AdapterHub itself loads both as NoReFT). Pass kind='direft' "
            "(--kind direft) if it was trained with DiReftConfig, kind='noreft' if with NoReftConfig."
        )
    return given


def activation(name: Any) -> str | None:
    """AdapterHub's name of an activation, by transformers' names."""
    if name is None:
        return None
    own = ACTIVATIONS.get(str(name).lower(), str(name).lower())
    if own not in ACT2FN:
        raise ConversionError(f"non_linearity={name!r} is not an activation of transformers, and cannot be converted.")
    return own


def find(directory: Path, *names: str) -> Path:
    """The first of these files that is there; the last if none is."""
    return next((directory / name for name in names if (directory / name).is_file()), directory / names[-1])


def read_units(file: Path, kind: str) -> dict[str, dict[int, Edit]]:
    """The units of each block, from the adapter's file."""
    parts: dict[tuple[str, int], dict[str, Tensor]] = {}
    adapters = set()
    for key, tensor in read_tensors(file).items():
        match = KEY.fullmatch(key)
        if match is None:
            raise ConversionError(f"{file} holds {key}, which is no part of a ReFT adapter of AdapterHub's.")
        adapters.add(match["adapter"])
        parts.setdefault((match["block"], int(match["unit"])), {})[match["tensor"]] = tensor
    if len(adapters) != 1:
        raise ConversionError(f"{file} holds the adapters {sorted(adapters)}; it must hold one.")
    units: dict[str, dict[int, Edit]] = {}
    for (block, unit), tensors in parts.items():
        units.setdefault(block, {})[unit] = edit_from(tensors, kind, f"{file}, {block}, unit {unit}")
    return units


def edit_from(tensors: Mapping[str, Tensor], kind: str, where: str) -> Edit:
    """One unit, from its tensors."""
    basis = ["projection.weight"] if kind != "loreft" else [f"{ROTATION}original", f"{ROTATION}0.base"]
    wanted = ["learned_source.weight", "learned_source.bias", *basis]
    if sorted(tensors) != sorted(wanted):
        raise ConversionError(
            f"{where}: {', '.join(sorted(tensors))} are not the tensors of {kind!r}, {', '.join(wanted)}."
        )
    check_tensors(tensors)
    edit = Edit(tensors[basis[0]], tensors["learned_source.bias"], tensors["learned_source.weight"])
    if not edit.fits or (kind == "loreft" and tensors[basis[1]].shape != (edit.shape[1], edit.shape[1])):
        raise ConversionError(f"{where}: the shapes of {', '.join(sorted(tensors))} do not fit together.")
    if kind == "loreft":
        edit.basis = orthogonal_weight(tensors[basis[0]], tensors[basis[1]])
    return edit


def read_head(
    directory: Path, model_class: str, blocks: Iterable[str], structure: Structure | None
) -> tuple[dict[str, Tensor], list[str]]:
    """The head that was trained with the adapter, and notes about it.

    Args:
        blocks: names of the edited blocks; what lies in the same part of the model as they do is no head.
    """
    file = find(directory, "model_head.safetensors", "pytorch_model_head.bin")
    if not file.is_file():
        return {}, []
    tensors = read_tensors(file)
    if task_of(model_class) == "CAUSAL_LM" and all(name.split(".")[0] == "lm_head" for name in tensors):
        return {}, [
            "The head of the causal language model was left out: AdapterHub freezes it, it is the base model's."
        ]
    flexible = [name for name in tensors if name.startswith("heads.")]
    unknown = [name for name in tensors if structure is not None and not structure.has_module(name.split(".")[0])]
    bodies = {block.split(".")[0] for block in blocks}
    inside = [name for name in tensors if name.split(".")[0] in bodies or "." not in name]
    if inside:
        raise ConversionError(
            f"{file} holds {inside[0]}, which is no part of a head. Convert the adapter without its head: head=False "
            "(--without-head)."
        )
    check_tensors(tensors)
    if flexible or unknown:
        raise ConversionError(
            f"{file} holds {(flexible or unknown)[0]}, a head that the model of transformers does not have. Save the "
            "adapter with the model class of transformers, or convert it without its head: head=False "
            "(--without-head); the logits are then those of the base model's head."
        )
    return tensors, []
