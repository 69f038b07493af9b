"""Training a boundless alignment: the temperature of its boundary falls, and a penalty keeps it small.

The equation is in interventions/boundless.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers.trainer_callback import TrainerCallback

from peft_reft.interventions import BoundlessIntervention


def set_temperature(model: nn.Module, temperature: float) -> None:
    """Set the temperature of all boundaries of a model, in directions: the lower, the harder they are in training.

    Raises:
        ValueError: if it is no positive number, or the model has no boundless intervention.
    """
    _check("temperature", temperature, above_zero=True)
    for intervention in boundless(model):
        intervention.temperature = float(temperature)


class BoundaryAnnealing(TrainerCallback):
    """Lowers the temperature from step to step of a Trainer, and adds a term to its loss: penalty · Σ boundary.

    Args:
        start: temperature of the first step, in directions. The paper's code has 50, for r = d = 4096.
        end: of the last step; in between it falls by the same amount each time. The paper's code has 0.1.
        penalty: what an intervention that exchanges all r directions adds to the loss, 0 for none. Without one, nothing
            makes the boundary leave out directions that do no harm.

    The temperature is worked out from the step, so that a training that is resumed goes on as it would have. The term's
    gradient is added right before the optimizer's step, behind the clipping of gradients; logged losses are without it.

    Raises:
        ValueError: if a temperature is not positive or rises, or the penalty is negative; in training, if the model has
            no boundless intervention, or with fp16, whose gradients are scaled.
    """

    def __init__(self, *, start: float, end: float, penalty: float):
        _check("start", start, above_zero=True)
        _check("end", end, above_zero=True)
        _check("penalty", penalty, above_zero=False)
        if end > start:
            raise ValueError(f"start={start!r} and end={end!r}: a temperature falls. Swap the two.")
        self.start, self.end, self.penalty = start, end, penalty

    def temperature_at(self, step: int, steps: int) -> float:
        """The temperature of a step of 0 ... steps - 1."""
        return self.start + (self.end - self.start) * min(step / max(steps - 1, 1), 1.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.fp16:
            raise ValueError("BoundaryAnnealing cannot add its penalty to fp16's scaled gradients. Use bf16=True.")
        list(boundless(kwargs["model"]))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        set_temperature(kwargs["model"], self.temperature_at(state.global_step, state.max_steps))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for intervention in boundless(kwargs["model"]):
            if not intervention.boundary.requires_grad or not self.penalty:
                continue
            if intervention.boundary.grad is None:
                raise ValueError(
                    "A boundary has no gradient to which the penalty could be added: the batches had no source_inputs, "
                    "or the trainer keeps gradients elsewhere, as DeepSpeed does. Wrap the collator in an "
                    "InterchangeCollator, or use penalty=0.0 and add the term to the loss yourself."
                )
            intervention.boundary.grad += self.penalty


def boundless(model: nn.Module) -> Iterator[BoundlessIntervention]:
    """The boundless interventions of a model, each once.

    Raises:
        ValueError: if there are none.
    """
    found = [module for module in model.modules() if isinstance(module, BoundlessIntervention)]
    if not found:
        raise ValueError(
            "The model has no boundless intervention, whose boundary could have a temperature. Make one with "
            "ReftConfig(intervention='boundless', r=...)."
        )
    yield from found


def _check(name: str, value: Any, above_zero: bool) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < 0 or (above_zero and value == 0):
        raise ValueError(f"{name}={value!r} must be a finite number{' above 0' if above_zero else ', at least 0'}.")
