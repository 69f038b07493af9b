"""A worker's adapters, slots and requests, driven as the runners of vLLM drive them, without vLLM."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import slow_places
import torch
from conftest import HIDDEN, reft_model, tiny_model
from torch import nn

from peft_reft import get_interventions
from peft_reft.integrations.vllm import runner as glue
from peft_reft.integrations.vllm.adapters import served_adapter
from peft_reft.integrations.vllm.worker import Sizes, Worker, find_blocks


class Block(nn.Module):
    """The stream in two tensors, as vLLM's Llama returns it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, hidden, residual):
        residual = hidden if residual is None else hidden + residual
        return self.linear(residual), residual


class Model(nn.Module):
    """Three blocks whose names are those of transformers' Llama."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, hidden):
        residual = None
        for block in self.model.layers:
            hidden, residual = block(hidden, residual)
        return hidden + residual


def attached(model, slots=2, **settings):
    worker = Worker(**settings)
    worker.attach(
        lambda: find_blocks(model, 3, ()),
        lambda: model(torch.randn(4, HIDDEN)),
        (),
        Sizes(slots, 8, HIDDEN, 64),
        torch.device("cpu"),
    )
    return worker


@pytest.fixture
def adapters(tmp_path):
    """Two saved adapters, with their models."""
    found = {}
    for seed, (name, settings) in enumerate(
        {"ends": {"positions": "f1+l2"}, "answers": {"positions": "l1+d2"}}.items()
    ):
        model = reft_model(tiny_model("llama"), seed=seed + 1, r=2, share_weights=False, **settings)
        model.save_pretrained(tmp_path / name)
        found[name] = (tmp_path / name, model)
    return found


class Runner:
    """What both runners of vLLM have: requests, a batch in an order of its own, and a manager of adapters."""

    def __init__(self, worker, adapters):
        self.lora_manager = SimpleNamespace(_adapter_manager=SimpleManager())
        glue._workers[self.lora_manager._adapter_manager] = worker
        self.worker, self.adapters = worker, adapters
        self.requests: dict[str, object] = {}
        self.req_states = SimpleNamespace(req_id_to_index=self.requests)

    def output(self, new=(), finished=()):
        for request in new:
            self.requests[request.req_id] = request
        return SimpleNamespace(scheduled_new_reqs=list(new), finished_req_ids=set(finished))


class SimpleManager:
    pass


def request(name, adapter, number, length, strength=None):
    lora = None if adapter is None else SimpleNamespace(lora_path=str(adapter), lora_int_id=number, lora_name="x")
    extra = None if strength is None else {"reft_strength": strength}
    return SimpleNamespace(
        req_id=name,
        lora_request=lora,
        prompt_token_ids=list(range(length)),
        prompt_len=length,
        sampling_params=SimpleNamespace(extra_args=extra),
    )


def step_v1(runner, output, ids, computed, scheduled):
    runner.input_batch = SimpleNamespace(req_ids=[*ids, None], num_computed_tokens_cpu=np.array([*computed, 7]))
    original = lambda self, scheduler_output, num_scheduled_tokens: "prepared"  # noqa: E731
    assert glue.prepare_inputs_v1(original, runner, output, np.array(scheduled, np.int32)) == "prepared"


def step_v2(runner, output, ids, computed, scheduled):
    batch = SimpleNamespace(
        req_ids=ids, num_computed_tokens_np=np.array(computed), num_scheduled_tokens=np.array(scheduled, np.int32)
    )
    assert glue.prepare_inputs_v2(lambda *args: batch, runner, output, "state", "batch", 1) is batch
    assert glue.set_active_loras_v2(lambda *args: "set", runner, (), (), set()) == "set"


def expected(model, adapters, rows, hidden):
    """The output with each row's edits, token by token; a row is (name or None, prompt, computed, count, strength)."""
    stream = hidden
    for number, block in enumerate(model.model.layers):
        stream = block.linear(stream) + stream
        new, at = stream.clone(), 0
        for name, prompt, computed, count, strength in rows:
            if name is not None:
                peft_model = adapters[name][1]
                modules = get_interventions(peft_model)[f"model.layers.{number}"]
                groups = slow_places.places_in_generate(peft_model.peft_config["default"], prompt, computed + count)
                for module, columns in zip(modules, groups):
                    for column in columns:
                        if computed <= column < computed + count:
                            h = stream[at + column - computed]
                            new[at + column - computed] = h + strength * (module(h) - h)
            at += count
        stream = new
    return stream


@pytest.mark.parametrize("step", [step_v1, step_v2])
@torch.no_grad()
def test_steps_of_either_runner(adapters, step):
    model, plain = Model(), Model()
    worker = attached(model)
    runner = Runner(worker, adapters)
    for slot, (number, name) in enumerate({11: "answers", 12: "ends"}.items()):
        worker.activate(slot, number, worker.load(served_adapter(adapters[name][0]), number))
    ends, answers = adapters["ends"][0], adapters["answers"][0]
    new = [
        request("a", ends, 12, 5),
        request("b", None, 0, 3),
        request("c", answers, 11, 4, 0.5),
        request("d", ends, 12, 1),
    ]
    steps = [  # the pieces of each step, in an order that is not that of the requests
        (new, (), [("c", 0, 4), ("a", 0, 3), ("b", 0, 3), ("d", 0, 1)]),
        ([], (), [("a", 3, 2), ("d", 1, 1), ("c", 4, 1), ("b", 3, 1)]),
        ([], ("d",), [("c", 5, 1), ("a", 5, 1)]),
        # Preempted and run again, what was generated with it; and another request with the name of a finished one.
        ([request("c", answers, 11, 4, 0.5), request("d", answers, 11, 2)], (), [("d", 0, 2), ("c", 0, 6)]),
        ([], ("a", "d"), [("b", 4, 2)]),
    ]
    names = {"a": ("ends", 5, 1.0), "b": (None, 3, 1.0), "c": ("answers", 4, 0.5), "d": ("ends", 1, 1.0)}
    edited = 0
    for number, (begun, finished, pieces) in enumerate(steps):
        if number == 3:
            names["d"] = ("answers", 2, 1.0)
        ids, computed, scheduled = map(list, zip(*pieces))
        step(runner, runner.output(begun, finished), ids, computed, scheduled)
        hidden = torch.randn(sum(scheduled), HIDDEN)
        rows = [(names[i][0], names[i][1], at, count, names[i][2]) for i, at, count in pieces]
        found = model(hidden.clone())
        torch.testing.assert_close(found, expected(plain, adapters, rows, hidden), atol=1e-4, rtol=1e-4)
        edited += not torch.equal(found, plain(hidden))
    assert edited == 4 and set(worker.requests) == {"c"}


def test_a_request_whose_adapter_is_in_no_slot_is_never_answered_without_it(adapters):
    worker = attached(Model())
    worker.note("a", 12, [1, 2, 3], 3, None)
    with pytest.raises(RuntimeError, match="answered without its edits"):
        worker.begin_step(["a"], np.array([0]), np.array([3]))
    loaded = worker.load(served_adapter(adapters["ends"][0]), 12)
    worker.activate(0, 12, loaded)
    worker.begin_step(["a"], np.array([0]), np.array([3]))
    assert worker.table.passes
    shutil.rmtree(adapters["ends"][0])  # what was loaded counts, not what lies there now
    worker.note("b", 12, [1, 2, 3], 3, None)
    worker.begin_step(["b"], np.array([0]), np.array([3]))
    assert worker.table.passes
    worker.activate(0, 13, None)  # a LoRA adapter takes the slot
    with pytest.raises(RuntimeError, match="answered without its edits"):
        worker.begin_step(["a"], np.array([0]), np.array([3]))


def test_adapters_of_one_name_and_two_ids_are_both_active():
    """vLLM compares adapters by name, and would activate one of them."""

    class Adapter(SimpleNamespace):
        def __eq__(self, other):
            return self.lora_name == other.lora_name

        def __hash__(self):
            return hash(self.lora_name)

    old, new = Adapter(lora_name="formal", lora_int_id=1), Adapter(lora_name="formal", lora_int_id=2)
    assert len({old, new}) == 1
    ids = [request.lora_int_id for request in (old, new)]
    v1 = SimpleNamespace(lora_id_to_lora_request={1: old, 2: new})
    *mappings, active = glue.make_lora_inputs_v1(lambda self, *args: (*args, {old}), v1, "prompts", "tokens")
    assert mappings == ["prompts", "tokens"] and [request.lora_int_id for request in active] == ids
    v2 = SimpleNamespace(lora_requests={"a": old, "b": new, "c": new, "elsewhere": None})
    original = lambda self, requests, *args: (*args, {old})  # noqa: E731
    *mappings, active = glue.make_lora_inputs_v2(original, v2, ["a", "b", "c", "base"], "prompts", "tokens")
    assert mappings == ["prompts", "tokens"] and [request.lora_int_id for request in active] == ids


def test_files_that_changed_under_waiting_requests_are_not_taken_for_the_old_ones(adapters):
    worker, (directory, other) = attached(Model()), (adapters["ends"][0], adapters["answers"][0])
    old = served_adapter(directory)
    worker.load(old, 12)
    shutil.copytree(other, directory, dirs_exist_ok=True)
    new = served_adapter(directory)
    assert new.version != old.version
    with pytest.raises(RuntimeError, match="changed while requests with it were waiting"):
        worker.load(new, 12)
    assert worker.load(new, 12, anew=True).served is new
    assert worker.load(new, 12).served is new and worker.load(served_adapter(other), 13)


def test_an_engine_that_cannot_serve_says_why(adapters, tmp_path):
    served = served_adapter(adapters["ends"][0])
    worker = Worker(["a KV connector is configured"])
    with pytest.raises(ValueError, match="cannot be served by this engine: a KV connector is configured"):
        worker.load(served, 12)
    broken = Model()
    broken.model.layers[1].forward = lambda hidden, residual: (residual, hidden - 3)  # some other form
    with pytest.raises(ValueError, match="cannot be served by this engine: "):
        attached(broken).load(served, 12)
    assert not any(block._forward_hooks for block in broken.model.layers)
    failing = Model()
    failing.model.layers[1].forward = None
    with pytest.raises(ValueError, match="a trial forward of the model failed"):
        attached(failing).load(served, 12)


def engine_settings():
    """What of vLLM's config the glue looks at, as it is by default."""
    return SimpleNamespace(
        model_config=SimpleNamespace(is_encoder_decoder=False),
        kv_transfer_config=None,
        parallel_config=SimpleNamespace(use_ubatching=False, prefill_context_parallel_size=1),
        speculative_config=None,
        compilation_config=SimpleNamespace(pass_config=SimpleNamespace(enable_sp=False)),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False),
    )


@pytest.mark.parametrize(
    ("part", "setting", "value", "said"),
    [
        ("model_config", "is_encoder_decoder", True, "an encoder and a decoder"),
        (None, "kv_transfer_config", SimpleNamespace(), "--kv-transfer-config"),
        ("parallel_config", "use_ubatching", True, "--enable-dbo"),
        ("parallel_config", "prefill_context_parallel_size", 2, "--prefill-context-parallel-size"),
        (
            None,
            "speculative_config",
            SimpleNamespace(enable_adaptive_verification=True),
            "(enable_adaptive_verification)",
        ),
        ("compilation_config", "pass_config", SimpleNamespace(enable_sp=True), "pass_config.enable_sp"),
        ("cache_config", "kv_sharing_fast_prefill", True, "--kv-sharing-fast-prefill"),
    ],
)
def test_what_divides_or_moves_a_step_s_tokens_keeps_an_engine_from_serving(part, setting, value, said):
    settings = engine_settings()
    settings.speculative_config = SimpleNamespace(enable_adaptive_verification=False)
    assert list(glue._obstacles(None, settings)) == list(glue._obstacles(None, engine_settings())) == []
    setattr(settings if part is None else getattr(settings, part), setting, value)
    (reason,) = glue._obstacles(None, settings)
    assert said in reason


def test_counted_answers_and_drafts_exclude_each_other(adapters):
    worker = attached(Model(), drafts=True)
    assert worker.load(served_adapter(adapters["ends"][0]), 12)
    with pytest.raises(ValueError, match=r"positions='l1\+d2', which count generated tokens"):
        worker.load(served_adapter(adapters["answers"][0]), 13)
