"""transformers' continuous batching: packed rows with pieces of many requests, run in a thread of its own.

Neither the tensors of such a forward nor `generate` show how long a request's prompt is (long ones come in chunks), but
the manager that scheduled it does. So the manager is noted where it is made, and asked in every forward.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from peft_reft.context.method import MethodEntry
from peft_reft.context.passed import take_own
from peft_reft.context.state import ModelState
from peft_reft.positions import Prompts
from peft_reft.tuner.neighbours import METHODS


def register() -> None:
    """Stand in for the methods that make a manager and run requests, on every model with an adapter."""
    for entry in (BatchingEntry, RequestsEntry):
        if entry not in METHODS:
            METHODS.append(entry)


class BatchingEntry(MethodEntry):
    """Stands in for `init_continuous_batching`: notes the manager, which knows what each forward's row holds."""

    name = "init_continuous_batching"

    def __init__(self, module: nn.Module, state: ModelState):
        super().__init__(module, state)
        self.manager: Any = None

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        self.__dict__.update(attributes)
        self.state.paged = self.prompts

    def attach(self) -> None:
        super().attach()
        self.state.paged = self.prompts

    def detach(self) -> None:
        super().detach()
        self.state.paged = None

    def __call__(
        self, generation_config: Any = None, continuous_batching_config: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        if continuous_batching_config is None:
            settings = generation_config or getattr(self.module, "generation_config", None)
            continuous_batching_config = getattr(settings, "continuous_batching_config", None)
        if continuous_batching_config is None:
            from transformers import ContinuousBatchingConfig

            continuous_batching_config = ContinuousBatchingConfig()
        # Requests that begin alike would share cached blocks, but the last tokens of one prompt, which are edited, may
        # be in the middle of another.
        continuous_batching_config = copy.copy(continuous_batching_config)
        continuous_batching_config.allow_block_sharing = False
        manager = self.original(generation_config, continuous_batching_config, *args, **kwargs)
        self.manager = weakref.ref(manager)
        return manager

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "manager": None}

    def prompts(self, columns: int, device: torch.device) -> tuple[Prompts, bool]:
        """Where the prompts lie in the running forward's row, and whether it holds generated tokens only.

        Raises:
            ValueError: if another manager runs the model, or a CUDA graph would freeze the places of prompt tokens.
        """
        requests = self.requests()
        if requests is None:
            raise ValueError(
                "A ReFT model was run by a continuous batching manager that it does not know, so that the prompts of "
                "the requests are unknown. Start it with model.generate_batch or model.init_continuous_batching."
            )
        answers_only = all(past >= prompt for _, past, prompt in requests)
        if not answers_only and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "A CUDA graph of a forward with prompt tokens would edit the same places in every replay. Pass "
                "ContinuousBatchingConfig(use_cuda_graph=False)."
            )
        return paged_prompts(requests, columns, device), answers_only

    def requests(self) -> list[tuple[int, int, int]] | None:
        """The pieces of the running forward's row, in their order: columns, columns before it, prompt length.

        None if there is no manager.
        """
        manager = None if self.manager is None else self.manager()
        processor = getattr(manager, "batch_processor", None)
        if processor is None:
            return None
        batch = processor.inputs_and_outputs
        if hasattr(batch, "io_pairs"):  # asynchronous scheduling prepares one batch while another runs
            batch = batch.io_pairs[batch.current_pair].host_io
        return [
            (
                request.query_length,
                request.state.position_offset - request.query_length,
                request.state._true_initial_tokens or len(request.state.initial_tokens),
            )
            for request in batch.requests_in_batch
        ]


class RequestsEntry(MethodEntry):
    """Stands in for `generate_batch`, which passes over what it does not know: also over what is ours."""

    name = "generate_batch"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        names = [name for name, value in take_own(kwargs).items() if value is not None]
        if names:
            raise ValueError(
                f"generate_batch was passed {' and '.join(names)}, which continuous batching has no place for: all of "
                "its requests are edited by the model's active adapters. Use generate; or set_adapter, set_subspaces, "
                "and a call for each."
            )
        return self.original(*args, **kwargs)


def paged_prompts(requests: Sequence[tuple[int, int, int]], columns: int, device: torch.device) -> Prompts:
    """Where the prompts lie in one packed row [1, S] of pieces of requests.

    Args:
        requests: of each piece, as from `BatchingEntry.requests`. What follows behind the last piece is padding.
    """
    order = torch.zeros(1, columns, dtype=torch.long)
    length, document = torch.zeros_like(order), torch.zeros_like(order)
    at = 0
    for number, (size, past, prompt) in enumerate(requests):
        order[0, at : at + size] = torch.arange(past, past + size)
        length[0, at : at + size] = prompt
        document[0, at : at + size] = number
        at += size
    token = torch.arange(columns)[None] < at
    answer = token & (order >= length)
    prompts = Prompts(token & ~answer, order, length, document, max(1, len(requests)), answer, order - length)
    return prompts.map(lambda tensor: tensor.to(device))
