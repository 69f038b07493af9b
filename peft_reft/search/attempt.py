"""One trial of a search, as the user's function sees it: its settings, and how its scores are reported.

Knows transformers' Trainer by its callbacks and `evaluate`; what is proposed, stored and given up is Optuna's business.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from peft_reft.tuner.config import ReftConfig

if TYPE_CHECKING:
    import optuna
    from transformers import Trainer


class Attempt:
    """One trial, as the objective is given it.

    Attributes:
        number: counts the trials, from 0.
        config: a fresh ReftConfig with the proposed blocks, positions and rank.
        learning_rate: the proposed one.
    """

    def __init__(self, trial: optuna.Trial, config: ReftConfig, metric: str):
        self.number = trial.number
        self.config = config
        self.learning_rate: float = trial.params["learning_rate"]
        self._trial = trial
        self._metric = metric

    def report(self, value: float, step: int) -> None:
        """Tell how good the model is after a step of training. All attempts should report at the same steps.

        Raises:
            optuna.TrialPruned: if it is not worth going on: the value is worse than the median of earlier attempts at
                that step, or not a finite number. Let it pass through.
        """
        import optuna

        if not math.isfinite(value):
            raise optuna.TrialPruned(f"{self._metric} is {value} at step {step}")
        self._trial.report(value, step)
        if self._trial.should_prune():
            raise optuna.TrialPruned(f"{self._metric} of {value:.4g} at step {step} is worse than the median")

    def run(self, trainer: Trainer) -> float:
        """Train with transformers' Trainer or any of its kind; every evaluation in between is reported.

        The trainer's progress bars and printed logs are switched off: `search` prints a line about each trial. Give it
        `eval_strategy` and `eval_steps` to evaluate during training; otherwise nothing can be given up early.

        Returns:
            The metric of the model that the training ended with.

        Raises:
            ValueError: if the evaluation has no such metric, or several processes train together.
        """
        import optuna

        if trainer.args.world_size > 1:
            raise ValueError(
                f"This search runs in {trainer.args.world_size} processes that train together, and each would propose "
                "settings of its own. Start it as one process; several such can share one folder, each with its GPU."
            )
        reporter = _Reporter(self, self._metric, isinstance(trainer.eval_dataset, dict))
        trainer.add_callback(reporter)
        for callback in (PrinterCallback, ProgressCallback):  # a search prints one line about each trial
            trainer.remove_callback(callback)
        try:
            trainer.train()
        except optuna.TrialPruned:
            trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)  # closes what is open
            raise
        if reporter.step == trainer.state.global_step and not trainer.args.load_best_model_at_end:
            return reporter.value
        trainer.remove_callback(reporter)
        return metric_of(trainer.evaluate(), self._metric)


class _Reporter(TrainerCallback):
    """Reports the evaluations of a running Trainer to an attempt; with several data sets, that which has the metric."""

    def __init__(self, attempt: Attempt, metric: str, several: bool):
        self.attempt, self.metric, self.several = attempt, metric, several
        self.step, self.value = -1, math.nan

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        metrics = metrics or {}
        if self.metric in metrics or not self.several:
            self.step, self.value = state.global_step, metric_of(metrics, self.metric)
            self.attempt.report(self.value, self.step)


def metric_of(metrics: Mapping[str, float], name: str) -> float:
    """A metric of an evaluation.

    Raises:
        ValueError: if there is none of that name.
    """
    if name not in metrics:
        raise ValueError(f"metric={name!r} is not among the results of the evaluation: {', '.join(sorted(metrics))}.")
    return float(metrics[name])
