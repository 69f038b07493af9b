"""Putting together what was learned apart: one more subspace of an adapter, and sums of adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peft_reft.context.subspaces import is_finite
from peft_reft.interventions import Intervention
from peft_reft.tuner.config import ReftConfig
from peft_reft.tuner.layer import ReftLayer, intervention_of
from peft_reft.tuner.sizes import check_rank

MUST_AGREE = ("positions", "share_weights", "share_layers", "turns", "prompt_end")  # among edits that are summed
CANNOT_BE_SUMMED = ("act_fn", "modules_to_save", "trainable_token_indices")


def grown(config: ReftConfig, name: str, r: int) -> ReftConfig:
    """The config of an adapter with one more part, whose earlier parts keep their values.

    Raises:
        ValueError: if the config has no subspaces, or has this one already.
    """
    if not config.subspaces:
        raise ValueError(
            f"The adapter has no subspaces to which {name!r} could be added. Give its directions a name first: load it "
            f'with a config that has subspaces={{"first": {config.r}}}, which changes nothing else.'
        )
    if name in config.subspaces:
        raise ValueError(f"The adapter has a subspace {name!r} already; it has {list(config.subspaces)}.")
    check_rank("r", r)
    parts = {**config.subspaces, name: r}
    larger = replace(config, r=config.r + r, subspaces=parts, frozen_subspaces=list(config.subspaces))
    larger.inference_mode = False  # the new part is trained, whatever the adapter was loaded for
    return larger


def grow(layers: Sequence[ReftLayer], adapter_name: str, config: ReftConfig) -> None:
    """Put interventions with one more part in the place of an adapter's.

    Args:
        config: as `grown` gives it.
    """
    seen = set()
    for layer in layers:
        groups: Any = layer.reft_interventions[adapter_name]
        layer.subspaces[adapter_name] = dict(config.subspaces or {})
        if id(groups) in seen:  # which layers share
            continue
        seen.add(id(groups))
        for number, old in enumerate(groups):
            groups[number] = _grown_intervention(old, layer.width, config)
        if adapter_name not in layer.active_adapters:
            groups.requires_grad_(False)


def _grown_intervention(old: Any, width: int, config: ReftConfig) -> nn.Module:
    new: Any = intervention_of(config, width, config.r, config.init_weights)
    new.to(device=old.basis.device, dtype=old.basis.dtype)
    names = [name for name, parameter in new.named_parameters()]
    before = {name: old.rows(name).detach() for name in names}
    with torch.no_grad():
        new.basis[: len(before["basis"])] = before["basis"]
        if isinstance(new, Intervention) and config.init_weights:
            new.start_from_zero()  # with the directions that the new part has beside the earlier ones
        for name, rows in before.items():
            new._parameters[name][: len(rows)] = rows
    new.frozen = len(before["basis"])
    new.hold()
    new.train(old.training)
    return new


# Sums of adapters.


def check_combination(combination_type: str) -> None:
    """Refuse the ways of combining adapters that LoRA has and ReFT has not.

    Raises:
        ValueError: naming the way.
    """
    if combination_type != "cat":
        raise ValueError(
            f"combination_type={combination_type!r} is not a way to combine ReFT adapters: their sum is exact, of the "
            "rank of all together, which LoRA calls 'cat'. Leave combination_type out, or pass 'cat'. Means, pruning "
            "and SVD of LoRA's weights have no counterpart for edits."
        )


def check_sum(configs: Mapping[str, Any], adapters: Sequence[str], weights: Sequence[float], name: str) -> None:
    """Refuse adapters whose weighted sum is not one adapter.

    Raises:
        ValueError: naming the adapter or the setting.
    """
    if not adapters or len(adapters) != len(weights):
        raise ValueError(
            f"adapters={list(adapters)!r} and weights={list(weights)!r} must be as many, and at least one of each."
        )
    for adapter in adapters:
        if not isinstance(configs.get(adapter), ReftConfig):
            raise ValueError(f"Adapter {adapter} does not exist; the ReFT adapters of the model are {sorted(configs)}.")
    if name in configs:
        raise ValueError(f"adapter_name={name!r} is the name of an adapter already. Choose another one.")
    for weight in weights:
        if not is_finite(weight):
            raise ValueError(f"weights={list(weights)!r} holds {weight!r}, which is not a finite number.")
    first = configs[adapters[0]]
    for adapter in adapters:
        config = configs[adapter]
        for field in MUST_AGREE:
            if getattr(config, field) != getattr(first, field):
                raise ValueError(
                    f"Adapters with different {field} cannot be summed to one: {getattr(first, field)!r} in "
                    f"{adapters[0]!r}, {getattr(config, field)!r} in {adapter!r}. Activate both instead: "
                    "model.base_model.set_adapter([...]) sums the edits of active adapters."
                )
        for field in CANNOT_BE_SUMMED:
            if getattr(config, field):
                raise ValueError(
                    f"Adapter {adapter!r} has {field}={getattr(config, field)!r}, which cannot be summed: only edits "
                    "without an activation can. Activate the adapters together instead, with "
                    "model.base_model.set_adapter([...])."
                )


def config_of_sum(
    configs: Mapping[str, ReftConfig], adapters: Sequence[str], layers: Sequence[Mapping[str, ReftLayer]]
) -> ReftConfig:
    """The config of the DiReFT adapter that a sum of adapters is: its rank is the sum of theirs.

    Args:
        layers: of each of the adapters, by the names of their blocks.
    """
    ranks = [max([configs[name].r, *(configs[name].rank_pattern or {}).values()]) for name in adapters]
    targets: dict[str, Any] = {}
    if any(found.keys() != layers[0].keys() for found in layers):
        targets = {"target_modules": set().union(*layers), "layers_to_transform": None, "exclude_modules": None}
        targets["share_layers"] = False  # where other adapters edit, the sum is another
    return replace(
        configs[adapters[0]],
        r=sum(ranks),
        intervention="direft",
        rank_pattern={},
        dropout=0.0,
        train_bias=True,
        subspaces=None,
        frozen_subspaces=None,
        **targets,
    )


@torch.no_grad()
def fill_sum(layer: ReftLayer, adapters: Sequence[str], weights: Sequence[float], name: str) -> None:
    """Write the weighted sum of a layer's adapters into the DiReFT adapter `name` of the same layer.

    h + Σ wᵢ Uᵢᵀ(Aᵢh + bᵢ) is DiReFT with the rows of all wᵢUᵢ as W2, of all Aᵢ as W1 and of all bᵢ as b. Every linear
    equation here has that form: A = W − R where the subspace is replaced, A = 0 where the learned value is a constant.

    Raises:
        ValueError: for an intervention of the user's own.
    """
    targets: Any = layer.reft_interventions[name]
    for number, target in enumerate(targets):
        target.erase()
        first = 0
        for adapter, weight in zip(adapters, weights):
            if adapter not in layer.reft_interventions:
                continue
            up, down, bias = linear_parts(layer.reft_interventions[adapter][number], adapter)  # type: ignore[index]
            rows = slice(first, first + len(bias))
            target.basis[rows], target.weight[rows], target.bias[rows] = weight * up, down, bias
            first += len(bias)


def linear_parts(intervention: Any, adapter: str) -> tuple[Tensor, Tensor, Tensor]:
    """U [r, d], A [r, d] and b [r] of an edit Uᵀ(Ah + b)."""
    if not isinstance(intervention, Intervention) or intervention.changed_methods():
        raise ValueError(
            f"Adapter {adapter!r} has the intervention {type(intervention).__name__}, of which it is not known whether "
            "it is linear. Sums are of the built-in interventions that take no source."
        )
    factors = intervention.factors()
    down = torch.zeros_like(factors.up) if factors.down is None else factors.down.mT
    return factors.up, down, factors.bias
