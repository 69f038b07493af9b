"""The entry to `generate`: remembers the prompt for all the forwards that follow.

Neither "the first forward" nor "an empty cache" marks the prompt: chunked prefill runs several forwards over it,
a reused cache starts in its middle, speculative decoding runs guesses along with it, and without a cache every
step runs it again. So the prompt is taken where the caller hands it over.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft_reft.context.arguments import (
    check_locations,
    keeps_a_cache,
    past_length,
    token_device,
    valid_columns,
    window_of,
)
from peft_reft.context.frame import Call, Frame, generation_scope, innermost_generation
from peft_reft.context.root import Root
from peft_reft.positions.notation import PositionSpec, mark
from peft_reft.positions.prompts import Prompts, Tokens, generated

if TYPE_CHECKING:
    from peft_reft.context.host import Host


@dataclass(eq=False)
class Generation:
    """One call of `generate`: its prompt, in columns of the whole row, however the prompt is then run.

    Attributes:
        tokens: the rows given to `generate`; None until an encoder-decoder's decoder has started.
        locations: what the caller passed as `intervention_locations`, [B, G, P], or None.
        adapter_names: the adapter of each row given, or None.
        decoder_columns: length of the decoder's prompt, where its first forward may hold more (guessed tokens).
        edits_answers: some adapter edits generated tokens too.
        seen: columns that went through the model in the forwards that have ended.
        prefilled: the whole prompt is in a cache; of it, nothing is left to edit.
    """

    root: Root
    tokens: Tokens | None
    locations: Tensor | None = None
    adapter_names: list[str] | None = None
    decoder_columns: int | None = None
    edits_answers: bool = False
    seen: int = 0
    prefilled: bool = False
    _running: tuple[int, bool] = (0, False)  # what `seen` and `prefilled` will be when the running forward has ended
    _prompts: dict[Any, Prompts] = field(default_factory=dict)

    def frame(self, host: Host, call: Call, arguments: dict[str, Any], rows: int, columns: int) -> Frame:
        """The frame of one forward within this generation."""
        if self.prefilled:
            return self._answer_frame(host, call, arguments, rows, columns)
        past = past_length(arguments, columns, self.seen)
        past = self.seen if isinstance(past, Tensor) and self.seen else int(past)
        if self.tokens is None:
            valid = valid_columns(arguments.get("attention_mask"), rows, columns, token_device(arguments))
            self.tokens = Tokens(valid[:, : self.decoder_columns], given=True)
        given, total = self.tokens.valid.shape
        self._running = (max(self.seen, past + columns), past + columns >= total and keeps_a_cache(arguments))
        if past >= total:
            return self._answer_frame(host, call, arguments, rows, columns)
        times, rest = divmod(rows, given)
        if rest:
            raise ValueError(
                f"generate was given {given} prompts but runs a batch of {rows} rows, which is no multiple of it; "
                "the rows' prompts cannot be told."
            )
        locations = None if host.role == "decoder" else self.locations
        if locations is not None:
            return Frame(
                host, call, rows, columns, locations=window_of(locations.repeat_interleave(times, 0), past, columns)
            )
        return Frame(
            host, call, rows, columns, find=lambda spec: self._prompts_of(spec).repeat(times).window(past, columns)
        )

    def _prompts_of(self, spec: PositionSpec) -> Prompts:
        """The prompts in columns of the whole row, worked out once."""
        key = (spec.turns, spec.prompt_end)
        if key not in self._prompts:
            assert self.tokens is not None
            self._prompts[key] = self.tokens.prompts(*key)
        return self._prompts[key]

    def _answer_frame(self, host: Host, call: Call, arguments: dict[str, Any], rows: int, columns: int) -> Frame:
        """The frame of a forward that holds generated tokens only."""
        if not self.edits_answers or self.locations is not None or self.tokens is None:
            return Frame(host, call, rows, columns, edits=False)
        first = past_length(arguments, columns, self.seen) - self.tokens.valid.shape[1]
        device = token_device(arguments)
        return Frame(
            host, call, rows, columns, find=lambda spec: generated(rows, columns, first, device), answers_only=True
        )

    def forward_ended(self) -> None:
        if not self.prefilled:
            self.seen, self.prefilled = self._running


class GenerateEntry:
    """Stands in for a model's `generate`; set as an attribute of the instance, removed on `unload`.

    An object rather than a function, so that models with an adapter can still be pickled and copied.
    """

    def __init__(self, model: nn.Module, root: Root):
        self.model = model
        self.root = root

    @property
    def __wrapped__(self) -> Any:  # for inspect.signature, help and the like
        cls: Any = type(self.model)
        return cls.generate.__get__(self.model)

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        return self.__wrapped__.__doc__

    def __call__(
        self, *args: Any, intervention_locations: Any = None, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> Any:
        names = list(inspect.signature(self.__wrapped__).parameters)
        generation = self._generation({**dict(zip(names, args)), **kwargs}, intervention_locations)
        if adapter_names is not None:
            generation.adapter_names = self.root.check_adapter_names(adapter_names)
        outer = innermost_generation(self.root)
        if outer is not None and outer.seen == 0:
            # That `generate` only passes the call on, without the arguments that it took out.
            generation.locations = outer.locations if generation.locations is None else generation.locations
            generation.adapter_names = generation.adapter_names or outer.adapter_names
        with generation_scope(generation):
            return self.__wrapped__(*args, **kwargs)

    def _generation(self, arguments: dict[str, Any], locations: Any) -> Generation:
        is_encoder_decoder = getattr(self.model.config, "is_encoder_decoder", False)
        valid = self._valid_columns(arguments)
        if locations is not None:
            locations = check_locations(locations, None if valid is None else (valid.shape[0], valid.shape[1]), 0)
        if valid is None or is_encoder_decoder:  # the decoder's prompt is known when the decoder starts
            return Generation(
                self.root, None, locations, None, self._decoder_columns(arguments), self.root.edits_answers()
            )
        ids = self._ids(arguments) if arguments.get("inputs_embeds") is None else None
        tokens = Tokens(valid, ids=ids if ids is not None and ids.shape == valid.shape else None, given=True)
        if locations is None:
            self._take_back_earlier_turns(tokens, arguments.get("past_key_values"))
        return Generation(self.root, tokens, locations, edits_answers=self.root.edits_answers())

    def _take_back_earlier_turns(self, tokens: Tokens, cache: Any) -> None:
        """Crop a reused cache to before the first edit of a turn that is not the last any more (`turns="last"`).

        What is cropped runs once more as part of the prompt, so that the cache makes no difference.
        """
        past = past_length({"past_key_values": cache}, 0, 0)
        if tokens.ids is None or (isinstance(past, int) and past == 0):
            return
        keep = past = int(past)
        for spec in self.root.specs():
            if spec.turns == "last" and spec.prompt_end:
                before, now = (mark(spec, tokens.prompts(turns, spec.prompt_end)).any(1) for turns in ("all", "last"))
                # Answers were generated without the edits of a prompt, which they are a part of now.
                answered = tokens.prompts("first", spec.prompt_end).inside.logical_not() & now
                changed = ((before != now) | answered)[:, :past].any(0)
                keep = min([keep, *changed.nonzero().flatten().tolist()])
        if keep < past:
            try:
                cache.crop(keep - past)
            except (AttributeError, RuntimeError, ValueError) as error:
                raise ValueError(
                    f"turns='last' has to take back edits of earlier turns, but this {type(cache).__name__} of {past} "
                    f"columns cannot be cropped to {keep}. Start with an empty cache, or use turns='all'."
                ) from error

    def _valid_columns(self, arguments: dict[str, Any]) -> Tensor | None:
        """Bool [B, S]: the columns of the prompts that are no padding, as transformers' `generate` sees them."""
        mask, embeds = arguments.get("attention_mask"), arguments.get("inputs_embeds")
        tokens = self._ids(arguments) if embeds is None else embeds
        if isinstance(mask, Tensor) and mask.dim() == 2:
            return mask.bool()
        if tokens is None:
            return None
        if embeds is None and not tokens.is_floating_point():
            pad, eos = self._setting("pad_token_id", arguments), self._setting("eos_token_id", arguments)
            if pad is not None and pad not in (eos if isinstance(eos, list) else [eos]):
                return (tokens != pad)[:: self.root.survey.ids_per_row]  # transformers infers the mask by the same rule
        rows = tokens.shape[0] // (self.root.survey.ids_per_row if embeds is None else 1)
        return torch.ones(rows, tokens.shape[1], dtype=torch.bool, device=tokens.device)

    def _ids(self, arguments: dict[str, Any]) -> Tensor | None:
        candidates = (arguments.get(name) for name in ("inputs", "input_ids"))
        return next((ids for ids in candidates if isinstance(ids, Tensor) and ids.dim() == 2), None)

    def _setting(self, name: str, arguments: dict[str, Any]) -> Any:
        """A generation setting: from the call, its generation config, or the model's."""
        configs = (arguments.get("generation_config"), getattr(self.model, "generation_config", None))
        values = (arguments.get(name), *(getattr(config, name, None) for config in configs))
        return next((value for value in values if value is not None), None)

    def _decoder_columns(self, arguments: dict[str, Any]) -> int | None:
        guesses = [arguments.get("assistant_model"), self._setting("prompt_lookup_num_tokens", arguments)]
        if all(guess is None for guess in guesses):
            return None  # the decoder's first forward is its prompt and nothing else
        start = arguments.get("decoder_input_ids")
        return 1 if start is None else int(start.shape[1])
