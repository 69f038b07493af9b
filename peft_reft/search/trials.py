"""Which trials of a study count: all that have ended by themselves, trained to the end or given up early."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import optuna

TRAINED = "COMPLETE"
FINISHED = (TRAINED, "PRUNED")  # by Optuna's names; what was interrupted has FAIL and is tried again


def finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Trials that were trained to the end or given up."""
    return [trial for trial in study.trials if trial.state.name in FINISHED]


def scored(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Trials that were trained to the end."""
    return [trial for trial in study.trials if trial.state.name == TRAINED]
