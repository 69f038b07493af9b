"""A copy of a model without its weights: its modules and their attributes, parameters that take no memory, no hooks.

Running it reads and changes nothing of the model, needs none of its devices, and multiplies no large matrices. Its
matrices are zero, so that blocks add nothing: a token's vector reaches the last block as it left the embedding.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PretrainedConfig

from peft_reft.blocks.compiled import uncompiled
from peft_reft.blocks.configs import configs_of

_HOOKS = [name for name in nn.Module().__dict__ if "hook" in name and name != "_is_full_backward_hook"]
_OWN_STATE = {"_parameters", "_buffers", "_modules", "forward", "generate", "_compiled_call_impl", *_HOOKS}
_LARGE = 1_000_000  # elements of a buffer that is not copied; multiplications of a product that is not computed


def weightless_copy(model: nn.Module) -> nn.Module:
    """A copy of the model's modules whose weights are views of single numbers; nothing in it is compiled."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        inner = uncompiled(module)
        if id(inner) not in memo:
            memo[id(inner)] = _zero_linear(inner) or object.__new__(type(inner))
        memo[id(module)] = memo[id(inner)]
    for module in model.modules():
        copied = memo[id(module)]
        if isinstance(copied, _ZeroLinear) or uncompiled(module) is not module:
            continue
        state = {k: _copied_value(v, memo) for k, v in module.__dict__.items() if k not in _OWN_STATE}
        copied.__dict__.update(state, training=False, _compiled_call_impl=None)
        copied.__dict__.update({name: OrderedDict() for name in _HOOKS if name in module.__dict__})
        parameters = {k: None if p is None else nn.Parameter(_ghost(p), False) for k, p in module._parameters.items()}
        buffers = {k: None if b is None else _copy_of(b) for k, b in module._buffers.items()}
        children = {k: None if m is None else memo[id(m)] for k, m in module._modules.items()}
        copied.__dict__.update(_parameters=parameters, _buffers=buffers, _modules=children)
    return memo[id(model)]


class _ZeroLinear(nn.Module):
    """In place of a linear layer with a storage of its own (quantised): returns zeros."""

    def __init__(self, out_features: int):
        super().__init__()
        self.out_features = out_features

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # Computed from x, for whoever follows its gradient.
        return (x[..., :1] * 0).repeat_interleave(self.out_features, dim=-1)


def _zero_linear(module: nn.Module) -> nn.Module | None:
    """The module to put in place of a linear layer whose weight is no matrix of numbers; None for all others."""
    weight = module._parameters.get("weight")
    sizes = (getattr(module, "out_features", None), getattr(module, "in_features", None))
    if weight is None or not all(isinstance(size, int) for size in sizes) or isinstance(module, nn.Bilinear):
        return None
    usual = weight.shape in (sizes, sizes[::-1]) and weight.is_floating_point() and weight.dtype.itemsize > 1
    return None if usual else _ZeroLinear(sizes[0])  # type: ignore[arg-type]


def _ghost(tensor: Tensor) -> Tensor:
    """Zeros (ones for vectors: the scales of norms) of the tensor's shape that take no memory."""
    value = 1.0 if tensor.dim() == 1 else 0.0
    shape = getattr(tensor, "ds_shape", tensor.shape)  # DeepSpeed keeps the shape of what it has taken apart
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return torch.full((), value, dtype=dtype).expand(tuple(shape))


def _copy_of(tensor: Tensor) -> Tensor:
    """A small buffer as it is, a large one as zeros."""
    if tensor.is_meta or tensor.numel() > _LARGE:
        return _ghost(tensor) if tensor.dim() != 1 else _ghost(tensor) * 0
    copied = tensor.detach().cpu().clone()
    return copied.float() if copied.is_floating_point() else copied


def _copied_value(value: Any, memo: dict[int, Any]) -> Any:
    """An attribute's value: modules become their copies, and what a forward might change is copied."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, Tensor):
        return _copy_of(value)
    if isinstance(value, PretrainedConfig):
        memo[id(value)] = config = copy.deepcopy(value)
        _run_anywhere(config)
        return config
    if type(value) in (list, tuple, set):
        return type(value)(_copied_value(v, memo) for v in value)
    if type(value) in (dict, OrderedDict):
        return type(value)((k, _copied_value(v, memo)) for k, v in value.items())
    if inspect.ismethod(value) and id(value.__self__) in memo:
        return MethodType(value.__func__, memo[id(value.__self__)])
    return value


def _run_anywhere(config: PretrainedConfig) -> None:
    """Choose implementations that need no special device or layout of the weights."""
    for part in configs_of(config):
        if part.__dict__.get("_attn_implementation_internal") not in (None, "eager", "sdpa"):
            part.__dict__["_attn_implementation_internal"] = "eager"
        if "_experts_implementation_internal" in part.__dict__:
            part.__dict__["_experts_implementation_internal"] = "eager"


_aten = torch.ops.aten
# Which of the arguments is the first factor.
_PRODUCTS = {_aten.mm.default: 0, _aten.bmm.default: 0, _aten.addmm.default: 1, _aten.baddbmm.default: 1}


class _NoLargeProducts(TorchDispatchMode):
    """Returns zeros for products of large matrices, without computing them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS:
            a, b = args[_PRODUCTS[func] :][:2]
            if a.numel() * b.shape[-1] > _LARGE:
                return a.new_zeros(*a.shape[:-1], b.shape[-1])
        elif func._schema.is_mutable and args and isinstance(args[0], nn.Parameter):
            return args[0]  # a model that rescales its weights: there is no memory to write to
        return func(*args, **(kwargs or {}))


def call_quietly(module: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
    """Call a weightless copy, without its warnings, and without changing what random numbers are drawn later."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), _NoLargeProducts():
        warnings.simplefilter("ignore")
        return module(**inputs)
