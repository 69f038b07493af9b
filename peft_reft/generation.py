"""The entry to `generate`: remembers the prompt for all the forwards that follow.

Neither "the first forward" nor "an empty cache" marks the prompt: chunked prefill runs several forwards over it,
a reused cache starts in its middle, speculative decoding runs guesses along with it, and without a cache every
step runs it again. So the prompt is taken where the caller hands it over.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from peft_reft.prompt import Tokens
from peft_reft.scope import Generation, Root, check_locations, generation_scope


class GenerateEntry:
    """Stands in for a model's `generate`; set as an attribute of the instance, removed on `unload`.

    An object rather than a function, so that models with an adapter can still be pickled and copied.
    """

    def __init__(self, model: nn.Module, root: Root):
        self.model = model
        self.root = root

    @property
    def __wrapped__(self) -> Any:  # for inspect.signature, help and the like
        return type(self.model).generate.__get__(self.model)

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        return type(self.model).generate.__doc__

    def __call__(
        self, *args: Any, intervention_locations: Any = None, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> Any:
        names = list(inspect.signature(self.__wrapped__).parameters)
        generation = self._generation({**dict(zip(names, args)), **kwargs}, intervention_locations)
        if adapter_names is not None:
            generation.adapter_names = self.root.check_adapter_names(adapter_names)
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
        return Generation(self.root, tokens, locations, edits_answers=self.root.edits_answers())

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
                return tokens != pad  # transformers infers the mask by the same rule
        return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)

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
