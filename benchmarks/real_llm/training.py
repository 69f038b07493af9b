"""One training, a step at a time, so that several can go side by side on one GPU.

On a GPU a model of this size is bound by the host: it waits for Python to start kernels. There a step is captured once
as a CUDA graph (forward, backward, clipping, AdamW) and replayed; several trainings, each on a stream of its own, then
fill the device from one process.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

WARMUP = 0.1  # of the steps; then the rate falls to 0 on a line
CLIP = 1.0
EAGER_STEPS = 5  # before the capture: the first forwards hold checks that a graph cannot
AGREEMENT = 0.02  # by how much the loss of a replayed step may differ from that of an eager forward, relative

Batch = dict[str, Tensor]


class Training:
    """A model, its batches and its optimizer.

    Args:
        model: with something that requires gradients.
        batches: one for each step, on the model's device; of one shape if `graph`.
        lr: the highest learning rate.
        graph: capture a step as a CUDA graph, and replay it.
        keep: columns at the end that hold all labels, and one before them.
        autocast: compute in bfloat16 what the model has in float32.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: list[Batch],
        lr: float,
        keep: int,
        graph: bool = False,
        autocast: bool = False,
    ):
        self.model, self.batches, self.lr, self.keep = model.train(), batches, lr, keep
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.device = self.parameters[0].device
        # A graph reads the rate where it lay at the capture, so that it is a tensor there.
        rate: Any = torch.tensor(lr, device=self.device) if graph else lr
        self.optimizer = torch.optim.AdamW(self.parameters, lr=rate, weight_decay=0.0, capturable=graph, fused=graph)
        self.autocast = autocast
        self.losses = torch.zeros(len(batches), device=self.device)
        self.number = 0
        self.stream = torch.cuda.Stream() if graph else None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.given: Batch = {}  # what the graph reads
        self.loss: Tensor | None = None  # what it writes

    def rate(self) -> float:
        """The learning rate of the coming step."""
        warm = max(1, int(WARMUP * len(self.batches)))
        rest = (len(self.batches) - self.number) / max(1, len(self.batches) - warm)
        return self.lr * min((self.number + 1) / warm, rest)

    def context(self) -> contextlib.AbstractContextManager:
        """A graph must not hold casts that autocast cached outside it."""
        if not self.autocast:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)

    def step(self) -> None:
        """The next step: the first ones eagerly, then as a graph, if there is to be one."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                with torch.cuda.stream(self.stream):
                    group["lr"].fill_(self.rate())
            else:
                group["lr"] = self.rate()
        batch = self.batches[self.number]
        if self.stream is None:
            self.losses[self.number] = self._compute(batch)
        elif self.number < EAGER_STEPS:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.losses[self.number] = self._compute(batch)
        else:
            if self.graph is None:
                self._capture(batch)
            with torch.cuda.stream(self.stream):
                for name, tensor in batch.items():
                    self.given[name].copy_(tensor)
                self.graph.replay()
                self.losses[self.number].copy_(self.loss)
        self.number += 1

    def _compute(self, batch: Batch) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        with self.context():
            loss = self.model(**batch, use_cache=False, logits_to_keep=self.keep).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()
        return loss.detach()

    def _capture(self, batch: Batch) -> None:
        """Capture a step (which is not run by that), after an eager forward whose loss the first replay must repeat.

        Raises:
            RuntimeError: if it does not.
        """
        torch.cuda.synchronize()
        with torch.no_grad(), self.context():
            expected = self.model(**batch, use_cache=False, logits_to_keep=self.keep).loss.item()
        self.given = {name: tensor.clone() for name, tensor in batch.items()}
        kept = [parameter.detach().clone() for parameter in self.parameters]
        state = {p: {k: v.clone() for k, v in s.items()} for p, s in self.optimizer.state.items()}
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.loss = self._compute(self.given)
        self.graph.replay()
        torch.cuda.synchronize()
        found = self.loss.item()
        if not abs(found - expected) <= AGREEMENT * abs(expected):
            raise RuntimeError(f"A replayed step has the loss {found}, the same forward without a graph {expected}.")
        with torch.no_grad():  # undo that trial step
            for parameter, value in zip(self.parameters, kept):
                parameter.copy_(value)
            for parameter, values in state.items():
                for name, value in values.items():
                    self.optimizer.state[parameter][name].copy_(value)

    def finish(self) -> list[float]:
        """Wait for the last step, and give the graph's memory back.

        Returns:
            The loss of each step.
        """
        if self.stream is not None:
            self.stream.synchronize()
        self.graph, self.loss, self.given = None, None, {}
        self.optimizer.zero_grad(set_to_none=True)
        self.model.eval()
        return self.losses.tolist()
