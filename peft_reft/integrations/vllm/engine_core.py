"""In vLLM's engine core: the names of cached blocks; and, in every process, the name of what was compiled.

Each function stands around one of vLLM's, which it gets first; patches.py says around which.
"""

from __future__ import annotations

import weakref
from importlib.metadata import version
from typing import Any

from peft_reft.integrations.vllm.adapter_of import reft_adapter
from peft_reft.integrations.vllm.adapters import ServedAdapter
from peft_reft.integrations.vllm.keys import block_keys
from peft_reft.integrations.vllm.requests import wishes_of
from peft_reft.integrations.vllm.rule import RequestEdits

_edits: weakref.WeakKeyDictionary[Any, tuple[ServedAdapter, RequestEdits] | None] = weakref.WeakKeyDictionary()


def extra_keys(original: Any, request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int) -> Any:
    keys, mm_idx = original(request, start_token_idx, end_token_idx, start_mm_idx)
    if request.lora_request is None:
        return keys, mm_idx
    if request not in _edits:
        _edits[request] = _edits_of(request)
    found = _edits[request]
    if found is not None:
        served, edits = found
        keys = block_keys(keys, edits, served.version, start_token_idx, end_token_idx)
    return keys, mm_idx


def _edits_of(request: Any) -> tuple[ServedAdapter, RequestEdits] | None:
    served = reft_adapter(request.lora_request)
    if served is None:
        return None
    wishes = wishes_of(getattr(request.sampling_params, "extra_args", None))
    length = request.num_prompt_tokens if wishes.prompt_length is None else wishes.prompt_length
    return served, RequestEdits(served.rule, length, wishes.strength, request.prompt_token_ids)


def compute_hash(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    found = original(self, *args, **kwargs)
    if self.lora_config is None:
        return found
    from vllm.utils.hashing import safe_hash

    own = f"{found} peft_reft {version('peft-reft')}"
    return safe_hash(own.encode(), usedforsecurity=False).hexdigest()[: len(found)]
