"""Causal tracing: which hidden states carry what makes the answer (Meng et al. 2022, https://arxiv.org/abs/2202.05262).

The model runs a clean and a corrupted input. Then it runs the corrupted one again, with the state of one block at one
token put back to what it was in the clean run: if the clean answer returns, that state carries what was corrupted.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
        """Write the rows to a file; NaN becomes an empty cell."""
        with open(path, "w", encoding="utf-8", newline="") as file:
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
            figure.savefig(path)
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
        for example in range(len(valid)):
            own = [_row(inputs, example, len(valid)) for inputs in (clean, corrupted)]
            _trace_one(
                result,
                probe,
                example,
                own[0],
                own[1],
                valid[example],
                blocks,
                bool(decoder),
                metric,
                tokenizer,
                batch_size,
            )
    return result


def _trace_one(
    result: Trace,
    probe: Probe,
    example: int,
    clean: Row,
    corrupted: Row,
    valid: Tensor,
    blocks: Sequence[str],
    decodes: bool,
    metric: Metric | None,
    tokenizer: Any,
    batch_size: int,
) -> None:
    columns = valid.nonzero().flatten().tolist()
    # By columns, not as the prompt: labels among the inputs would end that.
    states = probe.read({**clean, "intervention_locations": torch.tensor([columns], device=valid.device)})

    def predicted(output: Any) -> Tensor:
        logits = output_of(output)
        if logits.dim() == 2:
            return logits
        last = 1 if decodes else len(valid) - columns[-1]  # from the end: a model may return the last logits alone
        if last > logits.shape[1]:
            raise ValueError(
                f"The model returned logits of its last {logits.shape[1]} column(s), which are padding; the prediction "
                f"is that of column {columns[-1]}. Pad on the left, or leave out logits_to_keep."
            )
        return logits[:, -last]

    before = predicted(probe.base(**clean))
    measure = metric if metric is not None else _probability_of(int(before.argmax()))
    high, low = float(measure(before)), float(measure(predicted(probe.base(**corrupted))))
    result.examples.append({"example": example, "clean": high, "corrupted": low})
    ids = corrupted.get("input_ids")
    numbers = [-1] * len(columns) if ids is None else ids[0, valid].tolist()
    names = [str(position) for position in range(len(columns))] if ids is None else names_of(numbers, tokenizer)
    for block in blocks:
        found, _ = states[block]
        values: list[float] = []
        for first in range(0, len(columns), batch_size):
            chunk = columns[first : first + batch_size]
            output = probe.restored(corrupted, block, chunk, found[0, first : first + len(chunk)])
            measured = measure(predicted(output))
            if measured.shape != (len(chunk),):
                raise ValueError(
                    f"metric returned {list(measured.shape)} for the logits of {len(chunk)} rows; it must return a "
                    "number for each row."
                )
            values += measured.tolist()
        for position, value in enumerate(values):
            result.rows.append(
                {
                    "example": example,
                    "block": block,
                    "depth": block_number(block),
                    "position": position,
                    "column": columns[position],
                    "token": names[position],
                    "token_id": numbers[position],
                    "value": value,
                    "effect": value - low,
                    "restored": (value - low) / (high - low) if high != low else float("nan"),
                }
            )


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
