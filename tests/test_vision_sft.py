"""Vision-language SFT: TRL's own collator, in ReftDataCollator or not, with image tokens counted as prompt tokens."""

from __future__ import annotations

import pytest
import reference
import torch
import transformers
from conftest import HIDDEN, randomize, tiny_config
from datasets import Dataset
from PIL import Image
from trainer_kit import QUIET, tokens_of, word_tokenizer
from trl import SFTConfig, SFTTrainer

from peft_reft import ReftConfig, ReftDataCollator

IMAGE = "<image>"
PATCHES = 4  # an image of 16 x 16 in patches of 8 x 8
CONFIG = {"task_type": "CAUSAL_LM", "positions": "f3+l2"}


@pytest.fixture(scope="module")
def processor():
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    images = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, do_convert_rgb=True
    )
    return transformers.LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def llava(processor):
    """A tiny LLaVA: a CLIP tower, a projection, and the tiny llama of the other tests."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=vision,
            text_config=tiny_config("llama"),
            image_token_id=processor.tokenizer.convert_tokens_to_ids(IMAGE),
            image_seq_length=PATCHES,
            vision_feature_layer=-1,
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return model


def picture(shade):
    return Image.new("RGB", (16, 16), (shade, 255 - shade, 40))


def pictures(rows=8):
    """Prompts with the image in front, in the middle, or missing words around it; answers of one to three words."""
    prompts = (f"{IMAGE} w5 w6", f"w7 {IMAGE} w8 w9 w10", f"w11 {IMAGE}", f"{IMAGE}")
    return Dataset.from_list(
        [
            {
                "images": [picture(25 * row)],
                "prompt": prompts[row % 4],
                "completion": " " + " ".join(["w20", "w21", "w22"][: 1 + row % 3]),
            }
            for row in range(rows)
        ]
    )


def trainer(processor, folder, collator=False):
    config = ReftConfig(**CONFIG)
    made = SFTTrainer(
        model=llava(processor),
        args=SFTConfig(**QUIET, output_dir=str(folder), max_steps=2, max_length=None),
        train_dataset=pictures(),
        processing_class=processor,
        peft_config=config,
    )
    if collator:
        made.data_collator = ReftDataCollator(made.data_collator, config)
    randomize(made.model, scale=0.3)
    return made


def test_the_collator_counts_image_tokens_as_prompt_tokens(processor, tmp_path):
    made = trainer(processor, tmp_path, collator=True)
    got = next(iter(made.get_train_dataloader()))
    expected = reference.columns_to_edit("f3+l2", got["attention_mask"], got["labels"])
    named = [[[c for c in group if c >= 0] for group in row] for row in got["intervention_locations"].tolist()]
    assert named == expected
    image = got["input_ids"] == processor.tokenizer.convert_tokens_to_ids(IMAGE)
    assert image.sum(1).tolist() == [PATCHES] * 4
    edited = torch.zeros_like(image)
    for row, groups in enumerate(named):
        edited[row, [column for group in groups for column in group]] = True
    assert (edited & image).any(1).all(), "some of the edited tokens are the image's"
    assert (edited & (got["labels"] != -100)).sum() == 0


def test_the_loss_is_that_of_each_row_alone_with_its_columns_named(processor, tmp_path):
    made = trainer(processor, tmp_path)
    inputs = next(iter(made.get_train_dataloader()))
    made.model.eval()
    with torch.no_grad():
        by_labels = made.model(**inputs).logits
        whole_rows = made.model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    for row in range(len(by_labels)):
        valid = inputs["attention_mask"][row].bool()
        prompt = int((valid & (inputs["labels"][row] == -100)).sum())
        columns = [column for group in reference.select("f3+l2", prompt) for column in group]
        with torch.no_grad():
            alone = made.model(
                input_ids=inputs["input_ids"][row][valid][None],
                pixel_values=inputs["pixel_values"][row][None],
                intervention_locations=torch.tensor([columns]),
            ).logits[0]
        torch.testing.assert_close(by_labels[row][valid], alone, rtol=1e-4, atol=1e-4)
    assert (whole_rows - by_labels).abs().max() > 1e-2


@pytest.mark.parametrize("ready", [False, True], ids=["labels", "collator"])
def test_sft_trains_and_generates(ready, processor, tmp_path):
    made = trainer(processor, tmp_path, collator=ready)
    before = tokens_of(made.model)
    assert len(before) == 9 and before[0].shape[-1] == HIDDEN  # the text model's three blocks, not the image tower's
    made.train()
    assert any((p - q).abs().max() > 1e-3 for p, q in zip(before, tokens_of(made.model)))
    prompt = processor(images=[[picture(9)]], text=[f"{IMAGE} w5 w6"], return_tensors="pt")
    made.model.eval()
    with torch.no_grad():
        answer = made.model.generate(**prompt, max_new_tokens=3, return_dict_in_generate=True, output_logits=True)
        whole = made.model(**prompt).logits[:, -1]
    torch.testing.assert_close(answer.logits[0], whole, rtol=1e-4, atol=1e-4)


def test_labels_and_locations_train_the_same(processor, tmp_path):
    weights = []
    for number in range(2):
        made = trainer(processor, tmp_path / str(number), collator=bool(number))
        made.train()
        weights.append(torch.cat([weight.flatten() for weight in tokens_of(made.model)]))
    torch.testing.assert_close(*weights, rtol=0, atol=1e-6)
