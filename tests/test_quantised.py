"""Bases whose weights are not plain float32 numbers in memory: quantised, half precision, offloaded, without data.

The packages that quantise (bitsandbytes, torchao, optimum-quanto, hqq) are not among the package's dependencies; the
tests of bases of those that are missing are skipped.
"""

from __future__ import annotations

import copy

import accelerate
import peft
import pytest
import reference
import torch
import transformers
from conftest import BLOCKS, batch, logits, randomize, reft_model, tiny_model
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training

from peft_reft import ReftConfig, get_interventions

CAUSAL = {"task_type": "CAUSAL_LM"}
CONFIG = ReftConfig(positions="f2+l1", share_weights=False, **CAUSAL)
KINDS = {  # by the package that each needs
    "bitsandbytes": ["4 bit", "4 bit double", "8 bit"],
    "torchao": ["torchao 4 bit", "torchao 8 bit", "torchao float8"],
    "optimum.quanto": ["quanto 4 bit", "quanto 8 bit"],
    "hqq": ["hqq 4 bit"],
}
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:MatMul8bitLt", "ignore:.*torchao.*"
)


def quantisation(kind: str):
    if kind.startswith("torchao"):
        from torchao import quantization as ao

        four = {"weight_dtype": torch.int4, "granularity": ao.PerGroup(32)}
        configs = {"4 bit": (ao.IntxWeightOnlyConfig, four), "8 bit": (ao.Int8WeightOnlyConfig, {})}
        config, settings = configs.get(kind.removeprefix("torchao "), (ao.Float8WeightOnlyConfig, {}))
        return transformers.TorchAoConfig(config(**settings))
    if kind.startswith("quanto"):
        return transformers.QuantoConfig(weights=f"int{kind.split()[1]}")
    if kind == "8 bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    double = kind == "4 bit double"
    dtype = torch.bfloat16 if double else torch.float32
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4" if double else "fp4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=dtype,
    )


def load_quantised(kind: str, path):
    if kind != "hqq 4 bit":
        settings = {"quantization_config": quantisation(kind), "device_map": {"": "cpu"}}
        return transformers.AutoModelForCausalLM.from_pretrained(path, **settings).eval()
    from hqq.core.quantize import BaseQuantizeConfig  # by its own loader: that of transformers wants a GPU
    from hqq.models.hf.base import AutoHQQHFModel

    base = transformers.AutoModelForCausalLM.from_pretrained(path)
    config = BaseQuantizeConfig(nbits=4, group_size=32)
    AutoHQQHFModel.quantize_model(base, quant_config=config, compute_dtype=torch.float32, device="cpu")
    return base.eval()


@pytest.fixture(scope="module")
def saved_base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    tiny_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(path)
    return path


@pytest.fixture(
    params=[(package, kind) for package, kinds in KINDS.items() for kind in kinds], ids=lambda pair: pair[1]
)
def quantised(request, saved_base):
    """A function that loads the quantised base afresh."""
    package, kind = request.param
    pytest.importorskip(package)
    return lambda: load_quantised(kind, saved_base)


@pytest.fixture
def inputs():
    return batch(7, 4, 5, side="left")


def changed(model, inputs):
    """Logits of a model with an adapter, after a check that the adapter does something."""
    got = logits(model, inputs)
    with model.disable_adapter():
        assert (logits(model, inputs) - got).abs().max() > 0.05
    return got


def loss_of(model, inputs) -> torch.Tensor:
    """The loss of the rows' last two tokens, so that the prompt is long enough for every term."""
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    return model(**inputs, labels=labels).loss


def trained(model) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def check_gradients(model, inputs) -> None:
    """After a backward pass all of the adapter's parameters have one, and nothing else has."""
    loss_of(model, inputs).backward()
    for name, parameter in model.named_parameters():
        if ".reft_interventions." in name:
            assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name
            # Nothing reads the output of the last block for the first tokens.
            if f"layers.{BLOCKS - 1}.reft.reft_interventions.default.0" not in name:
                assert parameter.grad.abs().max().item() > 0, name
        else:
            assert parameter.grad is None, name


# Quantised.


def test_edits_of_a_quantised_base_equal_the_reference(quantised, inputs):
    base = quantised()
    model = randomize(get_peft_model(quantised(), CONFIG).eval())
    projection = model.get_base_model().model.layers[0].mlp.up_proj
    weight = projection._parameters.get("weight")
    assert type(projection) is not torch.nn.Linear or type(weight.data) is not torch.Tensor
    with torch.no_grad():
        expected = reference.forward(base, get_interventions(model), CONFIG, inputs).logits
    mask = inputs["attention_mask"].bool()
    torch.testing.assert_close(
        changed(model, inputs)[mask], expected[mask], rtol=1e-2, atol=0.03 * expected.abs().max().item()
    )


def test_a_fresh_adapter_changes_a_quantised_base_in_nothing_and_unloads(quantised, inputs):
    base = quantised()
    before, classes = logits(base, inputs), [type(module) for module in base.modules()]
    model = get_peft_model(base, CONFIG).eval()
    torch.testing.assert_close(logits(model, inputs), before, rtol=0, atol=1e-5)
    changed(randomize(model), inputs)
    unloaded = model.unload()
    assert torch.equal(logits(unloaded, inputs), before)
    assert [type(module) for module in unloaded.modules()] == classes


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_adapter_of_a_quantised_base_is_trained(quantised, checkpointing, inputs):
    base = prepare_model_for_kbit_training(quantised(), use_gradient_checkpointing=checkpointing)
    model = get_peft_model(base, CONFIG).train()
    check_gradients(model, inputs)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = loss_of(model, inputs)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_adapter_of_a_quantised_base_is_saved_and_loaded(quantised, low_cpu_mem_usage, inputs, tmp_path):
    model = randomize(get_peft_model(quantised(), CONFIG).eval())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(quantised(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    torch.testing.assert_close(logits(again, inputs), changed(model, inputs), rtol=0, atol=1e-6)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    tokens = model.generate(**inputs, **settings)
    assert again.generate(**inputs, **settings).tolist() == tokens.tolist()
    with model.disable_adapter():
        assert model.generate(**inputs, **settings).tolist() != tokens.tolist()


def test_lora_and_reft_train_together_on_a_quantised_base(quantised, inputs):
    base = prepare_model_for_kbit_training(quantised(), use_gradient_checkpointing=False)
    base.add_adapter(peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False), "lora")
    base.add_adapter(ReftConfig(), "reft")
    base.set_adapter(["lora", "reft"])
    base.train()
    loss_of(base, inputs).backward()
    with_gradient = [name for name, parameter in base.named_parameters() if parameter.grad is not None]
    assert with_gradient == trained(base) and {"lora_" in name for name in with_gradient} == {True, False}


# Half precision.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [True, False])
def test_a_half_precision_base_takes_float32_adapters_and_such_of_its_own_dtype(dtype, autocast, inputs):
    base = tiny_model("llama").to(dtype).requires_grad_(False)
    model = get_peft_model(copy.deepcopy(base), CONFIG, autocast_adapter_dtype=autocast).eval()
    # In half precision W and R cannot be equal: R's rows are made orthonormal, and W is rounded.
    atol = 0 if autocast else 0.05
    torch.testing.assert_close(logits(model, inputs), logits(base, inputs), rtol=0, atol=atol)
    randomize(model)
    interventions = get_interventions(model)
    kinds = {parameter.dtype for modules in interventions.values() for parameter in modules.parameters()}
    assert kinds == {torch.float32 if autocast else dtype}
    with torch.no_grad():
        expected = reference.forward(base, interventions, CONFIG, inputs).logits
    got = changed(model, inputs)
    mask = inputs["attention_mask"].bool()
    assert got.dtype == dtype
    torch.testing.assert_close(got[mask], expected[mask], rtol=0.05, atol=0.05 * expected.abs().max().item())
    loss_of(model.train(), inputs).backward()
    gradients = [p.grad for modules in interventions.values() for p in modules.parameters()]
    assert all(grad is not None and grad.isfinite().all() for grad in gradients)
    assert any(grad.abs().max() > 0 for grad in gradients)


# Offloaded.


def offloaded(how: str, path, folder):
    """The base with weights elsewhere than where it computes."""
    if how == "device_map":
        return transformers.AutoModelForCausalLM.from_pretrained(path, device_map="auto").eval()
    if how == "disk in device_map":
        places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        places |= {f"model.layers.{number}": "disk" if number else "cpu" for number in range(BLOCKS)}
        return transformers.AutoModelForCausalLM.from_pretrained(path, device_map=places, offload_folder=folder).eval()
    base = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    if how == "cpu":
        return accelerate.cpu_offload(base, execution_device=torch.device("cpu"))
    return accelerate.disk_offload(base, folder, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("how", ["device_map", "cpu", "disk", "disk in device_map"])
def test_an_offloaded_base_takes_an_adapter_trains_and_generates(how, saved_base, inputs, tmp_path):
    plain = randomize(get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(saved_base), CONFIG).eval())
    model = get_peft_model(offloaded(how, saved_base, tmp_path / "weights"), CONFIG).eval()
    assert not any(p.is_meta for modules in get_interventions(model).values() for p in modules.parameters())
    randomize(model)
    torch.testing.assert_close(logits(model, inputs), changed(plain, inputs))
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    assert model.generate(**inputs, **settings).tolist() == plain.generate(**inputs, **settings).tolist()
    check_gradients(model.train(), inputs)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(saved_base), tmp_path / "adapter"
    ).eval()
    torch.testing.assert_close(logits(again, inputs), logits(plain, inputs))


@pytest.mark.parametrize("how", ["device_map", "cpu"])
def test_an_adapter_is_loaded_into_an_offloaded_base(how, saved_base, inputs, tmp_path):
    plain = randomize(get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(saved_base), CONFIG).eval())
    plain.save_pretrained(tmp_path / "adapter")
    for low_cpu_mem_usage in (False, True):
        base = offloaded(how, saved_base, tmp_path / "weights")
        model = PeftModel.from_pretrained(base, tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage).eval()
        torch.testing.assert_close(logits(model, inputs), changed(plain, inputs))


def test_a_model_is_offloaded_together_with_its_adapter(inputs):
    plain = reft_model(tiny_model("llama"), positions="f2+l1", **CAUSAL)
    want = changed(plain, inputs)
    model = accelerate.cpu_offload(copy.deepcopy(plain), execution_device=torch.device("cpu"))
    torch.testing.assert_close(logits(model, inputs), want)
    assert any(parameter.is_meta for parameter in model.parameters())


# Without data.


def test_a_model_without_data_takes_an_adapter_without_data(inputs):
    """`low_cpu_mem_usage=True`: parameters on the meta device, of the shapes that the weights will have."""
    with torch.device("meta"):
        base = transformers.AutoModelForCausalLM.from_config(tiny_model("llama").config)
    model = get_peft_model(base, CONFIG, low_cpu_mem_usage=True)
    full = get_peft_model(tiny_model("llama"), CONFIG)
    shapes = {name: parameter.shape for name, parameter in full.named_parameters()}
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == shapes
    assert all(parameter.is_meta for parameter in model.parameters())


def test_an_adapter_without_data_gets_its_weights_from_a_state_dict(inputs):
    full = reft_model(tiny_model("llama"), positions="f2+l1", share_weights=False, **CAUSAL)
    model = get_peft_model(tiny_model("llama"), CONFIG, low_cpu_mem_usage=True).eval()
    own = [parameter for modules in get_interventions(model).values() for parameter in modules.parameters()]
    assert all(parameter.is_meta for parameter in own)
    peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(full), low_cpu_mem_usage=True)
    assert torch.equal(logits(model, inputs), changed(full, inputs))
