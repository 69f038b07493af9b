"""The places that an adapter edits, found by loops over single tokens, and forwards of a base model with these edits.

`reference.py` knows the equations and the terms `fN`, `lM` and `all`. Here are all terms, turns, markers, holes in the
mask, packed documents, generated tokens, and rows that have adapters of their own. Nothing uses the package's code.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import reference
import torch
from torch import Tensor, nn

from peft_reft import get_interventions

Groups = list[list[int]]  # [group] -> columns of the padded row


# Which tokens of one prompt.


def terms_of(positions: str) -> list[tuple[str, int]]:
    """("f", 2), ("l", 1) for "f2+l1"; the number of "all" and "d" is 1."""
    return [(kind, int(number or 1)) for kind, number in re.findall(r"(all|[flmed])(\d*)", positions)]


def named_tokens(positions: str, n: int) -> Groups:
    """For each term, the tokens it names in a prompt of n tokens; a token that two terms name belongs to the first."""
    terms = terms_of(positions)
    first = sum(number for kind, number in terms if kind == "f")
    last = sum(number for kind, number in terms if kind == "l")
    prefix = min(first, max(n - last, math.ceil(n / 2))) if last else min(first, n)
    taken: set[int] = set()
    groups = []
    for kind, number in terms:
        middle = max(0, (n - number) // 2)
        rule = {
            "f": lambda token: token < prefix,
            "l": lambda token: token >= n - last and token >= prefix,
            "m": lambda token, middle=middle, number=number: middle <= token < middle + number,
            "e": lambda token, number=number: (token + 1) % number == 0,
            "all": lambda token: True,
            "d": lambda token: False,
        }[kind]
        group = [token for token in range(n) if rule(token) and token not in taken]
        taken.update(group)
        groups.append(group)
    return groups


def split_by_position(positions: str, groups: Groups, n: int) -> Groups:
    """One group per position (share_weights="position"): a suffix counts from the prompt's end."""
    split = []
    for (kind, number), group in zip(terms_of(positions), groups):
        start = {"f": 0, "l": n - number, "m": max(0, (n - number) // 2)}[kind]
        split += [[token for token in group if token == start + slot] for slot in range(number)]
    return split


def prompt_groups(config: Any, prompt: Sequence[int], new: Sequence[int] | None = None) -> Groups:
    """The columns of a prompt that each intervention edits.

    Args:
        prompt: the prompt's columns, from the first token on.
        new: of these, the columns that belong to this turn (turns="all"); None for all of them.
    """
    groups = named_tokens(config.positions, len(prompt))
    if config.share_weights == "position":
        groups = split_by_position(config.positions, groups, len(prompt))
    allowed = set(prompt if new is None else new)
    return [[prompt[token] for token in group if prompt[token] in allowed] for group in groups]


def answer_groups(config: Any, answer: Sequence[int]) -> Groups:
    """The columns of an answer that each term edits: the K-th, 2K-th, ... for "dK"."""
    if config.share_weights == "position":
        return [[] for _ in range(sum(number for _, number in terms_of(config.positions)))]
    return [
        [column for place, column in enumerate(answer) if kind == "d" and (place + 1) % number == 0]
        for kind, number in terms_of(config.positions)
    ]


# Where prompts and answers lie in a row.


def marker_ends(tokens: Sequence[int], marker: Sequence[int]) -> list[int]:
    """Numbers of the tokens at which the marker ends; what padding holds does not count."""
    size = len(marker)
    return [end for end in range(size - 1, len(tokens)) if list(tokens[end - size + 1 : end + 1]) == list(marker)]


def runs_of(flags: Sequence[bool]) -> list[tuple[int, int]]:
    """Start and stop of each longest run of True."""
    runs, start = [], None
    for place, flag in enumerate([*flags, False]):
        if flag and start is None:
            start = place
        elif not flag and start is not None:
            runs.append((start, place))
            start = None
    return runs


def parts_of_document(
    config: Any, columns: list[int], labels: Sequence[int] | None, ids: Sequence[int] | None
) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """Each prompt of a document: its columns, those of them that are new in this turn, the answer's columns."""
    n, turns = len(columns), config.turns
    marker = config.prompt_end if ids is not None else None
    ends = marker_ends([ids[column] for column in columns], marker) if marker else []
    if labels is not None:
        predicted = [place > 0 and labels[column] != -100 for place, column in enumerate(columns)]
        if marker and turns != "all" and predicted[1:2] == [True] and ends:
            cut = (ends[0] if turns == "first" else ends[-1]) + 1
            if cut < n:  # labels that cover the prompt: the marker ends it
                predicted[:cut] = [False] * cut
        runs = runs_of(predicted)
        # An answer's last token is run only if the conversation goes on, and then with the next turn's prompt.
        answers = [columns[start : stop if stop == n else stop - 1] for start, stop in runs]
        if not runs:
            yield columns, columns, []
        elif turns in (None, "first"):
            prompt = columns[: runs[0][0]]
            yield prompt, prompt, answers[0]
            for answer in answers[1:]:
                yield prompt, [], answer
        elif turns == "last":
            prompt = columns[: runs[-1][0]]
            yield prompt, prompt, answers[-1]
        else:
            before = 0
            for (start, stop), answer in zip(runs, answers):
                yield columns[:start], columns[before:start], answer
                before = stop if stop == n else stop - 1
    elif ends:
        if turns == "all":
            before = 0
            for end in ends:
                yield columns[: end + 1], columns[before : end + 1], []
                before = end + 1
        else:
            cut = (ends[0] if turns == "first" else ends[-1]) + 1
            yield columns[:cut], columns[:cut], columns[cut:]
    else:
        yield columns, columns, []


def add(groups: Groups, more: Groups) -> Groups:
    return [first + second for first, second in zip(groups, more)]


def places(
    config: Any,
    valid: Sequence[Any],
    labels: Sequence[int] | None = None,
    ids: Sequence[int] | None = None,
    documents: Sequence[int] | None = None,
) -> Groups:
    """[group] -> columns that an adapter edits in one row of a forward outside `generate`.

    Args:
        config: a `ReftConfig`; positions, share_weights, turns and prompt_end are read.
        valid: per column, whether it is no padding.
        labels: per column, -100 = not predicted; None if the call has none.
        ids: per column, in which to look for the marker.
        documents: per column, the number of its document; None if the row is one.
    """
    by_document: dict[int, list[int]] = {}
    for column, is_token in enumerate(valid):
        if is_token:
            by_document.setdefault(0 if documents is None else int(documents[column]), []).append(column)
    groups = answer_groups(config, [])
    for columns in by_document.values():
        for prompt, new, answer in parts_of_document(config, columns, labels, ids):
            groups = add(groups, add(prompt_groups(config, prompt, new), answer_groups(config, answer)))
    return groups


def places_in_generate(config: Any, given: int, columns: int) -> Groups:
    """[group] -> columns of a row without padding, of which the first `given` were passed to `generate`."""
    prompt = list(range(given))
    return add(prompt_groups(config, prompt), answer_groups(config, list(range(given, columns))))


# A forward of the base model, each row with edits of its own.


@dataclass
class RowEdit:
    """What one adapter does in one row.

    Attributes:
        groups: [group] -> columns.
        adapter: what `get_interventions` returns; None for a row of the base model.
    """

    groups: Groups
    adapter: dict[str, nn.ModuleList] | None = None
    config: Any = None
    strength: float = 1.0


@contextmanager
def edited_rows(base: nn.Module, rows: Sequence[Sequence[RowEdit]]) -> Iterator[None]:
    """Plain hooks on `base`, a model without an adapter: row i has the summed edits of `rows[i]`."""

    def hook_of(name: str) -> Any:
        def hook(block: nn.Module, args: tuple, output: Any) -> Any:
            hidden = output if isinstance(output, Tensor) else output[0]
            edited = hidden.clone()
            for row, edits in enumerate(rows):
                for edit in edits:
                    modules = (edit.adapter or {}).get(name)
                    for group, columns in enumerate(edit.groups if modules is not None else []):
                        module = modules[group if len(modules) > 1 else 0]
                        for column in columns:
                            h = hidden[row, column]
                            new = reference.edit_vector(edit.config.intervention, module, h, edit.config.act_fn)
                            edited[row, column] += (edit.strength * (new - h)).to(h.dtype)
            return edited if isinstance(output, Tensor) else type(output)([edited, *output[1:]])

        return hook

    names = {name for edits in rows for edit in edits for name in edit.adapter or {}}
    handles = [base.get_submodule(name).register_forward_hook(hook_of(name)) for name in sorted(names)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Adapters:
    """The adapters of a model, as the reference sees them; the base model is named "__base__"."""

    model: Any
    strengths: dict[str, float] = field(default_factory=dict)

    def edit(self, name: str, groups: Groups) -> list[RowEdit]:
        if name == "__base__":
            return []
        config = self.model.peft_config[name]
        return [RowEdit(groups, get_interventions(self.model, name), config, self.strengths.get(name, 1.0))]

    def in_forward(self, names: Sequence[str], inputs: dict[str, Tensor]) -> list[list[RowEdit]]:
        """The edits of each row of a forward; of the inputs input_ids, attention_mask and labels are read."""
        ids = inputs["input_ids"]
        mask, labels = inputs.get("attention_mask", torch.ones_like(ids)), inputs.get("labels")
        rows = []
        for row, name in enumerate(names):
            own_labels = None if labels is None else labels[row].tolist()
            groups = []
            if name != "__base__":
                groups = places(self.model.peft_config[name], mask[row].tolist(), own_labels, ids[row].tolist())
            rows.append(self.edit(name, groups))
        return rows

    @torch.no_grad()
    def forward(self, base: nn.Module, names: Sequence[str], inputs: dict[str, Tensor]) -> Tensor:
        """Logits of the base model with each row's edits."""
        with edited_rows(base, self.in_forward(names, inputs)):
            return base(**{name: value for name, value in inputs.items() if name != "labels"}).logits

    @torch.no_grad()
    def generate(self, base: nn.Module, name: str, ids: Tensor, new_tokens: int) -> tuple[list[int], Tensor]:
        """Greedy tokens of one row [n] and the logits [T, V] they were chosen by, in whole forwards without a cache."""
        row, steps = ids, []
        for _ in range(new_tokens):
            groups = [] if name == "__base__" else places_in_generate(self.model.peft_config[name], len(ids), len(row))
            with edited_rows(base, [self.edit(name, groups)]):
                steps.append(base(input_ids=row[None], use_cache=False).logits[0, -1])
            row = torch.cat([row, steps[-1].argmax()[None]])
        return row[len(ids) :].tolist(), torch.stack(steps)
