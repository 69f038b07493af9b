"""The fit check for transformers' own `model.load_adapter`, which loads what fits and reports the rest.

What keeps an adapter from fitting is worked out in checkpoint.py; here is only how to get between transformers and
its loading. An adapter that does not fit is removed again, as it is by PEFT's ways of loading.

PEFT and transformers do not say for which purpose an adapter is created or weights are set: `call_of` looks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FrameType
from typing import Any

from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.integrations.peft import PeftAdapterMixin

from peft_reft.tuner.attach import tidy_up
from peft_reft.tuner.checkpoint import does_not_fit, intervention_shapes, mismatch
from peft_reft.tuner.keys import is_intervention, without_adapter

LOADER = "_load_pretrained_model"  # the method of transformers' models that reads a checkpoint into one


def call_of(*functions: Callable[..., Any]) -> FrameType | None:
    """The innermost call of one of these functions that is under way; None if there is none."""
    codes = [function.__code__ for function in functions]
    frame = inspect.currentframe()
    while frame is not None and frame.f_code not in codes:
        frame = frame.f_back
    return frame


class CheckedLoading:
    """Stands in for the loading method of a model for one call.

    Made before the adapter is injected, so that it knows what the model was like without it.
    """

    def __init__(self, model: Any, adapter_name: str):
        self.model, self.adapter_name = model, adapter_name
        layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
        self.active: list[str] = next((layer.active_adapters for layer in layers), [])
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    @classmethod
    def begun(cls, model: nn.Module, adapter_name: str) -> CheckedLoading | None:
        """If transformers' `load_adapter` is about to inject this adapter into the model; else None."""
        frame = call_of(PeftAdapterMixin.load_adapter)
        return cls(model, adapter_name) if frame is not None and frame.f_locals.get("self") is model else None

    def expect(self, config: PeftConfig) -> None:
        """Check the weights that come next."""
        self.config = config
        self.model.__dict__[LOADER] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        del self.model.__dict__[LOADER]
        try:
            loaded = getattr(self.model, LOADER)(*args, **kwargs)
        except Exception:
            self._remove()
            raise
        reason = self._mismatch(loaded[0])
        if reason is not None:
            self._remove()
            raise ValueError(does_not_fit(self.model, reason, self.config))
        return loaded

    def _mismatch(self, report: Any) -> str | None:
        """What keeps the loaded tensors from fitting, from transformers' report."""

        def anonymous(key: str) -> str:
            return without_adapter(key, self.adapter_name)

        parameters = {
            anonymous(name): p for name, p in self.model.named_parameters() if is_intervention(name, self.adapter_name)
        }
        wanted = intervention_shapes(parameters)
        saved = dict(wanted)
        for key in report.missing_keys:
            saved.pop(anonymous(key), None)
        for key, shape, _ in report.mismatched_keys:
            saved[anonymous(key)] = tuple(shape)
        saved |= {anonymous(key): () for key in report.unexpected_keys if is_intervention(key)}
        return mismatch(saved, wanted)

    def _remove(self) -> None:
        self.model.delete_adapter(self.adapter_name)
        tidy_up(self.model)
        if self.active:
            self.model.set_adapter(self.active)
        trained = {id(parameter) for parameter in self.trained}
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) in trained)
