"""The oracle: slow loops that follow the paper line by line.

Nothing here uses the package's position or prompt code, or its equations; of an intervention only the parameters are
read. One vector is edited at a time, in double precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda x: x,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "silu": lambda x: x * torch.sigmoid(x),
}

Columns = list[list[list[int]]]  # [row][group] -> columns of the padded row


# The six equations, for one vector h [d].


def loreft(h: Tensor, R: Tensor, W: Tensor, b: Tensor, act: Callable) -> Tensor:
    return h + R.T @ (act(W @ h + b) - R @ h)


def noreft(h: Tensor, W2: Tensor, W1: Tensor, b: Tensor, act: Callable) -> Tensor:
    return h + W2.T @ (act(W1 @ h + b) - W2 @ h)


def direft(h: Tensor, W2: Tensor, W1: Tensor, b: Tensor, act: Callable) -> Tensor:
    return h + W2.T @ act(W1 @ h + b)


def odireft(h: Tensor, R: Tensor, W: Tensor, b: Tensor, act: Callable) -> Tensor:
    return h + R.T @ act(W @ h + b)


def consreft(h: Tensor, R: Tensor, b: Tensor, act: Callable) -> Tensor:
    return h + R.T @ (act(b) - R @ h)


def lobireft(h: Tensor, R: Tensor, b: Tensor, act: Callable) -> Tensor:
    return h + R.T @ act(b)


EQUATIONS: dict[str, Callable[..., Tensor]] = {
    "loreft": loreft,
    "noreft": noreft,
    "direft": direft,
    "odireft": odireft,
    "consreft": consreft,
    "lobireft": lobireft,
}
ORTHONORMAL = ("loreft", "odireft", "consreft", "lobireft")  # the equations that have R
CONSTANT = ("consreft", "lobireft")  # the equations without W


def gram_schmidt(rows: Tensor) -> Tensor:
    """Rows orthonormalised first to last: from each, take off its parts along the ones before, then normalise."""
    done: list[Tensor] = []
    for row in rows:
        for _ in range(2):  # once more, for what rounding left
            for other in done:
                row = row - (other @ row) * other
        done.append(row / torch.sqrt(row @ row))
    return torch.stack(done)


def edit_vector(equation: str, module: nn.Module, h: Tensor, act_fn: str | None = None) -> Tensor:
    """One vector after the intervention `module`, whose parameters are read; differentiable in them.

    An equation that is not one of the six is taken from the module itself.
    """
    if equation not in EQUATIONS:
        return module(h)
    parameters = {name: parameter.double() for name, parameter in module.named_parameters()}
    basis = parameters["basis"]
    basis = gram_schmidt(basis) if equation in ORTHONORMAL else basis
    if equation in CONSTANT:
        return EQUATIONS[equation](h.double(), basis, parameters["weight"], ACTIVATIONS[act_fn])
    source = parameters["weight"], parameters["bias"]
    return EQUATIONS[equation](h.double(), basis, *source, ACTIVATIONS[act_fn])


def edit_vectors(equation: str, module: nn.Module, h: Tensor, act_fn: str | None = None) -> Tensor:
    """`edit_vector` for every vector of h [..., d]."""
    vectors = [edit_vector(equation, module, vector, act_fn) for vector in h.reshape(-1, h.shape[-1])]
    return torch.stack(vectors).reshape(h.shape)


# Which tokens.


def select(positions: str, n: int) -> list[list[int]]:
    """For each term of `positions`, the tokens it names in a prompt of n tokens, counted from 0."""
    terms = positions.split("+")
    N = sum(int(term[1:]) for term in terms if term[0] == "f")
    M = sum(int(term[1:]) for term in terms if term[0] == "l")
    prefix_size = min(N, max(n - M, math.ceil(n / 2))) if M else min(N, n)
    groups = []
    for term in terms:
        group = []
        for token in range(n):
            in_prefix = token < prefix_size
            if term == "all" or (term[0] == "f" and in_prefix) or (term[0] == "l" and not in_prefix and token >= n - M):
                group.append(token)
        groups.append(group)
    return groups


def prompts_of_row(
    valid: Sequence[Any], labels: Sequence[int] | None = None, document: Sequence[int] | None = None
) -> list[list[int]]:
    """The columns of each document's prompt in one row.

    Args:
        valid: per column, whether it is no padding.
        labels: per column, -100 = not predicted; None: every token belongs to the prompt.
        document: per column, which document it belongs to; None: the row is one document.
    """
    documents: dict[int, list[int]] = {}
    for column, is_token in enumerate(valid):
        if is_token:
            documents.setdefault(0 if document is None else int(document[column]), []).append(column)
    prompts = []
    for columns in documents.values():
        prompt = []
        for number, column in enumerate(columns):
            if labels is not None and number >= 1 and labels[column] != -100:
                break  # the first prediction that counts; a first token is never predicted
            prompt.append(column)
        prompts.append(prompt)
    return prompts


def columns_to_edit(
    positions: str, mask: Tensor, labels: Tensor | None = None, documents: Tensor | None = None
) -> Columns:
    """[row][group] -> the columns that `positions` names in a batch."""
    rows: Columns = []
    for row in range(mask.shape[0]):
        groups: list[list[int]] = [[] for _ in positions.split("+")]
        row_labels = None if labels is None else labels[row].tolist()
        row_documents = None if documents is None else documents[row].tolist()
        for prompt in prompts_of_row(mask[row].tolist(), row_labels, row_documents):
            for group, tokens in zip(groups, select(positions, len(prompt))):
                group.extend(prompt[token] for token in tokens)
        rows.append(groups)
    return rows


def columns_from_locations(locations: Tensor, groups: int) -> Columns:
    """[row][group] -> columns, from `intervention_locations` [B, P] or [B, G, P], -1 = unused.

    Without a dimension for groups (or with shared weights) which group a column is in makes no difference: all of
    them are put into the first.
    """
    rows: Columns = []
    for row in locations.tolist():
        if locations.dim() == 3 and len(row) == groups:
            rows.append([[column for column in group if column >= 0] for group in row])
        else:
            flat = row if locations.dim() == 2 else [column for group in row for column in group]
            rows.append([[column for column in flat if column >= 0]] + [[] for _ in range(groups - 1)])
    return rows


# A forward of the base model with edits.


@contextmanager
def edits(
    base: nn.Module,
    interventions: Mapping[str, nn.ModuleList],
    config: Any,
    columns: Columns | Callable[[str], Columns],
) -> Iterator[None]:
    """Plain hooks on blocks of `base`, a model without an adapter, which edit their outputs token by token.

    Args:
        base: model with the weights that the adapter's model has.
        interventions: what `get_interventions` gives for the adapter: block name -> one module per position group.
        config: anything with the attributes `intervention` and `act_fn`.
        columns: [row][group] -> columns, or a function that gives them by the block's name.
    """
    handles = []

    def hook_of(name: str, modules: nn.ModuleList) -> Callable:
        def hook(block: nn.Module, args: tuple, output: Any) -> Any:
            hidden = output if isinstance(output, Tensor) else output[0]
            edited = hidden.clone()
            for row, groups in enumerate(columns(name) if callable(columns) else columns):
                for group, places in enumerate(groups):
                    module = modules[group if len(modules) > 1 else 0]
                    for column in places:
                        vector = hidden[row, column]
                        edited[row, column] = edit_vector(config.intervention, module, vector, config.act_fn).to(vector)
            return edited if isinstance(output, Tensor) else type(output)([edited, *output[1:]])

        return hook

    try:
        for name, modules in interventions.items():
            handles.append(base.get_submodule(name).register_forward_hook(hook_of(name, modules)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def forward(
    base: nn.Module,
    interventions: Mapping[str, nn.ModuleList],
    config: Any,
    inputs: Mapping[str, Tensor],
    labels: Tensor | None = None,
    locations: Tensor | None = None,
    documents: Tensor | None = None,
) -> Any:
    """Output of the base model for `inputs`, with the edits that the config's positions ask for.

    Args:
        base, interventions, config: as for `edits`; of the config also `positions` is read.
        inputs: input_ids, attention_mask if there is padding, and what else the model wants.
        labels: aligned with input_ids; they tell where the prompts end (give them for causal models only).
        locations: `intervention_locations`, which win over everything.
        documents: [B, S] number of each column's document, for packed rows.
    """
    terms = len(config.positions.split("+"))
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    if locations is not None:
        columns = columns_from_locations(locations, terms)
    else:
        columns = columns_to_edit(config.positions, mask, labels, documents)
    decoder_ids = inputs.get("decoder_input_ids")
    if decoder_ids is None:
        with edits(base, interventions, config, columns):
            return base(**inputs)
    decoder_mask = inputs.get("decoder_attention_mask")
    decoder_mask = torch.ones_like(decoder_ids) if decoder_mask is None else decoder_mask
    decoder_columns = columns_to_edit(config.positions, decoder_mask)
    in_decoder = {id(module) for module in base.get_decoder().modules()}

    def of_stack(name: str) -> Columns:
        return decoder_columns if id(base.get_submodule(name)) in in_decoder else columns

    with edits(base, interventions, config, of_stack):
        return base(**inputs)
