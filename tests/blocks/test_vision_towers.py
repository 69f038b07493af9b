"""The blocks of a vision tower, named by `target_modules`."""

from __future__ import annotations

import contextlib
import copy
import functools

import architectures
import pytest
import reference
import torch
import transformers
from conftest import randomize
from edit_spy import warnings_of
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


# Within calls of the whole model: images are no rows of the text, and their vectors no tokens.

VECTORS = {"llava": 17, "internvl": 17}  # of an image within the tower
IMAGE_TOKENS = {"llava": 16, "internvl": 4, "qwen2_vl": 4}  # and among the tokens
TOWERS = {
    "llava": r".*vision_tower.*layers\.\d+",
    "internvl": r".*vision_tower.*layer\.\d+",
    "qwen2_vl": r".*visual\.blocks\.\d+",
}


def seeing(model_type, pattern=None, **settings):
    """A tiny model of images and text, one with an adapter, and the adapter's interventions."""
    model, base = (architectures.tiny_model(model_type, "image-text") for _ in range(2))
    for one in (model, base):
        one.generation_config.eos_token_id = None
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():  # so large that an image matters to the text behind it
            for parameter in one.parameters():
                if parameter.dim() > 1:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    config = ReftConfig(target_modules=pattern or TOWERS[model_type], task_type="CAUSAL_LM", **settings)
    model = randomize(get_peft_model(model, config).eval())
    return model, base, get_interventions(model)


def row_of(model_type, base, *parts):
    """The ids of a row, of numbers of words with an image between each two, and its images."""
    token = getattr(base.config, "image_token_id", None) or base.config.image_token_index
    ids, size = [], architectures.IMAGE
    for number, words in enumerate(parts):
        ids += [token] * IMAGE_TOKENS[model_type] * (number > 0) + list(range(10, 10 + words))
    generator = torch.Generator().manual_seed(sum(parts))
    if model_type == "qwen2_vl":
        patches = torch.randn(16 * (len(parts) - 1), base.model.visual.patch_embed.proj.weight[0].numel())
        return ids, {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]] * (len(parts) - 1))}
    return ids, {"pixel_values": torch.randn(len(parts) - 1, 3, size, size, generator=generator)}


def batch_of(rows):
    width = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([[0] * (width - len(ids)) + ids for ids, _ in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids, _ in rows]),
        **{name: torch.cat([images[name] for _, images in rows]) for name in rows[0][1]},
    }


@contextlib.contextmanager
def edited_at(base, interventions, columns):
    """The blocks of `base` with edits at these columns of every row, in place before anything records an output."""
    blocks = [base.get_submodule(name) for name in interventions]

    def edited(block, intervention, *args, **kwargs):
        output = type(block).forward(block, *args, **kwargs)
        h = (output if isinstance(output, torch.Tensor) else output[0]).clone()
        h[:, columns] = intervention(h[:, columns])
        return h if isinstance(output, torch.Tensor) else (h, *output[1:])

    for block, modules in zip(blocks, interventions.values()):
        block.forward = functools.partial(edited, block, modules[0])
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


@pytest.mark.parametrize("model_type", VECTORS)
def test_within_a_call_positions_count_the_vectors_of_each_image(model_type):
    model, base, interventions = seeing(model_type, positions="f2+l1")
    rows = [row_of(model_type, base, *parts) for parts in ((2, 3), (9,), (1, 1, 2))]  # one image, none, two
    inputs = batch_of(rows)
    logits = model(**inputs).logits
    settings = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    answers = model.generate(**inputs, **settings)
    for row, (ids, images) in enumerate(rows):
        alone = {"input_ids": torch.tensor([ids]), **(images if len(images["pixel_values"]) else {})}
        with torch.no_grad(), edited_at(base, interventions, [0, 1, VECTORS[model_type] - 1]):
            expected, continued = base(**alone).logits[0], base.generate(**alone, **settings)
        torch.testing.assert_close(logits[row, -len(ids) :], expected, rtol=1e-4, atol=1e-4)
        for got, wanted in zip(answers.logits, continued.logits):
            torch.testing.assert_close(got[row], wanted[0], rtol=1e-4, atol=1e-4)
        for others in ([0, 1], [0, 1, 2, VECTORS[model_type] - 1], [1, 2, VECTORS[model_type] - 1]):
            with torch.no_grad(), edited_at(base, interventions, others):
                differs = (base(**alone).logits[0] - expected).abs().max() > 1e-3
            assert differs == (len(images["pixel_values"]) > 0)


def test_rows_as_long_as_their_images_are_not_taken_for_them():
    """As many images as rows, each of as many vectors as a row has columns, some of which are padding or an answer."""
    model, base, interventions = seeing("internvl", positions="f2+l1")
    rows = [row_of("internvl", base, *parts) for parts in ((10, 3), (1, 4))]
    inputs = batch_of(rows)
    assert inputs["input_ids"].shape == (2, VECTORS["internvl"]) and not inputs["attention_mask"].all()
    labels = inputs["input_ids"].masked_fill(torch.arange(17) < 15, -100)
    with torch.no_grad(), edited_at(base, interventions, [0, 1, 16]):
        expected = base(**inputs).logits
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.train()(**inputs, labels=labels).logits, expected, rtol=1e-4, atol=1e-4)


def test_text_and_images_are_edited_each_by_its_own_count():
    """Columns that a call names are those of the text; the tower goes by the positions."""
    pattern = rf"{TOWERS['internvl']}|.*language_model\.layers\.\d+"
    model, base, interventions = seeing("internvl", pattern, positions="l1")
    rows = [row_of("internvl", base, *parts) for parts in ((2, 3), (1, 1, 2))]
    inputs = batch_of(rows)
    width = inputs["input_ids"].shape[1]
    towers = {name: modules for name, modules in interventions.items() if "vision_tower" in name}
    text = {name: modules for name, modules in interventions.items() if "vision_tower" not in name}
    assert towers and text
    for given, column in (({}, width - 1), ({"intervention_locations": torch.tensor([[width - 2]] * 2)}, width - 2)):
        with torch.no_grad(), edited_at(base, towers, [16]), edited_at(base, text, [column]):
            expected = base(**inputs).logits
        torch.testing.assert_close(model(**inputs, **given).logits, expected, rtol=1e-4, atol=1e-4)


def test_gradients_of_a_tower_are_the_same_with_checkpoints():
    gradients = []
    for reentrant in (None, False, True):
        model, base, _ = seeing("internvl", positions="f2+l1")
        inputs = batch_of([row_of("internvl", base, *parts) for parts in ((2, 3), (1, 1, 2))])
        labels = inputs["input_ids"].masked_fill(torch.arange(inputs["input_ids"].shape[1]) < 10, -100)
        if reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
            inputs["pixel_values"].requires_grad_()  # or a reentrant checkpoint sees nothing to differentiate
        model.train()(**inputs, labels=labels).loss.backward()
        parameters = [p for name, p in model.named_parameters() if "reft_" in name]
        gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
    assert gradients[0].abs().max() > 1e-6
    for others in gradients[1:]:
        torch.testing.assert_close(others, gradients[0])


def test_training_without_labels_is_not_warned_of_where_only_images_are_edited():
    model, base, _ = seeing("internvl", positions="l1")
    inputs = batch_of([row_of("internvl", base, 2, 3)])
    assert not warnings_of(lambda: [model.train()(**inputs).logits.sum().backward() for _ in range(4)])


def test_images_that_lie_in_one_row_have_no_first_vector_each():
    model, base, interventions = seeing("qwen2_vl", positions="all")
    inputs = batch_of([row_of("qwen2_vl", base, *parts) for parts in ((2, 3), (1, 1, 2))])
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == base.config.image_token_id).long()
    with torch.no_grad(), edited_at(base, {}, []):
        before = base(**inputs).logits
    for name, modules in interventions.items():
        base.get_submodule(name).register_forward_hook(lambda m, a, h, one=modules[0]: one(h))
    torch.testing.assert_close(model(**inputs).logits, base(**inputs).logits, rtol=1e-4, atol=1e-4)
    assert (base(**inputs).logits - before).abs().max() > 1e-2
    for positions in ("f1", "l2"):
        with pytest.raises(ValueError, match=rf"'{positions}' counts the vectors of each image.*positions='all'"):
            seeing("qwen2_vl", positions=positions)[0](**inputs)


def test_what_is_given_by_row_or_column_of_the_text_is_refused_for_images():
    model, base, _ = seeing("internvl", positions="f1", subspaces={"one": 2, "two": 2}, r=4)
    model.add_adapter("other", ReftConfig(target_modules=TOWERS["internvl"], positions="f1", init_weights=False))
    inputs = batch_of([row_of("internvl", base, *parts) for parts in ((2, 3), (1, 4))])
    alone = model(**inputs).logits
    torch.testing.assert_close(model(**inputs, adapter_names=["default"] * 2).logits, alone)
    torch.testing.assert_close(model(**inputs, subspaces=[["one", "two"]] * 2).logits, alone)
    assert (model(**inputs, subspaces=["one"] * 2).logits - alone).abs().max() > 1e-3
    assert (model(**inputs, adapter_names=["other"] * 2).logits - alone).abs().max() > 1e-3
    for given in ({"adapter_names": ["default", "other"]}, {"subspaces": ["one", "two"]}):
        with pytest.raises(ValueError, match="unknown whose they are"):
            model(**inputs, **given)
    with pytest.raises(ValueError, match="intervention_locations name columns of tokens, but all that this"):
        model(**inputs, intervention_locations=torch.tensor([[3], [3]]))


@pytest.mark.parametrize("kind", ["Moonshine", "SpeechT5"])
def test_an_encoder_decoder_of_sounds_is_no_tower(kind):
    """transformers declares of these, and of the models in them, that they take sounds alone."""
    config = architectures.tiny_config(kind.lower())
    if kind == "Moonshine":
        config.encoder_num_key_value_heads = config.decoder_num_key_value_heads = architectures.HEADS
    name = {"Moonshine": "MoonshineForConditionalGeneration", "SpeechT5": "SpeechT5ForSpeechToText"}[kind]
    torch.manual_seed(0)
    base = getattr(transformers, name)(config).eval()
    model = randomize(get_peft_model(copy.deepcopy(base), ReftConfig(positions="l1")).eval())
    sounds = torch.randn(2, 4000, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[2, 5, 6, 7], [2, 8, 9, 11]])
    frames = base(input_values=sounds, decoder_input_ids=ids).encoder_last_hidden_state.shape[1]
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for side, column in (("encoder", frames - 1), ("decoder", 3)):
            blocks = {name: one for name, one in get_interventions(model).items() if f".{side}." in f".{name}"}
            assert len(blocks) == 3
            stack.enter_context(edited_at(base, blocks, [column]))
        expected = base(input_values=sounds, decoder_input_ids=ids).logits
    torch.testing.assert_close(model(input_values=sounds, decoder_input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    settings = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True, "do_sample": False}
    (answer,) = model.generate(input_values=sounds, decoder_input_ids=ids, **settings).logits
    torch.testing.assert_close(answer, expected[:, -1], rtol=1e-4, atol=1e-4)
