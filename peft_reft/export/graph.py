"""The graph of a backbone: traced once with open sizes, and run at sizes other than those before anyone relies on it.

A trace follows one example. A model that chooses its way by the number of tokens, or by the tokens themselves, may
give a graph that is right for that example alone; so a graph is compared with its backbone, and refused if it differs.

Shape letters: B rows, S columns of one forward, L blocks, G position groups, r rank, d hidden size.
"""

from __future__ import annotations

from contextlib import redirect_stderr
from io import StringIO
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from peft_reft.export.backbone import Backbone, BakedBackbone
from peft_reft.info.files import one_line

TOLERANCE = 1e-3  # of the norm of what the backbone itself returns


class Sizes(NamedTuple):
    """Sizes of a graph's inputs; None leaves one open.

    Attributes:
        rank, groups: r and G.
        columns: the most that a row has, for runtimes that reserve memory.
        rows: B.
    """

    rank: int | None = None
    groups: int | None = None
    columns: int | None = None
    rows: int | None = None


class Example(NamedTuple):
    """Inputs of one forward: rows, columns of this forward, columns of the past, rank, groups."""

    rows: int
    columns: int
    past: int
    rank: int
    groups: int


def trace(backbone: Backbone, sizes: Sizes) -> ExportedProgram:
    """The graph of a backbone, in which all sizes that are not fixed are open.

    Raises:
        ValueError: if torch.export cannot trace the model, or the graph is another function than the model.
    """
    past = 0 if backbone.cache is None else 6
    example = Example(sizes.rows or 2, 5, past, sizes.rank or 3, sizes.groups or 2)
    name = type(backbone.model).__name__
    try:
        with torch.no_grad(), redirect_stderr(StringIO()):  # where torch prints the whole graph of a trace that failed
            program = torch.export.export(
                backbone, inputs(backbone, example), dynamic_shapes=_open_sizes(backbone, sizes), strict=False
            )
    except Exception as error:  # torch.export raises what its many parts raise
        raise ValueError(
            f"{name} cannot be exported: torch.export does not follow its forward for rows of any length "
            f"({one_line(first_cause(error))}). Run it with the package itself, or export another model."
        ) from error
    _open_short_rows(program)
    for probe in probes(example, sizes):
        why = _difference(program, backbone, probe)
        if why is not None:
            raise ValueError(
                f"{name} cannot be exported: its graph, traced for {example.rows} rows of {example.columns} columns, "
                f"{why} for {probe.rows} of {probe.columns} behind {probe.past}. Its forward depends on the number of "
                "tokens in a way that torch.export does not see. Run it with the package itself, or export another "
                "model."
            )
    return program


def _open_short_rows(program: ExportedProgram) -> None:
    """Let a graph run rows of one to three tokens, which its probes try.

    torch.export traces no size below two as open, and so takes a row of columns and past for four or more.
    """
    for size, bounds in program.range_constraints.items():
        if bounds.lower > 2:
            program.range_constraints[size] = type(bounds)(2, bounds.upper)  # two stands for all below it, too


def first_cause(error: BaseException) -> BaseException:
    """What led to an error: exporters wrap it in others, which tell of their own steps."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def inputs(backbone: Backbone, example: Example, seed: int = 0) -> tuple[Tensor, ...]:
    """Inputs of a backbone with random tokens, edits and past; the last row's first column is padding."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns, past, rank, groups = example
    shape = (len(backbone.blocks), groups, rank)
    ids = torch.randint(0, backbone.vocabulary, (rows, columns), generator=generator)
    attention_mask = torch.ones(rows, past + columns, dtype=torch.long)
    if rows > 1:
        attention_mask[-1, 0] = 0
    edit_mask = torch.nn.functional.one_hot(torch.arange(columns) % groups, groups).float().expand(rows, -1, -1)
    given = [ids, attention_mask, edit_mask.contiguous()]
    if not isinstance(backbone, BakedBackbone):
        sizes = ((*shape, backbone.width), shape, (*shape, backbone.width))
        given += [torch.randn(*size, generator=generator) * backbone.width**-0.5 for size in sizes]
    kept = backbone.empty_past(rows, past)
    return *given, *(torch.randn(*part.shape, generator=generator).to(part.dtype) for part in kept)


def probes(traced: Example, sizes: Sizes) -> list[Example]:
    """Sizes within the open ones at which a graph is tried: a prompt, one token behind it, and more of both."""
    rank, groups = traced.rank if sizes.rank else 1, traced.groups if sizes.groups else 1
    rows = sizes.rows or 1
    if not traced.past:
        found = [Example(rows, columns, 0, rank, groups) for columns in (1, 3, 12)]
    else:
        found = [Example(rows, columns, past, rank, groups) for columns, past in ((9, 0), (1, 0), (1, 9), (4, 3))]
    if sizes.rows is None:
        found.append(traced._replace(rows=3, columns=7))
    return [probe for probe in found if probe.columns + probe.past <= (sizes.columns or 1 << 30)]


@torch.no_grad()
def _difference(program: ExportedProgram, backbone: Backbone, probe: Example) -> str | None:
    """What a graph does other than its backbone; None if nothing."""
    given = inputs(backbone, probe, seed=1)
    expected = backbone(*given)
    try:
        found = program.module(check_guards=False)(*given)
    except Exception as error:
        return f"fails ({one_line(error)})"
    for one, other in zip(found, expected, strict=True):
        apart = (one.float() - other.float()).norm()
        if one.shape != other.shape or not apart <= TOLERANCE * other.float().norm():
            return "returns something else than the model"
    return None


def _open_sizes(backbone: Backbone, sizes: Sizes) -> dict[str, Any]:
    """For each input, the dimensions that are open."""
    columns: Any = Dim.AUTO if sizes.columns is None else Dim.AUTO(max=sizes.columns)
    rows: Any = Dim.STATIC if sizes.rows else Dim.AUTO
    groups: Any = Dim.STATIC if sizes.groups else Dim.AUTO
    rank: Any = Dim.STATIC if sizes.rank else Dim.AUTO
    row = {0: rows, 1: columns}
    found: dict[str, Any] = {"input_ids": row, "attention_mask": row, "edit_mask": {**row, 2: groups}}
    if not isinstance(backbone, BakedBackbone):
        found |= {name: {1: groups, 2: rank} for name in ("down", "bias", "up")}
    if backbone.cache:
        found["past"] = tuple({0: rows, 2: columns} for _ in range(2 * len(backbone.cache)))
    return found
