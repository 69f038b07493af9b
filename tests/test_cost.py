"""What ReFT may cost, in counts: tensor operations, synchronisations, graph breaks, bytes. Times are in benchmarks/."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import VOCAB, batch, randomize, tiny_config, tiny_model
from peft import get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import peft_reft.context.forward
import peft_reft.interventions.equations
from peft_reft import ReftConfig

VIEWS = {"aten._unsafe_view.default", "aten.detach.default"}  # beside what torch itself calls a view
SYNCHRONIZING = ("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.equal", "aten.masked_select")
STEPS_WITH_A_CHECK = 3  # the first training forwards look whether anything is edited at all


class Operations(TorchDispatchMode):
    """Counts tensor operations, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        schema = function._schema
        with_tensors = any("Tensor" in str(value.type) for value in (*schema.arguments, *schema.returns))
        if with_tensors and not function.is_view and str(function) not in VIEWS:
            self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


def operations(run: Callable[[], Any]) -> Counter[str]:
    with Operations() as counter:
        run()
    return counter.counts


def added(adapted: Callable[[], Any], base: Callable[[], Any]) -> dict[str, int]:
    """The operations of one call beyond those of another."""
    more, reference = operations(adapted), operations(base)
    return {name: more[name] - reference[name] for name in {*more, *reference} if more[name] != reference[name]}


def llama(blocks: int) -> nn.Module:
    return tiny_model("llama", num_hidden_layers=blocks)


def adapted(model: nn.Module, training: bool = False, **settings: Any) -> nn.Module:
    """An adapter on a model, past the checks of the first training forwards, frozen if it is not to be trained."""
    config = ReftConfig(**{"r": 4, "positions": "f4+l4", "task_type": "CAUSAL_LM", **settings})
    model = randomize(get_peft_model(model, config)).train(training)
    if not training:
        model.requires_grad_(False)
    with torch.set_grad_enabled(training):
        for _ in range(STEPS_WITH_A_CHECK):
            model(**labelled(12, 9))
    return model


def labelled(*lengths: int) -> dict[str, torch.Tensor]:
    inputs = batch(*lengths)
    columns = torch.arange(inputs["input_ids"].shape[1])
    return {**inputs, "labels": torch.where(columns < min(lengths) // 2, -100, inputs["input_ids"])}


def operations_per_block(training: bool, inputs: dict[str, torch.Tensor]) -> float:
    """What ReFT adds per block: the difference between models of two and of six blocks."""
    totals = {}
    with torch.set_grad_enabled(training):
        for blocks in (2, 6):
            base, model = llama(blocks).train(training), adapted(llama(blocks), training)
            run, reference = (lambda m=model: m(**inputs)), (lambda m=base: m(**inputs))
            run()
            totals[blocks] = sum(added(run, reference).values())
    return (totals[6] - totals[2]) / 4


@pytest.mark.parametrize("lengths", [(12, 9, 10, 11), (5,), (3, 20)], ids=str)
@pytest.mark.parametrize(("training", "most"), [(False, 7), (True, 10)], ids=["inference", "training"])
def test_a_block_gets_few_operations_whatever_the_batch(training, most, lengths):
    assert 0 < operations_per_block(training, labelled(*lengths)) <= most


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_positions_and_orthonormal_rows_are_worked_out_once_for_all_blocks(training, monkeypatch):
    calls: Counter[str] = Counter()

    def count(module: Any, name: str) -> None:
        original = getattr(module, name)

        def counted(*args: Any) -> Any:
            calls[name] += 1
            return original(*args)

        monkeypatch.setattr(module, name, counted)

    count(peft_reft.context.forward, "places_of")
    count(peft_reft.interventions.parts, "orthonormal_rows")
    model = adapted(llama(6), training)
    calls.clear()
    with torch.set_grad_enabled(training):
        model(**labelled(12, 9))
    # Frozen weights give the same rows again: what earlier forwards worked out is used.
    assert calls == ({"places_of": 1, "orthonormal_rows": 1} if training else {"places_of": 1})


def test_a_new_value_of_a_frozen_weight_is_noticed(monkeypatch):
    """The cache of the test above must not be one that always hits."""
    model = adapted(llama(2))
    calls = []
    original = peft_reft.interventions.parts.orthonormal_rows
    monkeypatch.setattr(peft_reft.interventions.parts, "orthonormal_rows", lambda w: calls.append(1) or original(w))
    randomize(model, seed=5)
    with torch.no_grad():
        model(**labelled(12, 9))
    assert len(calls) == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_recomputation_does_not_orthonormalise_again(reentrant):
    model = adapted(llama(3), training=True)
    inputs = labelled(12, 9)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    counts = operations(lambda: model(**inputs).loss.backward())
    assert counts["aten.linalg_cholesky_ex.default"] == 1
    assert counts["aten.index_add.default"] == 2 * 3  # the blocks did run a second time


@pytest.mark.parametrize("strategy", ["generate", "forward by forward"])
def test_a_decode_step_gets_no_operation(strategy):
    counts = []
    for model in (llama(3), adapted(llama(3))):
        inputs = batch(7, 4, side="left")
        if strategy == "generate":
            settings = {"do_sample": False, "eos_token_id": None}

            def run(tokens, m=model, i=inputs, s=settings):
                return operations(lambda: m.generate(**i, min_new_tokens=tokens, max_new_tokens=tokens, **s))

            counts.append(run(5) - run(4))
        else:
            with torch.no_grad():
                cache = model(**inputs, past_key_values=DynamicCache(), use_cache=True).past_key_values
                mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
                step = {"input_ids": torch.tensor([[5], [6]]), "attention_mask": mask, "past_key_values": cache}
                counts.append(operations(lambda m=model, s=step: m(**s)))
    assert counts[0] == counts[1]
    assert sum(counts[0].values()) > 10


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("positions", ["f4+l4", "all"])
def test_a_forward_does_not_wait_for_the_device(training, positions):
    model, base = adapted(llama(2), training, positions=positions), llama(2).train(training)
    inputs = labelled(12, 9)
    with torch.set_grad_enabled(training):
        more = added(lambda: model(**inputs), lambda: base(**inputs))
    # On the CPU, and only there, the three kinds of parameters are compared with those of the forward before.
    allowed = 0 if training else 3
    assert sum(count for name, count in more.items() if name.startswith(SYNCHRONIZING)) <= allowed
    assert more.get("aten._local_scalar_dense.default", 0) == more.get("aten.nonzero.default", 0) == 0


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_fullgraph_compile_without_break_and_recompilation(training):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = adapted(llama(2), training)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    batches = [labelled(12, 9), labelled(7, 12), labelled(12, 4)]  # other prompts in batches of the same shape
    with torch.set_grad_enabled(training):
        got = [compiled(**inputs).logits for inputs in batches]
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        assert not torch._dynamo.utils.counters["graph_break"]
        for logits, inputs in zip(got, batches):
            torch.testing.assert_close(logits, model(**inputs).logits)


def test_parameters_and_file_at_the_size_of_the_paper_s_small_models(tmp_path):
    config = LlamaConfig(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=8, vocab_size=8
    )
    model = get_peft_model(LlamaForCausalLM(config), ReftConfig(r=4, positions="f4+l4", task_type="CAUSAL_LM"))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 73_776
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size <= 310_000


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_nothing_the_size_of_the_hidden_state_squared_is_kept(training):
    """torch's own parametrisation keeps a d x d matrix per block."""
    base = llama(2)
    own = {id(tensor) for tensor in (*base.parameters(), *base.buffers())}
    model = adapted(base, training)
    width = base.config.hidden_size
    found, seen = [], set()

    def collect(value: Any) -> None:
        if id(value) in seen or id(value) in own:
            return
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, dict):
            [collect(item) for item in value.values()]
        elif isinstance(value, (list, tuple, set)):
            [collect(item) for item in value]
        elif type(value).__module__.startswith("peft_reft") or isinstance(value, nn.Module):
            collect(vars(value))
            collect(getattr(value, "__self__", None))

    collect(model)
    for hook in [h for m in model.modules() for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]:
        collect(getattr(hook, "__self__", None))
    assert len(found) >= 6  # W, b and the rows of R, in two blocks
    assert all(tensor.numel() < width * width for tensor in found)


def test_many_adapters_in_one_batch_use_as_many_operations_as_few():
    model = get_peft_model(llama(2), ReftConfig(r=2, positions="f2+l2"), adapter_name="a0")
    for number in range(1, 64):
        model.add_adapter(f"a{number}", ReftConfig(r=2, positions="f2+l2"))
    model.eval().requires_grad_(False)
    inputs = batch(*(5 + number % 3 for number in range(64)))

    def scatters(names: list[str] | None) -> int:
        with torch.no_grad():
            counts = operations(lambda: model(**inputs, adapter_names=names))
        return counts["aten.index_add.default"], counts["aten.index_select.default"]

    assert scatters([f"a{number}" for number in range(64)]) == scatters(["a0"] * 64)
    assert scatters([f"a{number}" for number in range(64)])[0] == scatters(None)[0] == 2


def test_adapters_that_no_row_asks_for_cost_no_function_call():
    """A server with a thousand adapters in memory pays for those of the batch."""
    model = get_peft_model(llama(2), ReftConfig(r=2, positions="f2+l2"), adapter_name="a0")

    def calls() -> int:
        found = 0

        def count(frame: Any, event: str, argument: Any) -> None:
            nonlocal found
            found += event in ("call", "c_call")

        with torch.no_grad():
            sys.setprofile(count)
            try:
                model(**batch(5, 6), adapter_names=["a0", "a1"])
            finally:
                sys.setprofile(None)
        return found

    model.add_adapter("a1", ReftConfig(r=2, positions="f2+l2"))
    model.eval().requires_grad_(False)
    calls()  # which works out the factors
    few = calls()
    for number in range(2, 30):
        model.add_adapter(f"a{number}", ReftConfig(r=2, positions="f2+l2"))
    model.eval().requires_grad_(False)
    calls()
    assert abs(calls() - few) <= 2


def test_a_model_without_data_runs():
    """On the meta device FLOPs can be counted and shapes inferred without weights."""
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(tiny_config("llama"), attn_implementation="eager")
        model = get_peft_model(model, ReftConfig(r=2, positions="f2+l2")).eval()
        inputs = {"input_ids": torch.zeros(1, 6, dtype=torch.long), "attention_mask": torch.zeros(1, 1, 6, 6)}
    assert model(**inputs).logits.shape == (1, 6, VOCAB)
