"""A backbone with edits as inputs answers as the package does: every equation, positions, cache and padding."""

import itertools

import pytest
import torch
from conftest import DECODERS, batch, logits, randomize, reft_model, tiny_model
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    MusicgenDecoderConfig,
    MusicgenForCausalLM,
    ProphetNetConfig,
    ProphetNetForCausalLM,
    XLMConfig,
    XLMWithLMHeadModel,
)

from peft_reft import ReftConfig, register_intervention, set_strength, set_subspaces
from peft_reft.export import (
    EditableBackbone,
    adapter_tensors,
    edit_mask,
    export_backbone,
    exportable,
    greedy_answer,
    open_backbone,
)
from peft_reft.export.graph import Sizes, trace
from peft_reft.interventions import BUILT_IN, REGISTRY, takes_source

EQUATIONS = [name for name in sorted(BUILT_IN) if not takes_source(name)]
CAUSAL = {"task_type": "CAUSAL_LM"}
PROMPT, TOKENS = [5, 9, 31, 44, 7, 80], 6


def answer(model, tokens=TOKENS):
    ids = torch.tensor([PROMPT])
    model.generation_config.eos_token_id = None  # answers go on behind a token that would end them
    settings = {"max_new_tokens": tokens, "do_sample": False}
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)[0, len(PROMPT) :].tolist()


def answer_of(backbone, tensors, positions, share_weights=True, strength=1.0):
    past = backbone.empty_past() if backbone.cache else None
    return greedy_answer(backbone, PROMPT, tensors, positions, share_weights, past, TOKENS, strength)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("intervention", EQUATIONS)
def test_every_equation_gives_the_logits_of_the_package(intervention, side):
    settings = {"positions": "f2+l1", "share_weights": False, "layers_to_transform": [0, 2]}
    model = reft_model(tiny_model("llama"), intervention=intervention, r=3, task_type="CAUSAL_LM", **settings)
    inputs = batch(7, 4, side=side)
    tensors, mask = adapter_tensors(model), edit_mask("f2+l1", inputs["attention_mask"])
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "down": (3, 2, 3, 32),
        "bias": (3, 2, 3),
        "up": (3, 2, 3, 32),
    }
    backbone, valid = exportable(model, cache=False), inputs["attention_mask"].bool()
    with torch.no_grad():
        got, off = (backbone(*inputs.values(), m, *tensors.values())[0] for m in (mask, mask.roll(1, dims=1)))
    expected = logits(model, inputs)
    torch.testing.assert_close(got[valid], expected[valid], rtol=1e-4, atol=1e-4)
    assert (got - off)[valid].abs().max() > 1e-2  # one token further is another result
    with model.disable_adapter():
        assert (logits(model, inputs) - expected)[valid].abs().max() > 1e-2


@pytest.mark.parametrize("intervention", sorted(BUILT_IN.difference(EQUATIONS)))
def test_an_intervention_that_takes_a_source_is_refused(intervention, tmp_path):
    model = reft_model(tiny_model("llama"), intervention=intervention, task_type="CAUSAL_LM")
    model.save_pretrained(tmp_path)
    for refused in (
        lambda: adapter_tensors(model),
        lambda: adapter_tensors(tmp_path),
        lambda: exportable(model, baked="default"),
    ):
        with pytest.raises(ValueError, match="takes the hidden states of another input"):
            refused()


@pytest.mark.parametrize("own", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [5, 6]}])
def test_weights_that_an_adapter_changes_do_not_slip_into_a_backbone(own):
    model = reft_model(tiny_model("llama"), positions="l1", **CAUSAL, **own)
    with pytest.raises(ValueError, match="weights that would become part of the backbone"):
        exportable(model)
    assert answer_of(exportable(model, baked="default"), None, "l1") == answer(model)
    model.add_adapter("other", ReftConfig(positions="l1", **CAUSAL))
    model.set_adapter("other")
    exportable(model)
    with pytest.raises(ValueError, match=r"Call set_adapter\('default'\) first"):
        exportable(model, baked="default")


def test_an_adapter_within_blocks_is_refused():
    model = reft_model(tiny_model("llama"), positions="l1", target_modules=r".*\.mlp", **CAUSAL)
    with pytest.raises(ValueError, match=r"'model.layers.0.mlp', a module within a block"):
        adapter_tensors(model)
    with pytest.raises(ValueError, match="none of the model's blocks"):
        exportable(model, baked="default")


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("family", DECODERS)
def test_answers_are_those_of_generate(family, cache):
    model = reft_model(tiny_model(family), positions="f2+d2", share_weights=False, task_type="CAUSAL_LM")
    backbone, tensors = exportable(model, cache=cache), adapter_tensors(model)
    for strength in (1.0, 0.5, 0.0):
        set_strength(model, strength)
        assert answer_of(backbone, tensors, "f2+d2", False, strength) == answer(model)
    assert answer_of(backbone, tensors, "f2+d2", False) != answer_of(backbone, tensors, "f2+d3", False)


@pytest.mark.parametrize("cache", [True, False])
def test_tokens_behind_a_given_answer_are_those_of_the_model_behind_it(cache):
    model = reft_model(tiny_model("llama"), positions="f2+d2", share_weights=False, task_type="CAUSAL_LM")
    own = answer(model)
    given = [own[0], (own[1] + 1) % 100, *own[2:]]
    ids, labels = torch.tensor([[*PROMPT, *given]]), torch.tensor([[-100] * len(PROMPT) + given])
    expected = model(input_ids=ids, labels=labels).logits[0, len(PROMPT) - 1 : -1].argmax(-1).tolist()
    past = exportable(model).empty_past() if cache else None
    arguments = (PROMPT, adapter_tensors(model), "f2+d2", False, past, TOKENS)
    found = greedy_answer(exportable(model, cache=cache), *arguments, given=given)
    assert found == expected and found[:2] == own[:2] and found[2:] != own[2:]


def test_a_window_is_kept_by_the_mask_when_the_cache_holds_the_whole_row():
    models = [reft_model(tiny_model("mistral", sliding_window=size), positions="f1+d2", **CAUSAL) for size in (4, 100)]
    found = [answer_of(exportable(model), adapter_tensors(model), "f1+d2") for model in models]
    assert found == [answer(model) for model in models] and found[0] != found[1]


def test_a_padded_batch_with_a_cache_continues_as_the_whole_rows():
    model = reft_model(tiny_model("gpt2"), positions="f1+l2", task_type="CAUSAL_LM")  # with absolute places
    backbone, tensors = exportable(model), adapter_tensors(model)
    inputs = batch(7, 4, side="left")
    ids, mask = inputs.values()
    edits = edit_mask("f1+l2", mask, share_weights=True)
    with torch.no_grad():
        logits_whole, *_ = backbone(ids, mask, edits, *tensors.values(), *backbone.empty_past(2))
        _, *past = backbone(ids[:, :5], mask[:, :5], edits[:, :5], *tensors.values(), *backbone.empty_past(2))
        logits_rest, *_ = backbone(ids[:, 5:], mask, edits[:, 5:], *tensors.values(), *past)
    torch.testing.assert_close(logits_rest, logits_whole[:, 5:], rtol=1e-4, atol=1e-4)
    answers = model.generate(**inputs, max_new_tokens=1, do_sample=False)[:, -1]
    assert logits_whole[:, -1].argmax(-1).tolist() == answers.tolist()


def test_shared_weights_take_a_mask_of_one_group_or_of_one_per_term():
    model = reft_model(tiny_model("llama"), positions="f1+l1", task_type="CAUSAL_LM")
    backbone, tensors, inputs = exportable(model, cache=False), adapter_tensors(model), batch(6)
    assert tensors["bias"].shape[1] == 1
    with torch.no_grad():
        one, two = (
            backbone(*inputs.values(), edit_mask("f1+l1", prompt_length=6, share_weights=share), *tensors.values())[0]
            for share in (True, False)
        )
    torch.testing.assert_close(one, two)
    torch.testing.assert_close(one, logits(model, inputs), rtol=1e-4, atol=1e-4)


def test_a_mask_of_other_columns_is_refused():
    model = reft_model(tiny_model("llama"), positions="all", **CAUSAL)
    inputs, tensors = batch(6), adapter_tensors(model)
    for mask in (torch.ones(1, 1, 1), torch.ones(1, 6), torch.ones(2, 6, 1)):
        with pytest.raises(ValueError, match=r"edit_mask has the shape .* for token ids \(1, 6\)"):
            exportable(model, cache=False)(*inputs.values(), mask, *tensors.values())
        with pytest.raises(ValueError, match="edit_mask has the shape"):
            exportable(model, cache=False, baked="default")(*inputs.values(), mask)


def test_a_mask_of_fewer_groups_than_the_adapter_is_refused():
    model = reft_model(tiny_model("llama"), positions="f1+l1", share_weights=False, **CAUSAL)
    mask = edit_mask("f1+l1", prompt_length=6, share_weights=True)
    with pytest.raises(ValueError, match=r"edit_mask has 1 group\(s\), but the adapter 2"):
        exportable(model, cache=False)(*batch(6).values(), mask, *adapter_tensors(model).values())


def test_the_model_stays_what_it_was():
    model = reft_model(tiny_model("llama"), positions="f1+l1", task_type="CAUSAL_LM")
    before, hooks = answer(model), [len(module._forward_hooks) for module in model.modules()]
    backbone = exportable(model)
    answer_of(backbone, adapter_tensors(model), "f1+l1")
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    with pytest.raises((IndexError, RuntimeError)):  # tensors of no adapter
        answer_of(backbone, dict.fromkeys(("down", "bias", "up"), torch.ones(1, 1, 1, 32)), "f1+l1")
    assert answer(model) == before


def test_adapters_of_other_types_stay_part_of_the_backbone():
    base = tiny_model("llama")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    expected = answer(model)
    backbone = exportable(model)
    nothing = {"down": torch.zeros(3, 1, 1, 32), "bias": torch.zeros(3, 1, 1), "up": torch.zeros(3, 1, 1, 32)}
    assert answer_of(backbone, nothing, "f1") == expected
    with model.disable_adapter():
        assert answer(model) != expected


class Squared(nn.Module):
    def __init__(self, d, r):
        super().__init__()
        self.direction = nn.Parameter(torch.randn(r, d))

    def forward(self, h):
        return h + (h @ self.direction.T).square() @ self.direction * 0.1


@pytest.mark.parametrize("settings", [{"act_fn": "gelu", "intervention": "loreft"}, {"intervention": "squared"}])
@pytest.mark.filterwarnings("ignore:.*no weights for which the edit is zero")
def test_what_is_no_two_products_is_refused_as_tensors_and_can_be_baked_in(settings):
    register_intervention("squared", Squared)
    try:
        model = reft_model(
            tiny_model("llama"), positions="f2+l2", share_weights=False, task_type="CAUSAL_LM", **settings
        )
        with pytest.raises(ValueError, match="baked"):
            adapter_tensors(model)
        backbone = exportable(model, baked="default")
        assert answer_of(backbone, None, "f2+l2", False) == answer(model)
        with model.disable_adapter():
            assert answer_of(backbone, None, "f2+l2", False, strength=0.0) == answer(model)
            assert answer_of(backbone, None, "f2+l2", False) != answer(model)
    finally:
        del REGISTRY["squared"]


def test_an_adapter_of_a_model_in_half_precision_is_baked_in_its_own():
    base = tiny_model("llama", num_hidden_layers=1).to(torch.bfloat16)
    model = reft_model(base, positions="f1+l1", act_fn="gelu", **CAUSAL)
    backbone, inputs = exportable(model, cache=False, baked="default"), batch(6)
    mask = edit_mask("f1+l1", prompt_length=6, share_weights=True)
    with torch.no_grad():
        got, plain = (backbone(*inputs.values(), strength * mask)[0] for strength in (1, 0))
    torch.testing.assert_close(got, logits(model, inputs).float(), rtol=0.02, atol=0.02)
    assert (got - plain).abs().max() > 0.1


def test_a_baked_adapter_keeps_its_weights_when_the_model_trains_on():
    model = reft_model(tiny_model("llama"), positions="l1", task_type="CAUSAL_LM")
    backbone, before = exportable(model, baked="default"), answer(model)
    randomize(model, seed=5)
    assert answer_of(backbone, None, "l1") == before != answer(model)


def xlm():
    return XLMWithLMHeadModel(XLMConfig(n_words=40, emb_dim=16, n_layers=1, n_heads=2, mask_token_id=3))


def prophetnet():
    sizes = {"num_decoder_layers": 1, "num_decoder_attention_heads": 2, "decoder_ffn_dim": 16, "ngram": 2}
    return ProphetNetForCausalLM(ProphetNetConfig(vocab_size=40, hidden_size=16, is_decoder=True, **sizes))


@pytest.mark.parametrize(
    ("model", "cache", "why"),
    [
        (lambda: tiny_model("t5"), True, "no decoder-only causal language model"),
        (lambda: tiny_model("bert"), True, "no decoder-only causal language model"),
        (lambda: nn.Linear(3, 3), True, "no decoder-only causal language model"),
        (xlm, False, "XLMWithLMHeadModel.generate passes other tokens"),
        (prophetnet, False, "ProphetNetForCausalLM return hidden states of 3 streams for each token, where"),
    ],
)
def test_models_that_cannot_be_exported_are_refused_with_the_reason(model, cache, why):
    with pytest.raises(ValueError, match=why):
        exportable(model(), cache=cache)


def test_a_recurrent_state_is_refused_and_so_is_a_graph_of_one_length_alone():
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4)).eval()
    with pytest.raises(ValueError, match="cache=False"):
        exportable(model)
    backbone = exportable(model, cache=False)  # its loop over the tokens is unrolled by the trace
    with pytest.raises(ValueError, match=r"traced for 2 rows of 5 columns, fails \(.*\) for 1 of 1 behind 0"):
        trace(backbone, Sizes())


class Counted(EditableBackbone):
    """Returns other logits in every call, of which a trace sees one."""

    calls = itertools.count(1)

    def run(self, *arguments):
        logits, *past = super().run(*arguments)
        return logits * next(self.calls), *past


def test_a_graph_that_is_another_function_than_its_model_is_refused():
    backbone = exportable(tiny_model("llama", num_hidden_layers=1), cache=False)
    with pytest.raises(ValueError, match="returns something else than the model for 1 of 1 behind 0"):
        trace(Counted(backbone.model, backbone.blocks, backbone.width, backbone.vocabulary, None).eval(), Sizes())


def test_a_model_that_takes_more_than_token_ids_is_refused():
    config = MusicgenDecoderConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=8)
    with pytest.raises(ValueError, match="does not run on token ids and their mask alone"):
        exportable(MusicgenForCausalLM(config))


def test_a_subspace_is_switched_off_by_its_rows():
    settings = {"r": 3, "subspaces": {"one": 1, "two": 2}, "positions": "f1+l1", "task_type": "CAUSAL_LM"}
    model = reft_model(tiny_model("llama"), **settings)
    backbone, tensors, inputs = exportable(model, cache=False), adapter_tensors(model), batch(6)
    mask = edit_mask("f1+l1", prompt_length=6, share_weights=True)
    for name, rows in (("one", slice(1, 3)), ("two", slice(0, 1))):
        set_subspaces(model, [name])
        up = tensors["up"].clone()
        up[:, :, rows] = 0
        with torch.no_grad():
            got = backbone(*inputs.values(), mask, tensors["down"], tensors["bias"], up)[0]
        torch.testing.assert_close(got, logits(model, inputs), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(adapter_tensors(model), tensors, rtol=0, atol=0)  # whatever is switched on
    assert (got - logits(model, inputs, subspaces=["one"])).abs().max() > 1e-2


def test_too_few_tensors_of_the_past_are_refused():
    model = reft_model(tiny_model("llama"), positions="l1", task_type="CAUSAL_LM")
    ids = torch.tensor([PROMPT])
    with pytest.raises(ValueError, match="takes 6 tensors of the past"):
        exportable(model)(ids, torch.ones_like(ids), torch.ones(1, 6, 1), *adapter_tensors(model).values())


def test_config_has_a_name_for_every_way_of_sharing():
    model = reft_model(tiny_model("llama"), positions="f1+l2", share_weights="position", task_type="CAUSAL_LM")
    tensors = adapter_tensors(model)
    assert tensors["bias"].shape[1] == 3
    assert ReftConfig(positions="f1+l2", share_weights="position").share_weights == "position"
    assert answer_of(exportable(model), tensors, "f1+l2", "position") == answer(model)


def test_a_pt2_file_with_a_cache_runs_prompts_of_a_few_tokens(tmp_path):
    """torch.export takes a row of past and columns for four or more, and its file refused shorter ones."""
    base = tiny_model("llama", num_hidden_layers=1)
    base.generation_config.eos_token_id = None
    model = reft_model(base, positions="f1+l1+d2", share_weights=False, task_type="CAUSAL_LM")
    export_backbone(exportable(model), tmp_path, "pt2")
    run, description = open_backbone(tmp_path)
    for length in (1, 2, 3):
        ids = torch.tensor([PROMPT[:length]])
        wanted = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0)[0, length:].tolist()
        past = description.empty_past()
        got = greedy_answer(run, PROMPT[:length], adapter_tensors(model), "f1+l1+d2", False, past, new_tokens=4)
        assert got == wanted
        assert got != greedy_answer(run, PROMPT[:length], adapter_tensors(model), "f1+l1+d2", False, past, 4, 0.0)
