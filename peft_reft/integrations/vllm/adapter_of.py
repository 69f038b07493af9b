"""The ReFT adapter that a request of vLLM names."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from peft_reft.integrations.vllm.adapters import ServedAdapter, served_adapter


def reft_adapter(lora_request: Any) -> ServedAdapter | None:
    """The ReFT adapter that a LoRA request names; None for a LoRA adapter, or without a request.

    Raises:
        ValueError: if it cannot be read or served.
    """
    if lora_request is None:
        return None
    return served_adapter(_directory(lora_request.lora_path))


@functools.cache
def _directory(path: str) -> Path:
    """Where an adapter lies, as vLLM finds it: a directory, or a name on the hub, which is downloaded."""
    from vllm.lora.utils import get_adapter_absolute_path

    return Path(get_adapter_absolute_path(path))
