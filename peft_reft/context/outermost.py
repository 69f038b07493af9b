"""Putting entries on a model, in front of whatever else is put in place of a module's `forward`; and off again."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peft_reft.context.entry import ForwardEntry
from peft_reft.context.state import ModelState


class StayOutermost:
    """Forward pre-hook of an entry's module, which runs before torch calls what it found as `forward`.

    TRL and accelerate replace `forward` after an adapter was added, and may take arguments out of the call that the
    entry has to see. By the time a pre-hook runs, torch has looked `forward` up: so the context of the first such call
    is opened here, and an entry around the replacement is in its place from then on. The replicas of nn.DataParallel
    have the attributes of the module that they copy, its entry too: which module is called is known here.
    """

    def __init__(self, entry: ForwardEntry):
        self.entry = entry

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        entry = self.entry
        found = module.__dict__.get("forward")
        if found is entry or torch.compiler.is_compiling():
            if entry.module is not module:
                entry.state.running.replica = module
            return None
        self.entry = entry.succeeded_by(found)
        running = entry.state.running
        outer = running.context
        context = self.entry.enter(outer, args, kwargs)
        if context is not outer:
            running.context = context

            def close(*_: Any) -> None:
                handle.remove()
                running.context, entry.close = outer, None

            entry.close = close
            handle = module.register_forward_hook(close, always_call=True)
        return args, kwargs


def attach_entry(entry: ForwardEntry) -> None:
    """Put an entry on its module, and keep it there."""
    entry.attach()
    stay = StayOutermost(entry)
    entry.stay = entry.module.register_forward_pre_hook(stay, prepend=True, with_kwargs=True)
    entry.state.add_entry(entry)


def detach_entries(state: ModelState) -> None:
    """Give all modules their own forward back."""
    for entry in state.entries:
        assert entry.stay is not None
        entry.stay.remove()
        entry.passive = True  # should something else hold it
        entry.detach()
    state.entries.clear()
    state.takes_ids = False
