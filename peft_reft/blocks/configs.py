"""The configs of transformers that a model's config holds: of its text, its images, its sound."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import PretrainedConfig


def configs_of(config: Any) -> Iterator[PretrainedConfig]:
    """A config of transformers and those in it, the outer before the inner ones; none for a config of another kind."""
    if isinstance(config, PretrainedConfig):
        yield config
        for part in vars(config).values():
            yield from configs_of(part)
