"""Where an exported backbone is edited: the mask that says so, for every term of the position notation.

A device has no prompts to find: the app knows what it gave the model. So the rule here is that of `generate`: what is
given is the prompt, whole rows of it, and generated tokens follow. The notation's arithmetic is that of positions/.

Shape letters: B rows, S columns, G position groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peft_reft.positions import PositionSpec, Prompts, mark, parse_positions
from peft_reft.positions import generated as decode_step


def edit_mask(
    positions: str,
    attention_mask: Tensor | None = None,
    prompt_length: int | Sequence[int] | Tensor | None = None,
    generated: int = 0,
    share_weights: bool | str = False,
) -> Tensor:
    """The tokens that an adapter edits, as an exported backbone takes them.

    Args:
        positions: the adapter's notation, such as "f7+l7".
        attention_mask: [B, S], nonzero for tokens, zero for padding wherever it is; the whole rows, cached columns too.
            None for rows without padding.
        prompt_length: tokens in the prompt of each row (padding does not count), one number or one per row; the tokens
            behind it are generated ones. None: all but the last `generated` tokens.
        generated: how many tokens were generated behind the prompt. Without `attention_mask` and `prompt_length` the
            mask is that of a single decode step, which runs the `generated`-th of them.
        share_weights: of the adapter. False: a group per term; True: one group; "position": a group per position.

    Returns:
        Float [B, S, G], 1 where a group's intervention edits a token, else 0; multiply it by the strength that you
        want, a number for all rows or [B, 1, 1]. A decode step takes the last column, `[:, -1:]`.

    Raises:
        ValueError: for what is no notation or sharing, or lengths that the rows do not have.

    >>> edit_mask("f1+l1", prompt_length=3)[0].T
    tensor([[1., 0., 0.],
            [0., 0., 1.]])
    >>> edit_mask("l1+d2", prompt_length=2, generated=3, share_weights=True).flatten()
    tensor([0., 1., 0., 1., 0.])
    >>> [edit_mask("d2", generated=step).item() for step in (1, 2, 3, 4)]
    [0.0, 1.0, 0.0, 1.0]
    """
    spec = parse_positions(positions)
    known = share_weights in (True, False, "position")
    if not known or (share_weights == "position" and any(term.width is None for term in spec.terms)):
        raise ValueError(
            f"share_weights={share_weights!r} is that of no adapter of positions={positions!r}: it is True, False, or, "
            "where each term names a fixed number of tokens, 'position'."
        )
    if isinstance(generated, bool) or not isinstance(generated, int) or generated < 0:
        raise ValueError(f"generated={generated!r} is no number of tokens; pass 0 for the prompt alone.")
    if attention_mask is None and prompt_length is None:
        if not generated:
            raise ValueError(
                "edit_mask needs to know how long the rows are: pass attention_mask or prompt_length, or "
                "generated=n for the decode step that runs the n-th generated token."
            )
        prompts = decode_step(1, 1, generated - 1, torch.device("cpu"))
    else:
        prompts = _prompts(attention_mask, prompt_length, generated)
    marks = mark(spec, prompts, share_weights)
    if share_weights is True:
        marks = marks.any(1, keepdim=True)
    return marks.transpose(1, 2).float()


def refuse_other_prompts(adapter: str, spec: PositionSpec) -> None:
    """Refuse an adapter whose prompts are found by token ids, which a mask of lengths does not know.

    Raises:
        ValueError: with turns="first" or "all". With "last" or None, what is given is the prompt, as in `generate`.
    """
    if spec.turns in ("first", "all"):
        raise ValueError(
            f"The adapter {adapter!r} edits the prompts of turns={spec.turns!r}, which are found by the token ids of a "
            "conversation. An edit mask knows lengths alone; use turns=None or 'last'."
        )


def _prompts(
    attention_mask: Tensor | None, prompt_length: int | Sequence[int] | Tensor | None, generated: int
) -> Prompts:
    """Each column's place, where a row is a prompt and the tokens generated behind it."""
    lengths = None if prompt_length is None else torch.as_tensor(prompt_length)
    if lengths is not None:
        is_whole = not lengths.is_floating_point() and lengths.dtype != torch.bool and lengths.dim() <= 1
        if not is_whole or int(lengths.min()) < 1:
            raise ValueError(
                f"prompt_length={prompt_length!r} must be a number of tokens above 0, or one for each row."
            )
    if attention_mask is None:
        assert lengths is not None
        if int(lengths.min()) != int(lengths.max()):
            raise ValueError(
                f"prompt_length={lengths.tolist()} differs between rows: pass the attention_mask, which shows on "
                "which side the shorter ones are padded."
            )
        attention_mask = torch.ones(lengths.numel(), int(lengths.max()) + generated)
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        what = f"of shape {tuple(attention_mask.shape)}" if isinstance(attention_mask, Tensor) else attention_mask
        raise ValueError(f"attention_mask is {what}; it must be a tensor [rows, columns].")
    if lengths is not None and lengths.numel() not in (1, len(attention_mask)):
        raise ValueError(
            f"prompt_length={prompt_length!r} has {lengths.numel()} entries, but the attention_mask has "
            f"{len(attention_mask)} rows."
        )
    valid = attention_mask != 0
    order = valid.cumsum(1) - 1
    count = order[:, -1:] + 1  # [B, 1]
    length = count - generated if lengths is None else lengths.to(count.device).reshape(-1, 1).expand_as(count)
    wrong = (length < 1) | (length > count)
    if lengths is not None and generated:
        wrong = wrong | (length + generated != count)
    if wrong.any():
        row = int(wrong.flatten().nonzero()[0])
        raise ValueError(
            f"Row {row} of the attention_mask has {int(count[row])} tokens, which cannot be a prompt of "
            f"{'at least one' if lengths is None else int(length[row])} and {generated} generated ones. The mask "
            "covers the whole row: the prompt's columns and those of the generated tokens."
        )
    inside = valid & (order < length)
    return Prompts(inside, order, length, answer=valid & ~inside, answer_order=order - length)
