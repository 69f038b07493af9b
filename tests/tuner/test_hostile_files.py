"""Adapters of strangers: each is refused with a clear error before anything is allocated, and none changes the base."""

from __future__ import annotations

import json
import shutil
import warnings
from contextlib import nullcontext

import pytest
import torch
from conftest import BLOCKS, HIDDEN, VOCAB, batch, logits, randomize, reft_model, tiny_model
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPConfig, LlamaConfig, T5Config, WhisperConfig

from peft_reft import ReftConfig
from peft_reft.tuner import fit
from peft_reft.tuner.checkpoint import check_tensors, warn_of_ignored
from peft_reft.tuner.fit import check_sizes, most_tokens, vocabulary_of
from peft_reft.tuner.keys import INTERVENTIONS
from peft_reft.tuner.sizes import shown

INPUTS = batch(7, 4)
CAUSAL = {"task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The directory of a sound adapter, to be spoilt in copies."""
    path = tmp_path_factory.mktemp("good")
    reft_model(tiny_model("llama"), r=2, **CAUSAL).save_pretrained(path)
    return path


def spoilt(good, tmp_path, tensors=None, **settings):
    """A copy with other settings, and with the tensors that a function makes of the stored ones."""
    path = shutil.copytree(good, tmp_path / "spoilt")
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, **settings}))
    if tensors is not None:
        save_file(tensors(load_file(path / "adapter_model.safetensors")), path / "adapter_model.safetensors")
    return path


def refused(path, said):
    """Loading raises ValueError, and the base computes what it computed before; returns the message."""
    base = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    wanted = logits(base, INPUTS)
    with pytest.raises(ValueError, match=said) as caught:
        PeftModel.from_pretrained(base, path)
    assert all(torch.equal(base.state_dict()[name], tensor) for name, tensor in before.items())
    assert torch.equal(logits(base, INPUTS), wanted)
    assert len(str(caught.value)) < 2000, "a value of any length is cut off"
    return str(caught.value)


# Sizes.

NINES = int("9" * 60)
HOSTILE = {
    "a prefix of a billion": ({"positions": "f1000000000+l1"}, "counts at most 16777216 tokens"),
    "a suffix of 10^60": ({"positions": f"l{NINES}"}, "counts at most 16777216 tokens"),
    "a step of 10^60": ({"positions": f"e{NINES}"}, "counts at most 16777216 tokens"),
    "a long notation": ({"positions": "f1+" * 100_000}, "is not a position spec"),
    "more than the model takes": ({"positions": "f129"}, r"takes at most 128 \(max_position_embeddings in its config"),
    "an intervention per position": ({"positions": "f100000", "share_weights": "position"}, "the most is 1024"),
    "a rank of a billion": ({"r": 10**9}, "must be between 1 and 32"),
    "a rank of 10^60": ({"r": NINES}, "must be between 1 and 32"),
    "a pattern's rank": ({"rank_pattern": {"layers.0": 10**12}}, "must be between 1 and 32"),
    "a long marker": ({"prompt_end": [1] * 200_000}, "has a length of 200000"),
    "a long text": ({"prompt_end": "x" * 10**6}, "has a length of 1000000"),
    "a negative id": ({"prompt_end": [-1]}, "prompt_end holds -1, which is not a token id"),
    "an id of 10^60": ({"prompt_end": [NINES]}, "which is not a token id"),
    "an id out of the vocabulary": ({"prompt_end": [5, VOCAB]}, "the vocabulary of LlamaForCausalLM has 100 ids"),
    "a trained id out of it": ({"trainable_token_indices": [VOCAB]}, "trainable_token_indices holds the token id 100"),
    "by its module": ({"trainable_token_indices": {"embed_tokens": [VOCAB]}}, "the vocabulary of 'embed_tokens' of"),
    "a negative trained id": ({"trainable_token_indices": [-1]}, "trainable_token_indices holds -1"),
    "trained ids of no kind": ({"trainable_token_indices": "all"}, "must be a list of token ids"),
    "a block of 10^60": ({"layers_to_transform": [NINES]}, "names blocks that do not exist"),
    "many blocks": ({"layers_to_transform": [0] * 200_000}, "layers_to_transform has 200000 entries"),
    "many names": (
        {"exclude_modules": [f"x{number}" for number in range(20_000)]},
        "exclude_modules has 20000 entries",
    ),
    "names of no kind": ({"target_modules": [1]}, "does not name modules; pass a list of names"),
    "a number for names": ({"modules_to_save": 3}, "modules_to_save=3 does not name modules"),
    "an empty name": ({"modules_to_save": ["lm_head", ""]}, r"modules_to_save=\['lm_head', ''\] has an empty name"),
    "an empty name of a module": ({"target_modules": [""]}, "has an empty name, which names no module"),
    "an embedding without a name": ({"trainable_token_indices": {"": [1]}}, "by the name of their embedding"),
    "text for names": ({"modules_to_save": "lm_head"}, "modules_to_save='lm_head' does not name modules"),
    "no dictionary": ({"rank_pattern": [1]}, r"rank_pattern=\[1\] must be a dictionary"),
    "no regular expression": ({"target_modules": "("}, r"target_modules='\(' is not a regular expression"),
    "none in a pattern": ({"rank_pattern": {"*": 2}}, "is not a regular expression"),
    "no intervention": ({"intervention": ["loreft"] * 1000}, "is unknown"),
    "no activation": ({"act_fn": {"a": 1}}, "is not an activation"),
    "no sharing": ({"share_weights": [True]}, "must be True, False or 'position'"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_settings_that_no_model_or_not_this_one_can_use_are_refused(case, good, tmp_path):
    settings, said = HOSTILE[case]
    refused(spoilt(good, tmp_path, **settings), said)


def test_an_adapter_larger_than_the_model_is_refused(monkeypatch):
    base = tiny_model("llama")
    config = ReftConfig(r=HIDDEN, positions="f100", share_weights="position")
    assert sum(p.numel() for p in base.parameters()) < 100 * BLOCKS * HIDDEN * (2 * HIDDEN + 1) < fit.MOST_PARAMETERS
    check_sizes(config, base, {"a": (HIDDEN, HIDDEN)})  # small enough for any machine
    monkeypatch.setattr(fit, "MOST_PARAMETERS", 1000)
    built = []
    monkeypatch.setattr("peft_reft.tuner.layer.build_intervention", lambda *args, **kwargs: built.append(args))
    with pytest.raises(ValueError, match="make an adapter of 624000 parameters in 3 block"):
        get_peft_model(base, config)
    assert not built


def test_what_a_model_s_config_allows_is_allowed():
    assert most_tokens(tiny_model("llama"))[0] == 128
    model = reft_model(tiny_model("llama"), positions="f64+l128")
    assert not torch.allclose(logits(model, INPUTS), logits(tiny_model("llama"), INPUTS))
    reft_model(tiny_model("llama"), prompt_end=[VOCAB - 1], trainable_token_indices=[VOCAB - 1])
    assert most_tokens(nn.Linear(2, 2))[0] == fit.MOST_UNSTATED


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (LlamaConfig(max_position_embeddings=10_000_000), 10_000_000),
        (WhisperConfig(max_source_positions=1500, max_target_positions=448), 1500),
        (T5Config(), fit.MOST_UNSTATED),
        (CLIPConfig(), fit.MOST_UNSTATED),  # its text part's 77 do not bound the patches of an image
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_limit_is_the_model_s_own_where_its_config_says_it(config, limit):
    model = nn.Module()
    model.config = config
    assert most_tokens(model)[0] == limit


def test_a_grown_vocabulary_counts():
    base = tiny_model("llama")
    base.resize_token_embeddings(VOCAB + 4, mean_resizing=False)
    assert vocabulary_of(base) == VOCAB + 4
    with pytest.raises(ValueError, match="holds the token id 104"):
        get_peft_model(base, ReftConfig(prompt_end=[VOCAB + 4]))
    get_peft_model(base, ReftConfig(prompt_end=[VOCAB + 3]))


@pytest.mark.parametrize("tokens", [[VOCAB], {"embed_tokens": [VOCAB]}], ids=str)
def test_tokens_of_a_second_adapter_are_compared_with_the_embedding_that_the_first_has_wrapped(tokens):
    model = reft_model(tiny_model("llama"), trainable_token_indices=[3])
    with pytest.raises(ValueError, match=r"token id 100, but the vocabulary of '(model\.)?embed_tokens' of .* has 100"):
        model.add_adapter("second", ReftConfig(trainable_token_indices=tokens))
    model.add_adapter("second", ReftConfig(trainable_token_indices=[VOCAB - 1]))


def test_a_short_value_is_shown_in_full():
    assert shown([1, "a"]) == "[1, 'a']" and shown("x" * 10**6).endswith("... (1000002 characters)")


# Tensors.


def each(change):
    return lambda tensors: {name: change(tensor) for name, tensor in tensors.items()}


def last(change):
    """Spoil one number, the last of the last tensor."""

    def spoil(tensors):
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        tensors[max(tensors)].view(-1)[-1] = change
        return tensors

    return spoil


NOT_FINITE = "is infinite or not a number"
SPOILT = {
    "NaN": (last(float("nan")), NOT_FINITE),
    "infinite": (last(float("inf")), NOT_FINITE),
    "NaN in bfloat16": (lambda tensors: each(torch.Tensor.bfloat16)(last(float("nan"))(tensors)), NOT_FINITE),
    "NaN in float8": (lambda t: each(lambda h: h.to(torch.float8_e5m2))(last(float("nan"))(t)), NOT_FINITE),
    **{
        str(dtype).removeprefix("torch."): (each(lambda tensor, dtype=dtype: tensor.to(dtype)), "is of type")
        for dtype in (torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64)
    },
    "a huge shape": (each(lambda tensor: torch.zeros(40_000, HIDDEN)), "does not fit LlamaForCausalLM"),
    "a scalar": (each(lambda tensor: tensor.flatten()[0].clone()), "does not fit"),
    "empty": (each(lambda tensor: torch.zeros(0, HIDDEN)), "does not fit"),
    "one missing": (lambda tensors: dict(list(tensors.items())[1:]), "the adapter lacks"),
    "none": (lambda tensors: {"x": torch.zeros(1)}, "the adapter has 0 edited blocks"),
    "one more": (lambda t: {**t, "a.reft.reft_interventions.0.basis": torch.zeros(1)}, "the model lacks a"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_tensors_that_are_no_weights_of_this_adapter_are_refused(case, good, tmp_path):
    change, said = SPOILT[case]
    refused(spoilt(good, tmp_path, change), said)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn], ids=str)
def test_finite_weights_of_any_precision_load(dtype, good, tmp_path):
    path = spoilt(good, tmp_path, each(lambda tensor: tensor.to(dtype)))
    model = PeftModel.from_pretrained(tiny_model("llama"), path)
    wanted = PeftModel.from_pretrained(tiny_model("llama"), good)
    assert (logits(model, INPUTS) - logits(wanted, INPUTS)).abs().max() < 0.5
    assert (logits(model, INPUTS) - logits(tiny_model("llama"), INPUTS)).abs().max() > 1


@pytest.mark.parametrize("setting", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 4]}], ids=str)
def test_what_a_config_names_and_the_file_lacks_is_refused(setting, good, tmp_path):
    path = shutil.copytree(good, tmp_path / "lacking")
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, **setting}))
    refused(path, "its file lacks .*(lm_head|embed_tokens).*, of its modules_to_save or trainable_token_indices")


def test_a_refused_file_leaves_an_adapter_of_that_name_as_it_was(good, tmp_path):
    model = PeftModel.from_pretrained(tiny_model("llama"), good)
    wanted = logits(model, INPUTS)
    path = spoilt(good, tmp_path, lambda tensors: each(lambda tensor: tensor + 1)(last(float("nan"))(tensors)))
    with pytest.raises(ValueError, match=NOT_FINITE):
        model.load_adapter(path, "default")
    assert torch.equal(logits(model, INPUTS), wanted)


# Keys that are not the adapter's.

STRANGE = {
    "base_model.model.lm_head.weight": (VOCAB, HIDDEN),
    "base_model.model.model.norm.weight": (HIDDEN,),
    "base_model.model.model.embed_tokens.weight": (VOCAB, HIDDEN),
    "base_model.model.model.layers.0.mlp.up_proj.weight": (64, HIDDEN),
    "lm_head.weight": (VOCAB, HIDDEN),
    "../../../etc/passwd": (2,),
}


@pytest.mark.parametrize("key", STRANGE)
def test_no_key_of_a_stranger_reaches_the_base(key, good, tmp_path):
    path = spoilt(good, tmp_path, lambda tensors: {**tensors, key: torch.full(STRANGE[key], 7.0)})
    base = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with pytest.warns(UserWarning, match="tensors that are not the adapter's, and that are not loaded") as caught:
        model = PeftModel.from_pretrained(base, path)
    assert sum(key in str(warning.message) for warning in caught) == 1
    sound = PeftModel.from_pretrained(tiny_model("llama"), good)
    assert torch.equal(logits(model, INPUTS), logits(sound, INPUTS))
    with model.disable_adapter():
        assert torch.equal(logits(model, INPUTS), logits(tiny_model("llama"), INPUTS))
    after = model.unload().state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])  # the second has one tensor for the embedding and the head
def test_no_key_of_a_stranger_reaches_the_base_of_transformers_own_loading(family, fails, tmp_path):
    def base():
        return tiny_model(family, tie_word_embeddings=family == "gpt2")

    model = reft_model(base(), **CAUSAL)
    model.save_pretrained(tmp_path / "good")
    wanted, before = logits(model, INPUTS), base()
    strange = {f"base_model.model.{name}": torch.full_like(p, 7.0) for name, p in before.named_parameters()}

    def spoil(tensors):
        own = {key: tensor * float("nan") if fails else tensor for key, tensor in tensors.items()}
        return {**strange, **own}

    path, loaded = spoilt(tmp_path / "good", tmp_path, spoil), base()
    with pytest.warns(UserWarning, match="tensors that are not the adapter's, and that are not loaded"):
        if fails:
            with pytest.raises(ValueError, match="not a number"):
                loaded.load_adapter(path)
        else:
            loaded.load_adapter(path)
            assert torch.equal(logits(loaded, INPUTS), wanted)
            loaded.disable_adapters()
    assert torch.equal(logits(loaded, INPUTS), logits(before, INPUTS))
    assert family != "gpt2" or loaded.lm_head.weight is loaded.transformer.wte.weight


def test_no_key_of_a_stranger_reaches_another_adapter_or_what_a_copy_was_made_of(tmp_path):
    def classifier():
        return tiny_model("bert", "classifier")

    settings = {"task_type": "SEQ_CLS"}
    model = reft_model(classifier(), **settings)
    nn.init.normal_(model.base_model.model.classifier.modules_to_save["default"].weight)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    strange = torch.full_like(load_file(file)["base_model.model.classifier.weight"], 7.0)
    keys = [f"base_model.model.classifier.{part}.weight" for part in ("original_module", "modules_to_save.mine")]
    save_file({**load_file(file), **dict.fromkeys(keys, strange.clone()), keys[1]: strange.clone()}, file)
    other = reft_model(classifier(), seed=3, adapter="mine", **settings)
    wanted = logits(other, INPUTS)
    with pytest.warns(UserWarning, match="are not loaded"):
        other.load_adapter(tmp_path, "theirs")
    assert torch.equal(logits(other, INPUTS), wanted)
    other.set_adapter("theirs")
    assert torch.equal(logits(other, INPUTS), logits(model, INPUTS)), "its own head was taken"
    with other.disable_adapter():
        assert torch.equal(logits(other, INPUTS), logits(classifier(), INPUTS))


def test_what_belongs_to_an_adapter_is_loaded_without_a_warning(tmp_path):
    settings = {"modules_to_save": ["lm_head"], "trainable_token_indices": [5, 6], **CAUSAL}
    model = reft_model(tiny_model("llama"), **settings)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.normal_()
        model.base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta["default"].normal_()
    model.save_pretrained(tmp_path)
    ids = {"input_ids": torch.tensor([[5, 7, 6, 8]])}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    assert torch.equal(logits(again, ids), logits(model, ids))
    plain = reft_model(tiny_model("llama"), **CAUSAL)
    assert not torch.allclose(logits(model, ids), logits(plain, ids))


def test_a_counter_in_a_module_that_is_saved_in_full_may_be_an_integer(tmp_path):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(self.first(x))

    def adapter():
        return get_peft_model(
            Network(), ReftConfig(target_modules=["first"], positions="all", modules_to_save=["norm"])
        )

    model, x = adapter(), torch.randn(8, 4)
    model.train()(x)
    randomize(model).eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Network(), tmp_path).eval()
    assert torch.equal(again(x), model(x)) and not torch.equal(model(x), adapter().eval()(x))
    assert again.base_model.model.norm.modules_to_save["default"].num_batches_tracked == 1


# A vocabulary that grew.


def grown(seed):
    base = tiny_model("llama")
    torch.manual_seed(seed)
    base.resize_token_embeddings(VOCAB + 4, mean_resizing=False)
    return base


def test_embeddings_of_a_grown_vocabulary_are_the_user_s_to_load(tmp_path):
    """PEFT saves them with an adapter, under the base model's names; an adapter does not change the base model."""
    model = reft_model(grown(1), **CAUSAL)
    inputs = {"input_ids": torch.tensor([[5, VOCAB + 1, 6, 8]])}
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    again = PeftModel.from_pretrained(grown(1), tmp_path)  # the same embeddings: nothing to warn of
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    with pytest.warns(UserWarning, match=r"lm_head\.weight, base_model\.model\.model\.embed_tokens\.weight\. "):
        again = PeftModel.from_pretrained(grown(2), tmp_path)
    assert not torch.allclose(logits(again, inputs), logits(model, inputs))
    # What the warning says to do.
    base = grown(2)
    own = {
        name.removeprefix("base_model.model."): t
        for name, t in load_file(tmp_path / "adapter_model.safetensors").items()
    }
    base.load_state_dict({name: own[name] for name in ("model.embed_tokens.weight", "lm_head.weight")}, strict=False)
    again = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(again, inputs), logits(model, inputs))


def test_tokens_that_are_trained_go_with_the_adapter_whatever_the_base_s_new_rows_are(tmp_path):
    settings = {"trainable_token_indices": [VOCAB + 1], "modules_to_save": ["lm_head"], **CAUSAL}
    model = reft_model(grown(1), **settings)
    with torch.no_grad():
        model.base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta["default"].normal_()
    model.save_pretrained(tmp_path)
    inputs = {"input_ids": torch.tensor([[5, VOCAB + 1, 6, 8]])}
    again = PeftModel.from_pretrained(grown(2), tmp_path)
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    assert not torch.allclose(logits(grown(2), inputs), logits(grown(1), inputs))


@pytest.mark.parametrize(("name", "is_refused"), [(f"layers.0{INTERVENTIONS}0.count", True), ("head.count", False)])
def test_whole_numbers_are_weights_of_no_intervention_even_where_the_model_has_some(name, is_refused):
    """A module that is saved in full may hold a counter."""
    tensors = {name: torch.zeros(2, dtype=torch.long)}
    with pytest.raises(ValueError, match="weights are floating-point numbers") if is_refused else nullcontext():
        check_tensors(tensors, current=tensors)


def test_tensors_that_are_ignored_are_told_unless_the_model_has_the_same():
    there = {"lm_head.weight": torch.tensor([1.0, 2.0])}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_ignored({"lm_head.weight": torch.tensor([1.0, 2.0])}, there, "default")
    for other in (torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0]).half(), torch.tensor([1.0])):
        with pytest.warns(UserWarning, match="are not loaded: lm_head.weight"):
            warn_of_ignored({"lm_head.weight": other}, there, "default")
