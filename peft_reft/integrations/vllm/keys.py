"""What distinguishes cached blocks of tokens that were edited.

vLLM names a cached block by its tokens, by the block before it, and by extra keys; for a LoRA adapter by the adapter,
all of whose tokens differ from the base model's. Of a ReFT adapter some tokens differ, and which ones depends on where
the request's prompt ends: the last token of one prompt lies in the middle of another that begins with it. So

- a block with edited tokens is named by which of them are edited, by what, and how strongly, besides the adapter;
- a block without any is named like the base model's. If an earlier one has some, the name of the block before it
  differs already. Blocks before the first edited token hold the base model's states: all adapters share them.
"""

from __future__ import annotations

from typing import Any

from peft_reft.integrations.vllm.rule import UNEDITED, RequestEdits

Keys = tuple[tuple[str, Any], ...]


def block_keys(keys: Keys | None, edits: RequestEdits, version: object, start: int, stop: int) -> Keys | None:
    """The extra keys of a block.

    Args:
        keys: those that vLLM gives it, with one named "lora" for the adapter.
        edits: of the block's request.
        version: of the adapter's files, so that weights written over others do not meet their states.
        start, stop: the block holds the request's tokens `start ... stop - 1`.
    """
    if edits.may_edit(start):
        interventions = edits.interventions(start, stop)
        if (interventions != UNEDITED).any():
            return (*(keys or ()), ("reft", (interventions.tobytes(), edits.strength, version)))
    return tuple(key for key in keys or () if key[0] != "lora") or None
