"""Keeps what frozen interventions multiply with from one forward to the next, for as long as nothing changes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peft_reft.interventions.batched import FactorTable, fingerprint, values_on_cpu

if TYPE_CHECKING:
    from peft_reft.tuner.layer import ReftLayer


class FactorCache:
    """Works out the factors of many layers for one forward; keeps the last ones for as long as nothing changes."""

    def __init__(self) -> None:
        self.key: Any = None
        self.table = FactorTable()
        self.seen: Tensor | None = None

    def __call__(self, layers: Sequence[ReftLayer], names: Sequence[str] | None) -> FactorTable:
        """The factors by layer (its id) and adapter.

        Args:
            names: the adapters that take part; None for the active ones.
        """
        entries: list[Any] = []
        for layer in layers:
            if layer.disable_adapters:
                continue
            own = layer.reft_interventions._modules
            for name in layer.active_adapters if names is None else names:
                if name in own:
                    entries.append(((id(layer), name), own[name]))
        key = None if torch.compiler.is_compiling() else fingerprint(entries)
        if key is not None and key == self.key and self._unwritten(entries):
            return self.table
        table = FactorTable(entries)
        self.key, self.table = (None, FactorTable()) if key is None else (key, table)
        self.seen = None if key is None else values_on_cpu(entries)
        return table

    def _unwritten(self, entries: Iterable[Any]) -> bool:
        """Whether the parameters hold what they held, as far as one can see without waiting for a device."""
        seen, values = self.seen, values_on_cpu(entries)
        return seen is None or values is None or torch.equal(seen, values)

    def __reduce__(self) -> Any:
        return FactorCache, ()  # a copied or pickled model starts without
