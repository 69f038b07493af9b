"""What one call of a model edits: the `ForwardContext` that an entry opens and the blocks' entries ask.

Shape letters: B rows, S columns, G position groups, P places per group, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_reft.context.arguments import repeats
from peft_reft.context.edit import Edit
from peft_reft.context.generate import Step
from peft_reft.context.kept import kept_families
from peft_reft.context.passed import NOTHING, Passed
from peft_reft.context.plan import Family, families_of
from peft_reft.context.sources import Collected, Collector, Exchange
from peft_reft.context.state import ModelState, names_of_rows
from peft_reft.context.subspaces import Choices, repeated
from peft_reft.positions import Places, PositionSpec, Prompts, Tokens, find_prompts, places_of

EACH_IMAGE = "the vectors of each image or sound"


class Given(NamedTuple):
    """What was passed to the outermost call, for the entries below it.

    Attributes:
        labels, shift_labels: as passed.
        labels_show_prompts: the labels were passed to a module that predicts tokens with them.
        passed: our own arguments.
        collecting: where this call, the forward of a source, notes its hidden states down.
        step: which step of a running `generate` the call is, if it is one.
        in_generate: the call was made while `generate` runs.
        moved_mask: the encoder's attention mask, where nothing was passed for the decoder, whose ids the model then
            makes of the encoder's.
    """

    labels: Any = None
    shift_labels: Any = None
    labels_show_prompts: bool = False
    passed: Passed = NOTHING
    collecting: Collected | None = None
    step: Step | None = None
    in_generate: bool = False
    moved_mask: Any = None


@dataclass(eq=False)
class ForwardContext:
    """One sequence of tokens on its way through a stack of blocks.

    Attributes:
        state: shared by all calls of the model.
        layers: the layers next to the blocks that this call may run.
        given: what the caller passed.
        role, depth: of the entry that opened it (see entry.py).
        rows, columns: the shape of the batch of tokens; None if the call has no tokens (images, plain tensors).
        idle: nothing in this forward is edited.
        prompts_of: where the prompts of a spec lie; None if the hidden state's shape has to tell.
        locations: columns to edit, [B, G, P]; they win.
        start: the column of the row with which this forward begins, where `prompts_of` or `locations` are of the whole
            row; None where they are of this forward's columns.
        answers_only: there are generated tokens only.
        tokens: what is known of the tokens, where `prompts_of` takes it from them.
        mask: their attention mask as it was passed.
        passed: the tensors of whole numbers that the call was passed, in lists and dicts too.
        own_ids_ran_at: depth of the deepest module that has run the call's own ids; -1 before any.
        changed_ids: ids, with the depth of their module, of calls whose ids were taken for the call's own in another
            form; depth -1 if they brought labels and a mask of their own.
        training: whether the model is in training mode.
        device: of the hidden states, where no tokens tell it.
        inputs: how many images or sounds a tower is given; None for a call of another kind.
    """

    state: ModelState
    layers: Sequence[Any]
    given: Given
    role: str = ""
    depth: int = 0
    rows: int | None = None
    columns: int | None = None
    idle: bool = False
    prompts_of: Callable[[PositionSpec], Prompts] | None = None
    locations: Tensor | None = None
    start: int | Tensor | None = None
    answers_only: bool = False
    tokens: Tokens | None = None
    mask: Any = None
    passed: Sequence[Tensor] = ()
    own_ids_ran_at: int = -1
    changed_ids: list[tuple[Tensor, int]] = field(default_factory=list)
    training: bool = False
    device: torch.device | None = None
    inputs: int | None = None
    _edits: list[Edit] | None = None
    _latest: list[Edit] | None = None
    _others: dict[Any, ForwardContext] = field(default_factory=dict)

    def edits_of(self, layer: Any, h: Tensor) -> Sequence[Edit]:
        """The edits of the call, among them those next to this layer, of the hidden state `h` [B, S, d].

        Raises:
            ValueError: if `h` does not hold one vector, as wide as the layer's, for each of the call's tokens.
        """
        if self.columns is None:
            if self.inputs is not None and h.shape[0] < self.inputs:
                layer.refuse_to_count(EACH_IMAGE, h.shape)
            return self._of_shape(h).edits_of(layer, h)
        edits = self._edits
        if edits is None:  # the first hidden state of a shape that only blocks know, or a block that is run again
            if torch.is_grad_enabled():
                # By itself: a checkpoint that runs the block again does the same work, and a reentrant one has a
                # backward pass of its own, which must not run into a graph that all blocks share.
                edits = self._latest = self._plan([layer])
            else:
                edits = self._edits = self._plan(self.layers)
        if edits and h.shape != (self.rows, self.columns, layer.width):
            self._refuse(layer, h)
        return edits

    def _refuse(self, layer: Any, h: Tensor) -> NoReturn:
        """Raise for a hidden state of another shape than the call's tokens and the layer's width give."""
        if h.shape[:2] == (self.rows, self.columns):
            raise ValueError(
                f"A block returned vectors of width {h.shape[-1]}, but its ReFT adapter was made for width "
                f"{layer.width}. Exclude that block with exclude_modules, or target other modules."
            )
        names = sorted({str(spec) for spec in layer.position_specs.values()})
        raise ValueError(
            f"A block returned hidden states of shape {tuple(h.shape)} for a batch of {self.rows} rows and "
            f"{self.columns} columns of tokens, so that positions={names[0]!r} cannot be placed in them. Exclude "
            "that block (exclude_modules=...), or target modules that keep one vector per token."
        )

    def prepare(self) -> None:
        """Work out the edits of all layers, before a block runs: not within a checkpoint, which would do it again."""
        if self.columns is not None and not self.idle:
            self._edits = self._plan(self.layers)

    def _plan(self, layers: Sequence[Any]) -> list[Any]:
        assert self.rows is not None and self.columns is not None
        names = self.adapters_of_rows(self.rows)
        if torch.compiler.is_compiling() or not any(layer is layers[0] for layer in self.state.layers):
            # Not kept: they would be part of the graph; or the layers are a replica's, made for this call alone.
            families = families_of(layers, None if names is None else list(dict.fromkeys(names)))
        else:
            families = kept_families(self.state.plans, layers, names)
        choices = self.given.passed.subspaces
        if choices is not None:
            choices = repeated(choices, self.rows, self.given.in_generate)
        edits: list[Any] = []
        for family in families:
            rows = family.rows_in(names)
            if rows == []:
                continue
            if family.takes_source:
                edits += self._exchanges(family, rows, choices)
            elif self.given.collecting is None:  # the forward of a source is not edited
                places = self._places(family.spec, family.share_weights)
                if places is not None:
                    edits.append(family.edit(places, (self.rows, self.columns), names, rows, self.training, choices))
        return edits

    def _exchanges(self, family: Family, rows: list[int] | None, choices: Choices | None) -> list[Any]:
        """What stands for the edit of a family that takes a source; nothing without a source, or without a place."""
        sources, collecting = self.given.passed.sources, self.given.collecting
        if sources is None and collecting is None:
            return []
        whole = None if self.answers_only else self._whole_places(family.spec, family.share_weights)
        if whole is None:
            return []
        whole = whole.listed()  # the k-th place takes what the source has at its k-th place
        places = self._window(whole)
        own = range(len(places.keep)) if rows is None else rows
        if collecting is not None:
            return [Collector(family, places, own, collecting)]
        assert sources is not None
        return [Exchange(family, places, whole.keep, own, sources, choices)]

    def places(self, spec: PositionSpec, share_weights: bool | str, h: Tensor) -> Places | None:
        """Where this call edits the hidden state `h` [B, S, d] by a spec; None for nowhere."""
        if self.idle:
            return None
        context = self._of_shape(h) if self.columns is None else self
        found = context._places(spec, share_weights)
        return None if found is None else found.to(h.device)

    def _places(self, spec: PositionSpec, share_weights: bool | str) -> Places | None:
        """Where to edit, by a spec, in columns of this forward; None for nowhere."""
        whole = self._whole_places(spec, share_weights)
        return None if whole is None else self._window(whole)

    def _window(self, whole: Places) -> Places:
        """Of places of the whole row, those in columns of this forward."""
        assert self.columns is not None
        return whole if self.start is None else whole.window(self.start, self.columns)

    def _whole_places(self, spec: PositionSpec, share_weights: bool | str) -> Places | None:
        """Where to edit, by a spec, in columns of the whole row if there is a `start`; None for nowhere."""
        if self.answers_only and not spec.edits_answers:
            return None
        if self.locations is not None:
            places = _places_given(spec, share_weights, self.locations)
        elif self.prompts_of is not None:
            places = places_of(spec, self.prompts_of(spec), share_weights)
        else:
            assert self.rows is not None and self.columns is not None
            valid = torch.ones(self.rows, self.columns, dtype=torch.bool, device=self.device)
            places = places_of(spec, find_prompts(valid), share_weights)
        return places if places.keep.shape[-1] else None

    def adapters_of_rows(self, rows: int) -> list[str] | None:
        """The adapter of each of `rows` rows, which may be the given ones each several times; None if not by row."""
        names = self.given.passed.adapter_names
        if names is None or len(names) == rows:
            return names
        times = repeats(len(names), rows)
        if times is None or not self.given.in_generate:
            raise ValueError(names_of_rows(len(names), rows))
        return [name for name in names for _ in range(times)]

    def edits_something(self) -> bool:
        """Whether some token was edited. Waits for the device."""
        contexts = [self, *self._others.values()]
        edits = [edit for context in contexts for edit in context._edits or context._latest or ()]
        return any(edit.keep is None or edit.keep.is_meta or bool((edit.keep != 0).any()) for edit in edits)

    # Hidden states that are not those of the call's tokens.

    def _of_shape(self, h: Tensor) -> ForwardContext:
        """This context for hidden states [B, S, d] of a call without tokens."""
        rows, columns = h.shape[:2]
        return self._other((rows, columns), rows=rows, columns=columns, device=h.device)

    def of_vectors(self, pool: int, columns: int) -> ForwardContext:
        """This context for blocks whose vectors are not those of single tokens.

        Args:
            pool: how many tokens a vector stands for, from the left; below 0 if the vectors are no tokens' at all.
            columns: how many vectors there are in a row.

        Raises:
            ValueError: if columns of tokens are given, which these blocks have not.
        """
        if self.columns is None:
            return self
        if self.locations is not None:
            raise ValueError(
                "intervention_locations name columns of tokens, but this model has blocks that return fewer vectors "
                f"than tokens ({columns} for {self.columns}). Leave them out, or target other modules."
            )
        whole, start, count = self.prompts_of, self.start, self.columns
        if whole is None or pool < 0:
            return self._other((pool, columns), columns=columns, prompts_of=None, start=None)

        def prompts_of(spec: PositionSpec) -> Prompts:
            inside = whole(spec).inside
            inside = inside if start is None else inside[:, start : start + count]
            return pooled(inside, pool, columns)

        return self._other((pool, columns), columns=columns, prompts_of=prompts_of, start=None)

    def _other(self, key: tuple[int, int], **changes: Any) -> ForwardContext:
        if key not in self._others:
            self._others[key] = self.anew(**changes)
        return self._others[key]

    def anew(self, **changes: Any) -> ForwardContext:
        """This context without its edits, for other hidden states or a checkpoint's second run: see `edits_of`."""
        return replace(self, **changes, _edits=None, _others={})


def _places_given(spec: PositionSpec, share_weights: bool | str, locations: Tensor) -> Places:
    if share_weights is True:
        locations = locations.flatten(1).unsqueeze(1)
    elif locations.shape[1] != (groups := spec.num_interventions(share_weights)):
        raise ValueError(
            f"intervention_locations of shape {tuple(locations.shape)} cannot be split over the {groups} "
            f"groups of positions={str(spec)!r} with share_weights={share_weights!r}; pass [B, {groups}, P]."
        )
    return Places(locations, locations >= 0)


def pooled(inside: Tensor, pool: int, columns: int) -> Prompts:
    """The prompts among vectors that stand for `pool` tokens each, `columns` of them.

    Args:
        inside: bool [B, S], the tokens of prompts.
    """
    padded = F.pad(inside.float().unsqueeze(1), (0, max(0, pool * columns - inside.shape[1])))
    return find_prompts(F.max_pool1d(padded, pool)[:, 0, :columns] > 0)
