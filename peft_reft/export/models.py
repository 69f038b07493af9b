"""Which models can be exported: decoders that run on token ids alone, whose blocks are one stack of plain outputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import GenerationConfig

from peft_reft.blocks import Layout, ModelBlocks
from peft_reft.info.files import one_line


def base_of(model: nn.Module) -> nn.Module:
    """The causal language model itself, without a `PeftModel` around it; other adapters in it stay."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def is_decoder(model: nn.Module) -> bool:
    """Whether a model is a decoder-only language model: it can generate, and has no encoder."""
    can_generate = getattr(model, "can_generate", None)
    encoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return can_generate is not None and bool(can_generate()) and not encoder


@torch.no_grad()
def logits_of_tokens(model: nn.Module) -> int:
    """How many logits a token gets from a causal language model that is given token ids and their mask.

    Raises:
        ValueError: if it does not run on these alone, as an exported graph has to.
    """
    name, ids = type(model).__name__, torch.ones(2, 3, dtype=torch.long, device=next(model.parameters()).device)
    try:
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    except Exception as error:  # whatever a model says that misses its other inputs
        raise ValueError(
            f"{name} does not run on token ids and their mask alone ({one_line(error)}); an exported graph has no "
            "other inputs of a model. Export a language model of text."
        ) from error
    if logits.dim() != 3 or logits.shape[:2] != ids.shape:
        raise ValueError(
            f"{name} returns logits of the shape {tuple(logits.shape)} for 2 rows of 3 token ids, where a language "
            "model of text returns [2, 3, vocabulary]."
        )
    return int(logits.shape[2])


@contextmanager
def plain_generation(model: Any) -> Iterator[None]:
    """`generate` does within it what it is told, without penalties, beams and forced tokens of the model's config."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def refuse_other_rows(model: nn.Module) -> None:
    """Refuse a model whose `generate` passes other token ids to it than the row, such as a token to be filled in.

    Raises:
        ValueError: for such a model: the app's loop, which passes the row, would get other answers.
    """
    name, ids = type(model).__name__, torch.ones(2, 3, dtype=torch.long, device=next(model.parameters()).device)
    seen: list[Any] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("input_ids")), with_kwargs=True
    )
    settings = GenerationConfig(max_new_tokens=1, do_sample=False, pad_token_id=0)
    try:
        with plain_generation(model):
            cast(Any, model).generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings, use_cache=False
            )
    finally:
        handle.remove()
    if not isinstance(seen[0], torch.Tensor) or not torch.equal(seen[0], ids):
        raise ValueError(
            f"{name}.generate passes other tokens to the model than those of the row, such as one to be filled in. A "
            "loop over an exported graph passes the row, and would get other answers. Run it with the package itself."
        )


def blocks_of_model(model: nn.Module) -> tuple[list[str], int]:
    """The blocks of a decoder, by their own names, and their width.

    Raises:
        ValueError: if its blocks are not one stack of plain hidden states [B, S, d] of one width.
    """
    found = ModelBlocks(model)
    stacks = found.stacks()
    if len(stacks) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(stacks)} stacks of blocks; one exported graph holds one stack, that of a "
            "decoder-only language model."
        )
    shapes = [found.shape_of(name) for name in stacks[0]]
    found.forget_trace()
    widths = sorted({width for width, _ in shapes})
    odd = [words for _, layout in shapes for words in _odd_words(layout)]
    if len(widths) > 1:
        odd.append(f"of several widths, {widths}")
    if odd:
        raise ValueError(
            f"The blocks of {type(model).__name__} return hidden states {odd[0]}, where an exported graph edits "
            "[rows, columns, width] of one width. Export the model with its adapter by torch.export instead."
        )
    return stacks[0], widths[0]


def _odd_words(layout: Layout) -> list[str]:
    """What is unusual in where a block's output has its vectors."""
    odd = []
    if layout.streams > 1:
        odd.append(f"of {layout.streams} streams for each token")
    if layout.padded:
        odd.append("of rows that it pads to a length of its own")
    if layout.before:
        odd.append(f"with {layout.before} other vectors in front of the tokens'")
    if layout.pool:
        odd.append("of fewer vectors than there are tokens")
    if (layout.rows, layout.columns) != (0, 1):
        odd.append("with rows and columns in another order")
    return odd
