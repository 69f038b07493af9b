"""The adapters of a model, for its user: their interventions, how strongly they edit, which of their subspaces act."""

from __future__ import annotations

from typing import Any

from torch import nn

from peft_reft.blocks import own_name
from peft_reft.context.subspaces import choice_of, is_finite
from peft_reft.tuner.injection import base_model_of, reft_layers


def get_interventions(model: nn.Module, adapter_name: str | None = None) -> dict[str, nn.ModuleList]:
    """The interventions of an adapter.

    Args:
        model: a `PeftModel`, or a model that adapters were injected into.
        adapter_name: None for the active adapter.

    Returns:
        For every edited block, by its module name in the base model, a ModuleList with one intervention per position
        group, in the order of the terms of `positions` (a single one if the weights are shared).

    Raises:
        ValueError: if there is no such adapter, or several are active and none is named.
    """
    base = base_model_of(model)
    if adapter_name is None:
        active = sorted({name for layer in reft_layers(base).values() for name in layer.active_adapters})
        if len(active) != 1:
            raise ValueError(f"The active ReFT adapters are {active}; name the one to look at with adapter_name.")
        adapter_name = active[0]
    found: dict[str, Any] = {
        own_name(block): layer.reft_interventions[adapter_name]
        for block, layer in reft_layers(base, adapter_name).items()
    }
    if not found:
        raise _no_adapter(adapter_name, _names(base))
    return found


def _names(model: nn.Module) -> list[str]:
    return sorted({name for layer in reft_layers(model).values() for name in layer.reft_interventions})


def _no_adapter(name: str | None, known: list[str]) -> ValueError:
    return ValueError(f"The model has no ReFT adapter {name!r}; its ReFT adapters are {known}.")


def set_strength(model: nn.Module, strength: float, adapter_name: str | None = None) -> None:
    """Scale an adapter's edits: 0 leaves the base model, 1 is as trained; negative and larger values work too.

    Args:
        model: a `PeftModel`, or a model that adapters were injected into.
        strength: the factor of every edit, until it is set again; not saved with the adapter.
        adapter_name: None for the active adapters, "*" for all (those that are used by row only, too).

    Raises:
        ValueError: if there is no such adapter, or the strength is no finite number.
    """
    if not is_finite(strength):
        raise ValueError(
            f"strength={strength!r} is not a finite number; 0 is the base model, 1 the adapter as trained."
        )
    known = _names(model)
    if not known:
        raise ValueError(
            f"{type(model).__name__} has no ReFT adapter whose strength could be set; add one with get_peft_model, or "
            "load one with PeftModel.from_pretrained."
        )
    if adapter_name not in (None, "*", *known):
        raise _no_adapter(adapter_name, known)
    for layer in reft_layers(model).values():
        names = {None: layer.active_adapters, "*": known}.get(adapter_name, [adapter_name])
        layer.scaling.update({name: float(strength) for name in names if name in layer.scaling})


def set_subspaces(model: nn.Module, subspaces: Any, adapter_name: str | None = None) -> None:
    """Choose which named parts of an adapter's R act, where a call does not say so itself with `subspaces=`.

    Args:
        model: a `PeftModel`, or a model that adapters were injected into.
        subspaces: a name, a list of names, {name: strength}; [] for none of them, None for all. It holds until it is
            set again, and is not saved with the adapter.
        adapter_name: None for the active adapters that have subspaces.

    Raises:
        ValueError: if no such adapter has subspaces, or one does not have those that are named.
    """
    layers = list(reft_layers(model).values())
    choice = choice_of(subspaces)
    active = {name for layer in layers for name in layer.active_adapters}
    known = {name: parts for layer in layers for name, parts in layer.subspaces.items()}
    chosen = known.keys() & (active if adapter_name is None else {adapter_name})
    if not chosen:
        raise ValueError(
            f"{'No active ReFT adapter' if adapter_name is None else f'No ReFT adapter {adapter_name!r}'} has "
            f"subspaces; those with subspaces are {sorted(known)}. Make one with ReftConfig(subspaces={{...}})."
        )
    there = {part for name in chosen for part in known[name]}
    if choice is not None and not there.issuperset(choice):
        raise ValueError(f"subspaces={subspaces!r} are not all there: {sorted(chosen)} has {sorted(there)}.")
    for layer in layers:
        for name in chosen & layer.subspaces.keys():
            layer.chosen_subspaces.pop(name, None)
            if choice is not None:
                layer.chosen_subspaces[name] = dict(choice)
    layers[0].state.plans.clear()  # which were made with the choice before
