"""A model's blocks: finding them, and the width and layout of the hidden states they put out.

No table of architectures: a trace of the model shows which lists of modules its tokens pass through. Where a model
cannot be traced (it has no config, or its code needs what a stand-in has not), the structure alone has to tell.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PretrainedConfig

from peft_reft.blocks.layout import CHANNELS_FIRST, OWN, PLAIN, Layout, edit_hidden_state, layout_from
from peft_reft.blocks.structure import block_width, device_and_dtype, size_of, structural_stacks
from peft_reft.blocks.tracing.example_inputs import Entry, entries, has_images_beside_tokens
from peft_reft.blocks.tracing.trace import Run, is_read, run

__all__ = ["Survey", "block_width", "device_and_dtype", "edit_hidden_state", "find_blocks"]

TOKENS = ((2, 6), (3, 9))  # rows and columns of the two forwards that are traced


def find_blocks(model: nn.Module) -> list[list[str]]:
    """Names of the blocks of each of the model's stacks, in their order.

    Raises:
        ValueError: if there are none, or an adapter cannot work on them, with the reason.
    """
    return Survey(model).stacks()


@dataclass(frozen=True)
class BlockList:
    """A list of modules in the model that ran in the trace.

    Attributes:
        path: the list's name.
        names: the modules that put out the hidden state of each entry: the entry, or what it ends in.
        ran: those of them that ran, in the order of the list.
        size: how many parameters the list has.
        kind: the class of its first entry.
        leaves: whether an entry has no parts, and so is no block.
    """

    path: str
    names: list[str]
    ran: list[str]
    size: int
    kind: type
    leaves: bool


class Survey:
    """What is known about the modules of a model, from a trace of it if there can be one.

    Attributes:
        runs: two forwards with different numbers of rows and columns; none if the model cannot be traced.
    """

    def __init__(self, model: nn.Module, ways: Sequence[Entry] | None = None):
        """Run the model in the first of the `ways` that reaches lists of blocks; None for those of `entries`."""
        self.model = model
        is_traceable = isinstance(getattr(model, "config", None), PretrainedConfig)
        ways = ways if ways is not None else entries(model) if is_traceable else ()
        first: tuple[Entry, list[Run]] | None = None
        for entry in ways:
            try:
                runs = [run(model, entry, *tokens) for tokens in TOKENS]
            except Exception:  # whatever a model's own code may raise on example inputs
                continue
            first = first or (entry, runs)
            self._take(entry, runs)
            if next(self._lists(model, ""), None) is not None:
                break
        else:
            self._take(*(first or (Entry(), [])))
        is_beside = bool(self.runs) and not self._entry.with_image and has_images_beside_tokens(model, self._entry)
        self._beside = Survey(model, [replace(self._entry, with_image=True)]) if is_beside else None

    def _take(self, entry: Entry, runs: list[Run]) -> None:
        self._entry, self.runs, self._calls = entry, runs, [traced.calls() for traced in runs]

    @property
    def ids_per_row(self) -> int:
        """How many rows of ids make one row of the hidden state."""
        return self._entry.ids_per_row

    # Shapes.

    def shape_of(self, name: str) -> tuple[int, Layout]:
        """Width and layout of what a module puts out.

        Raises:
            ValueError: if the width cannot be told.
        """
        layout = self.layout_of(name)
        if layout is None:  # not run in the trace, such as a vision tower
            module = self.model.get_submodule(name)
            if isinstance(module, _ConvNd):
                return module.out_channels, CHANNELS_FIRST
            return block_width(self.model, name), PLAIN
        return self._shapes(name)[0][layout.vector], layout

    def layout_of(self, name: str) -> Layout | None:
        """The layout of a module's output in the trace; None if it was not run or puts out no vectors to count.

        Where an image's vectors may stand beside those of the tokens, it is the layout with an image, which tells where
        the tokens are without one, too.
        """
        layout = self._layout_of(name)
        beside = self._beside.layout_of(name) if self._beside is not None and layout == PLAIN else None
        return beside or layout

    def _layout_of(self, name: str) -> Layout | None:
        shapes = self._shapes(name)
        if len(shapes) < 2:
            return None
        rows = [traced.rows for traced in self.runs]
        if self.runs[0].is_image and self._columns(name)[0] == self.runs[0].columns:  # not a decoder of text
            return Layout(pool=OWN) if len(shapes[0]) == 3 and [shape[0] for shape in shapes] == rows else None
        layout = layout_from(shapes, rows, self._columns(name))
        if layout is not None and (layout.before or layout.padded):
            start = self._first_column(name, layout)
            if start is not None:
                return replace(layout, before=start, padded=layout.padded or start < layout.before)
            if not layout.padded:
                return None
            layout = None  # as many vectors as ever, and none of them a token's
        return layout or self._pooled_layout(name)

    def _pooled_layout(self, name: str) -> Layout | None:
        """The layout of an encoder's block that puts out [B, T, d] with fewer vectors than tokens."""
        shapes, rows = self._shapes(name), [traced.rows for traced in self.runs]
        can_generate = getattr(self.model, "can_generate", bool)()
        if can_generate or any(len(s) != 3 or s[0] != n for s, n in zip(shapes, rows)) or shapes[0][2] != shapes[1][2]:
            return None
        if shapes[0][1] == shapes[1][1]:
            return Layout(pool=OWN)
        many = 32  # tokens: enough to see by how much their number is divided
        output = run(self.model, self._entry, rows[0], many).calls()[name][0].output
        return None if output is None else Layout(pool=round(many / output.shape[1]))

    def _shapes(self, name: str) -> list[tuple[int, ...]]:
        """The shapes of a module's output in the runs; fewer than two if it did not run."""
        events = [calls[name][0] for calls in self._calls if name in calls]
        return [tuple(event.output.shape) for event in events if event.output is not None]

    def _columns(self, name: str) -> list[int]:
        """The numbers of tokens that a module saw: the decoder's if they fit its output, else the input's."""
        decoder = [traced.decoder_columns for traced in self.runs]
        for one, other in zip(*self._shapes(name)):
            if one != other and one % decoder[0] == 0 and one // decoder[0] * decoder[1] == other:
                return decoder
        return [traced.columns for traced in self.runs]

    def _first_column(self, name: str, layout: Layout) -> int | None:
        """Where the first token stands: the one column that changes when another token takes its place."""
        one, other = (run(self.model, self._entry, *TOKENS[1], token).calls()[name][0].output for token in (0, 1))
        if one is None or other is None:
            return None
        changed = (one != other).movedim((layout.rows, layout.columns), (0, 1)).flatten(2).any(2).any(0)
        found = changed.nonzero().flatten().tolist()
        return found[0] if len(found) == 1 else None

    # Blocks.

    def stacks(self) -> list[list[str]]:
        """Names of the blocks of each of the model's stacks, in their order.

        Raises:
            ValueError: if there are none, or an adapter cannot work on them, with the reason.
        """
        stacks = self._traced_stacks() if self.runs else []
        stacks = stacks or structural_stacks(self.model)
        if not stacks:
            raise ValueError(_no_blocks(self.model))
        return stacks

    def _traced_stacks(self) -> list[list[str]]:
        """The main list of blocks of each side, encoder first, with those that run in parallel to it."""
        sides: dict[bool, list[BlockList]] = {}
        for found in self._lists(self.model, ""):
            is_decoder = self._columns(found.ran[0])[0] != self.runs[0].columns
            sides.setdefault(is_decoder, []).append(found)
        has_decoder = len(sides) == 2
        if has_decoder and not getattr(self.model.config, "is_encoder_decoder", False):
            del sides[True]  # of a text diffusion model: it refines a draft, and has no prompt
        stacks = []
        for is_decoder, lists in sorted(sides.items()):
            candidates = [found for found in lists if not found.leaves]
            if not candidates:
                continue
            main = max(candidates, key=lambda found: found.size)
            twins = [f for f in candidates if (f.kind, f.size, len(f.names)) == (main.kind, main.size, len(main.names))]
            if len(twins) == 1:
                twins = [self._last_of_round(main, lists)]
                self._refuse_sharing(twins[0])
            for twin in twins:
                refuse_unsound(self.model, twin.names)
                self._refuse_maps(twin)
                unread = has_decoder and not is_decoder and not self._is_read(twin.names[-1])
                stacks.append(twin.names[:-1] if unread else twin.names)
        return stacks

    def _is_read(self, name: str) -> bool:
        """Whether an edit of a module's output can do anything: decoders that read the cache of an encoder's blocks
        read no output of the last one.
        """
        return is_read(self.model, self._entry, name, *TOKENS[0])

    def _lists(self, module: nn.Module, path: str) -> Iterator[BlockList]:
        """The outermost lists that ran; a list of lists counts as one."""
        for name, child in module.named_children():
            inner = f"{path}.{name}" if path else name
            entries_of = _entries(child, inner) if isinstance(child, nn.ModuleList) else []
            names = [self._end_of(entry) for entry in entries_of]
            ran = [name for name in names if len(self._shapes(name)) == len(self.runs)]
            if not ran:
                yield from self._lists(child, inner)
                continue
            first = self.model.get_submodule(entries_of[0])
            leaves = not all(any(True for _ in self.model.get_submodule(entry).children()) for entry in entries_of)
            yield BlockList(inner, names, ran, size_of(child), type(first), leaves)

    def _end_of(self, entry: str) -> str:
        """The entry, or the part it ends in if it ran without a call that runs hooks, `layer.forward(...)`."""
        if entry in self._calls[0]:
            return entry
        depth = entry.count(".") + 1
        parts = [e.name for e in self.runs[0].events if e.name.startswith(f"{entry}.") and e.name.count(".") == depth]
        return parts[-1] if parts else entry

    def _last_of_round(self, main: BlockList, lists: list[BlockList]) -> BlockList:
        """Where lists of parts take turns, so that no module is the block: the list whose parts end each round."""
        calls = self._calls[0]
        if len(main.ran) < 2 or self._is_chain(main):
            return main
        order = {event.name: number for number, event in enumerate(self.runs[0].events)}
        turns = [
            found for found in lists if len(found.ran) == len(main.ran) and all(len(calls[n]) == 1 for n in found.ran)
        ]
        rounds = list(zip(*([order[name] for name in found.ran] for found in turns)))
        if len(turns) < 2 or any(max(one) > min(other) for one, other in pairwise(rounds)):
            return main
        return max(turns, key=lambda found: order[found.ran[0]])

    def _is_chain(self, found: BlockList) -> bool:
        """Whether blocks are given what the ones before them put out."""
        for one, other in pairwise(found.ran):
            output = self._calls[0][one][0].output
            if any(given is output for given in self._calls[0][other][0].inputs):
                return True
        return False

    # What an adapter cannot work on.

    def _refuse_sharing(self, found: BlockList) -> None:
        in_order = [event.name for event in self.runs[0].events if event.name in found.names]
        if any(one == other for one, other in pairwise(in_order)):
            raise ValueError(
                f"{type(self.model).__name__} runs the same block several times in a row ({in_order[0]!r}: "
                f"{in_order.count(in_order[0])} times), so that its depths cannot have interventions of their own. "
                f"ReftConfig(target_modules=[{found.names[0]!r}]) edits its output every time it runs."
            )

    def _refuse_maps(self, found: BlockList) -> None:
        for name in found.ran:
            if self.layout_of(name) is None:
                raise ValueError(
                    f"The block {name!r} of {type(self.model).__name__} puts out hidden states of shape "
                    f"{list(self._shapes(name)[0])} for {self._tokens()}: they hold no vectors that "
                    "could be counted. Name modules that put out [B, S, d] in ReftConfig(target_modules=[...]), or any "
                    "modules together with positions='all'."
                )

    def _tokens(self) -> str:
        traced = self.runs[0]
        return f"{traced.rows} images" if traced.is_image else f"{traced.rows} rows of {traced.columns} tokens"


def refuse_unsound(model: nn.Module, names: list[str]) -> None:
    """Refuse blocks whose edits would be computed but mean something else.

    Raises:
        ValueError: with the reason.
    """
    if any(hasattr(model.get_submodule(name), "backward_pass") for name in names):
        raise ValueError(
            f"{type(model).__name__} has reversible blocks: their backward pass works out their inputs from their "
            "outputs, which an edit of the outputs would falsify without an error. ReFT cannot train it."
        )
    every = getattr(getattr(model, "config", None), "rescale_every", 0) or 0
    if 0 < every < len(names):
        raise ValueError(
            f"{type(model).__name__} halves its hidden states every {every} blocks at inference but not in training, "
            "so that an edit would mean different things. Set model.config.rescale_every = 0 before you run the model."
        )


def _entries(container: nn.ModuleList, path: str) -> list[str]:
    """Names of a list's modules; of all of them in their order if it is a list of lists."""
    names = []
    for name, child in container.named_children():
        inner = f"{path}.{name}"
        names += _entries(child, inner) if isinstance(child, nn.ModuleList) else [inner]
    return names


def _no_blocks(model: nn.Module) -> str:
    candidates = [name for name, module in model.named_modules() if name and any(True for _ in module.parameters())]
    shown = ", ".join(candidates[:20]) + (", ..." if len(candidates) > 20 else "")
    return (
        f"No list of blocks was found in {type(model).__name__}. Name the modules whose output is to be edited "
        f"in ReftConfig(target_modules=[...]); candidates: {shown or 'none, the model has no parameters'}."
    )


class Remembered:
    """The answers of a `Survey` of one model, which is made when a question is new: tracing takes a moment, and every
    further adapter asks the same questions.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._stacks: list[list[str]] | None = None
        self._shapes: dict[str, tuple[int, Layout]] = {}
        self._survey: Survey | None = None
        self.ids_per_row = 1

    def stacks(self) -> list[list[str]]:
        """As `Survey.stacks`."""
        if self._stacks is None:
            self._stacks = self._ask().stacks()
        return self._stacks

    def shape_of(self, name: str) -> tuple[int, Layout]:
        """As `Survey.shape_of`."""
        if name not in self._shapes:
            self._shapes[name] = self._ask().shape_of(name)
        return self._shapes[name]

    def _ask(self) -> Survey:
        if self._survey is None:
            self._survey = Survey(self.model)
            self.ids_per_row = self._survey.ids_per_row
        return self._survey

    def forget_trace(self) -> None:
        """Let go of the tensors of the trace; the answers stay."""
        self._survey = None
