"""Towers: the parts of a model that run images or sounds beside the text.

An image is no row of the text, which may have none or several, and none of its vectors is a token. So what is given by
row or by column of the text means nothing there: positions count each image's own vectors, from the first to the last.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from peft_reft.context.forward import ForwardContext, Given
from peft_reft.context.subspaces import BASE

TOWER = "tower"  # the role of a tower's entry
TOKEN_COLUMNS = (
    "intervention_locations name columns of tokens, but all that this model's adapter edits are vectors of images or "
    "sounds, in {module}. Leave them out: positions count the vectors of each."
)
WHOSE_IMAGES = (
    "{name} holds {given!r} for the rows of a call, but {module} runs images or sounds, and a row may have none or "
    "several: it is unknown whose they are. Run rows that differ in separate calls, or leave that module's blocks out "
    "(target_modules, exclude_modules)."
)


def tower_context(entry: Any, given: Given, arguments: Mapping[str, Any]) -> ForwardContext:
    """The context of a tower's call.

    Args:
        entry: the tower's (see opening.py).
        given: to the call around it, or to `generate`.
        arguments: of the tower's forward, by name.

    Raises:
        ValueError: for what was given by row or by column of the text, where it is unknown what it means here.
    """
    module, state, layers = type(entry.module).__name__, entry.state, entry.layers
    passed = given.passed
    if passed.locations is not None and not any(one.layers for one in state.entries if one.role != TOWER):
        raise ValueError(TOKEN_COLUMNS.format(module=module))
    names, choices = passed.adapter_names, passed.subspaces
    if names is not None:
        held = {name for layer in layers for name in layer.reft_interventions}
        names = _one_for_all("adapter_names", [name if name in held else BASE for name in names], module)
    if choices is not None:
        choices = _one_for_all("subspaces", choices, module)
    # Of the one row, which stands for all: as `generate` repeats rows.
    given = given._replace(
        passed=passed._replace(locations=None, adapter_names=names, subspaces=choices),
        step=None,
        in_generate=True,
    )
    context = ForwardContext(state, layers, given, TOWER, entry.depth, training=entry.module.training)
    context.inputs = next((value.shape[0] for value in arguments.values() if isinstance(value, Tensor)), None)
    return context


def _one_for_all(name: str, given: Any, module: str) -> Any:
    """What is given for each row, as for one row, if it is the same for all."""
    entries = given.tolist() if isinstance(given, Tensor) else list(given)
    if any(entry != entries[0] for entry in entries):
        raise ValueError(WHOSE_IMAGES.format(name=name, given=entries, module=module))
    return given[:1]
