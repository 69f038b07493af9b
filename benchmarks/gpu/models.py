"""The models of the GPU benchmark: shapes, random weights made on the device, the methods, many adapters."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from benchmarks import common
from peft_reft import get_interventions

LABELS = {
    "base": "base",
    "floor": "floor",
    "hooks": "plain hooks",
    "reft": "LoReFT",
    "lora_qv": "LoRA r=8 q,v",
    "lora_qv_bf16": "LoRA q,v in bf16",
    "lora_all": "LoRA r=8 all linear",
}
EDITED = 4  # tokens at either end of a prompt, as in "f4+l4"


class Shape(NamedTuple):
    """The shape of a Llama, and of the batch that it is measured with."""

    hidden: int
    blocks: int
    intermediate: int
    vocab: int
    heads: int
    key_value_heads: int
    tied: bool
    rows: int
    columns: int


SHAPES = {
    "tiny": Shape(64, 2, 128, 128, 4, 2, True, 2, 32),
    "135M": Shape(576, 30, 1536, 49152, 9, 3, True, 8, 128),  # SmolLM2
    "1.5B": Shape(1536, 28, 8960, 151936, 12, 2, True, 4, 512),  # Qwen2.5
    "7B": Shape(4096, 32, 11008, 32000, 32, 32, False, 4, 512),  # Llama 2
}


def build(shape: Shape, device: str, blocks: int | None = None) -> nn.Module:
    """A Llama of a shape, its random weights made where it lives."""
    return common.llama(
        hidden=shape.hidden,
        blocks=blocks or shape.blocks,
        intermediate=shape.intermediate,
        vocab=shape.vocab,
        device=device,
        dtype=torch.bfloat16,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        tie_word_embeddings=shape.tied,
    )


class PlainHooks(nn.Module):
    """The edit of a ReFT model in one hook per block, with the places of one batch written down: the least it can cost.

    Args:
        model: a copy of the base model.
        adapted: the ReFT model whose edit it is; its equation is affine, so that its effect on zero and on the unit
            vectors says all about it. What is trained is all but the orthonormal rows.
        places: LongTensor [N], the edited tokens of a batch that is flattened to [B * S, D].
    """

    def __init__(self, model: nn.Module, adapted: nn.Module, places: Tensor):
        super().__init__()
        self.model = model
        self.down, self.bias, self.up = nn.ParameterList(), nn.ParameterList(), []
        for name, (intervention,) in get_interventions(adapted).items():
            down, bias, up = affine_factors(intervention)
            self.down.append(nn.Parameter(down))
            self.bias.append(nn.Parameter(bias))
            self.up.append(up)
            hook = self._hook(self.down[-1], self.bias[-1], up, places)
            model.get_submodule(name).register_forward_hook(hook)

    @staticmethod
    def _hook(down: Tensor, bias: Tensor, up: Tensor, places: Tensor) -> Any:
        def edit(block: nn.Module, args: Any, h: Tensor) -> Tensor:
            flat = h.view(-1, h.shape[-1])
            edits = torch.addmm(bias, flat.index_select(0, places).to(up.dtype), down) @ up
            return flat.index_add(0, places, edits.to(h.dtype)).view(h.shape)

        return edit

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


@torch.no_grad()
def affine_factors(intervention: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """`down` [D, R], `bias` [R] and `up` [R, D] of an edit h -> h + (h down + bias) up with orthonormal rows `up`."""
    up = intervention.subspace.detach()
    units = torch.eye(up.shape[-1], device=up.device, dtype=up.dtype)
    bias = intervention(torch.zeros_like(units[0])) @ up.mT
    return (intervention(units) - units) @ up.mT - bias, bias, up


def adapted(base: nn.Module, config: Any, name: str = "default", in_fp32: bool = True) -> nn.Module:
    """The base model with an adapter that does something: random weights, so that no part of an edit is zero."""
    model = get_peft_model(common.with_same_weights(base), config, name, autocast_adapter_dtype=in_fp32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def methods(base: nn.Module, names: Iterable[str], places: Tensor | None = None) -> dict[str, nn.Module]:
    """The methods that are compared, all on the base model's own weights.

    Args:
        names: of `LABELS`.
        places: what plain hooks edit, as `places_of` gives them.
    """
    made: dict[str, nn.Module] = {}
    for name in names:
        if name == "base":
            made[name] = common.with_same_weights(base)
        elif name == "floor":
            made[name] = common.Floor(common.with_same_weights(base))
        elif name == "hooks":
            assert places is not None
            reft = made["reft"] if "reft" in made else adapted(base, common.reft_config())
            made[name] = PlainHooks(common.with_same_weights(base), reft, places)
        elif name == "reft":
            made[name] = adapted(base, common.reft_config())
        elif name == "lora_all":
            made[name] = adapted(base, common.lora_config(common.ALL_LINEAR))
        else:
            made[name] = adapted(base, common.lora_config(common.Q_V), in_fp32=name == "lora_qv")
    return made


def places_of(inputs: dict[str, Tensor]) -> Tensor:
    """LongTensor [N]: the tokens that "f4+l4" edits in a batch of `common.batch`, counted over its flattened rows."""
    rows, columns = inputs["input_ids"].shape
    end = columns // 2 if "labels" in inputs else columns
    own = torch.cat([torch.arange(EDITED), torch.arange(end - EDITED, end)])
    return (torch.arange(rows)[:, None] * columns + own).flatten().to(inputs["input_ids"].device)


def add_copies(model: nn.Module, names: list[str], seconds: float) -> int:
    """Put copies of the model's first adapter into it, for at most so many seconds; returns how many.

    `add_adapter` walks over all modules at each call, so that a thousand calls take hours. What a tuner's layer keeps
    about an adapter is in dictionaries by its name: here each of them gets the copies.
    """
    first = model.active_adapter
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    parts = [part for layer in layers for part in layer._modules.values()]
    modules = [part for part in parts if isinstance(part, nn.ModuleDict) and first in part]
    settings = [part for layer in layers for part in vars(layer).values() if isinstance(part, dict) and first in part]
    begin = time.monotonic()
    for number, name in enumerate(names):
        if time.monotonic() - begin > seconds:
            return number
        model.peft_config[name] = copy.copy(model.peft_config[first])
        for part in modules:
            part[name] = _copied(part[first])
        for part in settings:
            part[name] = part[first]
    return len(names)


def _copied(module: nn.Module) -> nn.Module:
    """The module with parameters of its own and everything else in common; copy.deepcopy takes ten times as long."""
    found = copy.copy(module)
    found._parameters = {
        name: None if p is None else nn.Parameter(p.detach().clone(), p.requires_grad)
        for name, p in module._parameters.items()
    }
    found._modules = {name: None if child is None else _copied(child) for name, child in module._modules.items()}
    return found
