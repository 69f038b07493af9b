"""Three warnings about a ReFT adapter in transformers' `Trainer`, and so in TRL's trainers: each is given once.

And TRL's `disable_dropout`, which knows modules of the class `nn.Dropout` only, is made to reach ReFT's dropout.

They come from a callback. A trainer takes its callbacks from its caller, and hands them to a `CallbackHandler`; adding
one there is the only way that asks nothing of the user's code, nor that `transformers.trainer` be loaded, which takes
seconds. It is done when an adapter is made, and holds for the trainers created afterwards.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn
from transformers.trainer_callback import CallbackHandler, TrainerCallback

from peft_reft.context.notices import unlabelled_forward
from peft_reft.context.training import PROMPTS_OF_LABELS
from peft_reft.integrations.active import positions_that_need_the_end, trained_parameters
from peft_reft.interventions import Intervention
from peft_reft.tuner.injection import reft_layers, state_of
from peft_reft.tuner.loading import wrap_function

LOWEST_RATE = 1e-4
LOW_RATE = (
    "A ReFT adapter is about to be trained with a learning rate of {:g}. That is a rate for a model's own weights "
    "(TRL's default is 2e-5), at which an adapter hardly leaves its start. Begin with learning_rate=1e-3."
)
CUT_ANYWHERE = (
    "packing_strategy='wrapped' cuts the data into rows anywhere, and the batches do not show where a document begins: "
    "a ReFT adapter is trained as if each row were one document, with the first prompt in it, which may be the end of "
    "one. Use packing_strategy='bfd', or packing=False."
)
UNLABELLED_EVALUATION = (
    "In evaluation a ReFT model of positions={!r} got neither `labels` nor `intervention_locations`, as with label "
    "smoothing or compute_loss_func: the whole row counts as the prompt, its answer and padding included, so that the "
    "metrics are not those of the adapter as it is trained or generates. Wrap the collator, "
    "data_collator=peft_reft.ReftDataCollator(collator, config), or let the tokens say where prompts end, "
    "ReftConfig(prompt_end=...)."
)


class ReftNotices(TrainerCallback):
    """Warns of a rate that trains nothing, of packing, and of an evaluation that does not say where prompts end.

    Switches ReFT's dropout off where the trainer's arguments say `disable_dropout` (TRL's DPO does by default).
    """

    def __init__(self) -> None:
        self.given: set[str] = set()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs.get("model")
        if model is not None and getattr(args, "disable_dropout", False):
            disable_dropout(model)
        if model is None or not state.is_world_process_zero:
            return
        parameters = trained_parameters(model)
        if parameters:
            rate = rate_of(parameters, kwargs.get("optimizer"), args.learning_rate)
            if rate is not None and rate < LOWEST_RATE:
                self._warn_once("rate", LOW_RATE.format(rate))
        running = state_of(model)
        if (
            parameters
            and running is not None
            and getattr(args, "packing", False)
            and args.packing_strategy == "wrapped"
        ):
            running.warn_once(CUT_ANYWHERE, PROMPTS_OF_LABELS)  # as what a row of it may set off

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs.get("model")
        running = None if model is None else state_of(model)
        if model is None or running is None or "evaluation" in self.given or not unlabelled_forward(running):
            return
        positions = positions_that_need_the_end(model)
        if positions is not None and state.is_world_process_zero:
            self._warn_once("evaluation", UNLABELLED_EVALUATION.format(positions))

    def _warn_once(self, name: str, message: str) -> None:
        if name not in self.given:
            self.given.add(name)
            warnings.warn(message, stacklevel=2)


def disable_dropout(model: nn.Module) -> None:
    """Drop no entries of any edit any more."""
    for layer in reft_layers(model).values():
        for module in layer.modules():
            if isinstance(module, Intervention):  # one of the user's own has modules that trainers know
                module.dropout = 0.0


def rate_of(parameters: list[nn.Parameter], optimizer: Any, default: float) -> float | None:
    """The largest learning rate at which any of the parameters is trained, warm-up aside.

    Args:
        optimizer: None, or one that holds other tensors than the model does (sharded ones), for `default`.

    Returns:
        None for an optimizer that finds its own rate.
    """
    wanted = {id(parameter) for parameter in parameters}
    groups = getattr(optimizer, "param_groups", [])
    rates = [
        group.get("initial_lr", group.get("lr"))
        for group in groups
        if any(id(parameter) in wanted for parameter in group["params"])
    ]
    if not rates:
        return default
    known = [float(rate) for rate in rates if rate is not None]
    return max(known, default=None)


def add_to_trainers() -> None:
    """Let every trainer that is created from now on have `ReftNotices`."""
    wrap_function(CallbackHandler, "__init__", _with_notices)


def _with_notices(original: Any, handler: CallbackHandler, *args: Any, **kwargs: Any) -> None:
    original(handler, *args, **kwargs)
    if not any(isinstance(callback, ReftNotices) for callback in handler.callbacks):
        handler.add_callback(ReftNotices)
