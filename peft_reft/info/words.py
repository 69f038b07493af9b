"""Words for what stands in an adapter's config: its equation, its positions, its prompts and what it shares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from peft_reft.interventions import REGISTRY
from peft_reft.positions import PositionSpec
from peft_reft.tuner.subspaces import from_pairs


def equation_of(kind: str) -> str:
    """What h becomes, from the first line of the registered class; "" for an unknown name.

    >>> equation_of("loreft")
    'LoReFT(h) = h + Rᵀ(Wh + b - Rh)'
    """
    cls: type[nn.Module] | None = REGISTRY.get(kind)
    return "" if cls is None else ((cls.__doc__ or cls.__name__).strip().splitlines()[0].split(":")[0])


def positions_in_words(spec: PositionSpec) -> str:
    """Which tokens a spec edits.

    >>> from peft_reft.positions import parse_positions
    >>> positions_in_words(parse_positions("f3+l1+d8"))
    'the first 3 tokens and the last token of the prompt, and every 8th generated token'
    """
    prompt = [term.words for term in spec.terms if not term.generated]
    parts = [f"{' and '.join([', '.join(prompt[:-1]), prompt[-1]] if prompt[:-1] else prompt)} of the prompt"]
    parts = (parts if prompt else []) + [term.words for term in spec.terms if term.generated]
    return ", and ".join(parts)


def prompt_in_words(config: Mapping[str, Any]) -> str:
    """What counts as the prompt, unless a call names its places itself with `intervention_locations`."""
    marker, turns, task = config.get("prompt_end"), config.get("turns"), config.get("task_type")
    whole = "the whole input" if marker is None else f"everything up to the last marker {marker!r}"
    if task in (None, "CAUSAL_LM"):
        text = f"taken from labels or generate(); otherwise {whole}"
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


def subspaces_in_words(config: Mapping[str, Any]) -> str:
    """The named parts of R, in their order; "" if there are none.

    >>> subspaces_in_words({"subspaces": [["german", 4], ["formal", 2]], "frozen_subspaces": ["german"]})
    'german (rank 4, keeps its values), formal (rank 2)'
    """
    parts, frozen = from_pairs("subspaces", config.get("subspaces")), config.get("frozen_subspaces") or []
    if parts is None:
        return ""
    if not isinstance(parts, dict) or not isinstance(frozen, list):
        raise ValueError(f"subspaces is {parts!r} in the adapter's config; it must be pairs of name and rank, or null.")
    kept = {name: ", keeps its values" for name in frozen if isinstance(name, str)}
    return ", ".join(f"{name} (rank {rank}{kept.get(name, '')})" for name, rank in parts.items())


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
