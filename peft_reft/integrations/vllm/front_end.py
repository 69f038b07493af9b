"""In vLLM's front end: a request is checked before it is queued, and its adapter before the first request with it.

Each function stands around one of vLLM's, which it gets first; patches.py says around which.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from peft_reft.integrations.vllm.adapter_of import reft_adapter
from peft_reft.integrations.vllm.requests import PROMPT_LENGTH, STRENGTH, says_anything, wishes_of

# By engine: the adapters that its workers took, by id, each with its path and version.
_accepted: weakref.WeakKeyDictionary[Any, dict[int, tuple[str, object]]] = weakref.WeakKeyDictionary()


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
        if wishes.prompt_length is not None and wishes.prompt_length > length:
            raise ValueError(f"{PROMPT_LENGTH}={wishes.prompt_length} is more than the {length} tokens that are given.")
    beam_of = given.prompt.get(PROMPT_LENGTH) if isinstance(given.prompt, dict) else None
    if beam_of is not None:
        params = request.sampling_params.clone()  # all beams share it
        params.extra_args = {**(params.extra_args or {}), PROMPT_LENGTH: beam_of}
        request.sampling_params = params
    return request


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


def _unaccepted(engine: Any, lora_request: Any) -> bool:
    """Whether the workers of an engine have still to take the adapter of a request."""
    with _of_the_request():
        served = reft_adapter(lora_request)
        if served is None:
            return False
        known = _accepted.setdefault(engine, {}).get(lora_request.lora_int_id)
        if known is None or lora_request.load_inplace:
            return True
        if known != (lora_request.lora_path, served.version):
            raise ValueError(
                f"The adapter {lora_request.lora_name!r} has the id {lora_request.lora_int_id}, under which the files "
                f"in {known[0]!r} were loaded as they were before. Give it an id of its own, or load it with "
                "load_inplace=True."
            )
    return False


def _note_accepted(engine: Any, lora_request: Any) -> None:
    served = reft_adapter(lora_request)
    if served is not None:
        known = _accepted.setdefault(engine, {})
        known[lora_request.lora_int_id] = lora_request.lora_path, served.version


def add_request(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    request = _lora_request_in(args, kwargs)
    if _unaccepted(self, request):
        self.add_lora(request)
    return original(self, *args, **kwargs)


async def add_request_async(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    request = _lora_request_in(args, kwargs)
    if _unaccepted(self, request):
        await self.add_lora(request)
    return await original(self, *args, **kwargs)


def _lora_request_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The LoRA request among the arguments of `add_request`, or in a request that was made before."""
    named = dict(zip(("request_id", "prompt", "params", "arrival_time", "lora_request"), args)) | kwargs
    return named.get("lora_request") or getattr(named.get("prompt"), "lora_request", None)


def add_lora(original: Any, self: Any, lora_request: Any) -> Any:
    result = original(self, lora_request)
    _note_accepted(self, lora_request)
    return result


async def add_lora_async(original: Any, self: Any, lora_request: Any) -> Any:
    result = await original(self, lora_request)
    _note_accepted(self, lora_request)
    return result


def remove_lora(original: Any, self: Any, lora_id: int) -> Any:
    _accepted.setdefault(self, {}).pop(lora_id, None)
    return original(self, lora_id)  # an awaitable, if the engine's method is one
