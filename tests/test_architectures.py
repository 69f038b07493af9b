"""Every architecture: blocks found, edits placed, gradients, generation, checkpoints, and the base model given back.

A representative part runs with the tests. The whole sweep over transformers' mappings is a command of its own:

    python tests/test_architectures.py [causal masked seq2seq sequence token image image-text] [-t MODEL_TYPE ...]

The oracle hooks the blocks of a second, equal model and edits one vector at a time; of the package it uses nothing but
the interventions.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import inspect
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise

import architectures
import pytest
import torch
import transformers
from architectures import DEPTH, Batch, batch_for, tiny_model
from conftest import randomize
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from peft_reft import ReftConfig, get_interventions
from peft_reft.blocks import PLAIN
from peft_reft.blocks.declared import declared_stacks
from peft_reft.blocks.tracing.layouts import traced_layout
from peft_reft.blocks.tracing.stacks import traced_stacks
from peft_reft.blocks.tracing.traced_model import TracedModel
from peft_reft.context.replay import Replay

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:A training forward:UserWarning")

TASKS = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "sequence": "SEQ_CLS", "token": "TOKEN_CLS"}
LENGTHS = (9, 5, 3)  # the last is too short for "f2+l2" to edit every token once

CHECKPOINT = "_gradient_checkpointing_func"  # transformers' name for it

# Where the vectors of a token stand in the hidden state, where that is not [row, column].
Place = Callable[[Tensor, int, int], list[tuple]]
_TIME_FIRST: Place = lambda h, row, column: [(column, row)]  # noqa: E731
PLACES: dict[str, Place] = {
    "xlnet": _TIME_FIRST,
    "fsmt": _TIME_FIRST,
    "gemma3n_text": lambda h, row, column: [(stream, row, column) for stream in range(h.shape[0])],
    "squeezebert": lambda h, row, column: [(row, slice(None), column)],
    "cpmant": lambda h, row, column: [(row, 32 + column)],  # after the virtual tokens
    # The main stream, and one stream for each token that is predicted ahead, side by side.
    "prophetnet": lambda h, row, column: [(row, start + column) for start in range(0, h.shape[1], h.shape[1] // 3)],
}
PLACES["gemma3n"] = PLACES["gemma3n_text"]
# Numbers of blocks other than the depth of the config (twice that for an encoder and a decoder).
COUNTS = {
    "bloom": 2,
    "pix2struct": 3,
    "funnel": 12,
    "perceiver": 26,
    "nemotron_h": 4,
    "nemotron_h_omni": 4,
    "hrm_text": 4,
    "dory": 4,
    "diffusion_gemma": DEPTH - 1,  # nothing reads the output of the last
}


def config_for(mapping: str, **settings) -> ReftConfig:
    return ReftConfig(task_type=TASKS.get(mapping), positions="f2+l2", r=2, **settings)


def adapted(model: nn.Module, mapping: str, **settings) -> PeftModel:
    return randomize(get_peft_model(model, config_for(mapping, **settings)).eval())


def run(model: nn.Module, batch: Batch, **kwargs):
    torch.manual_seed(0)  # some models begin with a random draft
    with torch.no_grad():
        return model(**batch.inputs, **kwargs)


def result(output) -> Tensor:
    """Logits, or what stands for them."""
    return next(
        output[name] for name in ("logits", "prediction_logits", "last_hidden_state") if output.get(name) is not None
    )


def close(got: Tensor, expected: Tensor, what: str = "") -> None:
    largest = max(1.0, float(expected[expected.isfinite()].abs().max()))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * largest, msg=lambda text: f"{what} {text}")


# The oracle.


def edited_columns(valid: list[int]) -> list[int]:
    """The columns that "f2+l2" names among those of a row's tokens."""
    prefix = min(2, max(len(valid) - 2, (len(valid) + 1) // 2))
    return valid[:prefix] + valid[prefix:][-2:]


def vectors_of(model_type: str, name: str, valid: list[int], count: int) -> list[int]:
    """Which of a block's `count` vectors stand for a row's tokens."""
    if not valid or model_type == "perceiver":  # patches, latents: all of them
        return list(range(count))
    pools = {"canine": 4, "funnel": 2 ** int(name.split(".blocks.")[1][0]) if ".blocks." in name else 1}
    pool = pools.get(model_type, 1)
    return sorted({column // pool for column in valid if pool == 1 or column // pool < count})


def hidden_columns(output) -> int:
    """How many vectors a row of a hidden state [B, S, d] has."""
    return (output if isinstance(output, Tensor) else output[0]).shape[1]


@contextlib.contextmanager
def reference(
    model: nn.Module, interventions: dict[str, nn.ModuleList], batch: Batch, model_type: str, cached: bool = False
) -> Iterator[None]:
    """Edit the outputs of the blocks, one vector at a time.

    Args:
        cached: the first of several forwards holds the prompt, the others go on from a cache.
    """
    forwards = running = 0

    def count(*_) -> None:  # of the model, or of the part that it has generate: the outermost that runs
        nonlocal forwards, running
        forwards += not running
        running += 1

    def uncount(*_) -> None:
        nonlocal running
        running -= 1

    plain: Place = lambda h, row, column: [(row, column)]  # noqa: E731

    def edit(h: Tensor, intervention: nn.Module, columns: list[list[int]], name: str) -> Tensor:
        place = PLACES.get(model_type, plain) if model_type != "prophetnet" or "decoder" in name else plain
        h = h.clone()
        for row, chosen in enumerate(columns):
            for column in chosen:
                for index in place(h, row, column):
                    h[index] = intervention(h[index])
        return h

    def hook(block: nn.Module, args: tuple, output, name: str):
        is_decoder = batch.decoder_columns is not None and "decoder" in name.split(".encoder.")[0]
        if batch.decoder_columns is None or not is_decoder:
            count = hidden_columns(output)
            columns = [edited_columns(vectors_of(model_type, name, valid, count)) for valid in batch.valid]
        else:
            columns = [edited_columns(valid) for valid in batch.decoder_valid]
        if cached and forwards > 1:
            if model_type != "xlnet" or forwards > 2:
                return output
            # Its memory leaves out the last token, which runs once more, now as the first column.
            columns = [[c - batch.columns + 1 for c in row if c == batch.columns - 1] for row in columns]
        if isinstance(output, Tensor):
            return edit(output, interventions[name][0], columns, name)
        if isinstance(output, dict):
            key = next(iter(output))
            return type(output)({**output, key: edit(output[key], interventions[name][0], columns, name)})
        return type(output)([edit(output[0], interventions[name][0], columns, name), *output[1:]])

    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda block, args, output, name=name: hook(block, args, output, name), prepend=True
        )
        for name in interventions
    ]
    for name, part in model.named_modules():
        is_called = isinstance(part, PreTrainedModel) and part.can_generate()
        if is_called or (model_type == "diffusion_gemma" and name == "model.encoder"):  # which is called alone
            hooks += [part.register_forward_pre_hook(count), part.register_forward_hook(uncount)]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


# What is checked of each architecture. A check takes the model's type and mapping, and raises if it fails.


def check_the_blocks_of_the_main_stack_are_wrapped(model_type: str, mapping: str) -> None:
    base = tiny_model(model_type, mapping)
    names = list(get_interventions(get_peft_model(base, config_for(mapping))))
    has_decoder = any(name.endswith("decoder") for name, _ in base.named_modules())
    sides = 2 if base.config.is_encoder_decoder and has_decoder else 1
    assert len(names) == COUNTS.get(model_type, sides * DEPTH) or mapping == "image", names
    lists = {name.rstrip("0123456789") for name in names if name[-1].isdigit()}
    assert len(lists) <= max(sides, 2) or mapping == "image" or model_type == "funnel", names  # a list per resolution


def check_what_is_declared_is_what_a_trace_finds(model_type: str, mapping: str) -> None:
    """For the types whose classes declare enough; of the others everything is read off a trace."""
    model = tiny_model(model_type, mapping)
    if declared := declared_stacks(model):
        traced = TracedModel(model)
        assert traced.traces, "cannot be traced"
        assert [stack.names for stack in declared] == traced_stacks(traced)
        for stack in declared:
            shapes = {(traced.shapes(name)[0][-1], traced_layout(traced, name)) for name in stack.names}
            assert shapes == {(stack.width, PLAIN)}, shapes


def check_a_fresh_adapter_changes_nothing(model_type: str, mapping: str) -> None:
    base = tiny_model(model_type, mapping)
    batch = batch_for(base, mapping, LENGTHS)
    before = result(run(base, batch))
    after = result(run(get_peft_model(base, config_for(mapping)).eval(), batch))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


def check_logits_and_hidden_states_equal_the_reference(model_type: str, mapping: str) -> None:
    model, base = (tiny_model(model_type, mapping) for _ in range(2))
    model = adapted(model, mapping)
    for side in ("right", "left"):
        batch = batch_for(base, mapping, LENGTHS, side)
        got = run(model, batch, output_hidden_states=True)
        plain = result(run(base, batch))
        with reference(base, get_interventions(model), batch, model_type):
            expected = run(base, batch, output_hidden_states=True)
        difference = (result(got) - plain).abs().max()
        assert difference > 1e-3, f"the adapter does nothing: {difference}"
        close(result(got), result(expected))
        for name in ("hidden_states", "encoder_hidden_states", "decoder_hidden_states"):
            for one, other in zip(got.get(name) or (), expected.get(name) or (), strict=True):
                if isinstance(one, Tensor):  # PEGASUS-X records tuples
                    close(one, other)


def check_gradients_reach_every_intervention_and_nothing_else(model_type: str, mapping: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        base = tiny_model(model_type, mapping)
        if checkpointing and not base.supports_gradient_checkpointing:
            continue
        model = adapted(base, mapping)
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
            base.disable_input_require_grads()  # which GIT cannot bear: it adds to its embeddings in place
        model.train()
        torch.manual_seed(0)
        inputs = batch_for(base, mapping, LENGTHS).inputs
        if "use_cache" in inspect.signature(type(base).forward).parameters:
            inputs["use_cache"] = False  # which some models would fill twice under checkpointing
        output = result(model(**inputs))
        (output.float() * torch.randn(output.shape)).sum().backward()
        own = dict(get_interventions(model).items())
        parameters = {id(p): f"{name}.{key}" for name, m in own.items() for key, p in m.named_parameters()}
        for name, parameter in model.named_parameters():
            if id(parameter) in parameters:
                assert parameter.grad is not None and parameter.grad.abs().max() > 0, f"no gradient: {name}"
            elif "modules_to_save" not in name:
                assert parameter.grad is None, f"a gradient: {name}"
        gradients.append([p.grad for m in own.values() for p in m.parameters()])
    for one, other in zip(*gradients) if len(gradients) == 2 else ():
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def check_a_saved_adapter_gives_the_same_logits(model_type: str, mapping: str) -> None:
    model = adapted(tiny_model(model_type, mapping), mapping)
    with torch.no_grad():  # a classifier's own head is saved with the adapter
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1)
    model.requires_grad_(False)  # as the loaded one: torch multiplies with trained weights in another order
    batch = batch_for(model.get_base_model(), mapping, LENGTHS)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(tiny_model(model_type, mapping), folder).eval()
    torch.testing.assert_close(result(run(loaded, batch)), result(run(model, batch)), rtol=0, atol=0)


def check_the_base_model_is_given_back(model_type: str, mapping: str) -> None:
    base = tiny_model(model_type, mapping).requires_grad_(False)  # torch multiplies with trained weights otherwise
    batch = batch_for(base, mapping, LENGTHS)
    before, classes = result(run(base, batch)), {name: type(m) for name, m in base.named_modules()}
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.modules())
    model = adapted(base, mapping)
    assert not torch.equal(result(run(model, batch)), before)
    with model.disable_adapter():
        assert torch.equal(result(run(model, batch)), before)
    base = model.unload().requires_grad_(False)  # of a classifier the trained copy is given back, as by LoRA
    assert torch.equal(result(run(base, batch)), before)
    assert {name: type(m) for name, m in base.named_modules()} == classes
    assert base.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in base.state_dict().items())
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.modules()) == hooks


def check_generate_equals_the_reference_with_and_without_a_cache(model_type: str, mapping: str) -> None:
    model, base = (tiny_model(model_type, mapping) for _ in range(2))
    if not base.can_generate() or mapping not in ("causal", "seq2seq", "image-text"):
        return
    if model_type.startswith("musicgen"):  # its `generate` asks for a text encoder's output
        return
    model = adapted(model, mapping)
    batch = batch_for(base, mapping, LENGTHS, side="left")
    if model_type == "diffusion_gemma":
        check_drafts_equal_the_reference(model, base, batch)
        return
    if "attention_mask" not in batch.inputs:  # `generate` would tell the padding by its id, a forward would not
        batch = batch_for(base, mapping, LENGTHS[:1] * 2)
    inputs = {k: v for k, v in batch.inputs.items() if k not in ("decoder_input_ids", "decoder_attention_mask")}
    settings = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}
    settings |= {"pad_token_id": 0} if model_type != "blip" else {}  # which passes one of its own
    settings |= {"return_dict_in_generate": True, "output_scores": True, "num_beams": 1}
    settings |= {"decoder_start_token_id": 2} if base.config.is_encoder_decoder else {}
    if batch.decoder_columns is not None:
        batch = batch.with_decoder_columns(1)
    if model_type == "blip":  # which has its text model generate from a prompt without the last token
        batch = replace(batch, valid=[columns[:-1] for columns in batch.valid], columns=batch.columns - 1)
    caches = [False, True]  # each compared with itself: base models may differ
    if model_type in ("blip-2", "instructblip", "instructblipvideo"):
        caches = [True]  # without one transformers forgets the image
    if model_type == "evolla":
        caches = [False]  # with one its base fails
    for use_cache in caches:
        # OpenAI's GPT takes no cache: it runs the whole row, prompt included, in every step.
        cached = (use_cache and model_type != "openai-gpt") or model_type == "xlnet"
        with reference(base, get_interventions(model), batch, model_type, cached=cached):
            expected = base.generate(**inputs, **settings, use_cache=use_cache)
        got = model.generate(**inputs, **settings, use_cache=use_cache)
        for step, (one, other) in enumerate(zip(got.scores, expected.scores, strict=True)):
            close(one, other, f"use_cache={use_cache}, step {step}")


def check_drafts_equal_the_reference(model: PeftModel, base: nn.Module, batch: Batch) -> None:
    """Two drafts of eight tokens, refined one after the other; the first is not edited when the second reads it."""
    settings = {"max_new_tokens": 16, "max_denoising_steps": 3, "eos_token_id": None, "pad_token_id": 0}

    def drafts(model: nn.Module) -> Tensor:
        torch.manual_seed(0)
        return model.generate(**batch.inputs, **settings).sequences

    plain = drafts(base)
    with reference(base, get_interventions(model), batch, "diffusion_gemma", cached=True):
        expected = drafts(base)
    assert plain.shape[1] == batch.columns + 16 and not torch.equal(plain, expected)
    assert torch.equal(drafts(model), expected)


CHECKS: tuple[Callable[[str, str], None], ...] = (
    check_the_blocks_of_the_main_stack_are_wrapped,
    check_what_is_declared_is_what_a_trace_finds,
    check_a_fresh_adapter_changes_nothing,
    check_logits_and_hidden_states_equal_the_reference,
    check_gradients_reach_every_intervention_and_nothing_else,
    check_a_saved_adapter_gives_the_same_logits,
    check_the_base_model_is_given_back,
    check_generate_equals_the_reference_with_and_without_a_cache,
)


# The part that runs with the tests: every layout of the hidden state, every kind of cache and of stack.
REPRESENTATIVES = [
    *[("causal", name) for name in ("llama", "gptj", "qwen3_moe", "gemma3n_text", "deepseek_v4", "qwen4_exp_text")],
    *[
        ("causal", name)
        for name in ("mamba2", "rwkv", "nemotron_h", "zamba", "xlnet", "cpmant", "prophetnet", "hrm_text")
    ],
    *[("masked", name) for name in ("bert", "modernbert", "xlm", "squeezebert", "longformer", "funnel")],
    *[("seq2seq", name) for name in ("t5", "bart", "led", "fsmt", "encoder-decoder")],
    *[("sequence", "qwen2"), ("sequence", "canine"), ("token", "deberta-v2"), ("image", "vit")],
    ("image", "pvt_v2"),
    *[("image-text", name) for name in ("llava", "mllama", "blip-2", "vision-encoder-decoder")],
]
REFUSED = [
    ("causal", "reformer", "reversible"),
    ("masked", "albert", "several times in a row"),
    ("image", "convnext", "no vectors that"),
]


@pytest.mark.parametrize("mapping, model_type", REPRESENTATIVES, ids=["-".join(pair) for pair in REPRESENTATIVES])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_architecture(check: Callable[[str, str], None], mapping: str, model_type: str):
    check(model_type, mapping)


@pytest.mark.parametrize("mapping, model_type, reason", REFUSED)
def test_what_cannot_work_is_refused_with_the_reason_and_left_alone(mapping: str, model_type: str, reason: str):
    base = tiny_model(model_type, mapping)
    with pytest.raises(ValueError, match=reason):
        get_peft_model(base, config_for(mapping))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())


def test_the_blocks_of_a_vision_tower_are_reached_by_name():
    base = tiny_model("llava", "image-text")
    pattern = r".*vision_tower.*layers\.\d+"
    names = list(get_interventions(get_peft_model(base, ReftConfig(target_modules=pattern, positions="all"))))
    assert len(names) == DEPTH and all("vision_tower" in name for name in names)


def test_a_decoder_beside_an_encoder_of_images_counts_over_its_own_prompt():
    base = tiny_model("vision-encoder-decoder", "image-text")
    model = get_peft_model(base, ReftConfig(target_modules=r"decoder\..*layer\.\d+", positions="f2+l2", r=2)).eval()
    randomize(model)
    inputs = batch_for(base, "image-text", LENGTHS).inputs
    edits = model.get_submodule("base_model.model.decoder.bert.encoder.layer.0")
    seen = []
    edits.register_forward_hook(lambda block, args, output: seen.append(output))
    labels = torch.full_like(inputs["decoder_input_ids"], -100)
    labels[:, 2:] = 7  # predicted by the tokens in column 2 and behind it
    with torch.no_grad():
        model(**inputs, labels=labels)
        with model.disable_adapter():
            model(**inputs, labels=labels)
    edited, plain = (output if isinstance(output, Tensor) else output[0] for output in seen)
    changed = (edited != plain).any(-1)
    assert changed.tolist() == [[True, True, True, False]] * len(LENGTHS)


def test_rows_with_images_generate_with_their_own_adapters():
    base = tiny_model("vision-encoder-decoder", "image-text")
    common = {"target_modules": r"encoder\.layers\.\d+", "positions": "all"}  # which runs before the model does
    model = get_peft_model(base, ReftConfig(**common)).eval()
    model.add_adapter("other", ReftConfig(**common, intervention="direft", init_weights=False))
    randomize(model, seed=1)
    settings = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0, "num_beams": 1}
    settings |= {"decoder_start_token_id": 2, "return_dict_in_generate": True, "output_scores": True}
    pixels = batch_for(base, "image-text", LENGTHS[:1]).inputs["pixel_values"].expand(3, -1, -1, -1)
    together = model.generate(pixel_values=pixels, adapter_names=["other", "__base__", "default"], **settings)
    alone = []
    for row, name in enumerate(("other", None, "default")):
        model.set_adapter(name or "default")
        with model.disable_adapter() if name is None else contextlib.nullcontext():
            alone.append(model.generate(pixel_values=pixels[row : row + 1], **settings))
    for step, scores in enumerate(together.scores):
        rows = [output.scores[step][0] for output in alone]
        close(scores, torch.stack(rows), f"step {step}")
        differences = [float((one - other).nan_to_num().abs().max()) for one, other in pairwise(rows)]
        assert min(differences) > 1e-4, differences


def changed_columns(model: PeftModel, name: str, inputs: dict[str, Tensor]) -> list[list[int]]:
    """The columns of a block's output [B, S, d] that the adapter edits, of each row. For the first block of a stack."""
    seen = []

    def remember(block: nn.Module, args: tuple, output) -> None:
        seen.append(output if isinstance(output, Tensor) else output[0])

    handle = model.get_base_model().get_submodule(name).register_forward_hook(remember)
    run(model, Batch(inputs, [], 0))
    with model.disable_adapter():
        run(model, Batch(inputs, [], 0))
    handle.remove()
    return [row.nonzero().flatten().tolist() for row in (seen[0] != seen[1]).any(-1)]


@pytest.mark.parametrize(
    ("class_name", "start"),
    [("LayoutLMv3ForTokenClassification", 0), ("GitForCausalLM", 17), ("ViltForImagesAndTextClassification", 0)],
)
def test_tokens_are_found_beside_the_vectors_of_an_image(class_name: str, start: int):
    """Which stand in the same row: before the tokens or behind them."""
    cls = getattr(transformers, class_name)
    config = architectures.tiny_config(cls.config_class.model_type)
    config.num_images = 1
    base = cls._from_config(config).eval()
    model = randomize(get_peft_model(base, config_for("image-text")).eval())
    inputs = batch_for(base, "image-text", LENGTHS).inputs
    pixels = torch.randn(len(LENGTHS), 3, architectures.IMAGE, architectures.IMAGE)
    first = next(iter(get_interventions(model)))
    edited = [[0, 1, 7, 8], [0, 1, 3, 4], [0, 1, 2]]
    if "Vilt" not in class_name:
        inputs.pop("pixel_values", None)
        assert changed_columns(model, first, inputs) == edited
    with_image = inputs | {"pixel_values": pixels.unsqueeze(1) if "Vilt" in class_name else pixels}
    assert changed_columns(model, first, with_image) == [[start + column for column in row] for row in edited]


def test_tokens_behind_an_image_are_edited_when_they_are_generated():
    model, base = (tiny_model("git", "causal") for _ in range(2))
    model = randomize(get_peft_model(model, ReftConfig(positions="f1+l1+d", r=2)).eval())
    tokens = batch_for(base, "causal", (5, 5)).inputs["input_ids"]
    pixels = torch.randn(2, 3, architectures.IMAGE, architectures.IMAGE)
    settings = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}
    settings |= {"return_dict_in_generate": True, "output_scores": True}
    for use_cache in (True, False):  # 17 vectors of the image come first
        got = model.generate(input_ids=tokens, pixel_values=pixels, use_cache=use_cache, **settings)
        inputs = {"input_ids": got.sequences[:, :-1], "pixel_values": pixels}

        def edit(block: nn.Module, args: tuple, output, name: str):
            h = output[0].clone() if isinstance(output, tuple) else output.clone()
            for column in (0, 4, 5, 6, 7, 8):
                h[:, 17 + column] = get_interventions(model)[name][0](h[:, 17 + column])
            return (h, *output[1:]) if isinstance(output, tuple) else h

        handles = [
            base.get_submodule(name).register_forward_hook(lambda b, a, o, name=name: edit(b, a, o, name))
            for name in get_interventions(model)
        ]
        with torch.no_grad():
            expected = base(**inputs).logits[:, -5:]
            for handle in handles:
                handle.remove()
            assert (base(**inputs).logits[:, -5:] - expected).abs().max() > 1e-2
        for step, scores in enumerate(got.scores):
            possible = scores.isfinite()
            close(scores[possible], expected[:, step][possible], f"use_cache={use_cache}, step {step}")


def of_sound(class_name: str) -> nn.Module:
    cls = getattr(transformers, class_name)
    torch.manual_seed(0)
    return cls._from_config(architectures.tiny_config(cls.config_class.model_type)).eval()


@pytest.mark.parametrize(
    ("class_name", "stacks"),
    [
        ("Wav2Vec2ForCTC", ["wav2vec2.encoder.layers"]),
        ("HubertForSequenceClassification", ["hubert.encoder.layers"]),
        ("ASTForAudioClassification", ["audio_spectrogram_transformer.layers"]),
        ("WhisperForConditionalGeneration", ["model.encoder.layers", "model.decoder.layers"]),
        (
            "SpeechT5ForSpeechToText",
            ["speecht5.encoder.wrapped_encoder.layers", "speecht5.decoder.wrapped_decoder.layers"],
        ),
    ],
)
def test_the_blocks_of_models_of_sound_are_found(class_name: str, stacks: list[str]):
    names = list(get_interventions(get_peft_model(of_sound(class_name), ReftConfig())))
    assert names == [f"{stack}.{number}" for stack in stacks for number in range(DEPTH)]


def test_an_encoder_of_sound_counts_frames_and_its_decoder_tokens():
    model, base = (of_sound("WhisperForConditionalGeneration") for _ in range(2))
    model = randomize(get_peft_model(model, ReftConfig(positions="f2+l2", r=2)).eval())
    frames = base.config.max_source_positions
    sound = {"input_features": torch.randn(2, base.config.num_mel_bins, 2 * frames)}
    inputs = sound | {"decoder_input_ids": torch.randint(5, 90, (2, 7))}
    assert changed_columns(model, "model.encoder.layers.0", inputs) == [[0, 1, frames - 2, frames - 1]] * 2
    decoder = get_peft_model(base, ReftConfig(target_modules=r"model\.decoder\.layers\.\d", positions="f2+l2", r=2))
    assert changed_columns(randomize(decoder).eval(), "model.decoder.layers.0", inputs) == [[0, 1, 5, 6]] * 2
    base = decoder.unload()
    settings = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4, "return_dict_in_generate": True}
    for use_cache in (True, False):
        got = model.generate(**sound, **settings, output_scores=True, use_cache=use_cache)
        batch = Batch(sound, [[], []], frames, got.sequences.shape[1] - len(got.scores))
        with torch.no_grad(), reference(base, get_interventions(model), batch, "whisper"):
            expected = base(**sound, decoder_input_ids=got.sequences[:, :-1]).logits[:, -len(got.scores) :]
        for step, scores in enumerate(got.scores):
            possible = scores.isfinite()
            close(scores[possible], expected[:, step][possible], f"use_cache={use_cache}, step {step}")


def test_the_choices_of_a_question_are_rows_of_their_own():
    cls = transformers.CanineForMultipleChoice
    base = cls._from_config(architectures.tiny_config("canine")).eval()
    model = randomize(get_peft_model(base, ReftConfig(positions="f2+l2", r=2)).eval())
    tokens = torch.randint(5, 90, (2, 3, 16))
    with torch.no_grad():
        together = model(input_ids=tokens).logits
        alone = torch.cat([model(input_ids=tokens[:, choice : choice + 1]).logits for choice in range(3)], dim=1)
        with model.disable_adapter():
            assert (model(input_ids=tokens).logits - together).abs().min() > 1e-4
    close(together, alone)


class Stage(nn.Module):
    """Several blocks, which a checkpoint runs together, as the stages of some vision models."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])

    def run(self, h: Tensor) -> Tensor:
        for block in self.blocks:
            h = torch.tanh(block(h))
        return h

    def forward(self, h: Tensor) -> Tensor:
        checkpoint = getattr(self, CHECKPOINT, None)
        return self.run(h) if checkpoint is None else checkpoint(self.run, h)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("hooks_inside", [True, False])
def test_a_checkpoint_around_several_blocks_edits_what_the_call_did(reentrant, hooks_inside):
    def gradients(checkpointed: bool) -> list[Tensor]:
        torch.manual_seed(0)
        base = nn.Sequential(Stage(), Stage())
        config = ReftConfig(target_modules=r".*blocks\.\d", positions="f1", r=2)
        model = randomize(get_peft_model(base, config)).train()
        if checkpointed and hooks_inside:
            how = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
            wrapper = functools.partial(checkpoint_wrapper, checkpoint_impl=how)
            apply_activation_checkpointing(model, wrapper, lambda module: isinstance(module, Stage))
        elif checkpointed:
            for stage in base:
                setattr(stage, CHECKPOINT, functools.partial(checkpoint, use_reentrant=reentrant))
        loss = 0.0
        for call in range(2):  # two calls with positions of their own before one backward pass
            h = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(call)).requires_grad_()
            loss = loss + model(h, intervention_locations=torch.full((2, 1, 1), call)).square().sum()
        loss.backward()
        return [p.grad for m in get_interventions(model).values() for p in m.parameters()]

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        assert expected.abs().max() > 0


def test_unload_gives_a_module_its_checkpoint_function_back():
    base = tiny_model("pvt_v2", "image")
    base.gradient_checkpointing_enable({"use_reentrant": False})
    before = [module.__dict__.get(CHECKPOINT) for module in base.modules()]
    model = adapted(base, "image").train()
    model(pixel_values=torch.zeros(1, 3, 32, 32))
    assert any(isinstance(module.__dict__.get(CHECKPOINT), Replay) for module in base.modules())
    after = [module.__dict__.get(CHECKPOINT) for module in model.unload().modules()]
    assert all(one is other for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("mapping, model_type", [("causal", "llama"), ("seq2seq", "t5"), ("sequence", "deberta-v2")])
def test_checkpoints_within_checkpointed_blocks_give_the_same_gradients(mapping: str, model_type: str):
    """Those of transformers around each block, and torch's around the parts of blocks that hold their weights."""

    def gradients(nested: bool) -> list[Tensor]:
        base = tiny_model(model_type, mapping)
        model = adapted(base, mapping).train()
        interventions = get_interventions(model)
        if nested:
            base.gradient_checkpointing_enable({"use_reentrant": False})
            base.disable_input_require_grads()
            parts = [m for block in interventions for m in base.get_submodule(block).modules()]
            kinds = {type(m) for m in parts if type(m).__name__.endswith(("MLP", "LayerFF", "Attention"))}
            wrapper = functools.partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.NO_REENTRANT)
            apply_activation_checkpointing(model, wrapper, lambda module: type(module) in kinds)
            assert kinds
        output = result(model(**batch_for(base, mapping, LENGTHS).inputs))
        output.square().sum().backward()
        return [p.grad for m in interventions.values() for p in m.parameters()]

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        assert expected.abs().max() > 0


VARIED = [
    ("causal", "gpt2"),
    ("causal", "mamba2"),
    ("causal", "qwen3_moe"),
    ("seq2seq", "t5"),
    ("masked", "modernbert"),
]
VARIED += [("sequence", "deberta-v2"), ("image", "vit"), ("image-text", "llava")]


@pytest.mark.parametrize("mapping, model_type", VARIED)
def test_bfloat16_bases_take_float32_adapters_and_load_them_without_an_initialisation(mapping, model_type, tmp_path):
    base, again = (tiny_model(model_type, mapping).to(torch.bfloat16).requires_grad_(False) for _ in range(2))
    batch = batch_for(base, mapping, LENGTHS, side="left")
    inputs = {name: t.to(torch.bfloat16) if t.is_floating_point() else t for name, t in batch.inputs.items()}
    batch = replace(batch, inputs=inputs)
    before = result(run(base, batch))
    model = get_peft_model(base, config_for(mapping)).eval()
    assert torch.equal(result(run(model, batch)), before)
    got = result(run(randomize(model), batch))
    assert got.dtype == before.dtype and (got - before).abs().max() > 0.01
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(again, tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(result(run(loaded, batch)), got)
    result(model.train()(**inputs)).float().square().sum().backward()
    for name, modules in get_interventions(model).items():
        for parameter in modules.parameters():
            assert parameter.dtype == parameter.grad.dtype == torch.float32, name
            assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("model_type", ["t5", "bart", "encoder-decoder"])
def test_beams_of_an_encoder_and_a_decoder_score_as_the_reference_does(model_type: str):
    model, base = (tiny_model(model_type, "seq2seq") for _ in range(2))
    base.generation_config.forced_eos_token_id = None  # which would have no score
    model = adapted(model, "seq2seq")
    batch = batch_for(base, "seq2seq", LENGTHS, side="left")
    inputs = {name: tensor for name, tensor in batch.inputs.items() if not name.startswith("decoder_")}
    settings = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}
    settings |= {"pad_token_id": 0, "decoder_start_token_id": 2, "forced_eos_token_id": None}
    settings |= {"return_dict_in_generate": True, "output_scores": True}
    rows = torch.arange(len(LENGTHS)).repeat_interleave(2)
    twice = replace(batch, inputs={}, valid=[batch.valid[row] for row in rows], decoder_columns=1)
    for use_cache in (True, False):
        got = model.generate(**inputs, **settings, use_cache=use_cache)
        tokens = got.sequences
        arguments = {name: tensor[rows] for name, tensor in inputs.items()} | {"decoder_input_ids": tokens[:, :-1]}
        with torch.no_grad():
            plain = base(**arguments).logits
            with reference(base, get_interventions(model), twice, model_type):
                expected = base(**arguments).logits
        plain, expected = (
            logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1).sum(1) for logits in (plain, expected)
        )
        close(got.sequences_scores * (tokens.shape[1] - 1), expected)
        assert (plain - expected).abs().min() > 1e-2


def sweep(mapping: str, model_types: list[str]) -> dict[str, str]:
    """The outcome for each model type: "passed", "refused: ...", "not built: ..." or "FAILED ...: ..."."""
    outcomes = {}
    for model_type in model_types:
        outcomes[model_type] = outcome(model_type, mapping)
        print(f"{mapping:10} {model_type:28} {outcomes[model_type]}", flush=True)
        gc.collect()
    return outcomes


def outcome(model_type: str, mapping: str) -> str:
    try:
        base = tiny_model(model_type, mapping)
        run(base, batch_for(base, mapping, LENGTHS))
    except Exception as error:
        return f"not built: {short(error)}"
    try:
        get_peft_model(base, config_for(mapping))
    except NotImplementedError as error:  # a class without input embeddings, for which PEFT asks
        return f"not built: by PEFT: {short(error)}"
    except ValueError as error:
        return f"refused: {short(error)}"
    failures = []
    for check in CHECKS:
        try:
            check(model_type, mapping)
        except Exception as error:
            if VERBOSE:
                traceback.print_exc()
            failures.append(f"FAILED {check.__name__.removeprefix('check_')}: {short(error)}")
    return "; ".join(failures) or "passed"


def short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


VERBOSE = False


def main() -> int:
    """Run the sweep and print a table; the exit status is the number of failures."""
    global VERBOSE
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mappings", nargs="*", default=list(architectures.MAPPINGS))
    parser.add_argument("-t", "--types", nargs="+")
    parser.add_argument("-v", "--verbose", action="store_true")
    arguments = parser.parse_args()
    VERBOSE = arguments.verbose
    warnings.simplefilter("ignore")
    failed = 0
    for mapping in arguments.mappings:
        outcomes = sweep(mapping, arguments.types or architectures.model_types(mapping))
        kinds = [text.split(":")[0].split()[0] for text in outcomes.values()]
        print(mapping, {kind: kinds.count(kind) for kind in sorted(set(kinds))})
        failed += kinds.count("FAILED")
    return min(failed, 99)


if __name__ == "__main__":
    sys.exit(main())
