"""The ReFT adapters of one worker of vLLM: its model's blocks, its table of slots, the requests that it runs.

vLLM's own classes are reached through patches.py, which calls what is here with plain values. An adapter is accepted
only if everything that its edits need was found when the model was loaded; otherwise it is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from peft_reft.integrations.vllm.adapters import AdapterFactors, ServedAdapter, Version, read_factors
from peft_reft.integrations.vllm.operation import EditHook
from peft_reft.integrations.vllm.probe import UnknownConvention, find_conventions
from peft_reft.integrations.vllm.requests import wishes_of
from peft_reft.integrations.vllm.rule import RequestEdits
from peft_reft.integrations.vllm.slots import SlotTable
from peft_reft.integrations.vllm.step import NOTHING, edited_tokens


@dataclass(frozen=True)
class Sizes:
    """How large a worker's tables are.

    Attributes:
        slots: adapters that can be resident at once.
        columns: rank times interventions that each may have.
        width: of the hidden states.
        max_tokens: the most tokens of a step.
    """

    slots: int
    columns: int
    width: int
    max_tokens: int


class Blocks(dict[int, nn.Module]):
    """The blocks of a model that this worker has, by their numbers in the whole model.

    Attributes:
        names: of all blocks of the model, those of other workers included.
    """

    names: list[str]


def find_blocks(model: nn.Module, count: int, absent: tuple[type, ...]) -> Blocks:
    """The blocks of a model: the one list of modules that has as many as its config says, and lies in no other.

    Args:
        count: how many blocks the config says the model has.
        absent: classes that stand for the blocks of other pipeline stages.

    Raises:
        UnknownConvention: if there is no such list, or several.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    }
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if len(outer) != 1:
        raise UnknownConvention(
            f"{type(model).__name__} has {len(outer)} lists of {count} modules ({', '.join(outer) or 'none'}), so that "
            "its blocks cannot be told"
        )
    blocks = Blocks((n, block) for n, block in enumerate(lists[outer[0]]) if not isinstance(block, absent))
    blocks.names = [f"{outer[0]}.{number}" for number in range(count)]
    return blocks


class Running:
    """A request that runs, with an adapter of either type.

    Args:
        adapter_id: of its adapter.
        tokens, length, extra: as for `Worker.note`.
    """

    def __init__(self, adapter_id: int, tokens: Sequence[int] | None, length: int, extra: Any):
        self.adapter_id, self._given = adapter_id, (tokens, length, extra)
        self._edits: RequestEdits | None = None

    def edits_by(self, served: ServedAdapter | None) -> RequestEdits | None:
        """Which of its tokens are edited, worked out once; None for a LoRA adapter."""
        if served is not None and self._edits is None:
            tokens, length, extra = self._given
            wishes = wishes_of(extra)
            prompt = length if wishes.prompt_length is None else wishes.prompt_length
            self._edits = RequestEdits(served.rule, prompt, wishes.strength, tokens)
            self._given = None, length, None  # a long prompt need not be kept
        return self._edits


class Worker:
    """The ReFT adapters of one worker.

    Args:
        obstacles: what keeps this engine from serving ReFT adapters at all, in words.
        drafts: whether steps hold drafted tokens, some of which are dropped afterwards (speculative decoding).
        rename: a module's name in transformers -> its name in vLLM's model.

    Attributes:
        problem: why no ReFT adapter can be served, or None.
    """

    def __init__(self, obstacles: Sequence[str] = (), drafts: bool = False, rename: Callable[[str], str] = str):
        self.problem: str | None = "; ".join(obstacles) or None
        self.drafts = drafts
        self.rename = rename
        self.sizes: Sizes | None = None
        self.table: SlotTable | None = None
        self.blocks = Blocks()
        self.versions: dict[int, Version] = {}  # of the files that were read for each id
        self.in_slot: dict[int, tuple[int, ServedAdapter | None]] = {}  # resident adapters by id; None if LoRA
        self.requests: dict[str, Running] = {}  # those with an adapter, by id

    def attach(
        self,
        find: Callable[[], Blocks],
        run: Callable[[], Any],
        silence: Iterable[nn.Module],
        sizes: Sizes,
        device: torch.device,
    ) -> None:
        """Find out how the model's blocks return the stream, and put a hook on each.

        Args:
            find: gives the model's blocks.
            run, silence: as for `find_conventions`.
        """
        if self.problem is not None:
            return
        try:
            self.blocks = find()
            conventions = find_conventions(list(self.blocks.values()), run, list(silence), sizes.width)
        except UnknownConvention as error:
            self.problem = str(error)
            return
        except Exception as error:  # whatever a trial forward of a model can raise: without it nothing is known
            self.problem = f"a trial forward of the model failed ({type(error).__name__}: {error})"
            return
        self.sizes = sizes
        self.table = SlotTable(sizes.slots, sizes.columns, sizes.width, len(self.blocks), sizes.max_tokens, device)
        for index, (block, convention) in enumerate(zip(self.blocks.values(), conventions)):
            block.register_forward_hook(EditHook(self.table.number, index, convention))

    def load(self, served: ServedAdapter, adapter_id: int, anew: bool = False) -> AdapterFactors:
        """Read an adapter's weights.

        Args:
            anew: other files than those that were read for the id before may lie there now.

        Raises:
            ValueError: if it cannot be served, with the reason and a way out.
            RuntimeError: if its files are not those that its requests were accepted with. They wait or run, so that
                there is no request left to refuse.
        """
        if not anew and self.versions.get(adapter_id, served.version) != served.version:
            raise RuntimeError(
                f"The files of the ReFT adapter in {str(served.directory)!r} changed while requests with it were "
                "waiting, and it has to be read again (--max-cpu-loras keeps more adapters in memory). Put a new "
                "version into a new folder, or unload the adapter before."
            )
        if self.problem is not None or self.table is None or self.sizes is None:
            raise ValueError(
                f"The ReFT adapter in {str(served.directory)!r} cannot be served by this engine: {self.problem}. The "
                "base model and LoRA adapters are served as ever; serve this adapter with transformers (peft_reft's "
                "documentation, 'Serving many adapters')."
            )
        if self.drafts and any(term.generated and term.count > 1 for term in served.rule.spec.terms):
            raise ValueError(
                f"The ReFT adapter in {str(served.directory)!r} has positions={served.config.positions!r}, which count "
                "generated tokens, and with speculative decoding their numbers are known only after a step. Start "
                "vLLM without it, or serve an adapter that edits every generated token ('d') or none."
            )
        adapter = read_factors(served, self.blocks.names, self.sizes.width, self.rename)
        self.table.check(adapter)
        self.versions[adapter_id] = served.version
        own = {number: index for index, number in enumerate(self.blocks)}  # other stages hold the other blocks
        blocks = {own[number]: groups for number, groups in adapter.blocks.items() if number in own}
        return AdapterFactors(served, blocks, adapter.groups, adapter.rank)

    def activate(self, slot: int, adapter_id: int, adapter: AdapterFactors | None) -> None:
        """An adapter takes a slot; None for one that is no ReFT adapter."""
        for other in [id for id, (taken, _) in self.in_slot.items() if taken == slot or id == adapter_id]:
            del self.in_slot[other]
        if self.table is not None:
            self.table.put(slot, adapter)
        self.in_slot[adapter_id] = slot, None if adapter is None else adapter.served

    def reset(self) -> None:
        """All adapters left their slots, since the model's weights were replaced."""
        self.in_slot.clear()
        if self.table is not None:
            self.table.reset()

    def note(self, request: str, adapter_id: int, tokens: Sequence[int] | None, length: int, extra: Any) -> None:
        """A request with an adapter, of whichever type, begins, or begins again.

        Args:
            tokens: of its prompt; None if it is given as embeddings.
            length: of its prompt.
            extra: its extra arguments.
        """
        self.requests[request] = Running(adapter_id, tokens, length, extra)

    def forget(self, requests: Iterable[str], known: Collection[str]) -> None:
        """Requests are finished; those that are not among the known ones are, too."""
        for request in requests:
            self.requests.pop(request, None)
        if len(self.requests) > 2 * len(known) + 64:
            self.requests = {request: edits for request, edits in self.requests.items() if request in known}

    def begin_step(
        self, requests: Sequence[str], computed: NDArray[np.integer], scheduled: NDArray[np.integer]
    ) -> None:
        """Say what the coming forward edits.

        Args:
            requests: their ids, in the order in which their tokens lie.
            computed, scheduled: as for `edited_tokens`.
        """
        if self.table is None:
            return
        slots = np.full(len(requests), -1, np.int64)
        strengths = np.ones(len(requests), np.float32)
        found: list[RequestEdits | None] = [None] * len(requests)
        for number, request in enumerate(requests):
            running = self.requests.get(request)
            if running is None:
                continue
            if running.adapter_id not in self.in_slot:
                raise RuntimeError(
                    f"Request {request!r} needs the adapter of id {running.adapter_id}, which is in no slot: it would "
                    "be answered without its edits. Please report this with the version of vLLM."
                )
            slots[number], served = self.in_slot[running.adapter_id]
            found[number] = edits = running.edits_by(served)
            strengths[number] = 1 if edits is None else edits.strength
        edited = edited_tokens(found, computed, scheduled) if any(found) else NOTHING
        self.table.begin_step(edited, slots, strengths)
