"""Backbones as files: ONNX in onnxruntime, PT2 in torch, weights of 8 and 4 bits, and files that cannot be run."""

import warnings

import pytest
import torch
from conftest import batch, randomize, reft_model, tiny_model

from peft_reft import ReftConfig, set_strength
from peft_reft.export import (
    adapter_tensors,
    edit_mask,
    export_backbone,
    exportable,
    greedy_answer,
    load_adapter_tensors,
    open_backbone,
    save_adapter_tensors,
)
from peft_reft.export import quantise as rounding

PROMPT, TOKENS = [5, 9, 31, 44, 7, 80], 6
onnx, *_ = (pytest.importorskip(name) for name in ("onnx", "onnxscript", "onnxruntime"))
pytestmark = pytest.mark.filterwarnings("ignore")


def two_adapters():
    """One model, two adapters that differ in equation, rank, blocks, positions and sharing."""
    base = tiny_model("llama", num_hidden_layers=2)
    base.generation_config.eos_token_id = None
    model = reft_model(
        base, adapter="one", r=3, positions="f2+d2", share_weights=False, layers_to_transform=[1], task_type="CAUSAL_LM"
    )
    model.add_adapter("two", ReftConfig(r=1, positions="l1", intervention="direft", task_type="CAUSAL_LM"))
    return randomize(model, "two", seed=4, scale=1.0)


ADAPTERS = {"one": ("f2+d2", False), "two": ("l1", True)}


def answer(model, adapter):
    model.set_adapter(adapter)
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        found = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False
        )
    return found[0, len(PROMPT) :].tolist()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The folder of an ONNX backbone with a cache."""
    folder = tmp_path_factory.mktemp("onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export_backbone(exportable(two_adapters()), folder, base_model="tiny")
    return folder


def test_one_file_answers_for_every_adapter_and_for_the_base_model(exported, tmp_path):
    model = two_adapters()
    run, description = open_backbone(exported)
    seen = set()
    for adapter, (positions, share) in ADAPTERS.items():
        path = tmp_path / f"{adapter}.safetensors"
        save_adapter_tensors(model, path, torch.float32, adapter_name=adapter, base_model="tiny")
        tensors = description.inputs(load_adapter_tensors(path))
        for strength in (1.0, 0.0):
            got = greedy_answer(run, PROMPT, tensors, positions, share, description.empty_past(), TOKENS, strength)
            with model.disable_adapter() if strength == 0 else torch.no_grad():
                assert got == answer(model, adapter)
            seen.add(tuple(got))
    assert len(seen) == 3


def test_logits_are_those_of_the_backbone(exported):
    model = two_adapters()
    backbone, (run, _) = exportable(model), open_backbone(exported)
    tensors, mask = adapter_tensors(model, "one"), torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    ids = torch.randint(3, 90, (2, 5))
    arguments = (ids, mask, edit_mask("f2+d2", mask), *tensors.values(), *backbone.empty_past(2))
    with torch.no_grad():
        expected = backbone(*arguments)
    for got, wanted in zip(run(*arguments), expected, strict=True):
        keep = mask.bool() if got.dim() == 3 else mask.bool()[:, None].expand(got.shape[:3])
        torch.testing.assert_close(got[keep], wanted[keep], rtol=1e-4, atol=1e-4)


ROWS = [("one", 0.5), ("two", 2.0), ("one", 1.5), ("two", 0.0), ("one", -1.0)]  # adapter and strength


def of_rows(run, description, files, inputs, strengths, steps=4):
    """Greedy tokens of a batch whose rows have adapters and strengths of their own, and the logits of each step."""
    edits = {name: load_adapter_tensors(file) for name, file in files.items()}
    adapter, past = description.inputs(*edits.values()), description.empty_past(len(ROWS))
    ids, attention_mask = inputs.values()
    answer, found = ids[:, :0], []
    for generated in range(steps):
        mask = torch.cat(
            [
                edit_mask(one.positions, attention_mask, generated=generated, share_weights=one.share_weights)
                * torch.tensor([s if own == name else 0.0 for own, s in strengths]).view(-1, 1, 1)
                for name, one in edits.items()
            ],
            dim=-1,
        )
        columns = ids.shape[1] if past is None or not generated else 1
        logits, *present = run(ids[:, -columns:], attention_mask, mask[:, -columns:], *adapter.values(), *(past or ()))
        found.append(logits[:, -1])
        past = None if past is None else present
        ids = torch.cat((ids, found[-1].argmax(-1, keepdim=True)), dim=1)
        attention_mask = torch.cat((attention_mask, attention_mask[:, -1:]), dim=1)
        answer = ids[:, -generated - 1 :]
    return answer, torch.stack(found, dim=1)


def check_rows(run, description, tmp_path):
    """Rows of one run against generate with `adapter_names`, and against runs of single rows."""
    model, files = two_adapters(), {name: tmp_path / f"{name}.safetensors" for name in ADAPTERS}
    for name, file in files.items():
        save_adapter_tensors(model, file, torch.float32, adapter_name=name, base_model=description.base_model)
    inputs, names = batch(7, 4, 6, 7, 5, side="left"), [name for name, _ in ROWS]
    answer, logits = of_rows(run, description, files, inputs, ROWS)
    _, even = of_rows(run, description, files, inputs, [(name, 1.0) for name, _ in ROWS])
    assert all((one - other).abs().max() > 1e-2 for one, other in zip(logits, even))  # each row's strength matters
    settings = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    for row, (name, strength) in enumerate(ROWS):
        set_strength(model, strength, name)
        model.set_adapter(name)
        alone = {
            key: value[row : row + 1, value.shape[1] - int(inputs["attention_mask"][row].sum()) :]
            for key, value in inputs.items()
        }
        for one, given, extra in ((0, alone, {}), (row, inputs, {"adapter_names": names})):
            with torch.no_grad():
                found = model.generate(**given, **extra, **settings)
            assert found.sequences[one, -4:].tolist() == answer[row].tolist()
            wanted = torch.stack(found.logits, dim=1)[one]
            torch.testing.assert_close(logits[row], wanted, rtol=1e-3, atol=1e-3)


def test_each_row_has_a_strength_and_an_adapter_of_its_own_in_one_run(exported, tmp_path):
    check_rows(*open_backbone(exported), tmp_path)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_weights_of_few_bits_leave_the_edits_in_floating_point(dtype, exported, tmp_path, monkeypatch):
    model = two_adapters()
    if dtype == "int8":  # weights beside the graph, as those of a large model are
        monkeypatch.setattr(rounding, "ONE_FILE", 1000)
    (tmp_path / "backbone.json").write_bytes((exported / "backbone.json").read_bytes())
    rounding.quantise(exported / "backbone.onnx", tmp_path / "backbone.onnx", dtype)
    (run, description), (exact, _) = open_backbone(tmp_path), open_backbone(exported)
    tensors, ids = adapter_tensors(model, "one"), torch.tensor([PROMPT])
    mask = edit_mask("f2+d2", prompt_length=len(PROMPT))

    def logits(of, strength):
        past = description.empty_past()
        return of(ids, torch.ones_like(ids), strength * mask, *tensors.values(), *past)[0]

    assert (tmp_path / "backbone.onnx.data").exists() == (dtype == "int8")
    assert (logits(run, 0) - logits(exact, 0)).abs().max() > 1e-3  # the weights were rounded
    effect, exact_effect = (logits(of, 1) - logits(of, 0) for of in (run, exact))
    assert exact_effect.norm() > 1 and (effect - exact_effect).norm() < 0.6 * exact_effect.norm()
    rounded, whole = (onnx.load(folder / "backbone.onnx").graph for folder in (tmp_path, exported))
    weights = {tensor.name for tensor in whole.initializer}
    transposed = {node.output[0] for node in whole.node if node.op_type == "Transpose" and node.input[0] in weights}
    products = [node for node in whole.node if node.op_type == "MatMul"]
    of_states = [node for node in products if not set(node.input) & (weights | transposed)]
    # Two products in the attention and two with the adapter in each block are as they were; of the others the rotary
    # angles' alone, whose factor is no matrix of weights.
    few_bits = {node.output[0] for node in rounded.node if node.op_type == "DequantizeLinear"}
    kept = [node for node in rounded.node if node.op_type == "MatMul" and not few_bits & set(node.input)]
    assert 2 * (2 + 2) <= len(of_states) <= 2 * (2 + 2) + 1 < len(products)  # transformers 5.16 has the angles here
    assert {node.name for node in of_states} <= {node.name for node in kept}
    assert len(kept) <= 2 * (2 + 2) + 1


def changed(arguments, number, tensor):
    return [*arguments[:number], tensor, *arguments[number + 1 :]]


def test_inputs_that_do_not_fit_the_graph_are_named(exported):
    model, (run, description) = two_adapters(), open_backbone(exported)
    ids, tensors = torch.tensor([PROMPT]), adapter_tensors(model, "one")
    mask = edit_mask("f2+d2", prompt_length=len(PROMPT))
    given = [ids, torch.ones_like(ids), mask, *tensors.values(), *description.empty_past()]
    assert torch.isfinite(run(*given)[0]).all()
    for number, tensor, why in (
        (0, ids.int(), "input_ids is torch.int32"),
        (1, torch.ones(1, 7, dtype=torch.long), r"attention_mask is .* \[1, 7\], and must be .* \[1, 6\]"),
        (2, mask[:, -1:], r"edit_mask is .* \[1, 1, 2\], and must be .* \[1, 6, 2\]"),  # would broadcast
        (2, torch.ones(1, 6, 3), r"edit_mask is .* \[1, 6, 3\], and must be .* \[1, 6, 2\]"),
        (2, mask.double(), "edit_mask is torch.float64"),
        (3, tensors["down"].half(), "down is torch.float16"),
        (5, tensors["up"][1:], r"up is .* \[1, 2, 3, 32\], and must be .* \[2, 2, 3, 32\]"),
        (7, torch.zeros(1, 1, 2, 8), "past.0.value is torch.float32"),
    ):
        with pytest.raises(ValueError, match=why):
            run(*changed(given, number, tensor))
    with pytest.raises(ValueError, match=r"takes 10 tensors .* got 6"):
        run(*given[:6])


def test_pt2_without_a_cache_and_with_fixed_sizes(tmp_path):
    model = two_adapters()
    written = export_backbone(exportable(model, cache=False), tmp_path, "pt2", max_rank=4, max_groups=3)
    run, description = open_backbone(tmp_path)
    assert written == description and (description.max_rank, description.cache) == (4, None)
    for adapter, (positions, share) in ADAPTERS.items():
        save_adapter_tensors(model, tmp_path / "a.safetensors", torch.float32, adapter_name=adapter)
        tensors = description.inputs(load_adapter_tensors(tmp_path / "a.safetensors"))
        assert greedy_answer(run, PROMPT, tensors, positions, share, None, TOKENS) == answer(model, adapter)
    check_rows(run, description, tmp_path)
    # Weights that all groups share serve a mask of any group.
    ids, columns = torch.tensor([PROMPT]), torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, 1.0]])
    none = 0 * columns
    masks = (torch.stack((columns, none, none), -1), torch.stack((none, none, columns), -1), columns.unsqueeze(-1))
    one, two, three = (run(ids, torch.ones_like(ids), mask, *tensors.values())[0] for mask in masks)
    assert torch.equal(one, three)
    torch.testing.assert_close(one, two)


def test_a_backbone_is_written_in_the_precision_of_the_model(tmp_path):
    base = tiny_model("llama", num_hidden_layers=1).to(torch.bfloat16)
    description = export_backbone(exportable(base, cache=False), tmp_path, "pt2")
    assert (description.dtype, base.dtype) == ("bfloat16", torch.bfloat16)
    assert open_backbone(tmp_path)[0](
        torch.tensor([PROMPT]), torch.ones(1, 6, dtype=torch.long), torch.ones(1, 6, 1),
        torch.ones(1, 1, 2, 32), torch.ones(1, 1, 2), torch.ones(1, 1, 2, 32),
    )[0].dtype == torch.float32  # fmt: skip
    with pytest.raises(ValueError, match="A model in bfloat16 is nothing that format='onnx' holds"):
        export_backbone(exportable(base, cache=False), tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_formats_dtypes_and_sizes_that_there_are_not(tmp_path):
    backbone = exportable(two_adapters())
    with pytest.raises(ValueError, match=r"format='tflite' .* onnx, pt2, pte"):
        export_backbone(backbone, tmp_path, "tflite")
    with pytest.raises(ValueError, match="quantised='int4' of a model in float32 is nothing that format='pt2' holds"):
        export_backbone(backbone, tmp_path, "pt2", quantised="int4")
    with pytest.raises(ValueError, match="max_rank=0"):
        export_backbone(backbone, tmp_path, max_rank=0)
    assert not list(tmp_path.iterdir())


def test_a_damaged_or_missing_graph_is_refused(exported, tmp_path):
    with pytest.raises(ValueError, match=r"backbone.json"):
        open_backbone(tmp_path)
    (tmp_path / "backbone.json").write_bytes((exported / "backbone.json").read_bytes())
    with pytest.raises(ValueError, match="is missing"):
        open_backbone(tmp_path)
    (tmp_path / "backbone.onnx").write_bytes((exported / "backbone.onnx").read_bytes()[:5000])
    with pytest.raises(ValueError, match="the file is damaged"):
        open_backbone(tmp_path)
