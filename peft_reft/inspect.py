"""Looking at what an adapter does to the tokens of some prompts: `inspect_adapter`, `python -m peft_reft inspect DIR`.

Two questions are answered, by running the model as it is:

- How far does each block's edit move each token? One forward, in which every block's own output h and its edit Δh
  are noted down at every token.
- Which blocks make the answer what it is? One more forward per block, in which that block alone does not edit.

The model is left as it was found. What an adapter is by its saved files alone is told by info.py; the picture is drawn
by heatmap.py.

Shape letters: B rows, S columns, G position groups, d width, V classes (of the vocabulary, or of a classifier).
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from peft_reft.attach import reft_layers, roles_of
from peft_reft.frame import Frame
from peft_reft.host import Host
from peft_reft.info import AUTO_CLASSES, read_config
from peft_reft.interventions import edit_of
from peft_reft.layer import ReftLayer
from peft_reft.numbering import block_number
from peft_reft.sites import Sites

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAN = float("nan")
Row = dict[str, Any]


@dataclass
class Inspection:
    """What `inspect_adapter` found. Every table is a list of dicts with the same keys, as `pandas.DataFrame` takes it.

    Attributes:
        edits: a row for each prompt, block, adapter and token without padding. Its keys:

            - prompt, block, depth, adapter: number of the prompt, name and number of the block, name of the adapter.
              Several active adapters have a row each, and one for their sum, under their names joined by "+".
            - stack: "encoder" or "decoder", "" in other models; call: 0, or the how-many-eth call of a block that runs
              several times.
            - position, column: number of the token without and with padding, both from 0.
            - token, token_id: its text, and its id (-1 where the model is given no ids).
            - part: "prompt" or "answer".
            - edited: whether the adapter edits that token in that block. If not, the numbers below are 0 or NaN.
            - term: the term of `positions` by which it is edited, such as "l1"; "" for given locations and sums.
            - h_norm: ‖h‖, of the block's own output before the edit. edit_norm: ‖Δh‖.
            - relative: ‖Δh‖ / ‖h‖.
            - turn: the angle between h and h + Δh.
            - angle_before, angle_after, edit_angle: the angle of h, of h + Δh and of Δh to the edited subspace.

            Angles are in degrees. The angle of a vector v to a subspace with the orthogonal projection P is
            arccos(‖Pv‖ / ‖v‖): 0 in it, 90 at right angles to it. The subspace is the row space of the intervention's
            `subspace` (R, or W2 where it is free). The built-in interventions write into it alone, so that
            `edit_angle` is 0; it says something about interventions of your own. The angle of h, before and after,
            says how much of the state the subspace held and holds: a random direction of d numbers has
            arccos(√(r / d)), which is close to 90.
        effects: a row for each prompt and block: what the prediction loses if that block alone does not edit.

            - prompt, block, depth
            - tv: total variation ½ Σ|p − q| between the prediction p of the whole adapter and q without that block,
              between 0 and 1. kl: KL(p ‖ q) in nats.
            - tv_share, kl_share: the same as a part of what is lost when no block edits (NaN if nothing is). Shares
              need not add up to 1: later blocks can make up for what an earlier one did not do, or build on it.
            - logits: root mean square of the change of the logits.
        totals: a row for each prompt: tv, kl and logits of the whole adapter against no edit in any block, and the
            most likely class (`top`, `top_unedited`) with and without, as a token where classes are tokens.
        adapters: the adapters that were active.
    """

    edits: list[Row] = field(default_factory=list)
    effects: list[Row] = field(default_factory=list)
    totals: list[Row] = field(default_factory=list)
    adapters: list[str] = field(default_factory=list)

    def to_pandas(self, table: str = "edits") -> Any:
        """A table ("edits", "effects" or "totals") as a `pandas.DataFrame`; needs pandas."""
        import pandas  # type: ignore[import-untyped,unused-ignore]

        return pandas.DataFrame(self._table(table))

    def to_csv(self, path: str | Path, table: str = "edits") -> None:
        """Write a table to a file; NaN becomes an empty cell."""
        rows = self._table(table)
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]) if rows else [])
            writer.writeheader()
            for row in rows:
                writer.writerow({key: "" if value != value else value for key, value in row.items()})

    def plot(self, path: str | Path | None = None, value: str = "relative", **settings: Any) -> Figure:
        """A heat map of blocks and tokens, with a bar per block for its effect; needs matplotlib.

        Args:
            path: where to save it, in the format of the name's ending; None for not at all.
            value: the number to show, a key of `edits`: "relative", "edit_norm", "turn", "angle_before", ...
            settings: of `peft_reft.heatmap.draw`.
        """
        from peft_reft.heatmap import draw

        figure = draw(self, value, **settings)
        if path is not None:
            figure.savefig(path)
        return figure

    def _table(self, name: str) -> list[Row]:
        if name not in ("edits", "effects", "totals"):
            raise ValueError(f"table={name!r} is not one of 'edits', 'effects' and 'totals'.")
        rows: list[Row] = getattr(self, name)
        return rows


@dataclass
class Batch:
    """Inputs of one forward, and what their columns are.

    Attributes:
        inputs: as the model takes them.
        first: number of the first prompt in it.
        stacks: by stack ("", or "encoder" and "decoder"): ids [B, S] or None, and which columns are no padding [B, S].
        answers: by stack: which columns belong to an answer [B, S].
    """

    inputs: dict[str, Any]
    first: int
    stacks: dict[str, tuple[Tensor | None, Tensor]]
    answers: dict[str, Tensor]


class Spy:
    """Stands in for one layer's `edit`: notes down what it does, or leaves it out."""

    def __init__(self, layer: ReftLayer, notes: list[Row]):
        self.layer = layer
        self.notes = notes
        self.noting = False
        self.skipping = False
        self.calls = 0

    def __call__(self, h: Tensor, frame: Frame | None, *more: Any, **named: Any) -> Tensor:
        if self.skipping:
            return h
        if self.noting:
            self.noting = False  # an edit of a tensor in another shape calls itself
            self.notes.append(note_edits(self.layer, h, frame) | {"call": self.calls})
            self.calls += 1
            out = type(self.layer).edit(self.layer, h, frame, *more, **named)
            self.noting = True
            return out
        return type(self.layer).edit(self.layer, h, frame, *more, **named)


@torch.no_grad()
def inspect_adapter(
    model: nn.Module,
    prompts: str | Sequence[str] | Mapping[str, Any],
    tokenizer: Any = None,
    *,
    answers: str | Sequence[str] | None = None,
    effects: bool = True,
    batch_size: int = 8,
) -> Inspection:
    """How far the active adapters move each token of some prompts, and what each block's edits are worth.

    Args:
        model: a `PeftModel`, or a model that adapters were injected into.
        prompts: one or several texts; or a batch as the model takes it, of tensors (with `intervention_locations`, for
            instance, or without any tokens). Texts are encoded as they are: apply a chat template before.
        tokenizer: encodes texts, and gives the tokens their names; None with a batch shows ids.
        answers: for causal and encoder-decoder language models, an answer to each prompt. It is fed behind the prompt
            as in training, so that the terms `d` and `dK` of `positions`, which edit generated tokens, are seen too.
        effects: also run the model once without each block's edits, and once without any.
        batch_size: how many texts are run at once.

    The prediction whose change is measured is that of the token behind the prompt (or the mean over the answer's
    tokens, if there are answers or labels); of a masked language model at its mask tokens, or at all tokens if there
    are none; of a classifier over its classes. A model whose output has no `logits` has no effects, and one with a
    single logit has no probabilities: there `tv` and `kl` are NaN and `logits` tells the change of the score.

    The model runs in eval mode without gradients. Its modes, hooks, strengths and active adapters are as they were when
    the function returns or fails. Norms and angles are worked out in double precision.

    Raises:
        ValueError: if no ReFT adapter is active, or the prompts are not what is described above.
    """
    base = base_of(model)
    layers = {
        name: layer
        for name, layer in reft_layers(base).items()
        if not layer.disable_adapters and any(adapter in layer.reft_interventions for adapter in layer.active_adapters)
    }
    if not layers:
        raise ValueError(
            "No ReFT adapter is active in this model, so there is nothing to inspect. Call set_adapter first."
        )
    names = dict.fromkeys(name for layer in layers.values() for name in layer.active_adapters)
    adapters = [name for name in names if any(name in layer.reft_interventions for layer in layers.values())]
    result = Inspection(adapters=adapters)
    roles = roles_of(base)
    stack_of = {name: roles.get(base.get_submodule(name), "") for name in layers}
    notes: list[Row] = []
    with observed(model, layers, notes) as spies:
        for batch in batches(base, prompts, tokenizer, answers, batch_size):
            notes.clear()
            predictions = Predictions.of(model, base, batch, tokenizer, spies)
            for noted in notes:
                result.edits += edit_rows(noted, batch, stack_of[noted["block"]], tokenizer)
            if effects and predictions is not None:
                result.effects += predictions.effects(model, batch, spies)
                result.totals += predictions.totals(batch, tokenizer)
    result.edits.sort(key=lambda row: row["prompt"])
    result.effects.sort(key=lambda row: row["prompt"])
    return result


def base_of(model: nn.Module) -> Any:
    """The model of transformers (or any other) below PEFT's."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return base.model if isinstance(base, BaseTuner) else base


@contextmanager
def observed(model: nn.Module, layers: Mapping[str, ReftLayer], notes: list[Row]) -> Iterator[dict[str, Spy]]:
    """Put a spy into each layer and the model into eval mode, and take both back again."""
    modes = [(module, module.training) for module in model.modules()]
    spies = {name: Spy(layer, notes) for name, layer in layers.items()}
    try:
        model.eval()
        for layer, spy in zip(layers.values(), spies.values()):
            layer.__dict__["edit"] = spy  # in front of the method, for this layer only
        yield spies
    finally:
        for layer in layers.values():
            layer.__dict__.pop("edit", None)
        for module, mode in modes:
            module.training = mode


def note_edits(layer: ReftLayer, h: Tensor, frame: Frame | None) -> Row:
    """What a layer's active adapters do to the vectors of `h`: lengths and angles, by adapter, in [B, S] each."""
    h = h if h.dim() == 3 else h.reshape(h.shape[0] if h.dim() > 1 else 1, -1, h.shape[-1])
    exact = torch.float32 if h.device.type == "mps" else torch.float64
    total = torch.zeros(h.shape, dtype=exact, device=h.device)
    touched = torch.zeros(h.shape[:2], dtype=torch.bool, device=h.device)
    measured: dict[str, dict[str, Any]] = {}
    for name in layer.active_adapters:
        if name not in layer.reft_interventions:
            continue
        marks = marks_of(layer, name, layer.share_weights[name], h, frame)
        interventions: Any = layer.reft_interventions[name]
        delta = torch.zeros_like(total)
        numbers = {key: torch.full(h.shape[:2], NAN, dtype=exact, device=h.device) for key in SUBSPACE}
        for group, intervention in enumerate(interventions):
            where = marks[:, group] > 0
            if not where.any():
                continue
            vectors = h[where]
            edit = edit_of(intervention, vectors).to(exact) * marks[:, group][where, None] * layer.scaling[name]
            delta[where] += edit
            angles = angles_to(getattr(intervention, "subspace", None), vectors.to(exact), edit)
            for key, angle in zip(SUBSPACE, angles):
                numbers[key][where] = angle
        edited = marks.amax(1) > 0
        measured[name] = {"edited": edited, **lengths(h.to(exact), delta, edited), **numbers}
        measured[name]["terms"] = terms_of(layer, name, h, frame)
        total += delta
        touched |= edited
    if len(measured) > 1:
        measured["+".join(measured)] = {"edited": touched, **lengths(h.to(exact), total, touched)}
    return {"layer": layer, "h_norm": h.to(exact).norm(dim=-1), "measured": measured}


SUBSPACE = ("angle_before", "angle_after", "edit_angle")
NUMBERS = ("edit_norm", "relative", "turn", *SUBSPACE)


def marks_of(layer: ReftLayer, name: str, share: bool | str, h: Tensor, frame: Frame | None) -> Tensor:
    """Which tokens of `h` [B, S, d] each of an adapter's groups edits: [B, G, S], 1 or 0."""
    spec = layer.position_specs[name]
    if (frame is None or frame.columns is None) and str(spec) == "all":
        return h.new_ones(h.shape[0], 1, h.shape[1], dtype=torch.float32)
    sites = None if frame is None else frame.sites(spec, share, h)
    if sites is None:
        return h.new_zeros(h.shape[0], spec.num_interventions(share), h.shape[1], dtype=torch.float32)
    return marks_at(sites, h.shape[1])


def marks_at(sites: Sites, columns: int) -> Tensor:
    """Sites as marks [B, G, S]."""
    keep = sites.keep.squeeze(-1)
    if sites.columns is None:
        return keep
    chosen = sites.columns.unflatten(1, keep.shape[1:])
    return keep.new_zeros(*keep.shape[:2], columns).scatter_add(2, chosen, keep)


def terms_of(layer: ReftLayer, name: str, h: Tensor, frame: Frame | None) -> list[tuple[str, Tensor]]:
    """The terms of an adapter's positions, each with the tokens it names [B, S]; none for given locations."""
    if frame is not None and frame.locations is not None:
        return []
    marks = marks_of(layer, name, False, h, frame)
    return [(str(term), marks[:, group] > 0) for group, term in enumerate(layer.position_specs[name].terms)]


def lengths(h: Tensor, delta: Tensor, edited: Tensor) -> dict[str, Tensor]:
    """Length of the edits of `h` [B, S, d], alone and beside h, and by how much they turn it; 0 where not edited."""
    edit_norm = torch.where(edited, delta.norm(dim=-1), 0)
    moved = h + delta
    u, v = (w / w.norm(dim=-1, keepdim=True) for w in (h, moved))
    turn = torch.rad2deg(2 * torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1)))  # exact for small angles, too
    return {
        "edit_norm": edit_norm,
        "relative": torch.where(edited, edit_norm / h.norm(dim=-1), 0),
        "turn": torch.where(edited, turn, 0),
    }


def angles_to(subspace: Any, h: Tensor, delta: Tensor) -> tuple[Any, Any, Any]:
    """The angles of h, h + Δh and Δh [n, d] to the row space of `subspace` [r, d], in degrees; NaN if there is none."""
    if not isinstance(subspace, Tensor) or subspace.dim() != 2 or subspace.shape[-1] != h.shape[-1]:
        return NAN, NAN, NAN
    _, sizes, rows = torch.linalg.svd(subspace.to(h.dtype), full_matrices=False)
    rows = rows[sizes > 1e-6 * sizes.max()] if sizes.max() > 0 else rows[:0]

    def angle(v: Tensor) -> Tensor:
        inside = v @ rows.mT @ rows
        degrees = torch.rad2deg(torch.atan2((v - inside).norm(dim=-1), inside.norm(dim=-1)))
        return torch.where(v.norm(dim=-1) > 0, degrees, NAN)

    return angle(h), angle(h + delta), angle(delta)


def edit_rows(noted: Row, batch: Batch, stack: str, tokenizer: Any) -> list[Row]:
    """The rows of `Inspection.edits` for one block's call."""
    h_norm: Tensor = noted["h_norm"].cpu()
    rows, columns = h_norm.shape
    ids, valid = batch.stacks.get(stack, (None, torch.ones(0)))
    if valid.shape != h_norm.shape:  # images, or whatever has no tokens
        ids, valid = None, torch.ones(rows, columns, dtype=torch.bool)
    answer = batch.answers.get(stack)
    texts: dict[int, str] = {}
    found = []
    for adapter, measured in noted["measured"].items():
        numbers = {key: measured[key].tolist() if key in measured else None for key in ("edited", *NUMBERS)}
        terms = [(term, where.tolist()) for term, where in measured.get("terms", ())]
        for row in range(rows):
            position = 0
            for column in range(columns):
                if not valid[row, column]:
                    continue
                token = -1 if ids is None else int(ids[row, column])
                if token not in texts:
                    texts[token] = text_of(token, tokenizer)
                edited = bool(numbers["edited"][row][column])  # type: ignore[index]
                found.append(
                    {
                        "prompt": batch.first + row,
                        "block": noted["block"],
                        "depth": block_number(noted["block"]),
                        "stack": stack,
                        "call": noted["call"],
                        "adapter": adapter,
                        "position": position,
                        "column": column,
                        "token": texts[token] if token >= 0 else str(position),
                        "token_id": token,
                        "part": "answer" if answer is not None and bool(answer[row, column]) else "prompt",
                        "edited": edited,
                        "term": next((term for term, where in terms if edited and where[row][column]), ""),
                        "h_norm": float(h_norm[row, column]),
                        **{key: NAN if n is None else n[row][column] for key, n in numbers.items() if key != "edited"},
                    }
                )
                position += 1
    return found


def text_of(token: int, tokenizer: Any) -> str:
    """The text of a token; its name in the vocabulary where it has no text of its own."""
    if tokenizer is None or token < 0:
        return str(token)
    text: str = tokenizer.decode([token])
    if text and "\ufffd" not in text:
        return text
    name = tokenizer.convert_ids_to_tokens(token)
    return str(token if name is None else name)


# What a prediction owes to each block.


@dataclass
class Predictions:
    """The model's predictions for a batch, with all edits.

    Attributes:
        logits: [n, V], of the places that count.
        row: [n], the row of the batch that each belongs to.
        where: bool [B, S], those places; None if there is one prediction per row.
        tokens: whether classes are tokens.
    """

    logits: Tensor
    row: Tensor
    where: Tensor | None
    tokens: bool
    unedited: Tensor | None = None

    @classmethod
    def of(
        cls, model: nn.Module, base: Any, batch: Batch, tokenizer: Any, spies: Mapping[str, Spy]
    ) -> Predictions | None:
        """Run the model with everyone noting down; None if its output has no logits."""
        for spy in spies.values():
            spy.noting, spy.calls = True, 0
        try:
            output = model(**batch.inputs)
        finally:
            for name, spy in spies.items():
                spy.noting = False
                for noted in spy.notes:
                    if noted["layer"] is spy.layer:
                        noted["block"] = name
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor) or logits.dim() not in (2, 3):
            return None
        host = Host.of(base)
        causal = host is not None and host.root.causal
        where = None if logits.dim() == 2 else predicting(batch, causal, tokenizer).to(logits.device)
        if where is not None and where.shape != logits.shape[:2]:
            raise ValueError(
                f"The model put out logits of shape {tuple(logits.shape)} for tokens of shape {tuple(where.shape)}, so "
                "that the prediction behind the prompt cannot be told. Pass effects=False."
            )
        embeddings = getattr(getattr(base, "config", None), "vocab_size", None)
        chosen = logits if where is None else logits[where]
        row = torch.arange(len(logits)) if where is None else where.nonzero()[:, 0].cpu()
        return cls(chosen.float().cpu(), row, where, where is not None and embeddings == logits.shape[-1])

    def without(self, model: nn.Module, batch: Batch, skipped: Sequence[Spy]) -> Tensor:
        """The logits [n, V] when some layers do not edit."""
        try:
            for spy in skipped:
                spy.skipping = True
            logits: Tensor = model(**batch.inputs).logits
        finally:
            for spy in skipped:
                spy.skipping = False
        return (logits if self.where is None else logits[self.where]).float().cpu()

    def effects(self, model: nn.Module, batch: Batch, spies: Mapping[str, Spy]) -> list[Row]:
        """The rows of `Inspection.effects`; keeps the prediction without any edit."""
        self.unedited = self.without(model, batch, list(spies.values()))
        most = self._by_row(self.unedited)
        found = []
        for block, spy in spies.items():
            for row, lost in self._by_row(self.without(model, batch, [spy])).items():
                shares = {f"{key}_share": divide(lost[key], most[row][key]) for key in ("tv", "kl")}
                place = {"prompt": batch.first + row, "block": block, "depth": block_number(block)}
                found.append(place | lost | shares)
        return found

    def totals(self, batch: Batch, tokenizer: Any) -> list[Row]:
        """The rows of `Inspection.totals`."""
        assert self.unedited is not None
        found = []
        for row, lost in self._by_row(self.unedited).items():
            first = int((self.row == row).nonzero()[0])
            top, unedited = (int(logits[first].argmax()) for logits in (self.logits, self.unedited))
            names = [text_of(n, tokenizer if self.tokens else None) for n in (top, unedited)]
            found.append({"prompt": batch.first + row, **lost, "top": names[0], "top_unedited": names[1]})
        return found

    def _by_row(self, other: Tensor) -> dict[int, Row]:
        """How far the prediction is from another one, as means over the places of each row."""
        log_p, log_q = self.logits.double().log_softmax(-1), other.double().log_softmax(-1)
        one = self.logits.shape[-1] == 1  # a score: there are no probabilities
        values = {
            "tv": torch.full((len(log_p),), NAN).double() if one else (log_p.exp() - log_q.exp()).abs().sum(-1) / 2,
            "kl": torch.full((len(log_p),), NAN).double()
            if one
            else torch.where(log_p.exp() > 0, log_p.exp() * (log_p - log_q), 0).sum(-1).clamp(min=0),
            "logits": (self.logits.double() - other.double()).square().mean(-1).sqrt(),
        }
        return {
            row: {key: float(value[self.row == row].mean()) for key, value in values.items()}
            for row in self.row.unique().tolist()
        }


def divide(part: float, whole: float) -> float:
    return part / whole if whole > 0 else NAN


def predicting(batch: Batch, causal: bool, tokenizer: Any) -> Tensor:
    """The places [B, S] whose logits are the prediction."""
    stack = "decoder" if "decoder" in batch.stacks else ""
    ids, valid = batch.stacks[stack]
    last = valid & (valid.long().flip(1).cumsum(1).flip(1) == 1)
    labels = batch.inputs.get("labels")
    if isinstance(labels, Tensor) and labels.shape == valid.shape:
        counted = labels.cpu() != -100
        if causal:  # the logits of a column predict the next one
            counted = torch.nn.functional.pad(counted[:, 1:], (0, 1))
        return torch.where(counted.any(1, keepdim=True), counted & valid, last)
    if causal or stack == "decoder":
        return last
    mask = getattr(tokenizer, "mask_token_id", None)
    masked = valid & (ids == mask) if ids is not None and mask is not None else torch.zeros_like(valid)
    return torch.where(masked.any(1, keepdim=True), masked, valid)


# From texts to batches.


def batches(
    base: Any, prompts: Any, tokenizer: Any, answers: str | Sequence[str] | None, batch_size: int
) -> Iterator[Batch]:
    """The batches to run: the one given, or the texts, encoded and padded."""
    if isinstance(prompts, Mapping):
        if answers is not None:
            raise ValueError("answers go with prompts that are texts; give a batch of tensors its labels instead.")
        yield batch_of(base, dict(prompts), 0)
        return
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    replies = [answers] if isinstance(answers, str) else answers
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"prompts={prompts!r} must be a text, a list of texts, or a batch of tensors by name.")
    if tokenizer is None:
        raise ValueError("Prompts that are texts need a tokenizer: inspect_adapter(model, prompts, tokenizer).")
    if replies is not None and len(replies) != len(texts):
        raise ValueError(f"There are {len(replies)} answers for {len(texts)} prompts; give each prompt one.")
    seq2seq = bool(getattr(getattr(base, "config", None), "is_encoder_decoder", False))
    host = Host.of(base)
    if replies is not None and not seq2seq and not (host is not None and host.root.causal):
        raise ValueError("answers are for language models; this model reads its whole input as the prompt.")
    for first in range(0, len(texts), max(1, batch_size)):
        some = texts[first : first + max(1, batch_size)]
        rows = [list(tokenizer(text)["input_ids"]) for text in some]
        for text, row in zip(some, rows):
            if not row:
                raise ValueError(f"The prompt {text!r} has no tokens.")
        inputs: dict[str, Any] = {}
        if replies is not None:
            given = replies[first : first + len(some)]
            if seq2seq:
                inputs["labels"] = padded([list(tokenizer(text_target=text)["input_ids"]) for text in given], -100)
            else:
                ends = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in given]
                inputs["labels"] = padded([[-100] * len(row) + end for row, end in zip(rows, ends)], -100)
                rows = [row + end for row, end in zip(rows, ends)]
        pad = getattr(tokenizer, "pad_token_id", None)
        inputs["input_ids"] = padded(rows, 0 if pad is None else pad)
        inputs["attention_mask"] = padded([[1] * len(row) for row in rows], 0)
        yield batch_of(base, inputs, first)


def padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    """Rows of different lengths as one tensor, filled up on the right."""
    columns = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (columns - len(row))] for row in rows], dtype=torch.long)


def batch_of(base: Any, inputs: dict[str, Any], first: int) -> Batch:
    """Inputs on the model's device, with what their columns are; encoder-decoder models get what they decode from."""
    if inputs.get("adapter_names") is not None:
        raise ValueError("adapter_names is not supported here: set_adapter one of them, and inspect it.")
    labels, config = inputs.get("labels"), getattr(base, "config", None)
    ids = inputs.get("input_ids")
    if getattr(config, "is_encoder_decoder", False) and ids is not None and "decoder_input_ids" not in inputs:
        if labels is not None and hasattr(base, "prepare_decoder_input_ids_from_labels"):
            inputs["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(labels=labels)
        elif getattr(config, "decoder_start_token_id", None) is not None and labels is None:
            inputs["decoder_input_ids"] = torch.full((len(ids), 1), config.decoder_start_token_id)  # type: ignore[union-attr]
    stacks: dict[str, tuple[Tensor | None, Tensor]] = {}
    answers = {}
    encoder = "encoder" if "decoder_input_ids" in inputs else ""
    for stack, prefix in ((encoder, ""), ("decoder", "decoder_")):
        tokens, embeds = inputs.get(f"{prefix}input_ids"), inputs.get(f"{prefix}inputs_embeds")
        given = tokens if tokens is not None else embeds
        if not isinstance(given, Tensor):
            continue
        mask = inputs.get(f"{prefix}attention_mask")
        valid = torch.ones(given.shape[:2]) if not isinstance(mask, Tensor) or mask.dim() != 2 else mask.cpu()
        stacks[stack] = (None if tokens is None else tokens.cpu(), valid.bool())
        if isinstance(labels, Tensor) and labels.shape == given.shape[:2] and stack != "encoder":
            counted = labels.cpu() != -100
            answers[stack] = counted if stack == "" else torch.nn.functional.pad(counted[:, :-1], (1, 0))
    device = next((parameter.device for parameter in base.parameters()), torch.device("cpu"))
    moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
    return Batch(moved, first, stacks, answers)


# The command.


def main(argv: list[str]) -> int:
    """`python -m peft_reft inspect DIR --prompt TEXT ...`; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m peft_reft inspect",
        description="How far an adapter moves each token of some prompts, and what each block's edits are worth.",
    )
    parser.add_argument("directory", help="the adapter, as save_pretrained wrote it")
    parser.add_argument("--model", help="the base model; default: the one that the adapter names")
    parser.add_argument("--prompt", action="append", required=True, help="a prompt; may be given several times")
    parser.add_argument("--answer", action="append", help="an answer to each prompt: shows edits of generated tokens")
    parser.add_argument("--out", help="where to draw the heat map; the ending is the format (.png, .svg, .pdf)")
    parser.add_argument("--csv", help="where to write the table of edits; effects go to NAME-effects.csv beside it")
    parser.add_argument("--value", default="relative", choices=NUMBERS, help="what the heat map shows")
    parser.add_argument("--no-effects", action="store_true", help="do not run the model once more for each block")
    parser.add_argument("--num-labels", type=int, help="classes of a classifier, if its base model does not say")
    parser.add_argument("--dtype", default="auto", help="of the base model's weights: auto, float32, bfloat16, ...")
    parser.add_argument("--device", default=None, help="default: cuda if there is one, else cpu")
    arguments = parser.parse_args(argv)
    try:
        model, tokenizer = load(arguments)
        found = inspect_adapter(
            model, arguments.prompt, tokenizer, answers=arguments.answer, effects=not arguments.no_effects
        )
        if arguments.out:
            found.plot(arguments.out, arguments.value)
        if arguments.csv:
            path = Path(arguments.csv)
            found.to_csv(path)
            if found.effects:
                found.to_csv(path.with_name(f"{path.stem}-effects{path.suffix}"), "effects")
    except (ValueError, OSError, ImportError, KeyError) as error:
        print(f"{parser.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(summary(found))
    return 0


def load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The adapter on its base model, and the tokenizer."""
    import transformers

    import peft_reft  # noqa: F401  (makes REFT known to PEFT)

    config = read_config(Path(arguments.directory))
    name = arguments.model or config.get("base_model_name_or_path")
    if not name:
        raise ValueError("the adapter does not name its base model; give it with --model.")
    auto = getattr(transformers, AUTO_CLASSES.get(str(config.get("task_type")), "AutoModelForCausalLM"))
    more = {} if arguments.num_labels is None else {"num_labels": arguments.num_labels}
    base = auto.from_pretrained(name, dtype=arguments.dtype, **more)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = PeftModel.from_pretrained(base.to(device), arguments.directory)
    except RuntimeError as error:
        raise ValueError(f"the adapter does not fit {name!r}; a classifier may need --num-labels: {error}") from error
    has_tokenizer = (Path(arguments.directory) / "tokenizer_config.json").is_file()
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.directory if has_tokenizer else name)
    return model.eval(), tokenizer


def summary(found: Inspection) -> str:
    """A few lines per prompt: the prediction, and each block's part in it."""
    lines = []
    whole = "+".join(found.adapters)
    for prompt in dict.fromkeys(row["prompt"] for row in found.edits):
        lines.append(f"prompt {prompt}")
        for total in (row for row in found.totals if row["prompt"] == prompt):
            lines.append(
                f"  all blocks: tv {total['tv']:.3f}, kl {total['kl']:.3g} nats; most likely {total['top']!r}, "
                f"unedited {total['top_unedited']!r}"
            )
        effects = {row["block"]: row for row in found.effects if row["prompt"] == prompt}
        edits = [row for row in found.edits if row["prompt"] == prompt and row["adapter"] == whole and row["edited"]]
        for block in dict.fromkeys(row["block"] for row in edits):
            sizes = [row["relative"] for row in edits if row["block"] == block]
            text = f"  {block}: moves {len(sizes)} tokens by {math.fsum(sizes) / len(sizes):.3g} of their length"
            if block in effects:
                text += f"; without it tv {effects[block]['tv']:.3f}, kl {effects[block]['kl']:.3g} nats"
            lines.append(text)
    return "\n".join(lines)
