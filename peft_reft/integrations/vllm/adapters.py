"""What an adapter's directory says: where it edits, with which factors; or why vLLM cannot serve it.

Files are read by info/files.py, settings checked by `ReftConfig`, factors worked out by interventions/. The config is
enough for positions and is read in every process; the weights are read in the workers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from peft_reft.blocks import group_by_stack, pick_layers
from peft_reft.info.files import is_reft_adapter, read_adapter, read_config, weights_file
from peft_reft.info.reading import interventions_of
from peft_reft.integrations.vllm.rule import Rule
from peft_reft.interventions import Factors, Intervention, build_intervention, kind_of, stack_factors, takes_source
from peft_reft.positions import parse_positions
from peft_reft.tuner.checkpoint import check_tensors
from peft_reft.tuner.config import ReftConfig

Version = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ServedAdapter:
    """The settings of an adapter that vLLM can serve.

    Attributes:
        directory: where it lies.
        version: changes when its files are written anew.
        config: its settings.
        rule: which tokens it edits.
    """

    directory: Path
    version: Version
    config: ReftConfig
    rule: Rule


_READ: dict[Path, ServedAdapter] = {}


def served_adapter(directory: Path) -> ServedAdapter | None:
    """The ReFT adapter in a directory; None if an adapter of another type, or nothing, lies there.

    Raises:
        ValueError: if it cannot be read, or holds what cannot be served.
    """
    known = _READ.get(directory)
    if known is not None and _is_current(known):
        return known
    if not is_reft_adapter(directory):
        if known is None:
            return None
        raise ValueError(
            f"There was a ReFT adapter in {str(directory)!r}, and its files are gone. Put them back, or unload the "
            "adapter."
        )
    found = ServedAdapter(directory, version_of(directory), config := _config_in(directory), _rule_of(config))
    _READ[directory] = found
    return found


def version_of(directory: Path) -> Version:
    """When the files of an adapter were last written, and how large they are."""
    stats = [path.stat() for path in (directory / "adapter_config.json", weights_file(directory))]
    return tuple((stat.st_mtime_ns, stat.st_size) for stat in stats)


def _is_current(adapter: ServedAdapter) -> bool:
    try:
        return version_of(adapter.directory) == adapter.version
    except (OSError, ValueError):  # removed; reading it anew gives the reason
        return False


def _config_in(directory: Path) -> ReftConfig:
    read_config(directory)  # says what is wrong with the file, if something is
    config = ReftConfig.from_pretrained(str(directory))
    assert isinstance(config, ReftConfig)
    extra = {
        "modules_to_save": "modules trained in full would have to replace the base model's, which all requests share",
        "trainable_token_indices": "trained token embeddings would have to replace the base model's, which all share",
    }
    for name, reason in extra.items():
        if getattr(config, name):
            raise _cannot(directory, f"it has {name}={getattr(config, name)!r}, and {reason}. Train it without {name}")
    if takes_source(config.intervention):
        raise _cannot(
            directory,
            f"the intervention {config.intervention!r} takes its values from another input, and a request has none to "
            "give. Use it with transformers (source_inputs)",
        )
    if isinstance(config.prompt_end, str) and config.turns is not None:
        raise _cannot(
            directory,
            f"turns={config.turns!r} are found by prompt_end={config.prompt_end!r}, which is text, and vLLM's workers "
            "have no tokenizer. Write the marker's token ids into adapter_config.json: tokenizer.encode(text, "
            "add_special_tokens=False)",
        )
    return config


def _rule_of(config: ReftConfig) -> Rule:
    # Without turns a request's prompt is what it gives, as in `generate`; without a marker there are no turns.
    marked = config.turns is not None and config.prompt_end is not None
    spec = parse_positions(config.positions, *((config.turns, config.prompt_end or ()) if marked else ()))
    return Rule(spec, config.share_weights)


def _cannot(directory: Path, reason: str) -> ValueError:
    return ValueError(f"The ReFT adapter in {str(directory)!r} cannot be served by vLLM: {reason}.")


@dataclass(frozen=True)
class AdapterFactors:
    """What an adapter multiplies with.

    Attributes:
        served: its settings.
        blocks: by the number of the model's block, the factors of its interventions.
        groups: how many interventions each block has.
        rank: the largest one of any intervention.
    """

    served: ServedAdapter
    blocks: Mapping[int, Sequence[Factors]]
    groups: int
    rank: int


@torch.no_grad()
def read_factors(
    served: ServedAdapter, names: Sequence[str], width: int, rename: Callable[[str], str] = str
) -> AdapterFactors:
    """The factors of an adapter, worked out from its weights.

    Args:
        names: of all blocks of the model, in their order.
        width: of the hidden states.
        rename: a block's name in the model that the adapter was trained on -> its name in this one.

    Raises:
        ValueError: if the weights do not fit the model, or hold what is no intervention.
    """
    directory, config = served.directory, served.config
    saved = read_adapter(directory)
    stored, others = interventions_of(saved)
    if others:
        raise _cannot(directory, f"its file holds tensors that are no interventions: {', '.join(sorted(others)[:3])}")
    check_tensors(saved.tensors)
    built = {name: _interventions(served, name, groups, width) for name, groups in stored.items()}
    groups = served.rule.spec.num_interventions(config.share_weights)
    rank = max(factors.up.shape[0] for interventions in built.values() for factors in interventions)
    if config.share_layers:
        (shared,) = built.values()
        blocks = dict.fromkeys(_shared_blocks(served, names), shared)
    else:
        blocks = {_number_of(name, rename(name), names, served): own for name, own in built.items()}
    return AdapterFactors(served, blocks, groups, rank)


def _interventions(
    served: ServedAdapter, block: str, groups: Mapping[int, Mapping[str, torch.Tensor]], width: int
) -> list[Factors]:
    """The factors of one block's interventions."""
    config, directory = served.config, served.directory
    wanted = served.rule.spec.num_interventions(config.share_weights)
    if sorted(groups) != list(range(wanted)):
        raise _cannot(directory, f"{block} has {len(groups)} interventions where its settings ask for {wanted}")
    found = []
    for number in range(wanted):
        tensors = groups[number]
        basis = tensors.get("basis")
        if basis is None or basis.dim() != 2:
            raise _cannot(
                directory,
                f"the intervention {config.intervention!r} is not one of the equations of peft_reft, whose edits are "
                "all worked out in the same way. Serve it with transformers",
            )
        rank, own_width = basis.shape
        if own_width != width:
            raise _cannot(
                directory,
                f"{block} edits hidden states of width {own_width}, and the model's are {width} wide. Serve it with "
                f"the model it was trained on ({config.base_model_name_or_path!r})",
            )
        module = build_intervention(config.intervention, width, rank, act_fn=config.act_fn, init_weights=False)
        if not isinstance(module, Intervention) or kind_of(module) is None:
            raise _cannot(
                directory,
                f"the intervention {config.intervention!r} is a module of your own, and only equations in the form of "
                "the built-in ones are worked out for many adapters at once. Serve it with transformers",
            )
        shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
        if shapes != {name: tensor.shape for name, tensor in tensors.items()}:
            raise _cannot(directory, f"the parameters of {block} are not those of {config.intervention!r}")
        module.load_state_dict(dict(tensors))
        found.append(stack_factors([module]).map(lambda tensor: tensor[0]))
    return found


def _number_of(name: str, renamed: str, names: Sequence[str], served: ServedAdapter) -> int:
    """The number of the model's block that an adapter calls by a name.

    A model with a head has its blocks below a module that the model without one lacks, so one name may be the end of
    the other.
    """
    matches = [number for number, own in enumerate(names) if own in (name, renamed)]
    matches = matches or [
        number for number, own in enumerate(names) if f".{own}".endswith(f".{renamed}") or renamed.endswith(f".{own}")
    ]
    if len(matches) != 1:
        chosen = served.config.target_modules
        hint = f" (its target_modules={sorted(chosen)!r})" if isinstance(chosen, (set, list)) else ""
        raise _cannot(
            served.directory,
            f"it edits {name!r}{hint}, which is no block of this model; its blocks are {names[0]!r} to {names[-1]!r}, "
            "and only the output of blocks can be edited here. Train it without target_modules, or serve it with "
            "transformers",
        )
    return matches[0]


def _shared_blocks(served: ServedAdapter, names: Sequence[str]) -> list[int]:
    """The numbers of the blocks for which interventions are stored once."""
    config = served.config
    if config.target_modules is not None or config.exclude_modules is not None:
        raise _cannot(
            served.directory,
            "share_layers=True stores its interventions once, and target_modules or exclude_modules choose the blocks "
            "by names that vLLM's modules need not have. Choose them by layers_to_transform",
        )
    chosen = pick_layers(group_by_stack(list(names)), config.layers_to_transform)
    return [number for number, name in enumerate(names) if name in chosen]
