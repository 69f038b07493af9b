"""Named parts of an adapter's R: what a config says of them.

What a call says of its rows is read in context/subspaces.py, the equation of parts stands in interventions/parts.py,
growing an adapter by a part in combine.py.
"""

from __future__ import annotations

from typing import Any

from transformers.activations import ACT2FN

from peft_reft.interventions import check_parts
from peft_reft.tuner.sizes import check_rank, shown

LONGEST_NAME = 100


def from_pairs(field: str, value: Any) -> Any:
    """A field of a config as a dictionary: where the order counts, a file holds pairs, which nothing sorts."""
    if isinstance(value, (list, tuple)):
        pairs = [tuple(pair) if isinstance(pair, (list, tuple)) else (pair,) for pair in value]
        if all(len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
            names = [name for name, _ in pairs]
            if len(set(names)) < len(names):
                raise ValueError(f"{field}={shown(value)} has a name twice; each must be another one.")
            return dict(pairs)
    return value


def check_subspaces(config: Any) -> None:
    """Refuse subspaces that no adapter could have.

    Args:
        config: a `ReftConfig` that is being built.

    Raises:
        ValueError: naming the field.
    """
    parts, frozen = config.subspaces, config.frozen_subspaces
    if parts is None:
        if frozen is not None:
            raise ValueError(f"frozen_subspaces={shown(frozen)} needs subspaces, some of which keep their values.")
        return
    if not isinstance(parts, dict) or not parts:
        raise ValueError(
            f"subspaces={shown(parts)} must be a dictionary of ranks by name, such as {{'german': 4, 'formal': 4}}, or "
            "None for R as a whole."
        )
    for name, rank in parts.items():
        if not isinstance(name, str) or not name.strip() or len(name) > LONGEST_NAME or not name.isprintable():
            raise ValueError(
                f"subspaces={shown(parts)} has the name {shown(name)}; a name is printable text of at most "
                f"{LONGEST_NAME} characters."
            )
        check_rank(f"subspaces[{name!r}]", rank)
    if sum(parts.values()) != config.r:
        raise ValueError(
            f"subspaces={shown(parts)} have {sum(parts.values())} directions together, but r={config.r}. The ranks of "
            "the parts add up to r."
        )
    if config.rank_pattern:
        raise ValueError(
            f"subspaces={shown(parts)} have the same ranks in all blocks, which rank_pattern={config.rank_pattern!r} "
            "gives others. Leave one of the two out."
        )
    check_parts(config.intervention)
    if config.act_fn is not None and any(True for _ in ACT2FN[config.act_fn].parameters()):
        raise ValueError(
            f"subspaces={shown(parts)} would share the weights of the activation act_fn={config.act_fn!r}, so that no "
            "part could be trained apart or keep its values. Use an activation without weights, or none."
        )
    if frozen is not None:
        names = list(parts)
        if not isinstance(frozen, (list, tuple)) or list(frozen) != names[: len(frozen)] or len(frozen) == len(names):
            raise ValueError(
                f"frozen_subspaces={shown(frozen)} must be the first of the subspaces {names}, and leave one to train: "
                "later parts are kept at right angles to earlier ones."
            )
