"""What a saved adapter is, by its directory alone: `adapter_info`. No model is loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft_reft.info.files import read_adapter
from peft_reft.info.measuring import BlockInfo, block_info
from peft_reft.info.reading import interventions_of
from peft_reft.info.words import (
    equation_of,
    in_bytes,
    number,
    positions_in_words,
    prompt_in_words,
    subspaces_in_words,
    weights_in_words,
)
from peft_reft.positions import parse_positions
from peft_reft.tuner.sizes import printable


@dataclass(frozen=True)
class AdapterInfo:
    """A saved ReFT adapter.

    Attributes:
        intervention, equation: its name, and what h becomes ("" if that name is not registered in this process).
        positions, edited: the notation, and the same in words.
        prompt: where the prompt ends, in words.
        weights: what is shared, in words.
        subspaces: the named parts of R with their ranks, in words; "" if there are none.
        blocks: one entry per stored set of interventions: per edited block, or a single one if all blocks share.
        parameters: trained numbers of the interventions.
        other_parameters: numbers stored beside them (`modules_to_save`, token embeddings), and `other_tensors`
            their names.
        dtypes: of the interventions.
        size: bytes of the file of weights, `file` its name.
        finite: no parameter is infinite or NaN; None if the weights were not looked at.
        config: the whole adapter_config.json.
    """

    intervention: str
    equation: str
    positions: str
    edited: str
    prompt: str
    weights: str
    subspaces: str
    task_type: str | None
    base_model: str | None
    blocks: list[BlockInfo]
    parameters: int
    other_parameters: int
    other_tensors: list[str]
    dtypes: list[str]
    file: str
    size: int
    finite: bool | None
    config: dict[str, Any]

    def __str__(self) -> str:
        widths = sorted({block.width for block in self.blocks if block.width is not None})
        errors = [block.orthonormality for block in self.blocks if block.orthonormality is not None]
        extras = {key: self.config.get(key) for key in ("dropout", "act_fn") if self.config.get(key)}
        lines = {
            "intervention": f"{self.intervention}: {self.equation or 'not registered in this process'}",
            "": ", ".join(f"{key}={value!r}" for key, value in extras.items()),
            "positions": f"{self.positions}: {self.edited}",
            "prompt": self.prompt,
            "weights": self.weights,
            "blocks": self.blocks_in_words(),
            "subspaces": self.subspaces,
            "rank": f"{self.ranks_in_words()}, of width {', '.join(map(str, widths)) or '?'}",
            "parameters": self.parameters_in_words(),
            "size": f"{in_bytes(self.size)} ({self.file})",
            "R orthonormal": f"max |RRᵀ − I| = {max(errors):.1e}" if errors else "",
            "base model": ", ".join(filter(None, [self.task_type, self.base_model and repr(self.base_model)])),
            "warning": "some parameters are infinite or NaN" if self.finite is False else "",
        }
        text = "\n".join(f"{name:<14}{text}" for name, text in lines.items() if text) + "\n\n" + self.table()
        return printable(text)

    def blocks_in_words(self) -> str:
        """How many blocks are edited, and which."""
        if not self.blocks:
            return "not stored: the intervention has no parameters"
        if self.config.get("share_layers"):
            return f"one set of interventions for all edited blocks, stored at {self.blocks[0].name}"
        names = [block.name for block in self.blocks]
        shown = ", ".join(names) if len(names) <= 4 else f"{names[0]}, {names[1]}, ..., {names[-1]}"
        return f"{len(names)}: {shown}"

    def ranks_in_words(self) -> str:
        """The ranks that occur."""
        ranks = sorted({block.rank for block in self.blocks if block.rank is not None})
        return ", ".join(map(str, ranks)) or "?"

    def parameters_in_words(self) -> str:
        """How many numbers were trained, and in which precision they are stored."""
        others = f", and {self.other_parameters:,} of other modules" if self.other_parameters else ""
        kinds = f" in {', '.join(self.dtypes)}" if self.dtypes else ""
        return f"{self.parameters:,}{kinds}{others}"

    def table(self) -> str:
        """A line of numbers per block."""
        keys = list(dict.fromkeys(key for block in self.blocks for key in block.norms))
        rows = [["block", "rank", "parameters", *(f"‖{key}‖" for key in keys), "|RRᵀ−I|", "gain", "shift"]]
        for block in self.blocks:
            norms = [number(block.norms.get(key)) for key in keys]
            error = "-" if block.orthonormality is None else f"{block.orthonormality:.0e}"
            rank = "?" if block.rank is None else str(block.rank)
            rows.append(
                [block.name, rank, f"{block.parameters:,}", *norms, error, number(block.gain), number(block.shift)]
            )
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = [[row[0].ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(row[1:], widths[1:]))] for row in rows]
        return "\n".join("  ".join(line) for line in lines)

    def as_json(self) -> str:
        """All fields as JSON; numbers that JSON cannot hold (infinite, NaN) as null, control characters as codes."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: plain(entry) for key, entry in value.items()}
            if isinstance(value, list):
                return [plain(entry) for entry in value]
            return None if isinstance(value, float) and not math.isfinite(value) else value

        text = json.dumps(plain(asdict(self)), indent=2, ensure_ascii=False)
        return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def adapter_info(directory: str | Path, look_at_weights: bool = True) -> AdapterInfo:
    """What the adapter in a directory is, without its model.

    Args:
        directory: as `save_pretrained` wrote it.
        look_at_weights: False looks at names and shapes only, and leaves norms and the like out.

    Raises:
        ValueError: if there is no ReFT adapter in it, with the reason.
    """
    directory = Path(directory)
    saved = read_adapter(directory)
    config = saved.config
    spec = parse_positions(str(config.get("positions")), config.get("turns"))
    kind = str(config.get("intervention"))
    stored, others = interventions_of(saved)
    tensors = [tensor for groups in stored.values() for group in groups.values() for tensor in group.values()]
    return AdapterInfo(
        intervention=kind,
        equation=equation_of(kind),
        positions=str(spec),
        edited=positions_in_words(spec),
        prompt=prompt_in_words(config),
        weights=weights_in_words(config, spec),
        subspaces=subspaces_in_words(config),
        task_type=_name("task_type", config),
        base_model=_name("base_model_name_or_path", config),
        blocks=[block_info(name, groups, config, look_at_weights) for name, groups in stored.items()],
        parameters=sum(tensor.numel() for tensor in tensors),
        other_parameters=sum(tensor.numel() for tensor in others.values()),
        other_tensors=sorted(others),
        dtypes=sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}),
        file=saved.file.name,
        size=saved.file.stat().st_size,
        finite=all(bool(t.float().isfinite().all()) for t in tensors if t.is_floating_point())
        if look_at_weights
        else None,
        config=config,
    )


def _name(key: str, config: Mapping[str, Any]) -> str | None:
    value = config.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{key} is {value!r} in the adapter's config; it must be a name or null.")
    return value
