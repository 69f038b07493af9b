"""Where a module computes, and in what dtype."""

from __future__ import annotations

import torch
from torch import nn


def device_and_dtype(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a module computes and in what floating dtype, also if it is offloaded or quantised."""
    tensors = [*module.parameters(), *module.buffers()]
    dtype = next(
        (t.dtype for t in tensors if t.is_floating_point() and t.dtype.itemsize > 1), torch.get_default_dtype()
    )
    for part in module.modules():  # accelerate's hook knows where an offloaded module computes
        execution_device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if execution_device is not None:
            return torch.device(execution_device), dtype
    device = next((t.device for t in tensors if not t.is_meta), None)
    return device or (tensors[0].device if tensors else torch.device("cpu")), dtype
