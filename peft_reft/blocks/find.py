"""Finding a model's blocks, and the width and layout of what a module returns.

In this order: what the classes of transformers declare, where that is enough (`declared`); a trace (`tracing`), where
the model can be traced; its lists of modules (`structure`). The tokens' columns in a hidden state are `Layout`'s.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.modules.conv import _ConvNd

from peft_reft.blocks.compiled import own_modules, own_name
from peft_reft.blocks.declared import DeclaredStack, declared_stacks
from peft_reft.blocks.layout import CHANNELS_FIRST, PLAIN, Layout
from peft_reft.blocks.limits import refuse_unsound
from peft_reft.blocks.structure import block_width, structural_stacks

if TYPE_CHECKING:  # the room for tracing is entered when it is needed: most models need none
    from peft_reft.blocks.tracing.traced_model import TracedModel


class ModelBlocks:
    """The blocks of one model; answers are remembered, since every further adapter asks the same questions.

    Attributes:
        model: the model. Its modules must stay the same; what is added to a block does no harm.
        ids_per_row: how many rows of ids make one row of the hidden state: more than one for audio with codebooks.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.ids_per_row = 1
        self._stacks: list[list[str]] | None = None
        self._shapes: dict[str, tuple[int, Layout]] = {}
        self._traced: TracedModel | None = None

    def stacks(self) -> list[list[str]]:
        """Own names of the blocks of each of the model's stacks, encoder first, in their order.

        `present_names` gives those for `model.get_submodule`: where `torch.compile` has wrapped a block, that of the
        block inside.

        Raises:
            ValueError: if there are none, or an adapter cannot work on them, with the reason.
        """
        if self._stacks is None:
            stacks = self._find_stacks()
            for stack in stacks:
                refuse_unsound(self.model, stack)
            self._stacks = stacks
        return self._stacks

    def shape_of(self, name: str) -> tuple[int, Layout]:
        """Width and layout of what a module returns.

        Args:
            name: the module's, in the model as it is or its own.

        Raises:
            ValueError: if the width cannot be told.
        """
        name = own_name(name)
        if name not in self._shapes:
            self._shapes[name] = self._find_shape(name)
        return self._shapes[name]

    def forget_trace(self) -> None:
        """Let go of the tensors of the trace; the answers stay."""
        self._traced = None

    def _find_stacks(self) -> list[list[str]]:
        if self._declared:
            return [stack.names for stack in self._declared]
        from peft_reft.blocks.tracing.stacks import traced_stacks

        stacks = traced_stacks(self._trace()) or structural_stacks(self.model)
        if not stacks:
            modules = own_modules(self.model)
            names = [name for name, module in modules.items() if name and any(True for _ in module.parameters())]
            shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
            raise ValueError(
                f"No list of blocks was found in {type(modules['']).__name__}. Name the modules whose output is to be "
                "edited in ReftConfig(target_modules=[...]); candidates: "
                f"{shown or 'none, the model has no parameters'}."
            )
        return stacks

    def _find_shape(self, name: str) -> tuple[int, Layout]:
        for stack in self._declared:
            if name in stack.names:
                return stack.width, PLAIN
        from peft_reft.blocks.tracing.layouts import traced_layout

        traced = self._trace()
        layout = traced_layout(traced, name)
        if layout is None:  # not run in the trace, such as a vision tower
            module = own_modules(self.model)[name]
            if isinstance(module, _ConvNd):
                return module.out_channels, CHANNELS_FIRST
            return block_width(self.model, name), PLAIN
        return traced.shapes(name)[0][layout.vector], layout

    @cached_property
    def _declared(self) -> list[DeclaredStack]:
        return declared_stacks(self.model)

    def _trace(self) -> TracedModel:
        if self._traced is None:
            from peft_reft.blocks.tracing.traced_model import TracedModel

            self._traced = TracedModel(self.model)
            self.ids_per_row = self._traced.entry.ids_per_row
        return self._traced
