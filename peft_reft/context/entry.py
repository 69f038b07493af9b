"""Where a call enters a model: the forward of every module around the blocks that takes tokens.

model(...) or model.forward(...)  ->  ForwardEntry opens a ForwardContext  ->  blocks ask it  ->  closed

The entry stands in for the module's `forward`, as an attribute of the instance. That is seen by `model(...)` and
`model.forward(...)` alike, and `finally` closes the context after errors and interruptions, too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from types import CodeType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from peft_reft.context import notices
from peft_reft.context.block import BlockEntry, attach_block_entry
from peft_reft.context.forward import ForwardContext, Given
from peft_reft.context.opening import Entrance, open_context
from peft_reft.context.passed import STEP, take_own
from peft_reft.context.replay import Path
from peft_reft.context.state import ModelState
from peft_reft.context.tower import TOWER
from peft_reft.context.training import look_at_training


class ForwardEntry(Entrance):
    """Stands in for the `forward` of a module that takes tokens and has blocks below it.

    Args:
        blocks: names of the blocks; the others are those of `Entrance`.
    """

    def __init__(
        self,
        module: nn.Module,
        state: ModelState,
        role: str,
        depth: int,
        causal: bool,
        layers: Sequence[Any],
        blocks: Iterable[str],
    ):
        super().__init__(module, state, role, depth, causal, layers)
        self.path = Path(module, blocks)
        self.idle = ForwardContext(state, (), Given(), role, depth, idle=True)
        self.passive = False
        self.stay: RemovableHandle | None = None  # of the hook that keeps it outermost
        self.close: Callable[[], None] | None = None  # of a passive one, while its first call runs
        parameters = inspect.signature(type(module).forward).parameters.values()
        self.names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD][1:]

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        self.__dict__.update(attributes)
        if not self.passive:
            self.state.add_entry(self)

    @property
    def __code__(self) -> CodeType:  # torch.export names the function that it exports
        code: CodeType = self.__wrapped__.__code__
        return code

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        running = self.state.running
        if args and args[0] is self.module:  # accelerate's unwrap_model binds to the model what it takes for a function
            args = args[1:]
        if running.replica is not None:
            return self._of_replica()(*args, **kwargs)
        outer = running.context
        if self.passive:
            return self._below_what_replaced_it(*args, **kwargs)
        if outer is not None and outer.idle and outer.depth < self.depth and self.role != TOWER:
            return self.original(*args, **kwargs)
        if STEP in kwargs and kwargs[STEP].edits_nothing(self.role):
            del kwargs[STEP]
            context = self.idle
        else:
            context = self.enter(outer, args, kwargs)
        if context is outer:
            return self.original(*args, **kwargs)
        running.context = context
        try:
            output = self.original(*args, **kwargs)
        finally:
            running.context = outer
        if self.module.training and self.state.training_forwards is not None and is_recorded():
            look_at_training(context)
        return output

    def enter(self, outer: ForwardContext | None, args: Sequence[Any], kwargs: dict[str, Any]) -> ForwardContext:
        """The context of a call, with its edits worked out; `outer` if the call goes on with that one.

        Args:
            outer: the context that is open.
            args, kwargs: as the module's forward is given them; our own arguments are taken out.

        Raises:
            ValueError: in training, for what was given and cannot be used, or a block that is no longer in its place.
        """
        own = take_own(kwargs)
        context = open_context(self, outer, {**dict(zip(self.names, args)), **kwargs}, own)
        if context is not outer:
            context.prepare()
        if outer is None and not torch.compiler.is_compiling():
            self._look_at_blocks()
        if context is not outer and is_recorded():
            self.path.wrap_checkpoints(self.state.running)
        return context

    def _look_at_blocks(self) -> None:
        """Put the blocks' entries back in place, should something else have taken it."""
        displaced = self.path.displaced()
        if displaced is not None:
            notices.raise_or_warn_displaced(self.state, self.module, displaced)
        for _, _, block in self.path.blocks:
            attach_block_entry(block, self.state)

    def _below_what_replaced_it(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, called by what took the entry's place (see `StayOutermost`).

        torch calls no hook after an interruption, such as Ctrl-C: then a context that hooks opened is closed here.
        """
        close, self.close = self.close, None
        try:
            return self.original(*args, **kwargs)
        except BaseException as error:
            if close is not None and not isinstance(error, Exception):
                close()
            raise

    def succeeded_by(self, found: Any) -> ForwardEntry:
        """A new entry in front of what has taken this one's place, which may call this one, or no longer does."""
        successor = self.copied(replaced=found)
        self.state.entries[self.state.entries.index(self)] = successor
        self.passive = True
        self.module.__dict__["forward"] = successor
        return successor

    def _of_replica(self) -> ForwardEntry:
        """The entry of the replica that nn.DataParallel calls in this thread, whose layers are its own."""
        module, self.state.running.replica = self.state.running.replica, None
        assert module is not None
        kinds = {type(layer) for layer in self.layers}
        layers = [part for part in module.modules() if type(part) in kinds]
        for part in module.modules():
            block_entry = part.__dict__.get("forward")
            if type(block_entry) is BlockEntry:
                block_entry.copied(module=part).attach()
        return self.copied(module=module, layers=layers, path=Path(module, ()))


def is_recorded() -> bool:
    """Whether autograd records what runs now, so that checkpoints may run blocks again."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()
