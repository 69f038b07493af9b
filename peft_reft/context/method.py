"""What stands in for a method of a module, as an attribute of the instance.

An object rather than a function, so that models with an adapter can still be pickled and copied.
"""

from __future__ import annotations

from typing import Any, Self

from torch import nn

from peft_reft.context.state import ModelState


class MethodEntry:
    """Stands in for a method of a module.

    Args:
        module: the module.
        state: shared by all entries of a model.
    """

    name: str

    def __init__(self, module: nn.Module, state: ModelState):
        self.module = module
        self.state = state
        self.replaced: Any = module.__dict__.get(self.name)  # accelerate and TRL put theirs there, too

    def attach(self) -> None:
        self.module.__dict__[self.name] = self

    def detach(self) -> None:
        """Give the module its own method back, unless something else has taken this one's place."""
        if self.module.__dict__.get(self.name) is self:
            del self.module.__dict__[self.name]
            if self.replaced is not None:
                self.module.__dict__[self.name] = self.replaced

    def copied(self, **changes: Any) -> Self:
        """A copy with other attributes, on no module yet."""
        entry = object.__new__(type(self))
        entry.__dict__.update(self.__dict__, **changes)
        return entry

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module's own method, or what had been put in its place."""
        if self.replaced is not None:
            return self.replaced(*args, **kwargs)
        return getattr(type(self.module), self.name)(self.module, *args, **kwargs)

    @property
    def __wrapped__(self) -> Any:  # for inspect.signature, help and the like
        if self.replaced is not None:
            return self.replaced
        return getattr(type(self.module), self.name).__get__(self.module)

    @property
    def __name__(self) -> str:
        return self.name

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        return self.__wrapped__.__doc__
