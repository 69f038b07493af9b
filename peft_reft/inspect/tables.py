"""What an inspection found, as tables: lists of rows, to be drawn, saved or taken to pandas."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_reft.inspect.heatmap import draw
from peft_reft.tuner.staging import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]


@dataclass
class Inspection:
    """What `inspect_adapter` found. Every table is a list of dicts with the same keys, as `pandas.DataFrame` takes it.

    Attributes:
        edits: a row for each prompt, block, adapter and token without padding. Its keys:

            - prompt, block, depth, adapter: number of the prompt, name and number of the block, name of the adapter.
              Several active adapters have a row each, and one for their sum, under their names joined by "+". An
              adapter with subspaces also has a row for each of them, under "adapter:subspace".
            - stack: "encoder" or "decoder", "" in other models; call: number of the call, from 0, of a block that runs
              several times in a forward.
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

    @property
    def together(self) -> str:
        """The name under which `edits` has what all active adapters do together."""
        return "+".join(self.adapters)

    def to_pandas(self, table: str = "edits") -> Any:
        """A table ("edits", "effects" or "totals") as a `pandas.DataFrame`; needs pandas."""
        import pandas  # type: ignore[import-untyped,unused-ignore]

        return pandas.DataFrame(self._table(table))

    def to_csv(self, path: str | Path, table: str = "edits") -> None:
        """Write a table to a file, as a whole; NaN becomes an empty cell."""
        rows = self._table(table)
        with whole_file(Path(path)) as place, open(place, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]) if rows else [])
            writer.writeheader()
            for row in rows:
                writer.writerow({key: "" if value != value else value for key, value in row.items()})

    def plot(
        self,
        path: str | Path | None = None,
        value: str = "relative",
        *,
        adapter: str | None = None,
        prompts: Sequence[int] | None = None,
        max_unedited: int | None = 2,
    ) -> Figure:
        """A heat map of blocks and tokens, with a bar per block for how much it matters; needs matplotlib.

        Tokens that are not edited are grey, padding is not shown. A run of more than `max_unedited` tokens that no
        block edits is one column, "… 12" for twelve.

        Args:
            path: where to save it, in the format of the name's ending; None for not at all.
            value: the number to show, a key of `edits`: "relative", "edit_norm", "turn", "angle_before", ...
            adapter: whose edits; None for the sum of all active ones (of which there are no angles to a subspace).
            prompts: numbers of the prompts to draw; None for all.
            max_unedited: the longest run of unedited tokens that is drawn token by token; None for any.

        Raises:
            ValueError: for a value, adapter or prompt that is not in the tables.
        """
        whose = self.together if adapter is None else adapter
        figure = draw(self.edits, self.effects, self.totals, value, whose, prompts, max_unedited)
        if path is not None:
            with whole_file(Path(path)) as place:
                figure.savefig(place)
        return figure

    def _table(self, name: str) -> list[Row]:
        if name not in ("edits", "effects", "totals"):
            raise ValueError(f"table={name!r} is not one of 'edits', 'effects' and 'totals'.")
        rows: list[Row] = getattr(self, name)
        return rows
