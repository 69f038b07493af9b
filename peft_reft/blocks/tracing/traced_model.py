"""A model with two traces of it, which differ in rows and columns; the questions that these answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import nn

from peft_reft.blocks.compiled import own_modules, uncompiled
from peft_reft.blocks.structure import size_of
from peft_reft.blocks.tracing.dummy_inputs import EntryPoint, entry_points, has_images_beside_tokens
from peft_reft.blocks.tracing.trace import ModuleCall, Trace, trace

TOKENS = ((2, 7), (3, 9))  # rows and columns of the two; no padding to a multiple leaves both numbers of columns alone


@dataclass(frozen=True)
class BlockList:
    """A list of modules in the model that ran in the traces.

    Attributes:
        names: the modules that return the hidden state of each entry: the entry, or its last part.
        ran: those of them that ran, in the order of the list.
        size: how many parameters the list has.
        kind: the class of its first entry.
        leaves: whether an entry has no parts, and so is no block.
    """

    names: list[str]
    ran: list[str]
    size: int
    kind: type
    leaves: bool


class TracedModel:
    """A model that was called on dummy inputs, by the first of its entry points that reaches lists of modules.

    Attributes:
        model: the model.
        modules: its modules by their own names.
        entry: how it was called.
        traces: one trace for each of `TOKENS`; none if the model cannot be traced.
        with_image: the same with an image beside each row of tokens, where that has places of its own.
    """

    def __init__(self, model: nn.Module, entries: Sequence[EntryPoint] | None = None):
        """Args: entries: the entry points to try; None for those of `entry_points`."""
        self.model = uncompiled(model)
        self.modules = own_modules(model)
        self.entry, self.traces = EntryPoint(), []
        without_lists: list[tuple[EntryPoint, list[Trace]]] = []
        for entry in entry_points(self.model) if entries is None else entries:
            try:
                traces = [trace(self.model, entry, *tokens) for tokens in TOKENS]
            except Exception:  # whatever a model's own code may raise on dummy inputs
                continue
            self.entry, self.traces = entry, traces
            if next(self.lists(), None) is not None:
                break
            without_lists.append((entry, traces))
        else:
            if without_lists:
                self.entry, self.traces = without_lists[0]
        has_image = bool(self.traces) and not self.entry.with_image and has_images_beside_tokens(model, self.entry)
        with_image = [replace(self.entry, with_image=True)]
        self.with_image = TracedModel(model, with_image) if has_image else None

    def calls(self, name: str) -> list[ModuleCall]:
        """A module's calls in the first trace."""
        return self.traces[0].by_name.get(name, [])

    def shapes(self, name: str) -> list[tuple[int, ...]]:
        """The shapes of a module's output in the traces; fewer than two if it did not run."""
        calls = [one.by_name[name][0] for one in self.traces if name in one.by_name]
        return [tuple(call.output.shape) for call in calls if call.output is not None]

    def columns(self, name: str) -> list[int]:
        """The numbers of tokens that a module saw: the decoder's if they fit its output, else the input's."""
        decoder = [one.decoder_columns for one in self.traces]
        for one, other in zip(*self.shapes(name)):
            if one != other and one % decoder[0] == 0 and one // decoder[0] * decoder[1] == other:
                return decoder
        return [one.columns for one in self.traces]

    def affects_output(self, name: str) -> bool:
        """Whether what the model returns (its logits, mostly) depends on a module's output in a differentiable way.

        True also where that cannot be seen.
        """
        try:
            result = trace(self.model, self.entry, *TOKENS[0], followed=name).calls[-1].output
        except Exception:  # code that writes to what requires gradients
            return True
        return result is None or result.requires_grad

    def lists(self, path: str = "") -> Iterator[BlockList]:
        """The outermost lists of modules that ran, below a module; a list of lists counts as one."""
        for name, _ in self.modules[path].named_children():
            inner = f"{path}.{name}" if path else name
            entries = self._entries(inner) if isinstance(self.modules[inner], nn.ModuleList) else []
            names = [self._end_of(entry) for entry in entries]
            ran = [name for name in names if len(self.shapes(name)) == len(self.traces)]
            if not ran:
                yield from self.lists(inner)
                continue
            leaves = not all(any(True for _ in self.modules[entry].children()) for entry in entries)
            yield BlockList(names, ran, size_of(self.modules[inner]), type(self.modules[entries[0]]), leaves)

    def _entries(self, path: str) -> list[str]:
        """Names of a list's modules; of all of them in their order if it is a list of lists."""
        names = []
        for name, _ in self.modules[path].named_children():
            inner = f"{path}.{name}"
            names += self._entries(inner) if isinstance(self.modules[inner], nn.ModuleList) else [inner]
        return names

    def _end_of(self, entry: str) -> str:
        """The entry, or the part it ends in if it ran without a call that runs hooks, `layer.forward(...)`."""
        if self.calls(entry):
            return entry
        depth = entry.count(".") + 1
        calls = self.traces[0].calls
        parts = [c.name for c in calls if c.name.startswith(f"{entry}.") and c.name.count(".") == depth]
        return parts[-1] if parts else entry
