"""Models that pad their tokens to a multiple of a window or block of their own: the tokens' own columns are edited.

Against plain hooks on the base model, whatever the window and the number of tokens.
"""

from __future__ import annotations

import copy
import pathlib
import random
import re

import numpy
import pytest
import torch
import transformers
from conftest import randomize
from peft import get_peft_model

from peft_reft import ReftConfig, get_interventions
from peft_reft.blocks import ModelBlocks

ENCODER = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 130,
    "pad_token_id": 1,
}
TWO_SIDES = {
    "vocab_size": 100,
    "d_model": 32,
    "pad_token_id": 1,
    **{f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 2), ("attention_heads", 4))},
    **{f"{side}_ffn_dim": 64 for side in ("encoder", "decoder")},
}
SPARSE = {"attention_type": "block_sparse", "num_random_blocks": 1}  # from 7 blocks on; before that nothing is padded


def model_of(kind: str, multiple: int) -> torch.nn.Module:
    """A tiny model that pads to this multiple."""
    positions = {"max_encoder_position_embeddings": 130, "max_decoder_position_embeddings": 130}
    classes = {
        "longformer": ("LongformerForMaskedLM", "LongformerConfig", {**ENCODER, "attention_window": multiple}),
        "led": ("LEDForConditionalGeneration", "LEDConfig", {**TWO_SIDES, **positions, "attention_window": multiple}),
        "pegasus_x": ("PegasusXForConditionalGeneration", "PegasusXConfig", {**TWO_SIDES, "block_size": multiple}),
        "big_bird": ("BigBirdForMaskedLM", "BigBirdConfig", {**ENCODER, **SPARSE, "block_size": multiple}),
        "bigbird_pegasus": (
            "BigBirdPegasusForConditionalGeneration",
            "BigBirdPegasusConfig",
            {**TWO_SIDES, **SPARSE, "block_size": multiple, "max_position_embeddings": 130},
        ),
    }
    model, config, settings = classes[kind]
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**settings)).eval()


def logits_of(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    numpy.random.seed(0)  # of the blocks that sparse attention looks at
    random.seed(0)
    with torch.no_grad():
        return model(**inputs).logits


CASES = [
    *[("longformer", window, columns) for window in (4, 6, 8, 64) for columns in (5, 8, 9, 17)],
    *[("led", window, columns) for window in (4, 8, 12, 16) for columns in (5, 8, 9, 17)],
    *[("pegasus_x", block, columns) for block in (4, 8, 16) for columns in (5, 9, 16)],
    *[("big_bird", block, columns) for block in (2, 3, 4) for columns in (9, 28, 45, 115)],
    *[("bigbird_pegasus", block, columns) for block in (3, 4) for columns in (9, 45, 84)],
]


@pytest.mark.parametrize(("kind", "multiple", "columns"), CASES)
def test_the_tokens_own_columns_are_edited(kind, multiple, columns):
    base = model_of(kind, multiple)
    inputs = {"input_ids": torch.randint(3, 90, (2, columns)), "attention_mask": torch.ones(2, columns).long()}
    inputs["attention_mask"][1, columns - 2 :] = 0
    if base.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :3]
    before = logits_of(copy.deepcopy(base), inputs)  # BigBird goes over to full attention for good
    model = randomize(get_peft_model(copy.deepcopy(base), ReftConfig(positions="f1+l2", r=2)).eval())

    def edit(block, args, output, intervention, places):
        h = (output if isinstance(output, torch.Tensor) else output[0]).clone()
        for row, chosen in enumerate(places):
            h[row, chosen] = intervention(h[row, chosen])
        return h if isinstance(output, torch.Tensor) else (h, *output[1:])

    for name, (intervention,) in get_interventions(model).items():
        places = [[0, columns - 2, columns - 1], [0, columns - 4, columns - 3]]
        places = [[0, 1, 2]] * 2 if ".decoder." in name else places
        base.get_submodule(name).register_forward_hook(
            lambda block, args, output, one=intervention, at=places: edit(block, args, output, one, at)
        )
    got, expected = logits_of(model, inputs), logits_of(base, inputs)
    rows = inputs["attention_mask"].bool() if got.shape[:2] == inputs["input_ids"].shape else slice(None)
    torch.testing.assert_close(got[rows], expected[rows], rtol=1e-4, atol=1e-5)
    assert (got[rows] - before[rows]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["longformer", "led", "pegasus_x", "big_bird", "bigbird_pegasus"])
def test_a_layout_with_padding_does_not_depend_on_the_multiple(kind):
    for multiple in (4, 6, 8, 14, 64):
        blocks = ModelBlocks(model_of(kind, multiple))
        layouts = [blocks.shape_of(stack[0])[1] for stack in blocks.stacks()]
        assert [(layout.padded, layout.before) for layout in layouts] == [(True, 0), (False, 0)][: len(layouts)]


def test_all_methods_of_transformers_that_pad_to_a_multiple_are_known():
    """They are taken to pad behind the last token; reformer, which has one as well, is refused."""
    models = pathlib.Path(transformers.__file__).parent / "models"
    found = {
        path.parent.name for path in models.glob("*/modeling_*.py") if re.search(r"def _pad_to_", path.read_text())
    }
    assert found - {"longt5"} == {"big_bird", "bigbird_pegasus", "led", "longformer", "reformer"}
