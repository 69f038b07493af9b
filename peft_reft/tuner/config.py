"""ReftConfig: the fields of a ReFT adapter, each described once and validated when the config is built."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

from peft.config import PeftConfig
from peft.utils.peft_types import PeftType
from transformers import AutoTokenizer
from transformers.activations import ACT2FN

from peft_reft.interventions.equations import intervention_names, nearest_name
from peft_reft.positions.notation import parse_positions


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
            "help": "The equation: 'loreft', 'noreft', 'direft', 'odireft', 'consreft', 'lobireft', "
            "or a name given to `register_intervention`."
        },
    )
    positions: str = field(
        default="f1+l1",
        metadata={
            "help": "Which tokens are edited: 'fN' the first N of the prompt, 'lM' the last M, 'fN+lM' both, 'all' "
            "every one; further terms: 'mK' K in its middle, 'eK' every K-th, 'd' or 'dK' every, or every K-th, "
            "generated token."
        },
    )
    share_weights: bool | str = field(
        default=True,
        metadata={
            "help": "True: one intervention per block; False: one per position group (per term of `positions`); "
            "'position': one per position, for the terms fN, lM and mK."
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

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.REFT
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))  # as PEFT's own configs do
        self._validate()

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json, and a section of the README.md if the adapter's weights are there too.

        PEFT calls this last when it saves an adapter (see card.py).
        """
        super().save_pretrained(save_directory, **kwargs)
        try:
            from peft_reft.integrations.model_card import describe_saved

            describe_saved(save_directory)
        except Exception as error:  # never at the cost of what is being saved
            warnings.warn(
                f"The adapter is saved in {str(save_directory)!r}, but its README.md lacks ReFT's section: {error!r}"
            )

    def _validate(self) -> None:
        def is_int(value: Any) -> bool:
            return isinstance(value, int) and not isinstance(value, bool)

        for name, rank in {
            "r": self.r,
            **{f"rank_pattern[{k!r}]": v for k, v in (self.rank_pattern or {}).items()},
        }.items():
            if not is_int(rank) or rank < 1:
                raise ValueError(f"{name}={rank!r} is not a rank; it must be an integer of at least 1.")
        if self.intervention not in intervention_names():
            meant = nearest_name(self.intervention)
            raise ValueError(
                f"intervention={self.intervention!r} is unknown. {f'Did you mean {meant!r}? ' if meant else ''}"
                f"Use one of {', '.join(intervention_names())}, or call "
                "peft_reft.register_intervention with your own class first."
            )
        spec = parse_positions(self.positions)
        if self.share_weights not in (True, False, "position") or (
            isinstance(self.share_weights, int) and not isinstance(self.share_weights, bool)
        ):
            raise ValueError(f"share_weights={self.share_weights!r} must be True, False or 'position'.")
        if self.share_weights == "position" and any(term.width is None for term in spec.terms):
            raise ValueError(
                f"share_weights='position' needs a fixed number of positions, which positions={self.positions!r} does "
                "not have. Use fN, lM and mK only, or share_weights=False for one intervention per term."
            )
        if self.share_layers and self.rank_pattern:
            raise ValueError(
                f"share_layers=True has one intervention for all blocks, which cannot have the ranks of "
                f"rank_pattern={self.rank_pattern!r}. Leave one of the two out."
            )
        if self.turns not in (None, "first", "last", "all"):
            raise ValueError(f"turns={self.turns!r} must be 'first', 'last', 'all' or None.")
        if self.prompt_end is not None:
            ids = [0] if isinstance(self.prompt_end, str) else self.prompt_end
            if not self.prompt_end or not isinstance(ids, (list, tuple)) or not all(is_int(token) for token in ids):
                raise ValueError(
                    f"prompt_end={self.prompt_end!r} marks nothing; pass the text that ends a prompt, such as "
                    "'<|assistant|>\\n', or its token ids."
                )
        layers = [self.layers_to_transform] if is_int(self.layers_to_transform) else self.layers_to_transform
        if layers is not None and not (isinstance(layers, (list, tuple)) and layers and all(map(is_int, layers))):
            raise ValueError(
                f"layers_to_transform={self.layers_to_transform!r} does not name blocks; pass a block number, a list "
                "of them (negative ones count from the end), or None for every block."
            )
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r} is not a probability below 1; 0.0 drops nothing.")
        if self.act_fn is not None and not (isinstance(self.act_fn, str) and self.act_fn in ACT2FN):
            raise ValueError(
                f"act_fn={self.act_fn!r} is not an activation of transformers; use one of "
                f"{', '.join(sorted(ACT2FN))}, or None for a linear edit."
            )
        for name in ("share_layers", "init_weights"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False.")


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
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
        except Exception as error:
            raise ValueError(
                f"prompt_end={config.prompt_end!r} needs the tokenizer of {name!r}, which cannot be loaded. Pass token "
                "ids instead: prompt_end=tokenizer.encode(text, add_special_tokens=False)."
            ) from error
    return tuple(tokenizer.encode(config.prompt_end, add_special_tokens=False))
