"""ReftConfig: the fields of a ReFT adapter, each described once and validated when the config is built."""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import dataclass, field
from typing import Any

from peft.config import PeftConfig
from peft.utils.peft_types import PeftType
from transformers import AutoTokenizer
from transformers.activations import ACT2FN

from peft_reft.context.subspaces import is_finite
from peft_reft.interventions import intervention_names, nearest_name, takes_source
from peft_reft.positions import GRAMMAR, PositionSpec, parse_positions
from peft_reft.tuner.neighbours import AFTER_SAVING
from peft_reft.tuner.sizes import check_config_sizes, check_ids, check_rank, is_integer, shown
from peft_reft.tuner.staging import staged
from peft_reft.tuner.subspaces import check_subspaces, from_pairs


@dataclass
class ReftConfig(PeftConfig):
    """Configuration of a ReFT adapter (https://arxiv.org/abs/2404.03592).

    Raises:
        ValueError: on construction, for any value that no model could use.

    >>> ReftConfig(r=4, positions="f7+l7", task_type="CAUSAL_LM").positions
    'f7+l7'
    """

    r: int = field(default=4, metadata={"help": "Rank: the number of edited directions per intervention."})
    intervention: str = field(
        default="loreft",
        metadata={
            "help": "The equation: 'loreft', 'noreft', 'direft', 'odireft', 'consreft', 'lobireft', 'interchange', "
            "'vanilla', 'boundless', or a name given to `register_intervention`."
        },
    )
    positions: str = field(
        default="f1+l1",
        metadata={"help": f"Which tokens are edited: 'fN+lM' the first N and the last M of the prompt. {GRAMMAR}"},
    )
    share_weights: bool | str = field(
        default=True,
        metadata={
            "help": "True: one intervention per block; False: one per position group (per term of `positions`); "
            "'position': one per position, for terms that name a fixed number of tokens."
        },
    )
    share_layers: bool = field(
        default=False, metadata={"help": "True: the same interventions for all blocks, stored once."}
    )
    prompt_end: list[int] | str | None = field(
        default=None,
        metadata={
            "help": "What ends a prompt, as token ids or as a string that the model's tokenizer encodes, for callers "
            "that pass neither labels nor intervention_locations, or labels that cover the prompt too. Its last "
            "occurrence counts, unless `turns` says otherwise."
        },
    )
    turns: str | None = field(
        default=None,
        metadata={
            "help": "Whose prompt is edited where labels or `prompt_end` show several answers in one sequence: that of "
            "the 'first', of the 'last', or of 'all' turns. None: the first by labels, the last by `prompt_end`."
        },
    )
    layers_to_transform: list[int] | int | None = field(
        default=None,
        metadata={"help": "Numbers of the blocks to edit, negative ones counted from the end; None for every block."},
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names (or a regular expression) of the modules whose output is edited, instead of the blocks that "
            "are found in the model."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names (or a regular expression) of modules that are not edited after all."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that are trained and saved in full, such as a classification head."}
    )
    rank_pattern: dict[str, int] | None = field(
        default_factory=dict,
        metadata={"help": "Ranks that differ from `r`, by module name or regular expression: {'layers.3': 8}."},
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Token ids whose embeddings are trained and saved with the adapter."}
    )
    dropout: float = field(
        default=0.0, metadata={"help": "Probability of dropping an entry of an edit, in training; h is never dropped."}
    )
    act_fn: str | None = field(
        default=None, metadata={"help": "Activation of the learned source, by its name in transformers; None: linear."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "True: a fresh adapter changes nothing; False: random weights, as in pyreft."}
    )

    train_bias: bool = field(
        default=True,
        metadata={"help": "False: b keeps its value (0 in a fresh adapter), whatever is switched on and off."},
    )
    subspaces: dict[str, int] | None = field(
        default=None,
        metadata={
            "help": "Names and ranks of parts of R, in order, adding up to `r`: {'german': 4, 'formal': 4}. Each can "
            "be switched for itself, by row with `subspaces=` in a call, or with `set_subspaces`."
        },
    )
    frozen_subspaces: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the first `subspaces` that keep their values; `add_subspace` sets it."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.REFT
        self.subspaces = from_pairs("subspaces", self.subspaces)
        self.rank_pattern = from_pairs("rank_pattern", self.rank_pattern)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))  # as PEFT's own configs do
        self._validate()

    @property
    def parts(self) -> tuple[int, ...]:
        """Ranks of the subspaces, in their order; () if there are none."""
        return tuple((self.subspaces or {}).values())

    def to_dict(self) -> dict[str, Any]:
        """The fields as PEFT saves them; as pairs where the order counts, since PEFT sorts the keys of dictionaries."""
        values: dict[str, Any] = super().to_dict()
        if self.subspaces is not None:
            values["subspaces"] = [[name, rank] for name, rank in self.subspaces.items()]
        patterns = self.rank_pattern or {}
        if list(patterns) != sorted(patterns):  # of several that match a module, the first counts
            values["rank_pattern"] = [[pattern, rank] for pattern, rank in patterns.items()]
        return values

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json, and whatever integrations add to a saved adapter.

        PEFT calls this last when it saves an adapter.
        """
        if os.path.isfile(save_directory):
            raise AssertionError(f"Provided path ({save_directory}) should be a directory, not a file")  # as PEFT's
        with staged(save_directory) as stage:  # PEFT writes into the file itself, which is empty meanwhile
            super().save_pretrained(str(stage), **kwargs)
        for tell in AFTER_SAVING:
            try:
                tell(save_directory)
            except Exception as error:  # never at the cost of what is being saved
                warnings.warn(
                    f"The adapter is saved in {str(save_directory)!r}, but its README.md lacks ReFT's section: "
                    f"{error!r}"
                )

    def _validate(self) -> None:
        check_config_sizes(self)
        self._validate_names()
        check_rank("r", self.r)
        for name, rank in (self.rank_pattern or {}).items():
            check_rank(f"rank_pattern[{name!r}]", rank)
        if self.intervention not in intervention_names():
            meant = nearest_name(self.intervention)
            raise ValueError(
                f"intervention={shown(self.intervention)} is unknown. {f'Did you mean {meant!r}? ' if meant else ''}"
                f"Use one of {', '.join(intervention_names())}, or call "
                "peft_reft.register_intervention with your own class first."
            )
        spec = parse_positions(self.positions)
        if not isinstance(self.share_weights, bool) and self.share_weights != "position":
            raise ValueError(f"share_weights={shown(self.share_weights)} must be True, False or 'position'.")
        unbounded = [str(term) for term in spec.terms if term.width is None]
        if self.share_weights == "position" and unbounded:
            raise ValueError(
                f"share_weights='position' needs a fixed number of positions, which positions={self.positions!r} does "
                f"not have. Leave {' and '.join(unbounded)} out, or use share_weights=False for one intervention per "
                "term."
            )
        if self.share_layers and self.rank_pattern:
            raise ValueError(
                f"share_layers=True has one intervention for all blocks, which cannot have the ranks of "
                f"rank_pattern={self.rank_pattern!r}. Leave one of the two out."
            )
        if self.turns not in (None, "first", "last", "all"):
            raise ValueError(f"turns={shown(self.turns)} must be 'first', 'last', 'all' or None.")
        if self.prompt_end is not None:
            ids = [0] if isinstance(self.prompt_end, str) else self.prompt_end
            if not self.prompt_end or not isinstance(ids, (list, tuple)) or not all(map(is_integer, ids)):
                raise ValueError(
                    f"prompt_end={shown(self.prompt_end)} marks nothing; pass the text that ends a prompt, such as "
                    "'<|assistant|>\\n', or its token ids."
                )
            check_ids("prompt_end", ids)
        layers = [self.layers_to_transform] if is_integer(self.layers_to_transform) else self.layers_to_transform
        if layers is not None and not (isinstance(layers, (list, tuple)) and layers and all(map(is_integer, layers))):
            raise ValueError(
                f"layers_to_transform={shown(self.layers_to_transform)} does not name blocks; pass a block number, a "
                "list of them (negative ones count from the end), or None for every block."
            )
        if not is_finite(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={shown(self.dropout)} is not a probability below 1; 0.0 drops nothing.")
        if self.act_fn is not None and not (isinstance(self.act_fn, str) and self.act_fn in ACT2FN):
            raise ValueError(
                f"act_fn={shown(self.act_fn)} is not an activation of transformers; use one of "
                f"{', '.join(sorted(ACT2FN))}, or None for a linear edit."
            )
        self._validate_source(spec)
        check_subspaces(self)
        for name in ("share_layers", "init_weights", "train_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={shown(getattr(self, name))} must be True or False.")

    def _validate_source(self, spec: PositionSpec) -> None:
        """What an intervention that takes a source, another input's hidden state, has no use for."""
        if not takes_source(self.intervention):
            return
        for name in ("act_fn", "dropout"):
            if getattr(self, name):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no meaning for intervention={self.intervention!r}, which "
                    "learns no value: it takes one from a source. Leave it out."
                )
        if spec.edits_answers:
            raise ValueError(
                f"positions={self.positions!r} edits generated tokens, but intervention={self.intervention!r} takes "
                "its values from a source, which generates none. Use terms of the prompt."
            )

    def _validate_names(self) -> None:
        """The fields with names of modules, and patterns that are to match them."""
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, name)
            listed = isinstance(value, (list, tuple, set))
            names = listed and all(isinstance(entry, str) for entry in value)
            if listed and "" in value:  # PEFT takes it for the end of every name, the whole model's included
                raise ValueError(f"{name}={shown(value)} has an empty name, which names no module. Leave it out.")
            if not (value is None or names or (isinstance(value, str) and name != "modules_to_save")):
                raise ValueError(f"{name}={shown(value)} does not name modules; pass a list of names, or None.")
        if not isinstance(self.rank_pattern, (dict, type(None))):
            raise ValueError(
                f"rank_pattern={shown(self.rank_pattern)} must be a dictionary of ranks by module name or regular "
                "expression, such as {'layers.3': 8}."
            )
        tokens = self.trainable_token_indices
        by_module = tokens if isinstance(tokens, dict) else {"embed_tokens": tokens if tokens is not None else []}
        if "" in by_module or not all(isinstance(ids, (list, tuple)) for ids in by_module.values()):
            raise ValueError(
                f"trainable_token_indices={shown(tokens)} must be a list of token ids, or such lists by the name of "
                "their embedding."
            )
        for ids in by_module.values():
            check_ids("trainable_token_indices", ids)
        regular = {name: getattr(self, name) for name in ("target_modules", "exclude_modules")}
        regular |= {f"rank_pattern[{shown(key)}]": key for key in self.rank_pattern or {}}
        for name, pattern in regular.items():
            if isinstance(pattern, str):
                try:
                    re.compile(pattern)
                except (re.error, RecursionError, OverflowError) as error:
                    raise ValueError(f"{name}={shown(pattern)} is not a regular expression: {error}.") from error


def prompt_end_ids(config: ReftConfig, tokenizer: Any = None, model_name_or_path: str | None = None) -> tuple[int, ...]:
    """`config.prompt_end` as token ids; () if there is none.

    Args:
        tokenizer: encodes a string; None for the base model's own.
        model_name_or_path: where that is, if the config does not say.

    Raises:
        ValueError: if a string cannot be encoded.
    """
    if config.prompt_end is None:
        return ()
    if not isinstance(config.prompt_end, str):
        return tuple(config.prompt_end)
    if tokenizer is None:
        name = config.base_model_name_or_path or model_name_or_path
        try:  # an adapter's config may name any model: none of its code is run
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except Exception as error:
            raise ValueError(
                f"prompt_end={config.prompt_end!r} needs the tokenizer of {name!r}, which cannot be loaded. Pass token "
                "ids instead: prompt_end=tokenizer.encode(text, add_special_tokens=False)."
            ) from error
    return tuple(tokenizer.encode(config.prompt_end, add_special_tokens=False))
