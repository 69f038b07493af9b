"""An adapter as tensors: the inputs by which one exported backbone becomes that adapter.

Every built-in equation without an activation is `h + Uᵀ(Dh + b)`: LoReFT has D = W - R and U = R, DiReFT D = W1 and
U = W2, and so on (`Intervention.combine`). R is worked out here, so that a device needs no factorisation.

Shape letters: L blocks, G position groups, r rank, d hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from peft_reft.blocks import ModelBlocks, own_name, pick_layers
from peft_reft.export.masks import refuse_other_prompts
from peft_reft.export.models import base_of, blocks_of_model
from peft_reft.info.files import one_line, read_adapter
from peft_reft.info.measuring import built
from peft_reft.info.reading import interventions_of
from peft_reft.interventions import REGISTRY, Factors, Intervention, kind_of, stack_factors, takes_source
from peft_reft.positions import PositionSpec, parse_positions
from peft_reft.tuner.adapters import get_interventions
from peft_reft.tuner.injection import reft_layers

BAKE = (
    "Such an adapter can be part of an exported graph: exportable(model, baked=adapter_name), or --bake on the command "
    "line."
)
SOURCE = (
    "The adapter {adapter!r} has {kind}, which takes the hidden states of another input. An exported backbone runs one "
    "input; export an adapter of another intervention."
)


@dataclass(frozen=True)
class EditTensors:
    """The edits of an adapter, of the blocks that it edits.

    Attributes:
        blocks: their names in the base model.
        down, bias, up: [blocks, G, r, d], [blocks, G, r] and [blocks, G, r, d], float32; smaller ranks end in zeros.
        positions: the notation.
        share_weights: what the groups are: True one for all, False one per term, "position" one per position.
        base_model: the name of the base model, None if the adapter does not say.
    """

    blocks: list[str]
    down: Tensor
    bias: Tensor
    up: Tensor
    positions: str
    share_weights: bool | str
    base_model: str | None

    def of(self, blocks: Sequence[str]) -> dict[str, Tensor]:
        """The tensors for all blocks of a backbone, zeros for those that are not edited.

        Raises:
            ValueError: if it has not the blocks that the adapter edits.
        """
        missing = [name for name in self.blocks if name not in blocks]
        if missing and any(missing[0].startswith(f"{block}.") for block in blocks):
            raise ValueError(
                f"The adapter edits {missing[0]!r}, a module within a block, and a backbone is edited behind whole "
                "blocks. Export the model with its adapter by torch.export instead, or train one without "
                "target_modules."
            )
        if missing:
            raise ValueError(
                f"The adapter edits {missing[0]!r}, but the backbone's {len(blocks)} blocks are {blocks[0]!r} to "
                f"{blocks[-1]!r}: it belongs to another model{f', {self.base_model!r}' if self.base_model else ''}."
            )
        places = torch.tensor([list(blocks).index(name) for name in self.blocks])
        found = {}
        for name, tensor in (("down", self.down), ("bias", self.bias), ("up", self.up)):
            found[name] = tensor.new_zeros(len(blocks), *tensor.shape[1:]).index_copy(0, places, tensor)
        return found


def adapter_tensors(
    model_or_directory: nn.Module | str | Path, adapter_name: str | None = None, blocks: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """An adapter as the inputs of an exported backbone.

    Args:
        model_or_directory: a model with ReFT adapters, or the directory of a saved one.
        adapter_name: of a model's adapters; None for the active one.
        blocks: names of the backbone's blocks; None for those of the model. For a directory they are read off the
            config of the base model, if the adapter does not edit every block.

    Returns:
        "down" [L, G, r, d], "bias" [L, G, r] and "up" [L, G, r, d] in float32, zeros for blocks that are not edited and
        behind smaller ranks. G is 1 for shared weights, else what `edit_mask` gives for them. What was set on a model
        by `set_strength` and `set_subspaces` takes no part: the strength is the value of the mask, and subspaces are
        rows of r, in their order, whose rows of "up" can be scaled.

    Raises:
        ValueError: for an adapter that is more than these tensors, with the reason.
    """
    found = read_edits(model_or_directory, adapter_name, blocks)
    if blocks is None:
        if isinstance(model_or_directory, nn.Module):
            blocks = blocks_of_model(base_of(model_or_directory))[0]
        else:
            blocks = found.blocks if _edits_every_block(model_or_directory) else base_blocks(model_or_directory)
    return found.of(blocks)


def read_edits(
    model_or_directory: nn.Module | str | Path, adapter_name: str | None = None, blocks: Sequence[str] | None = None
) -> EditTensors:
    """The edits of an adapter in a model or a directory; arguments and errors as `adapter_tensors`."""
    if isinstance(model_or_directory, nn.Module):
        return _of_model(model_or_directory, adapter_name)
    return _of_directory(Path(model_or_directory), blocks)


def _of_model(model: nn.Module, adapter_name: str | None) -> EditTensors:
    interventions = get_interventions(model, adapter_name)
    base = base_of(model)
    layers = {own_name(name): layer for name, layer in reft_layers(base).items()}
    first = layers[next(iter(interventions))]
    name = adapter_name or first.active_adapters[0]
    config = getattr(model, "peft_config", {}).get(name)
    refuse_other_prompts(name, first.position_specs[name])
    _refuse_more(name, weights_of_its_own(config))
    factors = {block: [_factors(one, name) for one in groups] for block, groups in interventions.items()}
    base_model = getattr(getattr(base, "config", None), "name_or_path", None)
    return _stacked(factors, first.position_specs[name], first.share_weights[name], base_model)


def _of_directory(directory: Path, blocks: Sequence[str] | None) -> EditTensors:
    saved = read_adapter(directory)
    config = saved.config
    spec = parse_positions(str(config.get("positions")), config.get("turns"))
    if config.get("intervention") in REGISTRY and takes_source(config["intervention"]):
        raise ValueError(SOURCE.format(adapter=str(directory), kind=f"intervention={config['intervention']!r}"))
    stored, others = interventions_of(saved)
    refuse_other_prompts(str(directory), spec)
    _refuse_more(str(directory), sorted(others))
    factors: dict[str, list[Factors]] = {}
    for block, groups in stored.items():
        factors[block] = []
        for _, tensors in sorted(groups.items()):
            basis = tensors.get("basis")
            width, rank = (basis.shape[1], basis.shape[0]) if basis is not None and basis.dim() == 2 else (0, 0)
            made = built(config, width, rank, tensors) if width else None
            if made is None:
                raise ValueError(
                    f"The adapter in {str(directory)!r} has interventions {config.get('intervention')!r} that are no "
                    f"built-in equation, or not its parameters. {BAKE}"
                )
            factors[block].append(_factors(made, str(directory)))
    if config.get("share_layers"):
        every = list(blocks) if blocks is not None else base_blocks(directory)
        layers = config.get("layers_to_transform")
        chosen = every if layers is None else pick_layers([every], [layers] if isinstance(layers, int) else layers)
        factors = dict.fromkeys(chosen, next(iter(factors.values())))
    return _stacked(factors, spec, config.get("share_weights", True), config.get("base_model_name_or_path"))


def weights_of_its_own(config: Any) -> list[str]:
    """The settings by which an adapter changes weights of the base model as well."""
    return [key for key in ("modules_to_save", "trainable_token_indices") if getattr(config, key, None)]


def refuse_sources(adapter: str, interventions: Iterable[nn.Module]) -> None:
    """Refuse an adapter that takes hidden states from another input.

    Raises:
        ValueError: for such an adapter.
    """
    for intervention in interventions:
        if getattr(intervention, "takes_source", False):
            raise ValueError(SOURCE.format(adapter=adapter, kind=type(intervention).__name__))


def _refuse_more(adapter: str, others: list[str]) -> None:
    if others:
        raise ValueError(
            f"The adapter {adapter!r} has more than its interventions: {others[0]!r}. A file of edits cannot change "
            "the backbone's weights; train without modules_to_save and trainable_token_indices, or export the whole "
            "model."
        )


def _factors(intervention: nn.Module, adapter: str) -> Factors:
    refuse_sources(adapter, [intervention])
    if kind_of(intervention) is None:
        raise ValueError(
            f"The adapter {adapter!r} has a {type(intervention).__name__}, an intervention of one's own, which may be "
            f"any function of h and not only two products. {BAKE}"
        )
    assert isinstance(intervention, Intervention)
    if intervention.act is not None:
        raise ValueError(
            f"The adapter {adapter!r} has act_fn={intervention.act_fn!r} between its two products, which the graph of "
            f"a backbone for all adapters has not. {BAKE}"
        )
    with torch.no_grad():
        return stack_factors([intervention]).map(lambda part: part[0].detach().float().cpu())


def _stacked(
    factors: dict[str, list[Factors]], spec: PositionSpec, share_weights: Any, base_model: str | None
) -> EditTensors:
    """The factors of all blocks in one tensor each, padded to the largest rank."""
    ups = [one.up for groups in factors.values() for one in groups]
    widths = sorted({up.shape[1] for up in ups})
    counts = sorted({len(groups) for groups in factors.values()})
    if len(widths) > 1 or len(counts) > 1:
        raise ValueError(f"The adapter's blocks have widths {widths} and {counts} interventions; both must be alike.")
    rank, groups, width = max(up.shape[0] for up in ups), counts[0], widths[0]
    down, up = torch.zeros(len(factors), groups, rank, width), torch.zeros(len(factors), groups, rank, width)
    bias = torch.zeros(len(factors), groups, rank)
    for block, row in enumerate(factors.values()):
        for group, one in enumerate(row):
            r = one.up.shape[0]
            if one.down is not None:
                down[block, group, :r] = one.down.mT
            bias[block, group, :r], up[block, group, :r] = one.bias, one.up
    if not all(bool(tensor.isfinite().all()) for tensor in (down, bias, up)):
        raise ValueError("The adapter has parameters that are infinite or NaN, so that there is nothing to export.")
    return EditTensors(list(factors), down, bias, up, str(spec), share_weights, base_model)


def _edits_every_block(directory: str | Path) -> bool:
    config = read_adapter(Path(directory)).config
    chosen = ("layers_to_transform", "target_modules", "exclude_modules")
    return not any(config.get(key) for key in chosen) and config.get("layers_to_transform") != 0


def base_blocks(directory: str | Path) -> list[str]:
    """Names of all blocks of a saved adapter's base model, by the config of that model alone.

    Raises:
        ValueError: if that cannot be read here.
    """
    name = read_adapter(Path(directory)).config.get("base_model_name_or_path")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"The adapter in {str(directory)!r} edits some blocks of {name!r}, whose config cannot be read here to "
            f"know them all ({one_line(error)}). Pass blocks=[...], such as exportable(base).blocks."
        ) from error
    (stack,) = ModelBlocks(model).stacks()
    return stack
