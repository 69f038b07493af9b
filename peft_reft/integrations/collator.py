"""ReftDataCollator: wraps any collator and adds `intervention_locations` to its batches.

Labels may be taken away between the collator and the model; locations that travel with the batch are not.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft.utils.peft_types import TaskType
from torch import Tensor

from peft_reft.context.arguments import valid_columns
from peft_reft.context.notices import UNALIGNED_LABELS, UNREADABLE_MASK, describe
from peft_reft.context.subspaces import read_choices
from peft_reft.context.training import SEVERAL_ANSWERS
from peft_reft.positions import IGNORED, Tokens, align_shift_labels, document_starts, locate, parse_positions
from peft_reft.tuner.config import ReftConfig, prompt_end_ids

KEY = "intervention_locations"
SUBSPACES = "subspaces"
KL = "KL_"  # TRL's KTO trainer runs two sets of rows per batch; the names of the second begin so


class ReftDataCollator:
    """Calls `inner_collator` and adds the columns that a ReFT adapter edits.

    Args:
        inner_collator: any callable from a list of examples to a batch of tensors, the trainer's own included
            (`trainer.data_collator = ReftDataCollator(trainer.data_collator, config)`).
        config: the adapter's config: its `positions`, and its `task_type`, by which labels are next-token targets.

    The batch gets `intervention_locations`, a LongTensor [B, G, P]: per row and position group the columns to edit,
    left to right, -1 = unused. P is the largest number in `positions` (times the documents of a packed row; the number
    of columns for "all"). The end of the prompt is taken from `labels`, `shift_labels` or, with TRL's preference
    trainers, `completion_mask`. Batches of TRL's KTO trainer get no locations if they do not hold for their
    `KL_input_ids` too; that trainer passes labels. Examples that bring `intervention_locations` of their own ([P] or
    [G, P], columns of the example) keep them, moved by the padding that is put in front of the example.

    Examples that say which of the config's `subspaces` are theirs, in a column of that name (a name, a list of names,
    {name: strength}, None for all), give the batch `subspaces`: their strengths [B, K] for K subspaces in the config's
    order. Collators that know nothing of such a column drop it.

    It passes for an instance of what it wraps, and reads and sets the wrapped collator's attributes.
    """

    inner_collator: Callable[..., Any]
    config: ReftConfig

    def __init__(self, inner_collator: Callable[..., Any], config: ReftConfig):
        if not callable(inner_collator):
            raise TypeError(
                f"inner_collator={inner_collator!r} is not callable; pass a collator such as the trainer's."
            )
        if not isinstance(config, ReftConfig):
            raise TypeError(f"config={config!r} is not a ReftConfig; pass the one that the adapter was made with.")
        self.__dict__.update(inner_collator=inner_collator, config=config)

    def __call__(self, features: list[Any], *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(f, Mapping) and SUBSPACES in f for f in features):
            choices = [f.get(SUBSPACES) for f in features]
            features = [{name: value for name, value in f.items() if name != SUBSPACES} for f in features]
            batch = self._with_locations(features, *args, **kwargs)
            batch[SUBSPACES] = self._strengths(choices, batch)
            return batch
        return self._with_locations(features, *args, **kwargs)

    def _strengths(self, choices: list[Any], batch: Mapping[str, Any]) -> Tensor:
        """The strengths [B, K] of the config's K subspaces in the rows of a batch.

        Raises:
            ValueError: for names that the config does not have, or examples packed into fewer rows.
        """
        parts = self.config.subspaces
        if parts is None:
            raise ValueError(
                "The examples have a column `subspaces`, but the config has none. Give the collator the adapter's own "
                "config, with ReftConfig(subspaces={...}), or drop the column."
            )
        read = read_choices(choices, len(choices), {"": parts}, None, {""})
        found = torch.tensor([[1.0 if c is None else c.get(name, 0.0) for name in parts] for c in read])
        rows = next(tensor.shape[0] for tensor in batch.values() if isinstance(tensor, Tensor))
        times, rest = divmod(rows, len(found))
        if times and not rest:  # preference trainers make a row of each answer, all chosen ones first
            return found.repeat(times, 1)
        if (found == found[0]).all():  # several examples in one row
            return found[:1].expand(rows, -1)
        raise ValueError(
            f"{len(found)} examples with different subspaces were put into {rows} row(s), but a row has its subspaces "
            "as a whole. Train without packing and padding_free, or sort the examples so that those of a row agree."
        )

    def _with_locations(self, features: list[Any], *args: Any, **kwargs: Any) -> Any:
        given = [f.get(KEY) if isinstance(f, Mapping) else None for f in features]
        if any(locations is not None for locations in given):
            features = [{name: value for name, value in f.items() if name != KEY} for f in features]
            rows = [f.get("input_ids") for f in features]
            batch = self.inner_collator(features, *args, **kwargs)
            batch[KEY] = pad_locations(given, rows, batch.get("input_ids"))
            return batch
        batch = self.inner_collator(features, *args, **kwargs)
        if KEY not in batch:
            locations = self._locations(batch)
            if _same_for_kl_rows(locations, batch, self._locations):
                batch[KEY] = locations
        return batch

    def _locations(self, batch: Mapping[str, Any]) -> Tensor:
        ids = batch.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            raise ValueError(
                "ReftDataCollator needs a batch with `input_ids` as a tensor [B, S], but the wrapped collator gave "
                f"{sorted(batch)}{'' if ids is None else f' with input_ids={type(ids).__name__}'}."
            )
        mask = batch.get("attention_mask")
        rows, columns = ids.shape
        read = valid_columns(mask, rows, columns, 0, ids.device)
        if read is None:
            raise ValueError(UNREADABLE_MASK.format(mask=describe(mask), rows=rows, columns=columns))
        valid, shown = read
        starts, num_documents = document_starts(
            valid, batch.get("position_ids"), batch.get("seq_idx"), batch.get("cu_seq_lens_q")
        )
        starts = shown if starts is None else starts
        if starts is not None:
            counts = (starts & valid).sum(1)
            starts, num_documents = (starts, int(counts.max())) if counts.max() > 1 else (None, None)
        tokens = Tokens(valid, self._labels(batch), starts, num_documents, ids)
        tokenizer = getattr(self.inner_collator, "tokenizer", None)
        needed = tokens.labels is None or bool(tokens.labels_cover_prompts().any())
        marker = prompt_end_ids(self.config, tokenizer) if needed else ()
        spec = parse_positions(self.config.positions)
        if self.config.turns is None and spec.depends_on_the_end and tokens.labels_show_later_prompts(marker):
            warnings.warn(SEVERAL_ANSWERS.format(positions=spec), stacklevel=4)
        prompts = tokens.prompts(self.config.turns, marker)
        if prompts.document is not None and prompts.num_documents is None:  # several turns of one document
            prompts = prompts._replace(num_documents=int(prompts.document.max()) + 1)
        return locate(spec, prompts, self.config.share_weights)

    def _labels(self, batch: Mapping[str, Any]) -> Tensor | None:
        """Labels that tell where the prompt ends: those of a causal language model."""
        causal = self.config.task_type in (None, TaskType.CAUSAL_LM)
        if not causal or getattr(self.inner_collator, "mlm", False) or "decoder_input_ids" in batch:
            return None
        labels, shift_labels = batch.get("labels"), batch.get("shift_labels")
        shape = batch["input_ids"].shape
        if isinstance(labels, Tensor) and labels.shape == shape:
            return labels
        if isinstance(shift_labels, Tensor) and shift_labels.shape == shape:
            return align_shift_labels(shift_labels)
        completion_mask = batch.get("completion_mask")  # of which TRL's preference trainers make the labels
        if isinstance(completion_mask, Tensor) and completion_mask.shape == shape:
            return batch["input_ids"].masked_fill(completion_mask == 0, IGNORED)
        if self.config.task_type == TaskType.CAUSAL_LM and isinstance(labels, Tensor) and labels.dim() == 2:
            raise ValueError(UNALIGNED_LABELS.format(labels=list(labels.shape), rows=shape[0], columns=shape[1]))
        return None

    # Standing in for the wrapped collator.

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        inner = type(self.inner_collator)
        return inner if isinstance(inner, type) and inner.__module__ != "builtins" else type(self)

    def __getattr__(self, name: str) -> Any:
        if name in ("inner_collator", "config") or name.startswith("__"):  # not there yet while unpickling
            raise AttributeError(name)
        return getattr(self.inner_collator, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("inner_collator", "config"):
            self.__dict__[name] = value
        else:
            setattr(self.inner_collator, name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return ReftDataCollator, (self.inner_collator, self.config)

    def __repr__(self) -> str:
        return f"ReftDataCollator({self.inner_collator!r}, positions={self.config.positions!r})"


def _same_for_kl_rows(locations: Tensor, batch: Mapping[str, Any], find: Callable[[Mapping[str, Any]], Tensor]) -> bool:
    """Whether a batch's locations also hold for the second set of rows that TRL's KTO trainer makes of it, if any.

    That trainer passes the same locations to both. It passes labels too, which tell the prompts where locations cannot.
    """
    second = {name.removeprefix(KL): value for name, value in batch.items() if name.startswith(KL)}
    return "input_ids" not in second or torch.equal(locations, find(second))


def pad_locations(given: list[Any], rows: list[Any], padded: Any) -> Tensor:
    """Locations of several examples as those of their batch.

    Args:
        given: of each example, [P] or [G, P] each, or None.
        rows: the token ids of each example, or None.
        padded: the token ids of the batch [B, S]; None if it has none.

    Returns:
        Long [B, G, P] padded with -1, moved by the columns that were put in front of an example.
    """
    tensors = [torch.as_tensor([] if one is None else one, dtype=torch.long) for one in given]
    tensors = [tensor.reshape(-1, tensor.shape[-1]) if tensor.numel() else tensor.new_empty(0, 0) for tensor in tensors]
    found = torch.full((len(given), max(t.shape[0] for t in tensors), max(t.shape[1] for t in tensors)), -1)
    for row, tensor in zip(found, tensors):
        row[: tensor.shape[0], : tensor.shape[1]] = tensor
    if isinstance(padded, Tensor) and padded.dim() == 2 and len(padded) == len(rows):
        for locations, own, whole in zip(found, rows, padded.tolist()):
            own = [] if own is None else list(map(int, own))
            more = len(whole) - len(own)
            if own and more > 0 and whole[: len(own)] != own and whole[more:] == own:
                locations[locations >= 0] += more
    return found
