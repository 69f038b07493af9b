"""In vLLM's front end: a request is checked before it is queued, and its adapter before the first request with it.

Each function stands around one of vLLM's, which it gets first; patches.py says around which.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

from peft_reft.integrations.vllm.adapter_of import reft_adapter
from peft_reft.integrations.vllm.adapters import Version
from peft_reft.integrations.vllm.requests import PROMPT_LENGTH, STRENGTH, says_anything, wishes_of


class Known(NamedTuple):
    """The adapter that an id stands for; version is that of a ReFT adapter's files, None for a LoRA adapter."""

    path: str
    version: Version | None


_known: weakref.WeakKeyDictionary[Any, dict[int, Known]] = weakref.WeakKeyDictionary()  # by engine and id


@contextmanager
def _of_the_request() -> Iterator[None]:
    """Errors in here are the request's: vLLM answers its own class of them with the status 400, others with 500."""
    from vllm.exceptions import VLLMValidationError

    try:
        yield
    except ValueError as error:
        raise VLLMValidationError(str(error)) from error


def process_inputs(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    given = SimpleNamespace(lora_request=None, resumable=False)
    vars(given).update(inspect.signature(original).bind(self, *args, **kwargs).arguments)
    extra = getattr(given.params, "extra_args", None)
    with _of_the_request():
        served = reft_adapter(given.lora_request)
        if served is None and extra and says_anything(extra):
            raise ValueError(
                f"The request passes {sorted(extra)}, and is not for a ReFT adapter. Name one as its model, or leave "
                "these arguments out."
            )
        wishes = wishes_of(extra)
        if served is not None and getattr(given.params, "prompt_logprobs", None) is not None and _ends_scoring(self):
            raise ValueError(
                "On CPUs vLLM ends with an error over prompt_logprobs where the model's head is wrapped for LoRA. "
                "Start it with --lora-target-modules none, or without lm_head among them."
            )
        if served is not None and given.resumable:
            raise ValueError(
                "A session that streams its input cannot use a ReFT adapter: its prompt grows after a part of it was "
                f"run, and positions={served.config.positions!r} count from the prompt's start or end. Send the whole "
                "prompt at once."
            )
    request = original(self, *args, **kwargs)
    if served is None:
        return request
    length = len(request.prompt_token_ids if request.prompt_token_ids is not None else request.prompt_embeds)
    with _of_the_request():
        if served.rule.reads_tokens and request.prompt_embeds is not None:
            raise ValueError(
                f"The adapter edits turns={served.config.turns!r}, which are found in the prompt's tokens; this prompt "
                "is given as embeddings. Pass tokens, or use an adapter without `turns`."
            )
        if wishes.prompt_length is not None and wishes.prompt_length > length:
            raise ValueError(f"{PROMPT_LENGTH}={wishes.prompt_length} is more than the {length} tokens that are given.")
    beam_of = given.prompt.get(PROMPT_LENGTH) if isinstance(given.prompt, dict) else None
    if beam_of is not None:
        params = request.sampling_params.clone()  # all beams share it
        params.extra_args = {**(params.extra_args or {}), PROMPT_LENGTH: beam_of}
        request.sampling_params = params
    return request


def _ends_scoring(processor: Any) -> bool:
    """Whether an engine ends with an error of its own when it is asked for prompt_logprobs (vLLM 0.32, on CPUs)."""
    if processor.lora_config is None:  # vLLM refuses adapters then
        return False
    targets = processor.lora_config.target_modules
    return processor.vllm_config.device_config.device_type == "cpu" and (targets is None or "lm_head" in targets)


def get_prompt(original: Any, self: Any) -> Any:
    prompt = original(self)
    if self.lora_request is not None and prompt["type"] != "enc_dec":
        prompt[PROMPT_LENGTH] = len(self.orig_prompt["prompt_token_ids"])
    return prompt


def to_beam_search_params(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    with _of_the_request():
        if says_anything(self.vllm_xargs):
            raise ValueError(
                f"vLLM's beam search takes no vllm_xargs, so that {STRENGTH} would be dropped. Leave it out, or "
                "generate without use_beam_search."
            )
    return original(self, *args, **kwargs)


def _adapter_of(engine: Any, lora_request: Any) -> tuple[Known, bool]:
    """What a request's adapter is, and whether the workers have still to take it.

    Raises:
        ValueError: if its id stands for another adapter, or for earlier files that requests still run with; vLLM
            would answer from what it has under the id.
    """
    with _of_the_request():
        served = reft_adapter(lora_request)
        found = Known(lora_request.lora_path, None if served is None else served.version)
        known = _known.setdefault(engine, {}).get(lora_request.lora_int_id)
        if known in (None, found) or found.version is known.version is None:  # LoRA adapters are vLLM's own business
            return found, known is None and served is not None
        name = f"The adapter {lora_request.lora_name!r}"
        if not lora_request.load_inplace:
            raise ValueError(
                f"{name} has the id {lora_request.lora_int_id}, under which the files in {known.path!r} were loaded as "
                "they were before. Give it an id of its own, or load it with load_inplace=True."
            )
        running = _running(engine, lora_request.lora_int_id)
        if running:
            raise ValueError(
                f"{name} cannot be loaded in place while {running} request(s) run with the files that it would "
                "replace. Wait for them, abort them, or load it under another name."
            )
        return found, True


def _running(engine: Any, lora_id: int) -> int:
    """How many unfinished requests an adapter has."""
    requests = (state.lora_request for state in engine.output_processor.request_states.values())
    return sum(request is not None and request.lora_int_id == lora_id for request in requests)


def add_request(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    given = inspect.signature(original).bind(self, *args, **kwargs)
    request = _lora_request_in(given)
    if request is not None:
        found, is_new = _adapter_of(self, request)
        if is_new:
            self.add_lora(request)
        _let_workers_keep(given, request, found)
    result = original(*given.args, **given.kwargs)
    if request is not None:
        _known[self].setdefault(request.lora_int_id, found)
    return result


async def add_request_async(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    given = inspect.signature(original).bind(self, *args, **kwargs)
    request = _lora_request_in(given)
    if request is not None:
        found, is_new = _adapter_of(self, request)
        if is_new:
            await self.add_lora(request)
        _let_workers_keep(given, request, found)
    result = await original(*given.args, **given.kwargs)
    if request is not None:
        _known[self].setdefault(request.lora_int_id, found)
    return result


def _lora_request_in(given: inspect.BoundArguments) -> Any:
    """The LoRA request among the arguments of `add_request`, or in a request that was made before."""
    return given.arguments.get("lora_request") or getattr(given.arguments["prompt"], "lora_request", None)


def _let_workers_keep(given: inspect.BoundArguments, lora_request: Any, found: Known) -> None:
    """A ReFT adapter that was loaded in place is not loaded again in each step, as vLLM's workers would."""
    if found.version is None or not lora_request.load_inplace:
        return
    loaded = copy.copy(lora_request)
    loaded.load_inplace = False
    if given.arguments.get("lora_request") is lora_request:
        given.arguments["lora_request"] = loaded
    else:
        given.arguments["prompt"].lora_request = loaded


def add_lora(original: Any, self: Any, lora_request: Any) -> Any:
    found, _ = _adapter_of(self, lora_request)
    result = original(self, lora_request)
    _known[self][lora_request.lora_int_id] = found
    return result


async def add_lora_async(original: Any, self: Any, lora_request: Any) -> Any:
    found, _ = _adapter_of(self, lora_request)
    result = await original(self, lora_request)
    _known[self][lora_request.lora_int_id] = found
    return result


def remove_lora(original: Any, self: Any, lora_id: int) -> Any:
    known = _known.setdefault(self, {})
    if lora_id in known and known[lora_id].version is not None and (running := _running(self, lora_id)):
        raise ValueError(
            f"The adapter of id {lora_id} cannot be removed while {running} request(s) run with it: its files would "
            "be read again for them. Wait for them, or abort them."
        )
    known.pop(lora_id, None)
    return original(self, lora_id)  # an awaitable, if the engine's method is one
