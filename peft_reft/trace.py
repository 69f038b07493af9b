"""What a model's modules put out, seen by running a stand-in for the model on a few tokens.

The stand-in has the model's modules and their attributes, but parameters that take no memory, and no hooks. Running
it reads and changes nothing of the model, needs none of its devices, and multiplies no large matrices.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PretrainedConfig

from peft_reft.layout import hidden_state_of
from peft_reft.structure import input_embedding

_HOOKS = [name for name in nn.Module().__dict__ if "hook" in name and name != "_is_full_backward_hook"]
_OWN_STATE = {"_parameters", "_buffers", "_modules", "forward", "generate", "_compiled_call_impl", *_HOOKS}
_LARGE = 1_000_000  # elements of a buffer that is not copied; multiplications of a product that is not worked out


def stand_in(model: nn.Module) -> nn.Module:
    """A copy of the model's modules whose weights are views of single numbers."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        memo[id(module)] = _plain_linear(module) or object.__new__(type(module))
    for module in model.modules():
        clone = memo[id(module)]
        if isinstance(clone, _ZeroLinear):
            continue
        state = {k: _stand_in_value(v, memo) for k, v in module.__dict__.items() if k not in _OWN_STATE}
        clone.__dict__.update(state, training=False, _compiled_call_impl=None)
        clone.__dict__.update({name: OrderedDict() for name in _HOOKS if name in module.__dict__})
        parameters = {k: None if p is None else nn.Parameter(_ghost(p), False) for k, p in module._parameters.items()}
        buffers = {k: None if b is None else _copy_of(b) for k, b in module._buffers.items()}
        children = {k: None if m is None else memo[id(m)] for k, m in module._modules.items()}
        clone.__dict__.update(_parameters=parameters, _buffers=buffers, _modules=children)
    return memo[id(model)]


class _ZeroLinear(nn.Module):
    """What stands in for a linear layer with a storage of its own (quantised)."""

    def __init__(self, out_features: int):
        super().__init__()
        self.out_features = out_features

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return (x[..., :1] * 0).repeat_interleave(self.out_features, dim=-1)  # worked out from x, as gradients see it


def _plain_linear(module: nn.Module) -> nn.Module | None:
    weight, sizes = (
        module._parameters.get("weight"),
        (getattr(module, "out_features", None), getattr(module, "in_features", None)),
    )
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


def _stand_in_value(value: Any, memo: dict[int, Any]) -> Any:
    """An attribute's value: modules become their stand-ins, what a forward might change is copied."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, Tensor):
        return _copy_of(value)
    if isinstance(value, PretrainedConfig):
        memo[id(value)] = config = copy.deepcopy(value)
        _run_anywhere(config)
        return config
    if type(value) in (list, tuple, set):
        return type(value)(_stand_in_value(v, memo) for v in value)
    if type(value) in (dict, OrderedDict):
        return type(value)((k, _stand_in_value(v, memo)) for k, v in value.items())
    if inspect.ismethod(value) and id(value.__self__) in memo:
        return MethodType(value.__func__, memo[id(value.__self__)])
    return value


def _run_anywhere(config: PretrainedConfig) -> None:
    """Choose implementations that need no special device or layout of the weights."""
    for part in [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]:
        if not isinstance(part, PretrainedConfig):
            continue
        if part.__dict__.get("_attn_implementation_internal") not in (None, "eager", "sdpa"):
            part.__dict__["_attn_implementation_internal"] = "eager"
        if "_experts_implementation_internal" in part.__dict__:
            part.__dict__["_experts_implementation_internal"] = "eager"


class _NoLargeProducts(TorchDispatchMode):
    """Products of large matrices come out as zeros, without being worked out."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            a, b = args[:2]
            if a.numel() * b.shape[-1] > _LARGE:
                return a.new_zeros(*a.shape[:-1], b.shape[-1])
        elif func in (torch.ops.aten.addmm.default, torch.ops.aten.baddbmm.default):
            a, b = args[1:3]
            if a.numel() * b.shape[-1] > _LARGE:
                return a.new_zeros(*a.shape[:-1], b.shape[-1])
        elif func._schema.is_mutable and args and isinstance(args[0], nn.Parameter):
            return args[0]  # a model that rescales its weights: there is no memory to write to
        return func(*args, **(kwargs or {}))


@dataclass
class Event:
    """One call of a module in a run.

    Attributes:
        name: the module's.
        inputs: the floating-point tensors it was given.
        output: the first tensor in what it returned, if any.
    """

    name: str
    inputs: list[Tensor]
    output: Tensor | None


@dataclass
class Run:
    """The calls of all modules in one forward, in the order in which they returned.

    Attributes:
        rows, columns: the shape of the tokens that went in.
        decoder_columns: that of an encoder-decoder's decoder; the same if there is none.
        is_image: whether images went in, and no tokens.
    """

    rows: int
    columns: int
    decoder_columns: int
    is_image: bool = False
    events: list[Event] = field(default_factory=list)

    def calls(self) -> dict[str, list[Event]]:
        """The calls by the modules' names."""
        calls: dict[str, list[Event]] = {}
        for event in self.events:
            calls.setdefault(event.name, []).append(event)
        return calls


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in a nest of tuples, lists and mappings, in their order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


@dataclass(frozen=True)
class Entry:
    """A way to run a model on example inputs.

    Attributes:
        path: the module to call; the model itself if empty.
        ids_per_row: how many rows of ids make one row of the batch (one for each codebook of an audio model).
        with_image: whether each row of tokens comes with an image.
    """

    path: str = ""
    ids_per_row: int = 1
    with_image: bool = False


def run(model: nn.Module, entry: Entry, rows: int, columns: int, first_token: int = 0) -> Run:
    """Run a stand-in for the model on tokens.

    Args:
        first_token: which of the usable token ids the rows begin with.

    Raises:
        Exception: whatever the model's code raises on such inputs.
    """
    clone = stand_in(model)
    part = clone.get_submodule(entry.path)
    record = _record(part, rows, columns)
    for name, module in clone.named_modules():

        def hook(_: Any, args: tuple, kwargs: dict, output: Any, name: str = name) -> None:
            inputs = [t for t in tensors_in([args, kwargs]) if t.is_floating_point()]
            record.events.append(Event(name, inputs, hidden_state_of(output)))

        module.register_forward_hook(hook, with_kwargs=True)
    embedding = input_embedding(clone)
    for module in clone.modules():  # tied embeddings are modules of their own
        if module is embedding or (isinstance(module, nn.Embedding) and _same_table(module, embedding)):
            module.register_forward_hook(_distinct_vectors, prepend=True)
    with torch.no_grad():
        _forward(part, example_inputs(part, record, entry, first_token))
    return record


def _record(module: nn.Module, rows: int, columns: int) -> Run:
    """An empty record of a run with tokens of this shape."""
    names = inspect.signature(type(module).forward).parameters
    return Run(rows, columns, columns + 5 if "decoder_input_ids" in names else columns, "input_ids" not in names)


def is_read(model: nn.Module, entry: Entry, name: str, rows: int, columns: int) -> bool:
    """Whether what the model puts out (its logits, mostly) depends on a module's output in a differentiable way.

    True also where that cannot be told.
    """
    clone = stand_in(model)
    part = clone.get_submodule(entry.path)

    def follow(_: Any, args: tuple, output: Any) -> None:
        h = hidden_state_of(output)
        if h is not None:
            h.requires_grad_()  # nothing else does, so that only what is worked out from it will

    clone.get_submodule(name).register_forward_hook(follow)
    try:
        with torch.enable_grad():
            output = _forward(part, example_inputs(part, _record(part, rows, columns), entry))
    except Exception:  # code that writes to what requires gradients
        return True
    result = hidden_state_of(output)
    return result is None or result.requires_grad


def _forward(module: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
    """Call a stand-in, without its warnings, and without changing what numbers are drawn later."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), _NoLargeProducts():
        warnings.simplefilter("ignore")
        return module(**inputs)


def entries(model: nn.Module) -> list[Entry]:
    """The ways in which a model may run on tokens or images alone, to be tried in this order: itself, its body without
    the head, what lies between it and its input embedding; then with an image beside the tokens.

    None for models of sound: they would run for long, and a part of them that takes tokens is their decoder alone.
    """
    whole = _argument_names(model, "")
    if "input_ids" not in whole and whole & {"input_features", "input_values"}:
        return []
    embedding = input_embedding(model)
    path = next((name for name, module in model.named_modules() if module is embedding), "")
    inner: list[str] = []
    while "." in path:
        path = path.rpartition(".")[0]
        inner.insert(0, path)
    per_row = sorted({1, _setting(getattr(model, "config", None), "num_codebooks", 1)})
    found = []
    paths = dict.fromkeys(["", getattr(model, "base_model_prefix", ""), *inner])
    for with_image, path, ids_per_row in product((False, True), paths, per_row):
        names = _argument_names(model, path)
        if (path == "" or names & {"input_ids", "pixel_values"}) and (not with_image or _takes_both(names)):
            found.append(Entry(path, ids_per_row, with_image))
    return found


def _takes_both(names: set[str]) -> bool:
    return names >= {"input_ids", "pixel_values"}


def _argument_names(model: nn.Module, path: str) -> set[str]:
    """The names of the arguments of the forward of a part; none if there is no such part."""
    part = dict(model.named_modules()).get(path)
    return set() if part is None else set(inspect.signature(type(part).forward).parameters)


def has_images_beside_tokens(model: nn.Module, entry: Entry) -> bool:
    """Whether images may come with the tokens, and have places of their own: no token stands for them."""
    settings = [name for config in _settings(getattr(model, "config", None)) for name in config]
    names = _argument_names(model, entry.path)
    return _takes_both(names) and not any("image_token" in str(name) for name in settings)


def _same_table(module: nn.Embedding, embedding: nn.Module | None) -> bool:
    return isinstance(embedding, nn.Embedding) and module.weight.shape == embedding.weight.shape


def _distinct_vectors(module: nn.Module, args: tuple, output: Any) -> Any:
    """Hook of the embedding: each token id gets a vector of its own, so that one can tell where it went."""
    if not isinstance(output, Tensor) or not args or not isinstance(args[0], Tensor) or args[0].is_floating_point():
        return output
    waves = torch.arange(1, output.shape[-1] + 1, dtype=torch.float32)
    return torch.sin(waves * (1.0 + args[0].unsqueeze(-1).float())).view(output.shape).to(output.dtype) + output


def example_inputs(module: nn.Module, record: Run, entry: Entry, first_token: int = 0) -> dict[str, Tensor]:
    """Tokens (or an image) for a module's forward, by the names of its parameters."""
    names = inspect.signature(type(module).forward).parameters
    config = getattr(module, "config", None)
    inputs: dict[str, Any] = {}
    for name, columns in (("input_ids", record.columns), ("decoder_input_ids", record.decoder_columns)):
        if name in names:
            ids = _usable_ids(module, columns + 1)
            row = torch.tensor([ids[first_token], *ids[2:]])
            inputs[name] = row.repeat(record.rows * entry.ids_per_row, 1)
    if "pixel_values" in names and ("input_ids" not in names or entry.with_image):
        inputs["pixel_values"] = torch.zeros(record.rows, *_image_shape(config))
    if "bbox" in names:
        inputs["bbox"] = torch.zeros(record.rows, record.columns, 4, dtype=torch.long)
    if "use_cache" in names:
        inputs["use_cache"] = False
    return inputs


def _setting(config: Any, name: str, default: Any) -> Any:
    """A setting of a config, or of one of its parts."""
    parts = [config, *(getattr(config, part, None) for part in getattr(config, "sub_configs", {}))]
    return next((value for part in parts if (value := getattr(part, name, None)) is not None), default)


def _image_shape(config: Any) -> tuple[int, ...]:
    size = _setting(config, "image_size", _setting(config, "input_size", 224))
    return (_setting(config, "num_channels", 3), *((size, size) if isinstance(size, int) else tuple(size)[-2:]))


def _settings(config: Any) -> Iterator[dict[str, Any]]:
    """The settings of a config and of its parts."""
    found = [config.to_dict()] if isinstance(config, PretrainedConfig) else []
    while found:
        settings = found.pop()
        found += [value for value in settings.values() if isinstance(value, dict)]
        yield settings


def _usable_ids(module: nn.Module, count: int) -> list[int]:
    """Token ids without a special meaning (padding, an image, the end), as far as the config tells."""
    special: set[int] = set()
    embedding = input_embedding(module)
    size = getattr(embedding, "num_embeddings", None) or 1000
    for config in _settings(getattr(module, "config", None)):
        for name, value in config.items():
            if "token" in str(name):
                special.update(v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int))
    ids = [i for i in range(2, size) if i not in special] or [0]
    return (ids * (1 + count // len(ids)))[:count]
