"""A frozen backbone whose edits are inputs: one graph for every adapter of every equation, rank, blocks and positions.

Every block's output h [B, S, d] becomes

    h + ((h downᵀ + bias) · mask) up

summed over the position groups. All built-in equations without an activation have this form (`adapter_tensors`), blocks
that an adapter leaves alone have zeros, the mask's value is the strength, and a decode step is the same graph with a
mask of zeros. No gather, no scatter, no factorisation: what every runtime has.

Shape letters: B rows, S columns of this forward, L blocks, G position groups, r rank, d hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from peft_reft.blocks import edit_hidden_state
from peft_reft.context.forward import ForwardContext, Given
from peft_reft.export.caches import LayerCache, cache_argument, cache_of, cache_shape, empty_past, tensors_of
from peft_reft.export.masks import refuse_other_prompts
from peft_reft.export.models import base_of, blocks_of_model, is_decoder, logits_of_tokens, refuse_other_rows
from peft_reft.export.tensors import refuse_sources, weights_of_its_own
from peft_reft.interventions import edit_of, low_rank_edit, stack_factors
from peft_reft.interventions.batched import kind_of
from peft_reft.tuner.adapters import get_interventions
from peft_reft.tuner.injection import reft_layers, state_of

Edit = Callable[[int, Tensor], Tensor]  # the number of a block and its output -> what is added to that


class Backbone(nn.Module):
    """A causal language model, run with an edit of each block's output that is passed in.

    Attributes:
        model: the causal language model.
        blocks: module names of its L blocks, in their order.
        width: d.
        vocabulary: logits of a token.
        cache: what its layers keep, None without a cache.
    """

    def __init__(
        self, model: nn.Module, blocks: list[str], width: int, vocabulary: int, cache: list[LayerCache] | None
    ):
        super().__init__()
        self.model = model
        self.blocks = blocks
        self.width = width
        self.vocabulary = vocabulary
        self.cache = cache
        self.cache_argument = "" if cache is None else cache_argument(model)
        self.takes_positions = "position_ids" in inspect.signature(type(model).forward).parameters

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's weights, and so of its cache."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    def empty_past(self, rows: int = 1, columns: int = 0) -> list[Tensor]:
        """Keys and values of `columns` earlier columns, all zero: none for the first forward of a row."""
        return empty_past(self.cache, self.dtype, rows, columns)

    def run(
        self, input_ids: Tensor, attention_mask: Tensor, edit: Edit, past: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """Logits [B, S, vocabulary] in float32, and each layer's keys and values with those of this forward."""
        arguments: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self.takes_positions:  # counted over tokens, as `generate` does, so that padding may be on any side
            numbers = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            columns = torch.arange(input_ids.shape[1], device=input_ids.device)
            # Selected, not sliced: whether a slice is the whole of it would decide between two graphs.
            past_columns = attention_mask.shape[1] - input_ids.shape[1]
            arguments["position_ids"] = numbers.index_select(1, columns + past_columns)
        if self.cache is None:
            with edited(self.model, self.blocks, edit):
                return (self.model(**arguments, use_cache=False).logits.float(),)
        cache = cache_of(self.cache, past)
        with edited(self.model, self.blocks, edit):
            logits = self.model(**arguments, **{self.cache_argument: cache}, use_cache=True).logits
        return logits.float(), *tensors_of(self.cache, cache)


class EditableBackbone(Backbone):
    """A backbone that takes an adapter's tensors; made by `exportable`."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        edit_mask: Tensor,
        down: Tensor,
        bias: Tensor,
        up: Tensor,
        *past: Tensor,
    ) -> tuple[Tensor, ...]:
        """One forward.

        Args:
            input_ids: [B, S].
            attention_mask: [B, past + S], of the whole row.
            edit_mask: [B, S, G], see `edit_mask`. Where the adapter has one group, the mask may have several.
            down: [L, G, r, d], see `adapter_tensors`.
            bias: [L, G, r].
            up: [L, G, r, d].
            past: with a cache, key and value of each layer in turn, [B, heads, past, width].

        Returns:
            Logits [B, S, vocabulary]; with a cache, then the next forward's `past`.

        Raises:
            ValueError: for a mask of other rows or columns than the token ids, which torch would stretch over them.
        """
        check_mask(edit_mask, input_ids)
        if not torch.compiler.is_compiling() and down.shape[1] not in (1, edit_mask.shape[-1]):
            raise ValueError(
                f"edit_mask has {edit_mask.shape[-1]} group(s), but the adapter {down.shape[1]}: make it with the "
                "positions and the share_weights of the adapter."
            )
        if down.shape[1] == 1 and edit_mask.shape[-1] != 1:
            edit_mask = edit_mask.sum(-1, keepdim=True)  # one intervention for all groups, which have no token twice

        # All groups' directions one under the other, [L, G * r, d], so that an edit is two products of matrices.
        keep = edit_mask.unsqueeze(-1).expand(*edit_mask.shape, down.shape[2]).flatten(2)
        downs, biases, ups = down.flatten(1, 2).mT, bias.flatten(1), up.flatten(1, 2)

        def edit(number: int, h: Tensor) -> Tensor:
            return ((h.to(down.dtype) @ downs[number] + biases[number]) * keep) @ ups[number]

        return self.run(input_ids, attention_mask, edit, past)


class BakedBackbone(Backbone):
    """A backbone with one adapter inside, for interventions that are no tensors: with `act_fn`, or of one's own.

    Attributes:
        positions, share_weights: of the adapter.
        groups: position groups of its mask.
    """

    def __init__(
        self,
        editable: Backbone,
        interventions: dict[str, nn.ModuleList],
        positions: str,
        share_weights: bool | str,
    ):
        super().__init__(editable.model, editable.blocks, editable.width, editable.vocabulary, editable.cache)
        self.positions = positions
        self.share_weights = share_weights
        self.groups = len(next(iter(interventions.values())))
        self.edits: dict[int, list[Callable[[Tensor], Tensor]]] = {}
        for block, groups in interventions.items():
            self.edits[self.blocks.index(block)] = [_constant(intervention) for intervention in groups]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, edit_mask: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        """As `EditableBackbone.forward`, without the adapter's tensors."""
        check_mask(edit_mask, input_ids)

        def edit(number: int, h: Tensor) -> Tensor:
            groups = self.edits.get(number, [])
            mask = edit_mask.sum(-1, keepdim=True) if len(groups) == 1 else edit_mask
            # Chosen, not multiplied: a module of one's own may return anything for a vector that it is not meant for.
            edits = [
                torch.where(mask[..., g : g + 1] != 0, group(h) * mask[..., g : g + 1], 0.0)
                for g, group in enumerate(groups)
            ]
            return torch.stack(edits).sum(0) if edits else torch.zeros_like(h)

        return self.run(input_ids, attention_mask, edit, past)


def check_mask(edit_mask: Tensor, input_ids: Tensor) -> None:
    """Refuse a mask that is not one of the token ids of this forward."""
    if edit_mask.dim() != 3 or edit_mask.shape[:2] != input_ids.shape:
        raise ValueError(
            f"edit_mask has the shape {tuple(edit_mask.shape)} for token ids {tuple(input_ids.shape)}; it must be "
            "[rows, columns, groups] of the columns of this forward, in a decode step the last one."
        )


def _constant(intervention: nn.Module) -> Callable[[Tensor], Tensor]:
    """The edit of an intervention, in its own precision, with all that does not depend on h worked out before.

    A graph of LoReFT so has no Cholesky factorisation, which ONNX lacks.
    """
    dtype = next((p.dtype for p in intervention.parameters()), torch.float32)
    if kind_of(intervention) is None:
        return lambda h: edit_of(intervention, h.to(dtype))
    with torch.no_grad():
        factors = stack_factors([intervention]).map(lambda part: part[0])  # type: ignore[list-item]
    return lambda h: low_rank_edit(h.flatten(0, 1).to(dtype), factors).expand(h[..., 0].numel(), -1).view(h.shape)


@contextmanager
def unedited(model: nn.Module) -> Iterator[None]:
    """The model's own ReFT adapters change nothing within it."""
    state = state_of(model)
    if state is None:
        yield
        return
    outer, state.running.context = state.running.context, ForwardContext(state, (), Given(), depth=-1, idle=True)
    try:
        yield
    finally:
        state.running.context = outer


@contextmanager
def edited(model: nn.Module, blocks: list[str], edit: Edit) -> Iterator[None]:
    """Blocks return edited hidden states within it, whose vectors are [B, S, d]; the model's own ReFT adapters rest."""
    with unedited(model), ExitStack() as stack:
        for number, name in enumerate(blocks):

            def hook(block: nn.Module, args: Any, output: Any, number: int = number) -> Any:
                return edit_hidden_state(output, lambda h: h + edit(number, h).to(h.dtype))

            stack.callback(model.get_submodule(name).register_forward_hook(hook, prepend=True).remove)
        yield


def exportable(model_or_base: nn.Module, cache: bool = True, baked: str | None = None) -> Backbone:
    """A causal language model as a module that torch.export and its followers take, with edits as inputs.

    Args:
        model_or_base: the model, or a `PeftModel` around it, whose own ReFT adapters then take no part (others do).
            Its weights keep their precision, which is that of the file.
        cache: whether it takes and returns keys and values; without, every forward runs the whole row.
        baked: the name of one of the model's ReFT adapters that becomes part of the graph, for interventions that
            `adapter_tensors` refuses. The graph then serves this adapter alone, as it was trained: what `set_strength`
            and `set_subspaces` say takes no part.

    Returns:
        A module whose forward is that of `EditableBackbone`, or of `BakedBackbone`: without `down`, `bias` and `up`.
        The model is used, not copied; it stays as it was, but for training mode, which is switched off.

    Raises:
        ValueError: if the model is no decoder-only causal language model whose blocks and cache have the usual form,
            or one of its ReFT adapters changes the base model's weights, too.
    """
    model = base_of(model_or_base)
    if not is_decoder(model):
        raise ValueError(
            f"{type(model).__name__} is no decoder-only causal language model of transformers; pass one, such as "
            "AutoModelForCausalLM makes."
        )
    _refuse_changed_weights(model_or_base, baked)
    model.eval()
    with unedited(model):
        vocabulary = logits_of_tokens(model)
        refuse_other_rows(model)
        blocks, width = blocks_of_model(model)
        shape = cache_shape(model) if cache else None
    editable = EditableBackbone(model, blocks, width, vocabulary, shape).eval()
    if baked is None:
        return editable
    interventions = get_interventions(model_or_base, baked)
    refuse_sources(baked, [one for groups in interventions.values() for one in groups])
    others = sorted(interventions.keys() - set(blocks))
    if others:
        raise ValueError(f"The adapter {baked!r} edits {others[0]!r}, which is none of the model's blocks.")
    layer = next(iter(reft_layers(model).values()))
    spec = layer.position_specs[baked]
    refuse_other_prompts(baked, spec)
    return BakedBackbone(editable, interventions, str(spec), layer.share_weights[baked]).eval()


def _refuse_changed_weights(model: nn.Module, baked: str | None) -> None:
    """Refuse a model in which weights of a ReFT adapter stand in for those of the base model.

    Raises:
        ValueError: for `modules_to_save` and `trainable_token_indices` of an active adapter that is not the baked one,
            or of a baked one that is not active.
    """
    active = getattr(model, "active_adapters", []) if isinstance(model, PeftModel) else []
    for name, config in getattr(model, "peft_config", {}).items():
        own = weights_of_its_own(config) if config.peft_type == "REFT" else []
        if own and (name in active) != (name == baked):
            inside = name in active
            what = "would become part of the backbone" if inside else "the model does not use now"
            way_out = "Export the base model itself" if inside else f"Call set_adapter({name!r}) first"
            raise ValueError(
                f"The adapter {name!r} has {own[0]}, weights that {what}. {way_out}, or train without {own[0]}."
            )
