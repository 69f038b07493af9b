"""The blocks of a vision tower, named by `target_modules`."""

from __future__ import annotations

import architectures
import pytest
import reference
import torch
from conftest import randomize
from peft import get_peft_model
from torch import nn

from peft_reft import ReftConfig, get_interventions


@pytest.mark.parametrize(
    ("model_type", "mapping", "pattern"),
    [
        ("llava", "image-text", r".*vision_tower.*layers\.\d+"),
        ("qwen2_vl", "image-text", r".*visual\.blocks\.\d+"),
        ("paligemma", "image-text", r".*vision_tower.*layers\.\d+"),
    ],
)
def test_a_vision_tower_is_edited_at_every_patch(model_type, mapping, pattern):
    """Run by itself, since text is no part of it: against hooks that edit one vector at a time."""
    model, base = (architectures.tiny_model(model_type, mapping) for _ in range(2))
    model = randomize(get_peft_model(model, ReftConfig(target_modules=pattern, positions="all")).eval())
    interventions = get_interventions(model)
    assert len(interventions) == architectures.DEPTH

    def features(whole: nn.Module) -> torch.Tensor:
        tower = whole.get_submodule(next(iter(interventions)).rsplit(".", 2)[0])
        generator = torch.Generator().manual_seed(0)
        size = architectures.PATCH
        if model_type == "qwen2_vl":  # patches of an image of 1 x 4 x 4 of them, one after the other
            channels = tower.patch_embed.proj.weight[0].numel()
            arguments = torch.randn(16, channels, generator=generator), torch.tensor([[1, 4, 4]])
        else:
            tower = whole.get_submodule(next(iter(interventions)).split(".vision_tower.")[0] + ".vision_tower")
            arguments = (torch.randn(2, 3, 4 * size, 4 * size, generator=generator),)
        with torch.no_grad():
            output = tower(*arguments)
        return output if isinstance(output, torch.Tensor) else output.last_hidden_state

    def edit(module, args, output, intervention):
        h = output if isinstance(output, torch.Tensor) else output[0]
        edited = h.clone()
        for index in torch.cartesian_prod(*(torch.arange(size) for size in h.shape[:-1])).tolist():
            at = tuple(index) if isinstance(index, list) else (index,)
            edited[at] = reference.edit_vectors("loreft", intervention, h[at]).to(h)
        return edited if isinstance(output, torch.Tensor) else (edited, *output[1:])

    before = features(base)
    for name, modules in interventions.items():
        hook = lambda m, a, o, one=modules[0]: edit(m, a, o, one)  # noqa: E731
        base.get_submodule(name).register_forward_hook(hook)
    got, expected = features(model.get_base_model()), features(base)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert (got - before).abs().max() > 1e-2
