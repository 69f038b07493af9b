"""What the arguments of a forward say: shapes, padding, documents, cache, labels, and the caller's own locations.

What is given and cannot be read is not dropped: the functions here say so, and their callers decide whether that is an
error or a warning.

Shape letters: B rows, S columns of this forward, G position groups, P positions per group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_reft.positions import IGNORED, align_shift_labels, document_starts

HIDDEN = -9000.0  # an additive mask below this hides a token: libraries use -10000 or less (-9984 in bfloat16)
CACHES = ("past_key_values", "cache", "cache_params")  # transformers 5.24 calls each of them `cache`
PASTS = (*CACHES, "mems", "state", "past_buckets_states")  # what a forward is given of the columns before
PADDING = ("input_mask", "decoder_padding_mask")  # masks of what is padding, by names of their own
LOCATIONS_RULE = "Pass a LongTensor [B, P] or [B, G, P] of columns of the padded row, -1 = unused."


def token_shape(arguments: Mapping[str, Any], ids_per_row: int = 1, has_choices: bool = True) -> tuple[int, int] | None:
    """Rows and columns of a call's tokens; None if it has none, or not as one row per sequence.

    Args:
        ids_per_row: how many rows of `input_ids` make one row (audio models have one for each codebook).
        has_choices: ids [B, C, S] may be those of a row's choices. Otherwise, or where a mask [B, S] shows it, ids of
            three dimensions are [B, S, C], a token's ids in C codebooks.
    """
    embeds = arguments.get("inputs_embeds")
    if isinstance(embeds, Tensor) and embeds.dim() == 3:
        return embeds.shape[0], embeds.shape[1]
    ids = arguments.get("input_ids")
    if isinstance(ids, Tensor) and ids.dim() == 2:
        return ids.shape[0] // ids_per_row, ids.shape[1]
    if isinstance(ids, Tensor) and ids.dim() == 3:
        mask = arguments.get("attention_mask")
        if not has_choices or (isinstance(mask, Tensor) and mask.dim() == 2):
            return ids.shape[0], ids.shape[1]
    return None


def with_ids(arguments: Mapping[str, Any], main_input: Any) -> Mapping[str, Any]:
    """The arguments of an encoder or a decoder, its ids under their usual name.

    Args:
        main_input: what transformers declares to be the name of its main input: a side for text, beside one for
            sounds, may take its ids under the name of those.
    """
    ids = arguments.get(main_input)
    if arguments.get("input_ids") is not None or not isinstance(ids, Tensor) or ids.is_floating_point():
        return arguments
    return {**arguments, "input_ids": ids}


def repeats(given: int, rows: int) -> int | None:
    """How often each of `given` rows is run in a batch of `rows`, as `generate` does; None if that is no multiple.

    >>> repeats(2, 6), repeats(2, 2), repeats(2, 3)
    (3, 1, None)
    """
    times, rest = divmod(rows, given) if given else (0, 0)
    return None if rest or not times else times


def token_device(arguments: Mapping[str, Any]) -> torch.device:
    """The device of a call's tokens."""
    embeds = arguments.get("inputs_embeds")
    return (arguments["input_ids"] if embeds is None else embeds).device


# Padding and documents.


def mask_of(arguments: Mapping[str, Any], columns: int) -> Any:
    """The attention mask of a call, or what stands for one.

    XLM has `lengths` [B]; XLNet's `input_mask` and the `decoder_padding_mask` of FSMT's decoder [B, S] are not 0 where
    there is padding.
    """
    mask, lengths = arguments.get("attention_mask"), arguments.get("lengths")
    if mask is not None:
        return mask
    if isinstance(lengths, Tensor) and lengths.dim() == 1:
        return torch.arange(columns, device=lengths.device) < lengths.unsqueeze(1)
    padding = next((arguments[name] for name in PADDING if arguments.get(name) is not None), None)
    return padding == 0 if isinstance(padding, Tensor) else None


def valid_columns(
    mask: Any, rows: int, columns: int, past: int | Tensor, device: torch.device
) -> tuple[Tensor, Tensor | None] | None:
    """Which columns of a forward are no padding, by its attention mask.

    Args:
        mask: [B, columns of the whole row or of a static cache], [B, S, S] or [B, heads, S, columns of a cache], True
            or no large negative number where one may look; with 1 in the place of S, the same for every token; a dict
            of such masks by the type of the layer; or None.
        past: columns before this forward's.

    Returns:
        Bool [B, S], and bool [B, S] where a document begins if the mask shows that (one of three or four dimensions
        does); None if the mask cannot be read.
    """
    if mask is None:
        return torch.ones(rows, columns, dtype=torch.bool, device=device), None
    if isinstance(mask, Mapping):
        # Masks by layer type: full attention shows every token, a window or a chunk only those near by.
        if "full_attention" not in mask and len(mask) != 1:
            return None
        full = mask.get("full_attention", next(iter(mask.values())))
        return valid_columns(full, rows, columns, past, device)
    if not isinstance(mask, Tensor) or mask.shape[0] not in (1, rows):
        return None
    mask = mask.to(device)
    if mask.dim() == 2:
        return _of_columns(mask != 0, rows, columns, past)
    if mask.dim() == 3:
        mask = mask.unsqueeze(1)
    if mask.dim() != 4 or mask.shape[-2] not in (1, columns):
        return None
    # Of whole numbers, or of floats that attention adds to its scores, which may hold biases as well.
    seen = mask[:, 0] > HIDDEN if mask.is_floating_point() else mask[:, 0] != 0
    if mask.shape[-2] != columns:
        return _of_columns(seen[:, 0], rows, columns, past)
    offset = int(past) if not isinstance(past, Tensor) else 0
    if seen.shape[-1] < offset + columns:
        return None
    return _of_pairs(seen[..., offset : offset + columns].expand(rows, -1, -1))


def _of_columns(mask: Tensor, rows: int, columns: int, past: int | Tensor) -> tuple[Tensor, None] | None:
    """From a mask [B, W] of the whole row (or a cache, which may be wider), or of this forward's columns alone."""
    if mask.shape[0] != rows:  # one row, which holds for all
        mask = mask.expand(rows, -1)
    width = mask.shape[1]
    if isinstance(past, Tensor):
        if width < columns:
            return None
        column = past + torch.arange(columns, device=mask.device)
        return mask.gather(1, column.clamp(max=width - 1).expand(rows, columns)), None
    if width == columns:
        return mask, None
    return (mask[:, past : past + columns], None) if width >= past + columns else None


def _of_pairs(seen: Tensor) -> tuple[Tensor, Tensor]:
    """From which columns [B, S, S] each column may look at: which are no padding, and where documents begin.

    Padding may look at nothing. Libraries that want no softmax over nothing let it look at itself, or at everything:
    then no token looks at it, although tokens behind it look at columns before it. A document begins with a token that
    looks at no earlier one.
    """
    columns = seen.shape[-1]
    number = torch.arange(columns, device=seen.device)
    earlier = number < number.unsqueeze(1)
    back, ahead = seen & earlier, seen & earlier.mT
    looks_back, is_seen = back.any(-1), back.any(-2)  # [B, S]: at an earlier column; by a later one
    # Padding that looks at itself alone, in front of the tokens.
    alone = ~looks_back & ~is_seen & ~ahead.any(-1) & (columns > 1)
    # Padding that looks at everything.
    full = seen.all(-1)
    seen_by_others = (seen & ~full.unsqueeze(-1)).any(-2)
    everywhere = full & ahead.any(-1) & ~seen_by_others & ~full.all(-1, keepdim=True)
    # Padding behind the tokens, which looks at them and at itself: what comes behind it looks past it.
    furthest = torch.where(back, number, columns).amin(-1).flip(1).cummin(1).values.flip(1)
    passed = ~is_seen & (F.pad(furthest[:, 1:], (0, 1), value=columns) < number)
    if columns > 1:  # behind the last column there is nothing; it is padding if it comes behind padding
        passed = torch.cat([passed[:, :-1], passed[:, -2:-1] & ~seen[:, -1:, -2]], dim=1)
    valid = seen.diagonal(dim1=-2, dim2=-1) & ~alone & ~everywhere & ~passed
    return valid, valid & ~(back & valid.unsqueeze(1)).any(-1)


def of_moved_ids(valid: Tensor) -> Tensor:
    """Which columns of a decoder are no padding, where its ids are its encoder's, moved by one behind a start token.

    A row has as many tokens there as in the encoder: its last token falls off its end, and with padding behind it, too.

    Args:
        valid: bool [B, S], of the encoder.

    >>> of_moved_ids(torch.tensor([[1, 1, 1], [1, 1, 0], [0, 1, 1]]).bool()).int().tolist()
    [[1, 1, 1], [1, 1, 0], [1, 0, 1]]
    """
    moved = F.pad(valid[:, :-1], (1, 0), value=True)
    return moved & (moved.cumsum(1) <= valid.sum(1, keepdim=True))


def documents(arguments: Mapping[str, Any], valid: Tensor, shown: Tensor | None) -> tuple[Tensor | None, int | None]:
    """Where packed documents begin, and the most documents a row can hold (see `document_starts`).

    Args:
        shown: where documents begin by the attention mask, if that shows it.

    `position_ids` that begin anew are documents only where the model keeps them apart: transformers does so for calls
    with neither an attention mask nor a cache.
    """
    bounds, numbers = arguments.get("cu_seq_lens_q"), arguments.get("seq_idx")
    if bounds is not None or numbers is not None:
        return document_starts(valid, None, numbers, bounds)
    if shown is not None:
        return shown, None
    if arguments.get("attention_mask") is None and cache_of(arguments) is None:
        return document_starts(valid, arguments.get("position_ids"))
    return None, None


# Caches.


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """The cache of a call, whichever name transformers has for it; None without one."""
    return next((arguments[name] for name in CACHES if arguments.get(name) is not None), None)


def has_past(arguments: Mapping[str, Any]) -> bool:
    """Whether a call is given anything of the columns before its own."""
    return any(arguments.get(name) is not None for name in PASTS)


def past_length(arguments: Mapping[str, Any], columns: int, seen: int) -> int | Tensor:
    """How many columns came before those of this forward.

    Args:
        columns: S.
        seen: what the caller knows of it, for states that do not tell; 0 if nothing.

    Returns:
        An int, or a tensor if the cache counts on a device whose answer one would have to wait for.
    """
    cache = cache_of(arguments)
    if hasattr(cache, "get_seq_length"):
        try:
            length = cache.get_seq_length()
        except ValueError:  # a cache of linear-attention layers only
            return seen if has_state(arguments) else 0
        is_known = isinstance(length, Tensor) and length.device.type == "cpu" and not torch.compiler.is_compiling()
        return int(length) if is_known else length
    if isinstance(cache, (tuple, list)) and cache:  # the old format: (key, value) [B, H, S, d] of each layer
        return int(cache[0][0].shape[-2])
    mems = arguments.get("mems")
    if isinstance(mems, (tuple, list)) and mems:  # hidden states [M, B, d] of the past, or of the last part of it
        kept = int(mems[0].shape[0])
        if seen - kept > columns:  # more than what this forward could run once more
            raise ValueError(
                f"The model's memory keeps {kept} of {seen} columns, so the place of the next ones is unknown. "
                "Set model.config.mem_len to at least the length of the sequence."
            )
        return kept
    return seen if has_state(arguments) else 0


def has_state(arguments: Mapping[str, Any]) -> bool:
    """Whether a forward continues a recurrent state (of Mamba, RWKV and their like), which tells no length."""
    if arguments.get("state") is not None:
        return True
    cache = cache_of(arguments)
    if hasattr(cache, "seqlen_offset"):
        return bool(cache.seqlen_offset)
    for layer in getattr(cache, "layers", ()):
        states = getattr(layer, "has_previous_state", None)  # of a linear-attention layer, by state
        if states and any(states.values() if isinstance(states, dict) else [states]):
            return True
    return False


# Labels.


def aligned_labels(
    labels: Any, shift_labels: Any, rows: int, columns: int, is_decoder: bool = False
) -> tuple[Tensor | None, bool]:
    """Labels aligned with the tokens, in which column i holds the label of token i.

    Args:
        labels, shift_labels: as passed to the model; in `shift_labels` column i holds the label of token i + 1.
        is_decoder: of an encoder-decoder model, whose decoder's inputs are the labels moved by one.

    Returns:
        Long [B, S] or None; and whether there were labels that cannot be aligned.
    """
    if is_decoder:
        labels, shift_labels = shift_labels, labels
    for given, shifted in ((labels, False), (shift_labels, True)):
        if is_decoder and isinstance(given, Tensor) and given.dim() == 2 and given.shape[0] != rows:
            times = repeats(rows, given.shape[0])  # a row of labels for each codebook, one after the other
            given = given if times is None else given.unflatten(0, (rows, times)).movedim(1, 2)
        if not isinstance(given, Tensor) or given.shape[:2] != (rows, columns):
            continue
        if is_decoder and given.is_floating_point():
            continue  # classes: of tokens they would be whole numbers
        if given.dim() == 3:  # a label for each codebook of an audio model
            given = torch.where((given != IGNORED).any(-1), 0, IGNORED)
        if given.dim() == 2:
            return align_shift_labels(given) if shifted else given, False
    return None, labels is not None or shift_labels is not None


# Locations.


def check_locations(
    locations: Any, shape: tuple[int, int] | None, past: int | Tensor, may_repeat: bool = False
) -> Tensor:
    """`intervention_locations` as a long tensor [B, G, P].

    Args:
        shape: rows and columns of the call, if it has tokens.
        past: columns before those.
        may_repeat: a column may be named twice, as a source that two places take their value from.

    Raises:
        ValueError: if they are no columns of this batch. (The values are looked at on the CPU only: elsewhere that
            would make the device wait.)
    """
    is_whole = isinstance(locations, Tensor) and not locations.is_floating_point() and locations.dtype != torch.bool
    if not is_whole or locations.dim() not in (2, 3):
        what = repr(locations)
        if isinstance(locations, Tensor):
            what = f"a {locations.dtype} tensor of shape {tuple(locations.shape)}"
        raise ValueError(f"intervention_locations is {what}. {LOCATIONS_RULE}")
    if shape is not None:
        rows, columns = shape
        if locations.shape[0] != rows:
            raise ValueError(
                f"intervention_locations has {locations.shape[0]} rows, but the batch has {rows}; it belongs to "
                f"another batch. {LOCATIONS_RULE}"
            )
        if locations.numel() and values_can_be_read(locations):
            least, most = int(locations.min()), int(locations.max())
            if least < -1 or most >= columns + int(past):
                wrong = least if least < -1 else most
                raise ValueError(
                    f"intervention_locations holds {wrong}, but the rows have the columns 0 to "
                    f"{columns + int(past) - 1}. {LOCATIONS_RULE}"
                )
    locations = locations.long()
    locations = locations if locations.dim() == 3 else locations.unsqueeze(1)
    if may_repeat:
        return locations
    flat = locations.flatten(1)  # a column that is named twice is edited once, by the first
    repeated = (flat.unsqueeze(1) == flat.unsqueeze(2)).tril(-1).any(-1).view_as(locations)
    return torch.where(repeated, -1, locations)


def values_can_be_read(tensor: Tensor) -> bool:
    """Whether a tensor's values can be looked at at no cost: on the CPU, neither compiled, traced nor in torch.func."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False
    return tensor.device.type == "cpu" and type(tensor) is Tensor and torch.func.debug_unwrap(tensor) is tensor
