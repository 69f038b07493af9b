"""Causal tracing: which hidden states carry what makes the answer (Meng et al. 2022, https://arxiv.org/abs/2202.05262).

The model runs a clean and a corrupted input. Then it runs the corrupted one again, with the state of one block at one
token put back to what it was in the clean run: if the clean answer returns, that state carries what was corrupted.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft_reft.blocks.numbering import block_number
from peft_reft.causal.accuracy import evaluating, output_of
from peft_reft.causal.probe import Probe, on_device, probing
from peft_reft.inspect.heatmap import draw
from peft_reft.inspect.tokens import names_of
from peft_reft.tuner.injection import roles_of
from peft_reft.tuner.staging import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
Metric = Callable[[Tensor], Tensor]


@dataclass
class Trace:
    """What `trace` found.

    Attributes:
        rows: a row for each example, block and token:

            - example: number of the row in the inputs.
            - block, depth: name and number of the block.
            - position, column: number of the token without and with padding, both from 0.
            - token, token_id: the corrupted input's, its text if there was a tokenizer; -1 where there are no ids.
            - value: the metric with that state restored.
            - effect: by how much it is above that of the corrupted run.
            - restored: the effect as a part of what the corruption cost, 1 for all of it; NaN if it cost nothing.
        examples: a row for each example: the metric of the `clean` and of the `corrupted` run.
    """

    rows: list[Row] = field(default_factory=list)
    examples: list[Row] = field(default_factory=list)

    def grid(self, value: str = "restored", example: int = 0) -> tuple[list[str], Tensor]:
        """The names of the blocks, and a column of one example as [blocks, tokens]."""
        rows = [row for row in self.rows if row["example"] == example]
        blocks = list(dict.fromkeys(row["block"] for row in rows))
        return blocks, torch.tensor([[row[value] for row in rows if row["block"] == block] for block in blocks])

    def to_pandas(self) -> Any:
        """The rows as a `pandas.DataFrame`; needs pandas."""
        import pandas  # type: ignore[import-untyped,unused-ignore]

        return pandas.DataFrame(self.rows)

    def to_csv(self, path: str | Path) -> None:
        """Write the rows to a file, as a whole; NaN becomes an empty cell."""
        with whole_file(Path(path)) as place, open(place, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(self.rows[0]) if self.rows else [])
            writer.writeheader()
            for row in self.rows:
                writer.writerow({key: "" if value != value else value for key, value in row.items()})

    def plot(
        self, path: str | Path | None = None, value: str = "restored", examples: Sequence[int] | None = None
    ) -> Figure:
        """A heat map of blocks and tokens, a panel per example; needs matplotlib.

        Args:
            path: where to save it, in the format of the name's ending; None for not at all.
            value: "restored" or "effect".
            examples: numbers of the examples to draw; None for all.

        Raises:
            ValueError: for a value or example that is not in the table.
        """
        cells = [
            {
                **row,
                "prompt": row["example"],
                "stack": "",
                "call": 0,
                "adapter": "trace",
                "part": "prompt",
                "edited": True,
            }
            for row in self.rows
        ]
        figure = draw(cells, [], [], value, "trace", examples, None)
        if path is not None:
            with whole_file(Path(path)) as place:
                figure.savefig(place)
        return figure


@torch.no_grad()
def trace(
    model: nn.Module,
    clean: Mapping[str, Any],
    corrupted: Mapping[str, Any],
    metric: Metric | None = None,
    *,
    tokenizer: Any = None,
    layers: Sequence[int] | int | None = None,
    target_modules: list[str] | str | None = None,
    batch_size: int = 32,
) -> Trace:
    """How much restoring each hidden state of a corrupted run restores the clean answer.

    Args:
        model: with or without adapters; its ReFT adapters are switched off meanwhile.
        clean: inputs of a call of the model.
        corrupted: the same with something about them changed: other tokens in the same columns, or `inputs_embeds` with
            noise. Padding must be the same.
        metric: maps the logits [n, V] of the prediction to numbers [n], such as the difference of two answers' logits.
            None for the probability of the clean run's most likely answer.
        tokenizer: names the tokens in tables and pictures.
        layers: numbers of the blocks; None for all. Of encoder-decoder models the encoder's.
        target_modules: names of other modules whose output is restored, such as ["mlp"] or ["self_attn"].
        batch_size: how many tokens are tried at once.

    The prediction is that of the last token without padding; of the decoder's last, in encoder-decoder models; or over
    the classes of a classifier.

    Raises:
        ValueError: if clean and corrupted inputs do not have the same columns, or the metric does not return a number
            for each row.
    """
    result = Trace()
    clean, corrupted = (on_device(dict(inputs), model) for inputs in (clean, corrupted))
    valid = _valid(clean)
    if not torch.equal(valid, _valid(corrupted)):
        raise ValueError(
            f"The clean inputs have columns {list(valid.shape)} and the corrupted ones "
            f"{list(_valid(corrupted).shape)}, or other padding: each state takes the place of another. Change tokens "
            "for as many others, or pass inputs_embeds with noise."
        )
    with evaluating(model), probing(model, "all", layers, target_modules) as probe:
        roles = roles_of(probe.base)
        decoder = [name for name in probe.layers if roles.get(probe.base.get_submodule(name)) == "decoder"]
        blocks = [name for name in probe.layers if name not in decoder]
        for number in range(len(valid)):
            rows = [_row(inputs, number, len(valid)) for inputs in (clean, corrupted)]
            example = _Example(probe, rows[0], rows[1], valid[number], decodes=bool(decoder))
            states = example.states()
            before = example.predicted(probe.base(**example.clean))
            measure = metric if metric is not None else _probability_of(int(before.argmax()))
            high, low = float(measure(before)), float(measure(example.predicted(probe.base(**example.corrupted))))
            result.examples.append({"example": number, "clean": high, "corrupted": low})
            tokens = example.tokens(tokenizer)
            for block in blocks:
                values = example.restored(block, states[block], measure, batch_size)
                result.rows += [
                    {
                        "example": number,
                        "block": block,
                        "depth": block_number(block),
                        "position": position,
                        "column": example.columns[position],
                        "token": tokens[position][0],
                        "token_id": tokens[position][1],
                        "value": value,
                        "effect": value - low,
                        "restored": (value - low) / (high - low) if high != low else float("nan"),
                    }
                    for position, value in enumerate(values)
                ]
    return result


@dataclass
class _Example:
    """One row of the inputs, which is run by itself.

    Attributes:
        probe: runs the model and puts states into it.
        clean, corrupted: the row's inputs.
        valid: bool [S], its columns without padding.
        decodes: whether the prediction is a decoder's.
    """

    probe: Probe
    clean: Row
    corrupted: Row
    valid: Tensor
    decodes: bool

    @cached_property
    def columns(self) -> list[int]:
        """The numbers of the columns without padding."""
        return self.valid.nonzero().flatten().tolist()

    def states(self) -> dict[str, Tensor]:
        """The states [n, d] of the clean run at all tokens, by block."""
        # By columns, not as the prompt: labels among the inputs would end that.
        places = torch.tensor([self.columns], device=self.valid.device)
        states = self.probe.read({**self.clean, "intervention_locations": places})
        return {block: found[0] for block, (found, _) in states.items()}

    def predicted(self, output: Any) -> Tensor:
        """The logits [n, V] of the prediction in what the model returned."""
        logits = output_of(output)
        if logits.dim() == 2:
            return logits
        end = self.columns[-1]
        last = 1 if self.decodes else len(self.valid) - end  # from the end: a model may return the last logits alone
        if last > logits.shape[1]:
            raise ValueError(
                f"The model returned logits of its last {logits.shape[1]} column(s), which are padding; the prediction "
                f"is that of column {end}. Pad on the left, or leave out logits_to_keep."
            )
        return logits[:, -last]

    def tokens(self, tokenizer: Any) -> list[tuple[str, int]]:
        """The corrupted input's tokens and their ids."""
        ids = self.corrupted.get("input_ids")
        if ids is None:
            return [(str(position), -1) for position in range(len(self.columns))]
        numbers = ids[0, self.valid].tolist()
        return list(zip(names_of(numbers, tokenizer), numbers))

    def restored(self, block: str, states: Tensor, measure: Metric, batch_size: int) -> list[float]:
        """The metric of the corrupted run with the state of a block put back at each of the tokens in turn."""
        values: list[float] = []
        for first in range(0, len(self.columns), batch_size):
            columns = self.columns[first : first + batch_size]
            output = self.probe.restored(self.corrupted, block, columns, states[first : first + len(columns)])
            measured = measure(self.predicted(output))
            if measured.shape != (len(columns),):
                raise ValueError(
                    f"metric returned {list(measured.shape)} for the logits of {len(columns)} rows; it must return a "
                    "number for each row."
                )
            values += measured.tolist()
        return values


def _probability_of(answer: int) -> Metric:
    return lambda logits: logits.float().softmax(-1)[:, answer]


def _valid(inputs: Mapping[str, Any]) -> Tensor:
    """Bool [B, S]: the columns without padding."""
    embeds, mask = inputs.get("inputs_embeds"), inputs.get("attention_mask")
    tokens = inputs.get("input_ids") if embeds is None else embeds
    if not isinstance(tokens, Tensor) or tokens.dim() < 2:
        raise ValueError(f"trace needs input_ids [B, S] or inputs_embeds [B, S, d], but was given {sorted(inputs)}.")
    if isinstance(mask, Tensor) and mask.shape == tokens.shape[:2]:
        return mask.bool()
    return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)


def _row(inputs: Mapping[str, Any], number: int, rows: int) -> Row:
    """The inputs of one row; those that all rows share stay as they are."""
    own = {name for name, value in inputs.items() if isinstance(value, Tensor) and value.shape[:1] == (rows,)}
    return {name: value[number : number + 1] if name in own else value for name, value in inputs.items()}
