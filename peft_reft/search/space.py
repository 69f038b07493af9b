"""What a search tries: blocks, prefix, suffix, rank and learning rate, and the config that a choice of them makes.

Knows Optuna's way of being asked for values, and nothing of training.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from torch import nn

from peft_reft.blocks import ModelBlocks
from peft_reft.tuner.config import ReftConfig

if TYPE_CHECKING:
    import optuna


def block_choices(depth: int) -> dict[str, list[int] | None]:
    """Subsets of a model's blocks worth trying: all, the last half, quarter and so on, and every 2nd, 4th and so on.

    Each ends with the last block. Numbers count from the end, so that they fit stacks of any depth.

    >>> list(block_choices(12))
    ['all', 'last 6', 'last 3', 'last 2', 'last 1', 'every 2nd', 'every 4th', 'every 8th']
    >>> block_choices(12)["every 4th"]
    [-9, -5, -1]

    Raises:
        ValueError: without blocks.
    """
    if depth < 1:
        raise ValueError(f"depth={depth!r} is no number of blocks; it must be at least 1.")
    choices: dict[str, list[int] | None] = {"all": None}
    count = depth
    while count > 1:
        count = math.ceil(count / 2)
        choices[f"last {count}"] = list(range(-count, 0))
    step = 2
    while step < depth:
        choices["every 2nd" if step == 2 else f"every {step}th"] = list(range(-1, -depth - 1, -step))[::-1]
        step *= 2
    return choices


@dataclass(frozen=True)
class SearchSpace:
    """What is tried. Everything in it is checked when it is made, or before the first trial.

    Args:
        blocks: `layers_to_transform` by a name of yours; see `block_choices`.
        prefix: lengths of the edited prefix; 0 for none, "all" for every token of the prompt (and no suffix).
        suffix: lengths of the edited suffix; 0 for none. No trial has neither prefix nor suffix.
        ranks: values of `r`.
        learning_rate: lowest and highest; tried on a logarithmic scale.
        others: further fields of `ReftConfig` with the values to try, such as {"intervention": ["loreft", "direft"]}.

    Raises:
        ValueError: for values that no trial could use.
    """

    blocks: Mapping[str, list[int] | None]
    prefix: Sequence[int | str] = (0, 1, 2, 4, 8, "all")
    suffix: Sequence[int] = (0, 1, 2, 4, 8)
    ranks: Sequence[int] = (1, 2, 4, 8, 16)
    learning_rate: tuple[float, float] = (1e-4, 1e-2)
    others: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, **ranges: Any) -> SearchSpace:
        """The space for a base model: `block_choices` of its depth, and no rank above its width.

        Args:
            ranges: any arguments of the class; default ranks that are too large are left out.

        Raises:
            ValueError: if the model's blocks cannot be found, or for what the class refuses.
        """
        blocks = ModelBlocks(model)
        stacks = blocks.stacks()
        width = min(blocks.shape_of(stack[0])[0] for stack in stacks)
        ranges.setdefault("blocks", block_choices(min(map(len, stacks))))
        ranges.setdefault("ranks", tuple(r for r in cls.ranks if r <= width))
        space = cls(**ranges)
        if max(space.ranks) > width:
            raise ValueError(
                f"ranks={space.ranks!r} go beyond the model's hidden states, which have width {width}. Leave out what "
                "is larger."
            )
        return space

    def __post_init__(self) -> None:
        def is_int(value: Any, least: int) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and value >= least

        rules: dict[str, tuple[Callable[[Any], bool], str]] = {
            "prefix": (lambda v: v == "all" or is_int(v, 0), 'integers of at least 0, or "all"'),
            "suffix": (lambda v: is_int(v, 0), "integers of at least 0"),
            "ranks": (lambda v: is_int(v, 1), "integers of at least 1"),
        }
        for name, (rule, words) in rules.items():
            values = getattr(self, name)
            listed = isinstance(values, (list, tuple, range)) and len(values) > 0
            if not listed or not all(map(rule, values)) or len(set(values)) < len(values):
                raise ValueError(f"{name}={values!r} must be a list of {words}, at least one and each once.")
        if 0 in self.prefix and not any(self.suffix):
            raise ValueError(
                f"prefix={self.prefix!r} has a 0 and suffix={self.suffix!r} has nothing else, so that a trial could "
                "edit no token. Leave the 0 out of prefix, or add a length to suffix."
            )
        rates = self.learning_rate
        is_pair = isinstance(rates, (list, tuple)) and len(rates) == 2
        if not is_pair or not 0 < rates[0] <= rates[1] < math.inf:
            raise ValueError(f"learning_rate={rates!r} must be the lowest and the highest rate: 0 < lowest <= highest.")
        if not self.blocks or not isinstance(self.blocks, Mapping):
            raise ValueError(f"blocks={self.blocks!r} must name at least one choice; see block_choices.")
        taken = {"r", "positions", "layers_to_transform"} & set(self.others)
        unknown = set(self.others) - set(ReftConfig.__dataclass_fields__)
        listed = all(isinstance(values, (list, tuple)) and values for values in self.others.values())
        if taken or unknown or not listed:
            raise ValueError(
                f"others={dict(self.others)!r} must be fields of ReftConfig, each with a list of values to try; r, "
                "positions and layers_to_transform have ranges of their own."
            )

    def positions(self) -> list[str]:
        """Every value of `positions` that a trial can have."""
        return list(dict.fromkeys(spec(p, s) for p, s in product(self.prefix, self.suffix) if (p, s) != (0, 0)))

    def check(self, config: ReftConfig) -> None:
        """Make every kind of config once.

        Raises:
            ValueError: if the template, or two values together, make a config that is refused.
        """
        fixed: list[dict[str, Any]] = [{"layers_to_transform": blocks} for blocks in self.blocks.values()]
        for values in product(self.positions(), *self.others.values()):
            fixed.append(dict(zip(("positions", *self.others), values)))
        for settings in fixed:
            replace(config, **settings)

    def propose(self, trial: optuna.Trial) -> None:
        """Let Optuna choose; what it chose is in `trial.params`."""
        trial.suggest_categorical("blocks", list(self.blocks))
        prefix = trial.suggest_categorical("prefix", list(self.prefix))
        if prefix == 0:
            trial.suggest_categorical("suffix_alone", [length for length in self.suffix if length])
        elif prefix != "all":
            trial.suggest_categorical("suffix", list(self.suffix))
        trial.suggest_categorical("rank", list(self.ranks))
        trial.suggest_float("learning_rate", *self.learning_rate, log=True)
        for name, values in self.others.items():
            trial.suggest_categorical(name, list(values))

    def start(self, template: ReftConfig) -> dict[str, Any] | None:
        """The `params` of the template with the middle of the learning rates; None if that is not in the space."""
        low, high = self.learning_rate
        params: dict[str, Any] = {"rank": template.r, "learning_rate": math.sqrt(low * high)}
        params |= {name: getattr(template, name) for name in self.others}
        allowed = {"rank": self.ranks, **self.others}
        blocks = [name for name, numbers in self.blocks.items() if numbers == template.layers_to_transform]
        for prefix, suffix in product(self.prefix, self.suffix):
            fits = (prefix, suffix) != (0, 0) and spec(prefix, suffix) == template.positions
            if fits and blocks and all(params[name] in values for name, values in allowed.items()):
                ends = {"suffix_alone": suffix} if prefix == 0 else {"suffix": suffix}
                return {"blocks": blocks[0], "prefix": prefix, **(ends if prefix != "all" else {}), **params}
        return None

    def config(self, template: ReftConfig, params: Mapping[str, Any]) -> ReftConfig:
        """The config of a trial, by its `params`."""
        return replace(
            copy.deepcopy(template),
            r=params["rank"],
            positions=positions_of(params),
            layers_to_transform=self.blocks[params["blocks"]],
            **{name: params[name] for name in self.others},
        )


def spec(prefix: int | str, suffix: int) -> str:
    """The notation for two lengths, one of them more than 0.

    >>> spec(4, 2), spec(0, 2), spec(4, 0), spec("all", 2)
    ('f4+l2', 'l2', 'f4', 'all')
    """
    if prefix == "all":
        return "all"
    return "+".join(f"{end}{length}" for end, length in (("f", prefix), ("l", suffix)) if length)


def positions_of(params: Mapping[str, Any]) -> str:
    """`positions` of a trial."""
    return spec(params["prefix"], params.get("suffix", params.get("suffix_alone", 0)))
