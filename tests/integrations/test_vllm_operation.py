"""The operation that edits a step's tokens in place, compared with the interventions themselves, token by token."""

import numpy as np
import pytest
import reference
import torch
from torch import nn

from peft_reft import ReftConfig
from peft_reft.integrations.vllm.adapters import AdapterFactors, ServedAdapter
from peft_reft.integrations.vllm.operation import EditHook, edit_tokens
from peft_reft.integrations.vllm.probe import Convention
from peft_reft.integrations.vllm.rule import Rule
from peft_reft.integrations.vllm.slots import TABLES, SlotTable
from peft_reft.integrations.vllm.step import EditedTokens
from peft_reft.interventions import build_intervention, stack_factors
from peft_reft.positions import parse_positions

WIDTH, BLOCKS = 24, 3
KINDS = [
    ("loreft", None, 3),
    ("noreft", None, 2),
    ("direft", "relu", 2),
    ("odireft", "tanh", 1),
    ("consreft", "sigmoid", 2),
    ("lobireft", None, 4),
    ("loreft", "silu", 2),
    ("noreft", "gelu", 3),
]


class Adapter:
    """A random adapter: its interventions as modules, and what the table is given."""

    def __init__(self, kind: str, act_fn: str | None, rank: int, groups: int = 1, blocks=range(BLOCKS), seed: int = 0):
        torch.manual_seed(seed)
        self.kind, self.act_fn = kind, act_fn
        self.modules = {
            block: [build_intervention(kind, WIDTH, rank, act_fn=act_fn, init_weights=False) for _ in range(groups)]
            for block in blocks
        }
        config = ReftConfig(r=rank, intervention=kind, act_fn=act_fn, share_weights=groups == 1)
        served = ServedAdapter(None, (), config, Rule(parse_positions("f1+l1"), groups == 1))
        with torch.no_grad():
            factors = {
                block: [stack_factors([module]).map(lambda tensor: tensor[0]) for module in modules]
                for block, modules in self.modules.items()
            }
        self.factors = AdapterFactors(served, factors, groups, rank)

    def edit(self, block: int, group: int, h: torch.Tensor, strength: float) -> torch.Tensor:
        """A vector after the edit, by the reference."""
        if block not in self.modules:
            return h
        module = self.modules[block][group]
        return h + strength * (reference.edit_vector(self.kind, module, h.double(), self.act_fn) - h)


def table_with(adapters: list[Adapter], columns: int = 8, tokens: int = 64) -> SlotTable:
    table = SlotTable(len(adapters) + 1, columns, WIDTH, BLOCKS, tokens)
    for slot, adapter in enumerate(adapters):
        table.put(slot, adapter.factors)
    return table


def step_of(edits: list[tuple[int, int, int]]) -> EditedTokens:
    """(token, request, intervention) of each edited token."""
    return EditedTokens(*(np.array(part, np.int64) for part in zip(*edits)))


def check(table, adapters, edits, slot_of, strength_of, dtype=torch.float32, tolerance=1e-5, summed=True):
    table.begin_step(step_of(edits), np.array(slot_of), np.array(strength_of, np.float32))
    for block in range(BLOCKS):
        hidden = torch.randn(20, WIDTH).to(dtype)
        residual = torch.randn(20, WIDTH).to(dtype) if summed else None
        wanted = hidden.double()
        stream = wanted + (residual.double() if summed else 0)
        for token, request, group in edits:
            new = adapters[slot_of[request]].edit(block, group, stream[token], strength_of[request])
            wanted[token] += new - stream[token]
        before = hidden.clone()
        edit_tokens(hidden, residual, table.number, block)
        torch.testing.assert_close(hidden.double(), wanted, atol=tolerance, rtol=tolerance)
        untouched = sorted(set(range(20)) - {token for token, *_ in edits})
        assert torch.equal(hidden[untouched], before[untouched])
        assert not torch.equal(hidden, before) or all(block not in adapter.modules for adapter in adapters)


@pytest.mark.parametrize("kind, act_fn, rank", KINDS)
@pytest.mark.parametrize("summed", [True, False])
def test_every_equation_and_activation(kind, act_fn, rank, summed):
    adapter = Adapter(kind, act_fn, rank)
    edits = [(1, 0, 0), (2, 0, 0), (9, 1, 0)]
    check(table_with([adapter]), [adapter], edits, [0, 0], [1.0, 0.5], summed=summed)


def test_many_adapters_in_one_step():
    adapters = [Adapter(*kind, groups=1 + n % 2, seed=n) for n, kind in enumerate(KINDS)]
    adapters[3] = Adapter("odireft", "tanh", 1, blocks=[1], seed=3)
    slot_of = list(range(len(adapters)))
    edits = [(2 * n + k, n, (k if n % 2 and n != 3 else 0)) for n in range(len(adapters)) for k in (0, 1)]
    strengths = [1.0, 0.3, 1.0, -2.0, 1.0, 1.0, 0.0, 1.0]
    check(table_with(adapters), adapters, edits, slot_of, strengths)


@pytest.mark.parametrize("ranks", [[2, 2, 2, 2], [1, 3, 2, 4]])
def test_adapters_of_one_kind_are_worked_out_together(ranks):
    adapters = [Adapter("loreft", None, rank, seed=n) for n, rank in enumerate(ranks)]
    table = table_with(adapters)
    edits = [(0, 0, 0), (1, 0, 0), (4, 1, 0), (6, 2, 0), (7, 2, 0), (8, 2, 0), (11, 3, 0)]
    for _ in range(2):  # the second step finds the factors that the first one gathered
        check(table, adapters, edits, [0, 1, 2, 3], [1.0, 1.0, 0.5, 1.0])
    assert len(table.passes) == 1
    adapters[2] = Adapter("loreft", None, ranks[2], seed=9)
    table.put(2, adapters[2].factors)
    check(table, adapters, edits, [0, 1, 2, 3], [1.0, 1.0, 0.5, 1.0])
    many = [(0, 0, 0), (1, 1, 0), (2, 2, 0)] + [(3 + n, 3, 0) for n in range(17)]
    table.begin_step(step_of(many * 4), np.arange(4), np.ones(4, np.float32))
    assert len(table.passes) == 4  # filling up three of them to the longest would cost more


def test_half_precision_is_edited_in_single():
    adapter = Adapter("loreft", None, 3)
    check(table_with([adapter]), [adapter], [(3, 0, 0)], [0], [1.0], dtype=torch.bfloat16, tolerance=0.03)


def test_another_rows_nan_and_infinity_stay_where_they_are():
    adapters = [Adapter("loreft", None, 2, seed=n) for n in range(3)]
    table = table_with(adapters)
    table.begin_step(step_of([(0, 0, 0), (3, 1, 0), (4, 1, 0), (5, 2, 0)]), np.arange(3), np.ones(3, np.float32))
    assert len(table.passes) == 1
    hidden = torch.randn(8, WIDTH)
    hidden[3], hidden[7] = float("nan"), float("inf")
    edit_tokens(hidden, None, table.number, 0)
    assert hidden[[0, 1, 2, 4, 5, 6]].isfinite().all() and hidden[3].isnan().all() and hidden[7].isinf().all()


def test_a_slot_is_emptied_and_filled_anew():
    first, second = Adapter("loreft", "relu", 4), Adapter("lobireft", None, 1, blocks=[2], seed=1)
    table = SlotTable(1, 8, WIDTH, BLOCKS, 16)
    table.put(0, first.factors)
    places = [tensor.data_ptr() for tensor in (*table.down, *table.up, *table.bias)]
    table.put(0, second.factors)
    check(table, [second], [(5, 0, 0)], [0], [1.0])
    table.put(0, None)
    assert not any(tensor.any() for tensor in (*table.down, *table.up, *table.bias))
    assert places == [tensor.data_ptr() for tensor in (*table.down, *table.up, *table.bias)]  # written in place
    table.put(0, first.factors)
    table.reset()
    assert not any(tensor.any() for tensor in (*table.down, *table.up, *table.bias)) and table.residents == [None]


def test_an_adapter_that_no_slot_has_room_for_is_refused_with_the_option_that_makes_room():
    table = SlotTable(1, 4, WIDTH, BLOCKS, 16)
    with pytest.raises(
        ValueError, match=r"2 intervention\(s\) of rank 3 in a block, 6 directions .* --max-lora-rank 6"
    ):
        table.put(0, Adapter("loreft", None, 3, groups=2).factors)
    assert table.residents == [None]


class Block(nn.Module):
    """A block in the form of vLLM's: the stream is the sum of what it returns."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden, residual):
        residual = hidden if residual is None else hidden + residual
        return self.linear(residual), residual


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(BLOCKS))

    def forward(self, hidden):
        residual = None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual)
        return hidden + residual


def test_a_compiled_model_is_one_graph_for_all_steps():
    adapters = [Adapter("loreft", None, 2), Adapter("direft", "relu", 2, seed=1)]
    table = table_with(adapters)
    torch.manual_seed(0)
    plain, hooked = Stack(), Stack()
    hooked.load_state_dict(plain.state_dict())
    for number, block in enumerate(hooked.layers):
        block.register_forward_hook(EditHook(table.number, number, Convention("sum")))
    graphs = 0

    def backend(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(hooked, backend=backend, fullgraph=True, dynamic=True)

    def expected(hidden, edits):
        stream = hidden
        for number, block in enumerate(plain.layers):
            stream = block.linear(stream) + stream
            new = stream.clone()
            for token, request, group in edits:
                new[token] = adapters[request].edit(number, group, stream[token], 1.0).float()
            stream = new
        return stream

    with torch.inference_mode():
        for size, edits in ((9, [(0, 0, 0), (5, 1, 0)]), (9, [(2, 1, 0)]), (14, [(13, 0, 0)]), (5, [])):
            table.begin_step(
                step_of(edits) if edits else EditedTokens(*[np.empty(0, np.int64)] * 3), np.arange(2), np.ones(2)
            )
            hidden = torch.randn(size, WIDTH)
            torch.testing.assert_close(compiled(hidden.clone()), expected(hidden, edits), atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(hooked(hidden.clone()), expected(hidden, edits), atol=1e-4, rtol=1e-4)
    assert graphs == 1


def test_transformers_blocks_have_a_batch_of_one():
    adapter = Adapter("loreft", None, 2)
    table = table_with([adapter])
    table.begin_step(step_of([(1, 0, 0)]), np.array([0]), np.ones(1, np.float32))
    block = nn.Identity()
    block.register_forward_hook(EditHook(table.number, 0, Convention("first")))
    hidden = torch.randn(1, 4, WIDTH)
    edited = block(hidden.clone())
    torch.testing.assert_close(edited[0, 1], adapter.edit(0, 0, hidden[0, 1], 1.0).float(), atol=1e-5, rtol=1e-5)
    assert torch.equal(edited[0, [0, 2, 3]], hidden[0, [0, 2, 3]]) and TABLES[table.number] is table
