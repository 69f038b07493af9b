"""`generate`: the prompt is what the caller hands over, however it is then run.

Neither "the first forward" nor "an empty cache" marks the prompt: chunked prefill runs several forwards over it, a
reused cache starts in its middle, speculative decoding runs guesses along with it, and without a cache every step runs
it again. So the prompt is what the caller hands to `generate`. The arguments of its steps, and only those, are made by
`prepare_inputs_for_generation`: our entry for that method adds a `Step`, which says which columns of the row they run.
Other forwards that happen to run meanwhile (of a logits processor, say) get none, and are forwards of their own.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from peft_reft.context import notices
from peft_reft.context.arguments import PASTS, cache_of, has_past, past_length, token_shape, valid_columns
from peft_reft.context.method import MethodEntry
from peft_reft.context.passed import NOTHING, STEP, read_passed, take_own
from peft_reft.context.state import ModelState, names_of_rows
from peft_reft.positions import Tokens, mark

GUESSING = ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")  # settings by which tokens are guessed ahead


class Generation:
    """One call of `generate`: its prompt, in columns of the whole row.

    Attributes:
        tokens: the rows of the prompt; None until an encoder-decoder's decoder has started.
        shape: rows and columns of the prompts that the caller passed; None if that is not known.
        passed: what else the caller passed.
        edits_answers: some adapter edits generated tokens too.
        guesses: the first step may hold guessed tokens behind the prompt.
        in_chunks: the prompt is run in several steps.
        started: a step was prepared. (Some models' `generate` only passes the call on to that of a part.)
        decoder_columns: the length of a decoder's prompt; its first step may hold guessed tokens behind it.
        passed_on: the `generate` of a part, to which the call was passed on, prepared steps.
    """

    def __init__(self, state: ModelState, tokens: Tokens | None):
        self.state = state
        self.tokens = tokens
        self.shape: tuple[int, int] | None = None
        self.passed = NOTHING
        self.edits_answers = state.edits_answers()
        self.guesses = self.in_chunks = self.started = self.passed_on = False
        self.decoder_columns: int | None = None
        self._unseen = 0  # columns of the row that are not among the ids of a step: embeddings, earlier turns
        self._before = 0  # columns in the cache that are none of the row's: a prefix that was trained

    def step(self, is_decoder: bool, ids: Any, arguments: Mapping[str, Any], inputs: Mapping[str, Any]) -> Step | None:
        """The step whose arguments `generate` has just prepared.

        Args:
            is_decoder: of an encoder-decoder model.
            ids: the row so far, as `prepare_inputs_for_generation` was given it (or a chunk of the prompt).
            arguments: the other arguments that it was given.
            inputs: what the model will be given.
        """
        self.started = True
        if is_decoder:
            inputs = {
                **inputs,
                "input_ids": inputs.get("decoder_input_ids"),
                "inputs_embeds": inputs.get("decoder_inputs_embeds"),
            }
        shape = token_shape(inputs, 1 if is_decoder else self.state.ids_per_row, has_choices=False)
        if shape is None or not isinstance(ids, Tensor):
            return None
        # transformers 5.16 calls no chunk the first.
        is_first = bool(arguments.get("is_first_iteration")) or self.tokens is None
        if is_first:
            self._before = int(past_length(inputs, 0, 0)) - int(past_length(arguments, 0, 0))
            begins = self.tokens is None or not (self.guesses or self.in_chunks)
            mask = arguments.get("decoder_attention_mask" if is_decoder else "attention_mask")
            self._unseen = self._begin(is_decoder, ids, mask, inputs, shape) if begins else 0
        seen = max(0, ids.shape[1] + self._unseen - shape[1])
        if ids.shape[1] > shape[1] and not is_first and not has_past(inputs) and self.state.active_specs():
            raise RuntimeError(
                f"transformers {transformers.__version__} runs the last {shape[1]} of {ids.shape[1]} columns with "
                f"no cache by a name that peft_reft knows ({', '.join(PASTS)}): which columns they are is unknown. "
                "Generate with use_cache=False, or install a version of transformers that was tested."
            )
        past = past_length(inputs, shape[1], seen)
        if isinstance(past, Tensor) and not is_first:
            return Step(self, seen)
        return Step(self, int(past) - self._before)

    def _begin(
        self, is_decoder: bool, ids: Tensor, mask: Any, inputs: Mapping[str, Any], shape: tuple[int, int]
    ) -> int:
        """Take the prompt of a loop over steps: one `generate` may run several, each with a prompt of its own.

        Returns:
            How many columns of the row are not among `ids`.
        """
        rows, columns = shape
        mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        cached = int(past_length(inputs, columns, 0))
        width = ids.shape[1]
        if mask is not None:
            width = mask.shape[1]
        elif inputs.get("inputs_embeds") is not None or (cached and width == columns):  # the ids are not the whole row
            width = cached + columns
        longer = None if is_decoder else inputs.get("attention_mask")
        if width < columns and isinstance(longer, Tensor) and longer.shape[-1] >= columns:
            width, mask = columns, longer  # soft prompts were put in front of the ids since
        unseen = max(0, width - ids.shape[1])
        limit = self.decoder_columns if is_decoder else None
        if self.in_chunks and limit is not None:
            width = max(width, limit)  # the ids are those of the first chunk
        if self.tokens is not None and mask is None and not is_decoder:
            known, before = self.tokens.valid.shape
            if before == width and rows % known == 0:
                return unseen  # the prompt that the caller handed over, whose padding is known better there
        found = valid_columns(mask, rows, width, 0, ids.device)
        valid = torch.ones(rows, width, dtype=torch.bool, device=ids.device) if found is None else found[0]
        same = ids.shape == valid.shape and not is_decoder
        if is_decoder and self.guesses and limit is None:
            raise RuntimeError(
                f"transformers {transformers.__version__} did not call {DecoderPromptEntry.name}: it is unknown where "
                "the decoder's prompt ends before tokens that were guessed. Generate without assistance."
            )
        self.tokens = Tokens(valid[:, :limit], ids=ids if same else None, given=True)
        return unseen


class Step(NamedTuple):
    """One forward of a `generate` call: the columns behind `past` of the row."""

    generation: Generation
    past: int

    def edits_nothing(self, role: str) -> bool:
        """Whether it holds generated tokens only, and no adapter edits those.

        Args:
            role: of the module that runs it. Locations that were given name all there is to edit, but in an
                encoder-decoder model the encoder's.
        """
        generation = self.generation
        if generation.tokens is None or self.past < generation.tokens.valid.shape[1]:
            return False
        return not generation.edits_answers or (generation.passed.locations is not None and role == "")


class GenerateEntry(MethodEntry):
    """Stands in for `generate`: takes the prompt, and the arguments that the model does not know."""

    name = "generate"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own = take_own(kwargs)
        parameters = list(inspect.signature(self.__wrapped__).parameters)
        generation = self._generation({**dict(zip(parameters, args)), **kwargs}, own.get("intervention_locations"))
        running = self.state.running
        outer = running.generation
        # One that has started does more than pass the call on to a part.
        inherited = NOTHING if outer is None or outer.started else outer.passed
        generation.passed = read_passed(self.module, self.state, own, generation.shape, inherited)
        names, outer_names = generation.passed.adapter_names, running.adapter_names
        if names is not None and outer is None and generation.shape is not None and generation.shape[0] != len(names):
            raise ValueError(names_of_rows(len(names), generation.shape[0]))
        running.generation = generation
        self.state.unlabelled = False
        # PEFT's prompt learning puts a method of its own in the entry's place while it generates, by which it adds soft
        # prompts to the step: then an entry stands around that.
        attach_method_entry(PrepareEntry, self.module, self.state)
        try:
            running.adapter_names = names
            output = self.original(*args, **kwargs)
        finally:
            running.generation, running.adapter_names = outer, outer_names
        if outer is not None:
            outer.passed_on = outer.passed_on or generation.started or generation.passed_on
        elif not (generation.started or generation.passed_on):
            notices.raise_or_warn_of_no_steps(self.state, self.module, own)
        return output

    def _generation(self, arguments: Mapping[str, Any], locations: Any) -> Generation:
        valid = self._valid_columns(arguments)
        is_encoder_decoder = getattr(self.module.config, "is_encoder_decoder", False)
        tokens = None
        if valid is not None and not is_encoder_decoder:
            ids = self._ids(arguments) if arguments.get("inputs_embeds") is None else None
            tokens = Tokens(valid, ids=ids if ids is not None and ids.shape == valid.shape else None, given=True)
        generation = Generation(self.state, tokens)
        generation.shape = None if valid is None else (valid.shape[0], valid.shape[1])
        if locations is None and tokens is not None:
            self._take_back_earlier_turns(tokens, cache_of(arguments))
        guesses = [arguments.get("assistant_model"), *(self._setting(name, arguments) for name in GUESSING)]
        generation.guesses = any(guess is not None and guess is not False for guess in guesses)
        generation.in_chunks = self._setting("prefill_chunk_size", arguments) is not None
        return generation

    def _take_back_earlier_turns(self, tokens: Tokens, cache: Any) -> None:
        """Crop a reused cache to before the first edit of a turn that is not the last any more (`turns="last"`).

        What is cropped runs once more as part of the prompt, so that the cache makes no difference.
        """
        past = past_length({"cache": cache}, 0, 0)
        if tokens.ids is None or (isinstance(past, int) and past == 0):
            return
        keep = past = int(past)
        for spec in self.state.specs():
            if spec.turns == "last" and spec.prompt_end:
                before, now = (mark(spec, tokens.prompts(turns, spec.prompt_end)).any(1) for turns in ("all", "last"))
                # Answers were generated without the edits of a prompt, which they are a part of now.
                answered = tokens.prompts("first", spec.prompt_end).inside.logical_not() & now
                changed = ((before != now) | answered)[:, :past].any(0)
                keep = min([keep, *changed.nonzero().flatten().tolist()])
        if keep < past:
            _crop(cache, past, keep)

    def _valid_columns(self, arguments: Mapping[str, Any]) -> Tensor | None:
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
                # transformers infers the mask by the same rule.
                return (tokens != pad)[:: self.state.ids_per_row]
        rows = tokens.shape[0] // (self.state.ids_per_row if embeds is None else 1)
        return torch.ones(rows, tokens.shape[1], dtype=torch.bool, device=tokens.device)

    def _ids(self, arguments: Mapping[str, Any]) -> Tensor | None:
        candidates = (arguments.get(name) for name in ("inputs", "input_ids"))
        return next((ids for ids in candidates if isinstance(ids, Tensor) and ids.dim() == 2), None)

    def _setting(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """A generation setting: from the call, its generation config, or the model's."""
        configs = (arguments.get("generation_config"), getattr(self.module, "generation_config", None))
        values = (arguments.get(name), *(getattr(config, name, None) for config in configs))
        return next((value for value in values if value is not None), None)


def _crop(cache: Any, past: int, keep: int) -> None:
    """Take columns off the end of a cache, from `past` of them down to `keep`.

    Raises:
        ValueError: if that cannot be done. Where the cache is wider than a layer's window, transformers' `crop` may
            take off what is there and leave that layer without the columns that had been in the window before.
    """
    error: Exception | None = None
    if getattr(cache, "is_croppable", True):
        try:
            return cache.crop(keep - past)
        except (AttributeError, RuntimeError, ValueError) as found:
            error = found
    raise ValueError(
        f"turns='last' has to take back edits of earlier turns, but this {type(cache).__name__} of {past} columns "
        f"cannot be cropped to {keep}. Start with an empty cache, or use turns='all'."
    ) from error


class DecoderPromptEntry(MethodEntry):
    """Stands in for the method by which `generate` makes a decoder's prompt: it may put the start token in front."""

    name = "_prepare_decoder_input_ids_for_generation"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        ids, arguments = self.original(*args, **kwargs)
        generation = self.state.running.generation
        if generation is not None:
            generation.decoder_columns = int(ids.shape[1])
        return ids, arguments


class PrepareEntry(MethodEntry):
    """Stands in for `prepare_inputs_for_generation`: says of each step of `generate` which one it is."""

    name = "prepare_inputs_for_generation"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs = self.original(*args, **kwargs)
        generation = self.state.running.generation
        if generation is not None and isinstance(inputs, dict):
            is_decoder = bool(getattr(self.module.config, "is_encoder_decoder", False))
            ids = args[0] if args else kwargs.get("input_ids", kwargs.get("decoder_input_ids"))
            step = generation.step(is_decoder, ids, kwargs, inputs)
            if step is not None:
                inputs[STEP] = step
        return inputs


def attach_method_entry(entry: type[MethodEntry], module: nn.Module, state: ModelState) -> None:
    """Put an entry in place of a method, if the module has that, unless one is there."""
    if hasattr(type(module), entry.name) and not isinstance(module.__dict__.get(entry.name), entry):
        entry(module, state).attach()
