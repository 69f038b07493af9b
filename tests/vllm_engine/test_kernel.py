"""The kernel for GPUs, run by Triton's interpreter on the CPU, or on a GPU where there is one; and in a CUDA graph."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import numpy as np
import pytest

from peft_reft import ReftConfig
from peft_reft.integrations.vllm.adapters import AdapterFactors, ServedAdapter
from peft_reft.integrations.vllm.kernel import launch
from peft_reft.integrations.vllm.operation import edit_tokens
from peft_reft.integrations.vllm.rule import Rule
from peft_reft.integrations.vllm.slots import KERNEL_ACTIVATIONS, SlotTable
from peft_reft.integrations.vllm.step import EditedTokens
from peft_reft.interventions import build_intervention, stack_factors
from peft_reft.positions import parse_positions

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = ["loreft", "noreft", "direft", "odireft", "consreft", "lobireft"]


def random_adapter(kind, act_fn, rank, groups, width, seed):
    """An adapter of one block: what a table is given, and its interventions as modules."""
    torch.manual_seed(seed)
    modules = [build_intervention(kind, width, rank, act_fn=act_fn, init_weights=False) for _ in range(groups)]
    config = ReftConfig(r=rank, intervention=kind, act_fn=act_fn)
    served = ServedAdapter(None, (), config, Rule(parse_positions("f1+l1"), groups == 1))
    with torch.no_grad():
        factors = [stack_factors([module]).map(lambda tensor: tensor[0]) for module in modules]
    return AdapterFactors(served, {0: factors}, groups, rank), modules


def table_of(adapters, width, columns, tokens):
    table = SlotTable(len(adapters), columns, width, 1, tokens, DEVICE)
    for slot, (factors, _) in enumerate(adapters):
        table.put(slot, factors)
    return table


def step_of(edits):
    return EditedTokens(*(np.array(part, np.int64) for part in zip(*edits)))


def edited(stream, hidden, edits, adapters, strengths):
    """`hidden` with the edits of `stream`, by the modules."""
    result = hidden.double().clone()
    for token, request, group in edits:
        module = adapters[request][1][group].to(stream.device)
        with torch.no_grad():
            result[token] += strengths[request] * module.edit(stream[token].float()).double()
    return result


WITH_ACTIVATION = [("loreft", act_fn) for act_fn in sorted(filter(None, KERNEL_ACTIVATIONS))]


@pytest.mark.parametrize("kind, act_fn", [*((kind, None) for kind in KINDS), *WITH_ACTIVATION, ("direft", "relu")])
def test_the_kernel_edits_as_the_modules_do(kind, act_fn):
    width = 40
    adapters = [random_adapter(kind, act_fn, 3, 2, width, 0), random_adapter("loreft", None, 1, 1, width, 1)]
    table = table_of(adapters, width, 6, 16)
    edits = [(0, 0, 0), (3, 0, 1), (4, 1, 0), (9, 0, 0)]
    table.fill_buffers(step_of(edits), np.array([0, 1]), np.array([0.5, 1.0], np.float32))
    for with_residual in (False, True):
        hidden = torch.randn(12, width, device=DEVICE)
        residual = torch.randn(12, width, device=DEVICE) if with_residual else None
        wanted = edited(hidden if residual is None else hidden + residual, hidden, edits, adapters, [0.5, 1.0])
        before = hidden.clone()
        launch(hidden, residual, table, 0)
        torch.testing.assert_close(hidden.double(), wanted, atol=2e-5, rtol=2e-5)
        others = [token for token in range(12) if token not in {token for token, *_ in edits}]
        assert torch.equal(hidden[others], before[others]) and not torch.equal(hidden, before)


@pytest.mark.parametrize("width, columns, rank", [(576, 16, 4), (5000, 16, 8), (96, 128, 90)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_widths_that_are_no_powers_of_two_and_half_precision(width, columns, rank, dtype):
    adapters = [random_adapter("loreft", None, rank, 1, width, 0)]
    table = table_of(adapters, width, columns, 8)
    table.fill_buffers(step_of([(1, 0, 0)]), np.array([0]), np.ones(1, np.float32))
    hidden, residual = (torch.randn(3, width, device=DEVICE, dtype=dtype) for _ in range(2))
    wanted = edited(hidden.float() + residual.float(), hidden, [(1, 0, 0)], adapters, [1.0])
    launch(hidden, residual, table, 0)
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(hidden.double(), wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.skipif(DEVICE == "cpu", reason="a CUDA graph needs a GPU")
def test_a_captured_graph_edits_what_the_buffers_say_in_each_replay():
    width = 256
    adapters = [random_adapter("loreft", None, 4, 1, width, n) for n in range(3)]
    table = table_of(adapters, width, 16, 64)
    hidden, residual = (torch.randn(32, width, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    nothing = EditedTokens(*(np.empty(0, np.int64) for _ in range(3)))
    table.begin_step(nothing, np.array([0]), np.ones(1, np.float32))
    edit_tokens(hidden.clone(), residual, table.number, 0)  # compiled before it is captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        edit_tokens(hidden, residual, table.number, 0)
    for edits in ([(0, 0, 0), (31, 2, 0)], [(5, 1, 0)], [], [(n, n % 3, 0) for n in range(32)]):
        hidden.normal_(), residual.normal_()
        wanted = edited(hidden.float() + residual.float(), hidden, edits, adapters, [1.0, 0.25, -1.0])
        before = hidden.clone()
        step = step_of(edits) if edits else nothing
        table.begin_step(step, np.arange(3), np.array([1.0, 0.25, -1.0], np.float32))
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(hidden.double(), wanted, atol=0.05, rtol=0.05)
        assert torch.equal(hidden, before) == (not edits)
    new, modules = random_adapter("direft", "gelu", 2, 1, width, 9)  # another adapter in the slot: the same graph
    table.put(1, new)
    adapters[1] = new, modules
    wanted = edited(hidden.float() + residual.float(), hidden, [(7, 1, 0)], adapters, [1.0] * 3)
    table.begin_step(step_of([(7, 1, 0)]), np.arange(3), np.ones(3, np.float32))
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(hidden.double(), wanted, atol=0.05, rtol=0.05)
