"""Interchange interventions do what plain hooks do, a vector at a time: sources, places, parts, steps of `generate`."""

from functools import partial

import pytest
import torch
from conftest import batch, logits, tiny_model
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_reft import ReftConfig, get_interventions, set_strength
from peft_reft.info import adapter_info
from peft_reft.inspect import inspect_adapter
from peft_reft.interventions import VanillaIntervention
from peft_reft.interventions.registry import REGISTRY
from peft_reft.tuner.injection import state_of

BASE = {"input_ids": batch(7, 7, 7, seed=1)["input_ids"]}
SOURCE = batch(7, 4, 7, side="left", seed=2)  # the second row is shorter
FIRST_AND_LAST_TWO = [[0, 5, 6]] * 3
OF_SOURCE = [[0, 5, 6], [3, 5, 6], [0, 5, 6]]
CLOSE = {"atol": 1e-6, "rtol": 1e-5}


def interchange(base=None, seed=1, **settings):
    base = tiny_model("llama") if base is None else base
    torch.manual_seed(seed)
    settings = {"r": 3, "positions": "f1+l2", "intervention": "interchange", "task_type": "CAUSAL_LM", **settings}
    return get_peft_model(base, ReftConfig(**settings)).eval()


def states(base, inputs, blocks):
    """The blocks' outputs for some inputs."""
    found, handles = {}, []
    for block in blocks:

        def note(module, args, output, block=block):
            found[block] = (output if isinstance(output, Tensor) else output[0]).clone()

        handles.append(base.get_submodule(block).register_forward_hook(note))
    logits(base, inputs)
    for handle in handles:
        handle.remove()
    return found


def exchanged(base, inputs, sources, columns, edit):
    """Logits of `base` with the states at `columns` exchanged by plain hooks.

    Args:
        sources: states by block, with the columns [row][place] to take them from.
        edit: the block's name, h and s to the new vector.
    """
    found, of_source = sources
    handles = []
    for block in found:

        def put(module, args, output, block=block):
            hidden = output if isinstance(output, Tensor) else output[0]
            edited = hidden.clone()
            for row, (here, there) in enumerate(zip(columns, of_source)):
                for column, other in zip(here, there, strict=True):
                    edited[row, column] = edit(block, hidden[row, column], found[block][row, other])
            return edited if isinstance(output, Tensor) else (edited, *output[1:])

        handles.append(base.get_submodule(block).register_forward_hook(put))
    try:
        return logits(base, inputs)
    finally:
        for handle in handles:
            handle.remove()


def projections(model):
    R = {block: groups[0].subspace.detach() for block, groups in get_interventions(model).items()}
    return lambda block, h, s: h + R[block].T @ (R[block] @ (s - h))


@pytest.mark.parametrize("layers", [[1], [0, 2]], ids=str)
@pytest.mark.parametrize("kind", ["one direction", "interchange", "all directions", "vanilla"])
def test_an_interchange_is_what_plain_hooks_do(kind, layers):
    base = tiny_model("llama").double()
    settings = {
        "one direction": {"r": 1},
        "interchange": {},
        "all directions": {"r": 32},
        "vanilla": {"intervention": "vanilla"},
    }
    model = interchange(layers_to_transform=layers, **settings[kind]).double()
    edit = (lambda block, h, s: s) if kind in ("all directions", "vanilla") else projections(model)
    blocks = [f"model.layers.{number}" for number in layers]
    expected = exchanged(base, BASE, (states(base, SOURCE, blocks), OF_SOURCE), FIRST_AND_LAST_TWO, edit)
    found = logits(model, BASE, source_inputs=SOURCE)
    torch.testing.assert_close(found, expected, **({"atol": 1e-4, "rtol": 1e-4} if kind == "all directions" else CLOSE))
    unedited = logits(base, BASE)
    assert (found - unedited).abs().max() > 0.1
    assert torch.equal(logits(model, BASE), unedited)  # no source: nothing is edited
    torch.testing.assert_close(logits(model, BASE, source_inputs=BASE), unedited, **CLOSE)


def test_padding_of_base_and_source_makes_no_difference():
    model = interchange()
    padded = {side: batch(7, 4, side=side, seed=1) for side in ("left", "right")}
    expected = logits(model, padded["right"], source_inputs=batch(5, 6, side="right", seed=2))[:, 3]
    found = logits(model, padded["right"], source_inputs=batch(5, 6, side="left", seed=2))[:, 3]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    left = logits(model, padded["left"], source_inputs=batch(5, 6, side="left", seed=2))
    torch.testing.assert_close(left[1, -1], expected[1], atol=1e-5, rtol=1e-4)
    assert (expected[1] - logits(model, padded["right"])[1, 3]).abs().max() > 1e-2


def test_base_and_source_may_have_places_of_their_own():
    base, model = tiny_model("llama"), interchange(layers_to_transform=[0, 2])
    blocks = ["model.layers.0", "model.layers.2"]
    here, there = [[2, 3], [2, 4], [4, 5]], [[6, 6], [5, 3], [1, 2]]  # two places may take the same state
    expected = exchanged(base, BASE, (states(base, SOURCE, blocks), there), here, projections(model))
    source = {**SOURCE, "intervention_locations": torch.tensor(there)}
    found = logits(model, BASE, intervention_locations=torch.tensor(here), source_inputs=source)
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("positions", ["all", "f2", "l1"])
@pytest.mark.parametrize("share_weights", [True, False])
def test_any_positions(positions, share_weights):
    base = tiny_model("llama")
    model = interchange(positions=positions, share_weights=share_weights, layers_to_transform=[1])
    columns = [{"all": [*range(7)], "f2": [0, 1], "l1": [6]}[positions]] * 3
    source = {"input_ids": batch(7, 7, 7, seed=5)["input_ids"]}
    found = logits(model, BASE, source_inputs=source)
    of_source = states(base, source, ["model.layers.1"]), columns
    expected = exchanged(base, BASE, of_source, columns, projections(model))
    torch.testing.assert_close(found, expected, **CLOSE)


def test_several_sources_by_name_of_the_subspace():
    base = tiny_model("llama")
    model = interchange(subspaces={"number": 2, "gender": 1}, layers_to_transform=[1])
    block = "model.layers.1"
    R = get_interventions(model)[block][0].subspace.detach()
    other = {"input_ids": batch(7, 7, 7, seed=6)["input_ids"]}
    one, two = (states(base, inputs, [block])[block] for inputs in (SOURCE, other))

    def expected(names, strengths=(1.0, 1.0)):
        def put(module, args, output):
            edited = output.clone()
            for row in range(3):
                for place, column in enumerate((0, 5, 6)):
                    h = output[row, column]
                    if "number" in names:
                        s = one[row, OF_SOURCE[row][place]]
                        edited[row, column] += strengths[0] * R[:2].T @ (R[:2] @ (s - h))
                    if "gender" in names:
                        edited[row, column] += strengths[1] * R[2:].T @ (R[2:] @ (two[row, column] - h))
            return edited

        handle = base.get_submodule(block).register_forward_hook(put)
        result = logits(base, BASE)
        handle.remove()
        return result

    both = {"number": SOURCE, "gender": other}
    found = logits(model, BASE, source_inputs=both)
    torch.testing.assert_close(found, expected(["number", "gender"]), **CLOSE)
    torch.testing.assert_close(logits(model, BASE, source_inputs={"gender": other}), expected(["gender"]), **CLOSE)
    torch.testing.assert_close(
        logits(model, BASE, source_inputs=SOURCE, subspaces=["number"] * 3), expected(["number"]), **CLOSE
    )
    halves = logits(model, BASE, source_inputs=both, subspaces=[{"number": 0.5, "gender": 2.0}] * 3)
    torch.testing.assert_close(halves, expected(["number", "gender"], (0.5, 2.0)), **CLOSE)
    assert (found - halves).abs().max() > 1e-2


@pytest.mark.parametrize("settings", [{}, {"use_cache": False}, {"prefill_chunk_size": 3}, {"num_beams": 2}], ids=str)
def test_generate_exchanges_the_prompt_however_it_is_run(settings):
    base = tiny_model("llama")
    model = interchange(layers_to_transform=[1], positions="f2+l2", r=32)
    source = {"input_ids": batch(7, 7, 7, seed=5)["input_ids"]}
    columns = [[0, 1, 5, 6]] * 3
    sources = states(base, source, ["model.layers.1"]), columns
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = model.generate(**BASE, source_inputs=source, **options, **settings)
    rows = BASE["input_ids"]
    for _ in range(4):  # one whole forward for each token
        inputs = {"input_ids": rows}
        step = exchanged(base, inputs, sources, columns, lambda block, h, s: s)[:, -1].argmax(-1)
        rows = torch.cat([rows, step[:, None]], 1)
    if settings != {"num_beams": 2}:
        assert torch.equal(found, rows)
    plain = model.generate(**BASE, **options, **settings)
    assert not torch.equal(found, plain)
    assert found.shape == plain.shape


def test_generate_takes_places_of_base_and_source():
    model = interchange(layers_to_transform=[1])
    source = {**SOURCE, "intervention_locations": torch.tensor([[6], [5], [1]])}
    here = torch.tensor([[2], [6], [4]])
    first = model(**BASE, intervention_locations=here, source_inputs=source).logits[:, -1].argmax(-1)
    options = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
    for chunks in ({}, {"prefill_chunk_size": 3}):
        found = model.generate(**BASE, intervention_locations=here, source_inputs=source, **options, **chunks)
        assert torch.equal(found[:, -1], first)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_are_the_same_with_and_without_checkpoints(reentrant):
    gradients = []
    for checkpoints in (False, True):
        model = interchange(layers_to_transform=[0, 1])
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        labels = BASE["input_ids"].masked_fill(torch.arange(7) < 6, -100)
        loss = model.train()(**BASE, labels=labels, source_inputs=SOURCE, use_cache=False).loss
        loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(gradients[0]) == 2
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
        assert one.abs().max() > 1e-6


def test_the_gradient_of_r_is_right():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    config = ReftConfig(r=2, intervention="interchange", positions="all", target_modules=["0"])
    model = get_peft_model(net, config)
    (intervention,) = get_interventions(model)["0"]
    intervention.double()
    x, s = torch.randn(4, 6).double(), torch.randn(4, 6).double()
    with torch.no_grad():
        h, source = net[0].forward(x), net[0].forward(s)
    basis = intervention.basis.detach().clone().requires_grad_()
    R = torch.linalg.qr(basis.T)[0].T
    net[2].forward(torch.tanh(h + (source - h) @ R.T @ R)).square().sum().backward()
    model(x, source_inputs={"input": s}).square().sum().backward()
    torch.testing.assert_close(intervention.basis.grad, basis.grad)


@pytest.mark.parametrize("family", ["t5", "bert", "gpt2"])
def test_other_architectures(family):
    base = tiny_model(family)
    model = interchange(tiny_model(family), task_type=None, positions="l1", r=32, layers_to_transform=[1])
    decoder = {"decoder_input_ids": torch.tensor([[0, 5, 6]] * 3)} if family == "t5" else {}
    inputs, source = {**BASE, **decoder}, {"input_ids": batch(7, 7, 7, seed=5)["input_ids"], **decoder}
    blocks = list(get_interventions(model))
    found = states(base, source, blocks)
    in_decoder = [block for block in blocks if block.startswith("decoder")]
    expected_blocks = {block: found[block] for block in blocks if block not in in_decoder}
    if in_decoder:  # both stacks are exchanged at their own last token
        handles = []
        for block in in_decoder:

            def put(module, args, output, block=block):
                hidden = output if isinstance(output, Tensor) else output[0]
                edited = hidden.clone()
                edited[:, 2] = found[block][:, 2]
                return edited if isinstance(output, Tensor) else (edited, *output[1:])

            handles.append(base.get_submodule(block).register_forward_hook(put))
    expected = exchanged(base, inputs, (expected_blocks, [[6]] * 3), [[6]] * 3, lambda block, h, s: s)
    torch.testing.assert_close(logits(model, inputs, source_inputs=source), expected, atol=1e-4, rtol=1e-3)
    assert (expected - logits(model, inputs)).abs().max() > 1e-2


def test_rows_with_adapters_of_their_own_take_the_source_s_rows():
    model = interchange(layers_to_transform=[1])
    model.add_adapter("other", ReftConfig(r=2, positions="l1", intervention="interchange", task_type="CAUSAL_LM"))
    model.add_adapter("learned", ReftConfig(r=2, positions="l1", init_weights=False, task_type="CAUSAL_LM"))
    names = ["other", "__base__", "default"]
    mixed = logits(model, BASE, source_inputs=SOURCE, adapter_names=names)
    for row, name in enumerate(names):
        model.set_adapter("default" if name == "__base__" else name)
        alone = logits(model, BASE) if name == "__base__" else logits(model, BASE, source_inputs=SOURCE)
        torch.testing.assert_close(mixed[row], alone[row], **CLOSE)
    model.base_model.set_adapter(["default", "learned"])  # the source is unedited, whatever is active
    together = logits(model, BASE, source_inputs=SOURCE)
    assert (together - logits(model, BASE)).abs().max() > 1e-2


def test_strength_and_half_precision():
    model = interchange(intervention="vanilla", layers_to_transform=[1])
    set_strength(model, 0.0)
    assert torch.equal(logits(model, BASE, source_inputs=SOURCE), logits(model, BASE))
    half = interchange(tiny_model("llama").to(torch.bfloat16), intervention="vanilla", positions="all")
    source = {"input_ids": batch(7, 7, 7, seed=5)["input_ids"]}
    with torch.no_grad():
        exchanged_all = half(**BASE, source_inputs=source).logits
        assert torch.equal(exchanged_all, half(**source).logits)  # h + (s - h) is s, to the last bit


@pytest.mark.parametrize("kind", ["interchange", "vanilla"])
def test_it_is_saved_and_loaded(kind, tmp_path):
    model = interchange(intervention=kind)
    expected = logits(model, BASE, source_inputs=SOURCE)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path).eval()
    torch.testing.assert_close(logits(loaded, BASE, source_inputs=SOURCE), expected)


class Half(nn.Module):
    takes_source = True

    def __init__(self, d, r):
        super().__init__()
        self.share = nn.Parameter(torch.tensor(0.5))

    def forward(self, h, source):
        return h + self.share * (source - h)

    def edit(self):
        raise AssertionError("What a module of one's own has beside its forward is its own business.")


class HalfOfVanilla(VanillaIntervention):
    def forward(self, h, source):
        return (h + source) / 2


@pytest.mark.parametrize("own", [Half, HalfOfVanilla])
def test_an_intervention_of_one_s_own_may_take_a_source(monkeypatch, own):
    monkeypatch.setitem(REGISTRY, "half", own)
    base = tiny_model("llama")
    model = interchange(intervention="half", layers_to_transform=[1])
    sources = states(base, SOURCE, ["model.layers.1"]), OF_SOURCE
    expected = exchanged(base, BASE, sources, FIRST_AND_LAST_TWO, lambda block, h, s: (h + s) / 2)
    torch.testing.assert_close(logits(model, BASE, source_inputs=SOURCE), expected, **CLOSE)


# Refused.


def test_a_source_that_nothing_takes_is_refused():
    model = get_peft_model(tiny_model("llama"), ReftConfig(task_type="CAUSAL_LM")).eval()
    with pytest.raises(ValueError, match="no ReFT adapter of this call takes a source"):
        model(**BASE, source_inputs=SOURCE)
    with pytest.raises(ValueError, match="no ReFT adapter of this call takes a source"):
        model.generate(**BASE, source_inputs=SOURCE, max_new_tokens=1)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (batch(7, 7), "have 2 rows, but the call has 3"),
        (batch(7), "have 1 rows, but the call has 3"),  # which is not a row for all
        (batch(2, 7, 7, side="left"), "each place needs one to take its value from"),
        ({}, "is dict and not inputs"),
        (SOURCE["input_ids"], "is Tensor and not inputs"),
        ({"number": SOURCE}, r"are named \['number'\], but the subspaces are \[\]"),
        ({**SOURCE, "source_inputs": SOURCE}, "hold source_inputs"),
        ({**SOURCE, "subspaces": [None] * 3}, "hold subspaces"),
    ],
)
def test_sources_that_do_not_pair_with_the_call_are_refused(source, message):
    model = interchange()
    with pytest.raises(ValueError, match=message):
        model(**BASE, source_inputs=source)
    with pytest.raises(ValueError, match=message):
        model.generate(**BASE, source_inputs=source, max_new_tokens=1, pad_token_id=0)
    running = state_of(model.get_base_model()).running
    assert (running.context, running.generation) == (None, None)
    assert torch.isfinite(logits(model, BASE, source_inputs=SOURCE)).all()


def test_a_source_of_adapters_that_are_switched_off_is_not_run():
    model = interchange()
    with model.disable_adapter():
        found = logits(model, BASE, source_inputs=SOURCE)
    assert torch.equal(found, logits(tiny_model("llama"), BASE))
    assert not torch.equal(found, logits(model, BASE, source_inputs=SOURCE))


class OfOneBlock(nn.Module):
    """Runs its blocks as often as its inputs say."""

    def __init__(self):
        super().__init__()
        self.embed, self.blocks = nn.Embedding(100, 8), nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, input_ids, times):
        h = self.embed(input_ids)
        for block, count in zip(self.blocks, times):
            for _ in range(count):
                h = h + block(h)
        return h


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ((1, 2), "A block ran several times in the forward of a source"),
        ((1, 0), "Edited block number 1 .* did not run"),
    ],
)
def test_a_source_whose_blocks_run_otherwise_is_refused(times, message):
    config = ReftConfig(r=2, positions="l1", intervention="interchange", target_modules=["blocks.0", "blocks.1"])
    model, once = get_peft_model(OfOneBlock(), config).eval(), {**BASE, "times": (1, 1)}
    source = {"input_ids": BASE["input_ids"].flip(1)}
    assert not torch.equal(model(**once, source_inputs={**source, "times": (1, 1)}), model(**once))
    with pytest.raises(ValueError, match=message):
        model(**once, source_inputs={**source, "times": times})


def test_a_vanilla_intervention_is_the_source_itself():
    intervention = VanillaIntervention(8, 8)
    h, source = torch.randn(2, 3, 8).bfloat16(), torch.randn(2, 3, 8)
    assert torch.equal(intervention(h, source), source.bfloat16())
    assert str(intervention) == "VanillaIntervention(d=8)"


@torch.no_grad()
def test_a_place_in_what_a_source_has_cached_is_refused():
    """Its hidden state there is gone: that of another column is not taken for it."""
    model = interchange(positions="f1")
    with model.disable_adapter():
        cache = model(BASE["input_ids"][:, :5], use_cache=True).past_key_values
    source = {"input_ids": BASE["input_ids"][:, 5:], "past_key_values": cache}
    source["intervention_locations"] = torch.tensor([[1], [1], [1]])
    with pytest.raises(ValueError, match="each place needs one to take its value from"):
        model(**BASE, intervention_locations=torch.tensor([[2], [2], [2]]), source_inputs=source)
    source["intervention_locations"] = torch.tensor([[5], [5], [5]])
    cache.crop(-2)
    model(**BASE, intervention_locations=torch.tensor([[2], [2], [2]]), source_inputs=source)


def test_a_source_that_the_decoder_needs_more_for_says_so_and_runs_with_it():
    base = tiny_model("t5", eos_token_id=None)
    model = interchange(tiny_model("t5", eos_token_id=None), task_type=None, positions="l1", r=32)
    start = torch.full((3, 1), model.generation_config.decoder_start_token_id)
    for call in (model.generate, partial(model, decoder_input_ids=start)):
        with pytest.raises(ValueError, match="source_inputs without decoder_input_ids") as told:
            call(**BASE, source_inputs=SOURCE)
        assert "exactly one of input_ids or inputs_embeds" in str(told.value.__cause__)
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):  # which is another mistake
        model.generate(**BASE, source_inputs={**SOURCE, "inputs_embeds": torch.zeros(3, 7, 32), "labels": start})
    found = model.generate(**BASE, source_inputs={**SOURCE, "decoder_input_ids": start}, max_new_tokens=1)
    # The last block's whole state at the start token, which the logits are made of, is the source's.
    assert torch.equal(found, base.generate(**SOURCE, max_new_tokens=1))
    assert not torch.equal(found, base.generate(**BASE, max_new_tokens=1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"act_fn": "relu"}, "act_fn='relu' has no meaning"),
        ({"dropout": 0.1}, "dropout=0.1 has no meaning"),
        ({"positions": "f1+d"}, "edits generated tokens"),
        (
            {"intervention": "vanilla", "subspaces": {"a": 4}},
            "have no meaning for the intervention 'vanilla'",
        ),
    ],
)
def test_settings_without_meaning_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ReftConfig(**{"intervention": "interchange", **settings})


def test_what_the_tools_say_of_it(tmp_path):
    interchange(intervention="vanilla").save_pretrained(tmp_path / "vanilla")
    assert "not stored: the intervention has no parameters" in str(adapter_info(tmp_path / "vanilla"))
    model = interchange(subspaces={"number": 2, "gender": 1})
    model.save_pretrained(tmp_path / "interchange")
    info = adapter_info(tmp_path / "interchange")
    assert (info.equation, info.subspaces) == (
        "Interchange(h, s) = h + Rᵀ(Rs - Rh)",
        "number (rank 2), gender (rank 1)",
    )
    assert (tmp_path / "vanilla" / "README.md").is_file()
    with pytest.raises(ValueError, match="takes its values from a source"):
        inspect_adapter(model, BASE)
