"""What a saved adapter is, read from its directory alone: `python -m peft_reft info DIR`, and `adapter_info` in Python.

No model is loaded, nothing is executed and nothing is fetched: the config is JSON, tensors come from safetensors (or
from a pickle that may hold tensors only). What an adapter does to the tokens of a prompt is told by inspect.py.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from peft_reft.interventions import _REGISTRY, Intervention, build_intervention
from peft_reft.numbering import block_number
from peft_reft.positions import PositionSpec, Term, parse_positions

KEY = re.compile(r"(?:base_model\.model\.)?(?P<block>.+)\.reft\.reft_interventions\.(?P<group>\d+)\.(?P<name>.+)")
AUTO_CLASSES = {  # the class of transformers that makes the base model, by task type
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


@dataclass(frozen=True)
class BlockInfo:
    """The interventions of one edited block.

    Attributes:
        name: of the block in the base model.
        width, rank: d and r; None if the equation is unknown here and says neither.
        interventions: how many it has, one or one per position group.
        parameters: trained numbers.
        norms: Frobenius norm of each parameter, over all interventions of the block.
        orthonormality: max |R Rᵀ − I| of the R that is used; None where the equation has none, or was not looked at.
        gain: the most by which the linear part of the edit moves h, as a part of h's length (the largest singular
            value of the map h -> Δh without its constant); 0 for a fresh adapter; None with an activation or for
            equations that are not built in.
        shift: length of the edit's constant part, in the units of h; None as for `gain`.
    """

    name: str
    width: int | None
    rank: int | None
    interventions: int
    parameters: int
    norms: dict[str, float]
    orthonormality: float | None = None
    gain: float | None = None
    shift: float | None = None


@dataclass(frozen=True)
class AdapterInfo:
    """A saved ReFT adapter.

    Attributes:
        intervention, equation: its name, and what h becomes ("" if that name is not registered in this process).
        positions, edited: the notation, and the same in words.
        prompt: where the prompt ends, in words.
        weights: what is shared, in words.
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
        ranks = sorted({block.rank for block in self.blocks if block.rank is not None})
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
            "rank": f"{', '.join(map(str, ranks)) or '?'}, of width {', '.join(map(str, widths)) or '?'}",
            "parameters": f"{self.parameters:,} in {', '.join(self.dtypes)}"
            + (f", and {self.other_parameters:,} of other modules" if self.other_parameters else ""),
            "size": f"{in_bytes(self.size)} ({self.file})",
            "R orthonormal": f"max |RRᵀ − I| = {max(errors):.1e}" if errors else "",
            "base model": ", ".join(
                repr(value) if key else str(value)
                for key, value in enumerate([self.task_type, self.base_model])
                if value is not None
            ),
            "warning": "some parameters are infinite or NaN" if self.finite is False else "",
        }
        text = "\n".join(f"{name:<14}{text}" for name, text in lines.items() if text) + "\n\n" + self.table()
        # Names come from the file: they may hold nothing by which a terminal could be steered.
        return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)

    def blocks_in_words(self) -> str:
        """How many blocks are edited, and which."""
        if self.config.get("share_layers"):
            return f"one set of interventions for all edited blocks, stored at {self.blocks[0].name}"
        names = [block.name for block in self.blocks]
        shown = ", ".join(names) if len(names) <= 4 else f"{names[0]}, {names[1]}, ..., {names[-1]}"
        return f"{len(names)}: {shown}"

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


def adapter_info(directory: str | Path, look_at_weights: bool = True) -> AdapterInfo:
    """What the adapter in a directory is, without its model.

    Args:
        directory: as `save_pretrained` wrote it.
        look_at_weights: False reads names and shapes only, and leaves norms and the like out.

    Raises:
        ValueError: if there is no ReFT adapter in it, with the reason.
    """
    directory = Path(directory)
    config = read_config(directory)
    spec = parse_positions(str(config.get("positions")), config.get("turns"))
    kind = str(config.get("intervention"))
    stored: dict[str, dict[int, dict[str, Tensor]]] = {}
    others: dict[str, int] = {}
    try:
        with open_weights(directory) as (file, shapes, read):
            for key, shape in shapes.items():
                match = KEY.fullmatch(key)
                if match is None:
                    others[key] = math.prod(shape)
                    continue
                groups = stored.setdefault(match["block"], {})
                groups.setdefault(int(match["group"]), {})[match["name"]] = read(key)
    except (SafetensorError, OSError, EOFError, RuntimeError, pickle_error()) as error:
        raise ValueError(f"{str(directory)!r} holds weights that cannot be read: {error}") from error
    if not stored:
        raise ValueError(
            f"{str(file)!r} holds no weights of a ReFT adapter: none of its {len(others)} tensors lies below "
            "'.reft.reft_interventions.'. Save the adapter with PeftModel.save_pretrained."
        )
    tensors = [tensor for groups in stored.values() for group in groups.values() for tensor in group.values()]
    return AdapterInfo(
        intervention=kind,
        equation=equation_of(kind),
        positions=str(spec),
        edited=positions_in_words(spec),
        prompt=prompt_in_words(config),
        weights=weights_in_words(config, spec),
        task_type=config.get("task_type"),
        base_model=config.get("base_model_name_or_path"),
        blocks=[block_info(name, stored[name], config, look_at_weights) for name in in_order(stored)],
        parameters=sum(tensor.numel() for tensor in tensors),
        other_parameters=sum(others.values()),
        other_tensors=sorted(others),
        dtypes=sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}),
        file=file.name,
        size=file.stat().st_size,
        finite=all(bool(t.isfinite().all()) for t in tensors if t.is_floating_point()) if look_at_weights else None,
        config=config,
    )


def read_config(directory: Path) -> dict[str, Any]:
    """adapter_config.json of a ReFT adapter, as it stands: nothing of it is imported or executed.

    Raises:
        ValueError: if it is missing, unreadable or that of something else.
    """
    path = directory / CONFIG_NAME
    if not path.is_file():
        inside = sorted(str(found.parent) for found in directory.glob(f"*/{CONFIG_NAME}"))
        hint = f" There are adapters in {', '.join(map(repr, inside))}." if inside else ""
        what = "has no" if directory.is_dir() else "is no directory, let alone one with an"
        raise ValueError(
            f"{str(directory)!r} {what} {CONFIG_NAME}, so it is no saved adapter. Give the directory that "
            f"save_pretrained wrote (a download of it, if it is on the hub).{hint}"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not JSON: {error}") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "REFT":
        raise ValueError(f"{str(directory)!r} holds an adapter of the type {kind!r}, and not one of the type 'REFT'.")
    return dict(config)


@contextmanager
def open_weights(directory: Path) -> Iterator[tuple[Path, dict[str, tuple[int, ...]], Any]]:
    """The file of an adapter's weights: its path, the shapes by name, and a function that reads one tensor."""
    safe, pickled = directory / SAFETENSORS_WEIGHTS_NAME, directory / WEIGHTS_NAME
    if safe.is_file():
        with safe_open(safe, framework="pt") as tensors:
            yield safe, {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}, tensors.get_tensor  # noqa: SIM118
    elif pickled.is_file():
        loaded = torch.load(pickled, map_location="cpu", weights_only=True)
        yield pickled, {key: tuple(tensor.shape) for key, tensor in loaded.items()}, loaded.__getitem__
    else:
        raise ValueError(f"{str(directory)!r} has the config of a ReFT adapter and no {SAFETENSORS_WEIGHTS_NAME}.")


def pickle_error() -> type[Exception]:
    """What torch raises for a pickle that holds more than tensors."""
    from pickle import UnpicklingError

    return UnpicklingError


def block_info(name: str, groups: dict[int, dict[str, Tensor]], config: Mapping[str, Any], look: bool) -> BlockInfo:
    """What the stored parameters of one block are, by the number of the intervention and their names."""
    parameters = [tensor for group in groups.values() for tensor in group.values()]
    basis = groups[min(groups)].get("basis")
    rank, width = basis.shape if basis is not None and basis.dim() == 2 else (None, None)
    norms: dict[str, float] = {}
    measured: list[tuple[float | None, float | None, float | None]] = []
    if look:
        for key in dict.fromkeys(key for group in groups.values() for key in group):
            parts = [group[key].double().norm() for group in groups.values() if key in group]
            norms[key] = float(torch.stack(parts).norm())
        if rank is not None and width is not None:
            measured = [measure(built(config, width, rank, group)) for group in groups.values()]
    figures = [max((v for v in values if v is not None), default=None) for values in zip(*measured)] or [None] * 3
    return BlockInfo(name, width, rank, len(groups), sum(tensor.numel() for tensor in parameters), norms, *figures)


def built(config: Mapping[str, Any], width: int, rank: int, tensors: Mapping[str, Tensor]) -> Intervention | None:
    """The intervention that has these parameters; None if its equation is not one of the package's kind."""
    kind = str(config.get("intervention"))
    cls = _REGISTRY.get(kind)
    if cls is None or not issubclass(cls, Intervention) or cls.combine is not Intervention.combine:
        return None
    try:
        with torch.device("meta"):
            module = build_intervention(kind, width, rank, act_fn=config.get("act_fn"))
    except (KeyError, TypeError, ValueError):  # no such activation, or no such rank: a config that no model takes
        return None
    assert isinstance(module, Intervention)
    module.to_empty(device="cpu")
    parameters = dict(module.named_parameters())
    if {key: p.shape for key, p in parameters.items()} != {key: t.shape for key, t in tensors.items()}:
        return None
    for key, tensor in tensors.items():
        parameters[key].data = tensor
    return module


@torch.no_grad()
def measure(module: Intervention | None) -> tuple[float | None, float | None, float | None]:
    """Orthonormality, gain and shift: see `BlockInfo`."""
    if module is None or not all(p.isfinite().all() for p in module.parameters()):
        return None, None, None
    up = module.subspace.double()  # what the edits use, in the precision they use
    error = float((up @ up.mT - torch.eye(len(up)).double()).abs().max()) if module.orthonormal else None
    if module.act is not None:
        return error, None, None
    weight, bias = (None, module.weight) if module.bias is None else (module.weight, module.bias)
    factors = module.combine(up, weight, bias)
    gain = 0.0
    if factors.down is not None:
        # The squares of the singular values of upᵀ down [d, d] are eigenvalues of an r by r matrix.
        squares = torch.linalg.eigvals((factors.down @ factors.down.mT) @ (up @ up.mT)).real
        gain = max(float(squares.max()), 0.0) ** 0.5
    return error, gain, float((factors.bias.double() @ up).norm())


# In words.


def equation_of(kind: str) -> str:
    """What h becomes, from the first line of the registered class; "" for an unknown name.

    >>> equation_of("loreft")
    'LoReFT(h) = h + Rᵀ(Wh + b - Rh)'
    """
    cls: type[nn.Module] | None = _REGISTRY.get(kind)
    return "" if cls is None else ((cls.__doc__ or cls.__name__).strip().splitlines()[0].split(":")[0])


def positions_in_words(spec: PositionSpec) -> str:
    """Which tokens a spec edits.

    >>> positions_in_words(parse_positions("f3+l1+d8"))
    'the first 3 tokens and the last token of the prompt, and every 8th generated token'
    """
    prompt = [words(term) for term in spec.terms if term.kind != "d"]
    parts = [f"{' and '.join([', '.join(prompt[:-1]), prompt[-1]] if prompt[:-1] else prompt)} of the prompt"]
    parts = (parts if prompt else []) + [words(term) for term in spec.terms if term.kind == "d"]
    return ", and ".join(parts)


def words(term: Term) -> str:
    """One term of a spec."""
    n = term.count
    some = {"f": "the first", "l": "the last"}.get(term.kind)
    if some is not None:
        return f"{some} token" if n == 1 else f"{some} {n} tokens"
    if term.kind == "m":
        return "the token in the middle" if n == 1 else f"{n} tokens in the middle"
    what = "generated token" if term.kind == "d" else "token"
    return f"every {what}" if n == 1 else f"every {ordinal(n)} {what}"


def ordinal(n: int) -> str:
    """
    >>> [ordinal(n) for n in (1, 2, 3, 4, 11, 22)]
    ['1st', '2nd', '3rd', '4th', '11th', '22nd']
    """
    ending = "th" if n % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{ending}"


def prompt_in_words(config: Mapping[str, Any]) -> str:
    """What counts as the prompt, unless a call names its places itself with `intervention_locations`."""
    marker, turns, task = config.get("prompt_end"), config.get("turns"), config.get("task_type")
    whole = "the whole input" if marker is None else f"what stands before {marker!r}, the marker included"
    if task in (None, "CAUSAL_LM"):
        text = f"what labels or generate say, else {whole}"
    else:
        text = whole + ("; in decoder blocks the decoder's prompt" if task == "SEQ_2_SEQ_LM" else "")
    return text + (f"; of several turns: {turns}" if turns else "")


def weights_in_words(config: Mapping[str, Any], spec: PositionSpec) -> str:
    """What is shared between positions and blocks."""
    share = config.get("share_weights", True)
    if share == "position":
        text = f"{spec.num_interventions('position')} interventions per block, one per position"
    elif share is False:
        names = ", ".join(str(term) for term in spec.terms)
        text = f"{len(spec.terms)} interventions per block, one per term ({names})"
    else:
        text = "one intervention per block, for all its positions"
    return text + ("; the same for all blocks" if config.get("share_layers") else "")


def in_order(names: Mapping[str, Any]) -> list[str]:
    """Names of blocks by stack and number, as the model runs them, not as the letters of their names."""
    return sorted(names, key=lambda name: (re.sub(r"\d+", "", name), block_number(name) or 0, name))


def in_bytes(size: int) -> str:
    """
    >>> in_bytes(500), in_bytes(20_480)
    ('500 bytes', '20.5 kB')
    """
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.1f} {unit}" if unit != "bytes" else f"{size} bytes"
        size /= 1000  # type: ignore[assignment]
    return f"{size:.1f} GB"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def as_json(info: AdapterInfo) -> str:
    """All fields as JSON; numbers that JSON cannot hold (infinite, NaN) as null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [plain(entry) for entry in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(asdict(info)), indent=2, ensure_ascii=False)


def main(argv: list[str]) -> int:
    """`python -m peft_reft info DIR [--json]`; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m peft_reft info", description="What a saved ReFT adapter is, without loading its model."
    )
    parser.add_argument("directory", help="as save_pretrained wrote it")
    parser.add_argument("--json", action="store_true", help="all fields as JSON")
    arguments = parser.parse_args(argv)
    try:
        info = adapter_info(arguments.directory)
    except ValueError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(as_json(info) if arguments.json else info)
    return 0
