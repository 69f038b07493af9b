"""Where the residual stream lies in what a block returns, found out by running the model once when it is loaded.

Engines let the next block add what a block computed to the stream, because the sum can be fused with the norm that
follows. So a block returns the stream itself; or two tensors whose sum it is; or two of which the second is no longer
used. No name of a class tells which. What tells is the next block: if a vector moved from one of its inputs to the
other leaves everything that it returns as it was, it reads their sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

TOLERANCE = 0.03  # relative; models in half precision round the sum of the stream in each block
_MOVED = 0.1  # relative; what depends on an input changes at least so much when that is replaced by another vector


@dataclass(frozen=True)
class Convention:
    """How a class of blocks returns the residual stream.

    Attributes:
        stream: "sum" if it is the sum of the two tensors returned first, "first" if it is the first one alone.
    """

    stream: Literal["sum", "first"]

    def parts(self, output: Any) -> tuple[Tensor, Tensor | None]:
        """The tensor to which an edit is added, and the one that belongs to the stream besides."""
        first, second = _tensors(output)
        return first, second if self.stream == "sum" else None


class UnknownConvention(Exception):
    """What a block returns could not be made out; the message says at which block and why."""


def find_conventions(
    blocks: Sequence[nn.Module], run: Callable[[], Any], silence: Sequence[nn.Module] = (), width: int | None = None
) -> list[Convention]:
    """The convention of each block.

    Args:
        blocks: in the order in which they run.
        run: runs the whole model, on any tokens.
        silence: modules whose output depends on more than their input (attention without its cache): they return
            zeros meanwhile.
        width: that the hidden states should have; None for any.

    Raises:
        UnknownConvention: if the blocks return vectors of another width; if what a block returns does not go to the
            next block as it is, or reaches it in another way than those above.
    """
    with ExitStack() as stack, torch.inference_mode():
        for module in silence:  # not by a hook: some callers take `forward` itself
            module.forward = _zeros_instead_of(module.forward)
            stack.callback(delattr, module, "forward")
        outputs: dict[int, Any] = {}
        inputs: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        with ExitStack() as recording:
            for number, block in enumerate(blocks):
                recording.callback(block.register_forward_hook(_keep(outputs, number, _copied)).remove)
                handle = block.register_forward_pre_hook(_keep_inputs(inputs, number), with_kwargs=True)
                recording.callback(handle.remove)
            run()
        widths = {_tensors(output)[0].shape[-1] for output in outputs.values()} - {width}
        if width is not None and widths:
            raise UnknownConvention(f"blocks return vectors of width {max(widths)}, and the model's width is {width}")
        return _conventions(blocks, outputs, inputs)


def _conventions(
    blocks: Sequence[nn.Module], outputs: dict[int, Any], inputs: dict[int, tuple[tuple[Any, ...], dict[str, Any]]]
) -> list[Convention]:
    known: dict[tuple[type, type], Convention] = {}
    by_class: dict[type, Convention] = {}
    found: list[Convention | None] = []
    for number, block in enumerate(blocks):
        if number + 1 == len(blocks):
            found.append(by_class.get(type(block)))
            continue
        following = blocks[number + 1]
        pair = type(block), type(following)
        if pair not in known:
            if number not in outputs or number + 1 not in inputs:
                raise UnknownConvention(f"block {number} or the next one did not run in a forward of the model")
            known[pair] = _test(number, following, outputs[number], *inputs[number + 1])
            if by_class.setdefault(type(block), known[pair]) != known[pair]:
                raise UnknownConvention(f"blocks of the class {type(block).__name__} return the stream in two ways")
        found.append(known[pair])
    if found[-1:] == [None]:
        raise UnknownConvention(
            f"the last block, of the class {type(blocks[-1]).__name__}, has no block of its class before it to compare "
            "with"
        )
    return [convention for convention in found if convention is not None]


def _test(number: int, following: nn.Module, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Convention:
    """The convention of a block, by what the following one does with changed inputs."""
    first, second = _tensors(output)
    draw = torch.Generator(device="cpu").manual_seed(0)
    # As long as the longer one: what a block adds to the stream may be small next to the stream.
    size = max(float(part.float().std()) for part in (first, second) if part is not None)
    moved = (torch.randn(first.shape, generator=draw) * max(size, 1e-3)).to(first)

    def run(change: Tensor | None, change_of_second: Tensor | None) -> list[Tensor]:
        used = set()

        def replaced(value: Any) -> Any:
            for tensor, added, name in ((first, change, "first"), (second, change_of_second, "second")):
                if tensor is not None and isinstance(value, Tensor) and _is_same(value, tensor):
                    used.add(name)
                    return value.clone() if added is None else value + added
            return value.clone() if isinstance(value, Tensor) else value  # blocks may write into their inputs

        changed = following(*map(replaced, args), **{name: replaced(value) for name, value in kwargs.items()})
        if "first" not in used:
            raise UnknownConvention(f"what block {number} returns is not what the next block gets")
        return [part.float().clone() for part in _tensors(changed) if part is not None]

    plain = run(None, None)
    if not all(part.isfinite().all() for part in plain):
        raise UnknownConvention(f"the block after block {number} returns infinite values in a trial forward")
    if not _differ(run(moved, None), plain):
        raise UnknownConvention(f"the block after block {number} does not depend on what that one returns first")
    if second is None or not _differ(run(None, moved), plain):
        return Convention("first")
    if _agree(run(moved, -moved), plain):
        return Convention("sum")
    raise UnknownConvention(f"the two tensors that block {number} returns reach the next one in an unknown way")


def _tensors(output: Any) -> tuple[Tensor, Tensor | None]:
    """The hidden states that a block returns first, and a second tensor of the same shape, if there is one."""
    parts = output if isinstance(output, (tuple, list)) else (output,)
    first = parts[0] if parts else None
    if not isinstance(first, Tensor) or not first.is_floating_point():
        raise UnknownConvention(f"a block returns a {type(first).__name__} where its hidden states are expected")
    second = parts[1] if len(parts) > 1 else None
    return first, second if isinstance(second, Tensor) and second.shape == first.shape else None


def _is_same(value: Tensor, tensor: Tensor) -> bool:
    return value.shape == tensor.shape and value.dtype == tensor.dtype and torch.equal(value, tensor)


def _differ(some: list[Tensor], others: list[Tensor]) -> bool:
    return any((one - other).norm() > _MOVED * other.norm() for one, other in zip(some, others))


def _agree(some: list[Tensor], others: list[Tensor]) -> bool:
    return all((one - other).norm() <= TOLERANCE * other.norm() for one, other in zip(some, others))


def _copied(output: Any) -> Any:
    """A block's output; its tensors copied, since the next block may write into them."""
    if isinstance(output, (tuple, list)):
        return tuple(part.clone() if isinstance(part, Tensor) else part for part in output)
    return output.clone() if isinstance(output, Tensor) else output


def _keep(store: dict[int, Any], number: int, copy: Callable[[Any], Any]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        store[number] = copy(output)

    return hook


def _keep_inputs(store: dict[int, Any], number: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        store[number] = _copied(tuple(args)), {name: _copied(value) for name, value in kwargs.items()}

    return hook


def _zeros_instead_of(forward: Callable[..., Any]) -> Callable[..., Any]:
    def silenced(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        return torch.zeros_like(output) if isinstance(output, Tensor) else output

    return silenced
