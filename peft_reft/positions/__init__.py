"""Which tokens are edited: the terms of the notation, where the prompts of a batch lie, and the places in its rows.

Plain torch and index arithmetic, without a loop over rows and without waiting for the device. What a model's arguments
say about prompts is read in context/.
"""

from peft_reft.positions.notation import GRAMMAR, PositionSpec, parse_positions
from peft_reft.positions.places import Places, columns_of, locate, mark, places_at, places_of
from peft_reft.positions.prompts import (
    IGNORED,
    Prompts,
    Tokens,
    align_shift_labels,
    document_starts,
    find_prompts,
    generated,
    marker_ends,
)

__all__ = [
    "GRAMMAR",
    "IGNORED",
    "Places",
    "PositionSpec",
    "Prompts",
    "Tokens",
    "align_shift_labels",
    "columns_of",
    "document_starts",
    "find_prompts",
    "generated",
    "locate",
    "mark",
    "marker_ends",
    "parse_positions",
    "places_at",
    "places_of",
]
