"""A batch whose rows have adapters of their own equals each row alone: random pairs, against slow loops."""

import itertools
import random

import pytest
import torch
from conftest import batch, logits, randomize, tiny_model
from peft import get_peft_model
from slow_places import Adapters

from peft_reft import ReftConfig, set_strength

KINDS = ("loreft", "noreft", "direft", "odireft", "consreft", "lobireft")
MARKER = [7, 8]
CLOSE = {"rtol": 1e-3, "atol": 2e-4}


def random_positions(draw: random.Random) -> str:
    """A spec with any of the terms, bounded or not."""
    if draw.random() < 0.2:
        return draw.choice(["all", "all+d", "all+d2"])
    terms = [f"{kind}{draw.randint(1, 4)}" for kind in "fl" if draw.random() < 0.6]
    for term in (f"m{draw.randint(1, 3)}", f"e{draw.randint(1, 4)}", draw.choice(["d", "d2", "d3"])):
        if draw.random() < 0.3:
            terms.insert(draw.randint(0, len(terms)), term)
    return "+".join(terms) or "f1+l1"


def random_config(draw: random.Random, **settings) -> ReftConfig:
    positions = random_positions(draw)
    share = [True, False] if any(kind in positions for kind in ("e", "d", "all")) else [True, False, "position"]
    return ReftConfig(
        **{
            "task_type": "CAUSAL_LM",
            "r": draw.randint(1, 5),
            "positions": positions,
            "share_weights": draw.choice(share),
            "share_layers": draw.random() < 0.2,
            "intervention": draw.choice(KINDS),
            "act_fn": draw.choice([None, None, "relu", "tanh", "gelu"]),
            "turns": draw.choice([None, None, "first", "last", "all"]),
            "prompt_end": draw.choice([None, None, MARKER]),
            "layers_to_transform": draw.choice([None, None, [0], [-1, 0], 1]),
            **settings,
        }
    )


def adapters_of(first: ReftConfig, second: ReftConfig, strengths=(1.0, 1.0)) -> Adapters:
    """A tiny llama with the adapters "one" and "two", random weights, and their strengths."""
    model = get_peft_model(tiny_model("llama", eos_token_id=None), first, adapter_name="one")
    model.add_adapter("two", second)
    model.eval()
    for seed, (name, strength) in enumerate(zip(("one", "two"), strengths)):
        randomize(model, name, seed=seed + 3, scale=0.4)
        set_strength(model, strength, name)
    return Adapters(model, dict(zip(("one", "two"), strengths)))


def random_rows(draw: random.Random, rows: int, kind: str):
    """A batch with markers here and there, padded on a random side, and its positions.

    Args:
        kind: "plain", "labels" (one answer) or "turns" (labels anywhere).
    """
    inputs = batch(*(draw.randint(1, 11) for _ in range(rows)), side=draw.choice(["left", "right"]), seed=rows)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for row in range(rows):
        own = mask[row].nonzero().flatten().tolist()
        for _ in range(draw.randint(0, 2)):
            if len(own) > 2:
                place = draw.randint(0, len(own) - 2)
                ids[row, own[place]], ids[row, own[place + 1]] = MARKER
    if draw.random() < 0.3:  # without them a row is known to be one document, and places are found in another way
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    if kind == "plain":
        return inputs
    labels = torch.full_like(ids, -100)
    for row in range(rows):
        own = mask[row].nonzero().flatten().tolist()
        cut = draw.randint(0, len(own))
        for place, column in enumerate(own):
            if (kind == "labels" and place >= cut) or (kind == "turns" and draw.random() < 0.5):
                labels[row, column] = ids[row, column]
    return {**inputs, "labels": labels}


def assert_rows_equal(adapters: Adapters, names: list[str], inputs: dict, message: str) -> None:
    """The mixed batch equals the reference, and each row what it is alone."""
    got = logits(adapters.model, inputs, adapter_names=names)
    expected = adapters.forward(tiny_model("llama", eos_token_id=None), names, inputs)
    for row, name in enumerate(names):
        own = inputs["attention_mask"][row].bool()
        torch.testing.assert_close(got[row, own], expected[row, own], **CLOSE, msg=lambda m: f"{message}\n{m}")
        alone = {key: value[row, own][None] for key, value in inputs.items()}
        if name == "__base__":
            with adapters.model.disable_adapter():
                single = logits(adapters.model, alone)
        else:
            adapters.model.set_adapter(name)
            single = logits(adapters.model, alone)
        torch.testing.assert_close(got[row, own], single[0], **CLOSE, msg=f"row {row} alone, {message}")


@pytest.mark.parametrize("kind", ["plain", "labels", "turns"])
@pytest.mark.parametrize("seed", range(16))
@pytest.mark.filterwarnings("ignore:A row without the marker")
def test_random_pairs_of_adapters_in_one_batch_equal_each_row_alone(seed, kind):
    draw = random.Random(f"{kind} {seed}")
    configs = random_config(draw), random_config(draw)
    strengths = tuple(draw.choice([1.0, 1.0, 0.5, 0.0, -1.0, 2.0]) for _ in configs)
    adapters = adapters_of(*configs, strengths)
    names = ["one", "two", "__base__", draw.choice(["one", "two"])]
    draw.shuffle(names)
    inputs = random_rows(draw, len(names), kind)
    assert_rows_equal(adapters, names, inputs, f"names={names} strengths={strengths} {configs}")


UNBOUNDED = ("all", "all+d", "e2", "f1+e3", "e2+d2")
BOUNDED = ("f1+l1", "f1+l1+d8", "l1+d", "f2+m1")


@pytest.mark.parametrize(("first", "second"), list(itertools.product(UNBOUNDED, BOUNDED)))
@pytest.mark.parametrize("labelled", [False, True])
def test_a_row_of_all_beside_a_row_of_few_tokens(first, second, labelled):
    """One adapter names a bounded number of tokens, the other none that could be known before the forward."""
    configs = [ReftConfig(task_type="CAUSAL_LM", positions=positions, r=2) for positions in (first, second)]
    adapters = adapters_of(*configs)
    inputs = random_rows(random.Random(7), 3, "labels" if labelled else "plain")
    inputs.pop("position_ids", None)
    for names in (["one", "two", "__base__"], ["two", "one", "two"]):
        assert_rows_equal(adapters, names, inputs, f"{first} beside {second}")


@pytest.mark.parametrize("act_fn", ["relu", "tanh"])
@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(KINDS, 2)))
def test_two_kinds_with_the_same_activation_in_one_batch(first, second, act_fn):
    configs = [
        ReftConfig(task_type="CAUSAL_LM", positions="f1+l1", r=2, intervention=kind, act_fn=act_fn)
        for kind in (first, second)
    ]
    inputs = random_rows(random.Random(1), 2, "plain")
    assert_rows_equal(adapters_of(*configs), ["one", "two"], inputs, f"{first} beside {second}")


@pytest.mark.parametrize(("first", "second"), [("relu", "tanh"), (None, "relu"), ("gelu", None)])
@pytest.mark.parametrize("kind", KINDS)
def test_two_activations_of_one_kind_in_one_batch(kind, first, second):
    configs = [
        ReftConfig(task_type="CAUSAL_LM", positions="f1+l1", r=2, intervention=kind, act_fn=act_fn)
        for act_fn in (first, second)
    ]
    inputs = random_rows(random.Random(2), 3, "plain")
    assert_rows_equal(adapters_of(*configs), ["one", "two", "one"], inputs, f"{kind}: {first} beside {second}")


@pytest.mark.parametrize("strengths", [(-1.0, 1.0), (1.0, -0.5), (0.0, 1.0), (-2.0, 0.0)])
@pytest.mark.parametrize(("first", "second"), [("f1+l1", "f2+l2"), ("all", "f1"), ("e2", "all")])
def test_negative_and_zero_strengths_hold_in_rows_of_their_own(first, second, strengths):
    configs = [ReftConfig(task_type="CAUSAL_LM", positions=positions, r=2) for positions in (first, second)]
    adapters = adapters_of(*configs, strengths)
    inputs = random_rows(random.Random(3), 3, "plain")
    assert_rows_equal(adapters, ["one", "two", "__base__"], inputs, f"strengths={strengths}")


@pytest.mark.parametrize("positions", ["f1+l1", "all"])
def test_the_same_adapters_on_other_rows_in_the_next_call(positions):
    """What is known of two adapters from one call holds for their rows in that call only."""
    configs = [ReftConfig(task_type="CAUSAL_LM", positions=positions, r=2) for _ in range(2)]
    adapters = adapters_of(*configs, (0.5, -2.0))
    inputs = random_rows(random.Random(5), 4, "plain")
    for names in (["one", "two", "two", "one"], ["one", "two", "one", "two"], ["one", "one", "two", "__base__"]):
        assert_rows_equal(adapters, names, inputs, str(names))


def test_the_references_rows_differ_by_adapter():
    """The comparisons above would pass if no adapter did anything."""
    configs = [ReftConfig(task_type="CAUSAL_LM", positions=positions, r=2) for positions in ("f1+l1", "all")]
    adapters = adapters_of(*configs)
    inputs = batch(6, 6)
    inputs["input_ids"][1] = inputs["input_ids"][0]
    base = tiny_model("llama", eos_token_id=None)
    rows = [adapters.forward(base, [name, name], inputs)[0] for name in ("one", "two", "__base__")]
    for one, other in itertools.combinations(rows, 2):
        assert (one - other).abs().max() > 1e-2


# In `generate`.


NEW = 5
HOW = {
    "cached": {},
    "without a cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("seed", range(10))
def test_random_pairs_of_adapters_in_one_batch_generate_as_each_row_alone(seed, how):
    draw = random.Random(f"generate {seed}")
    configs = [random_config(draw, turns=None, prompt_end=None) for _ in range(2)]
    strengths = tuple(draw.choice([1.0, 1.0, 0.5, 0.0, -1.0]) for _ in configs)
    adapters = adapters_of(*configs, strengths)
    names = ["one", "two", "__base__"]
    draw.shuffle(names)
    inputs = batch(*(draw.randint(1, 9) for _ in names), side="left", seed=seed)
    got = adapters.model.generate(
        **inputs,
        adapter_names=names,
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        **HOW[how],
    )
    base = tiny_model("llama", eos_token_id=None)
    for row, name in enumerate(names):
        message = f"row {row} of {names} strengths={strengths} {configs}"
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        tokens, steps = adapters.generate(base, name, ids, NEW)
        found = torch.stack([step[row] for step in got.logits])
        torch.testing.assert_close(found, steps, **CLOSE, msg=lambda m, message=message: f"{message}\n{m}")
        assert got.sequences[row, -NEW:].tolist() == tokens, message


@pytest.mark.parametrize(("first", "second"), [("all", "f1+l1+d2"), ("e2+d", "l2"), ("all+d3", "f1+d")])
def test_markers_do_not_move_the_prompt_that_generate_was_given(first, second):
    configs = [
        ReftConfig(task_type="CAUSAL_LM", positions=positions, r=2, prompt_end=MARKER) for positions in (first, second)
    ]
    adapters = adapters_of(*configs)
    inputs = random_rows(random.Random(5), 2, "plain")
    ids = inputs["input_ids"][:, :4]
    got = adapters.model.generate(input_ids=ids, adapter_names=["one", "two"], max_new_tokens=NEW, do_sample=False)
    for row, name in enumerate(("one", "two")):
        own = ids[row][ids[row] != 0]
        tokens, _ = adapters.generate(tiny_model("llama", eos_token_id=None), name, own, NEW)
        assert got[row, -NEW:].tolist() == tokens


@pytest.mark.parametrize(
    "beams", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"num_beams": 2, "use_cache": False}]
)
@pytest.mark.parametrize(("first", "second"), [("all", "f1+l1"), ("f1+l1+d2", "e2"), ("all+d", "f2+d3")])
def test_beams_of_rows_with_adapters_of_their_own_continue_like_the_rows_alone(first, second, beams):
    configs = [ReftConfig(task_type="CAUSAL_LM", positions=positions, r=2) for positions in (first, second)]
    model = adapters_of(*configs).model
    names, inputs = ["two", "__base__", "one"], batch(6, 3, 5, side="left")
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, **beams}
    got = model.generate(**inputs, adapter_names=names, **settings)[:, inputs["input_ids"].shape[1] :].tolist()
    alone = []
    for name, ids, mask in zip(names, inputs["input_ids"], inputs["attention_mask"]):
        prompt = ids[mask.bool()][None]
        if name == "__base__":
            with model.disable_adapter():
                rows = model.generate(input_ids=prompt, **settings)
        else:
            model.set_adapter(name)
            rows = model.generate(input_ids=prompt, **settings)
        alone += rows[:, prompt.shape[1] :].tolist()
    assert got == alone
    with model.disable_adapter():
        assert got != model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :].tolist()


def test_sampled_sequences_of_a_row_all_have_its_own_adapter():
    configs = [ReftConfig(task_type="CAUSAL_LM", positions=positions, r=2) for positions in ("all", "f1+l1+d")]
    adapters = adapters_of(*configs)
    names, inputs = ["one", "two"], batch(5, 5)
    got = adapters.model.generate(
        **inputs,
        adapter_names=names,
        max_new_tokens=1,
        do_sample=True,
        num_return_sequences=3,
        return_dict_in_generate=True,
        output_logits=True,
    )
    expected = adapters.forward(tiny_model("llama", eos_token_id=None), names, inputs)[:, -1]
    torch.testing.assert_close(got.logits[0], expected.repeat_interleave(3, dim=0), **CLOSE)


@pytest.mark.parametrize("through", ["peft", "base"])
@pytest.mark.parametrize("around", ["peft", "base"])
def test_a_call_made_while_generate_runs_has_the_names_that_it_was_passed(around, through):
    """As of a logits processor that asks another adapter; without names of its own it has those of `generate`."""
    settings = {"positions": "all", "task_type": "CAUSAL_LM"}
    model = adapters_of(ReftConfig(**settings), ReftConfig(**settings)).model
    callers = {"peft": model, "base": model.get_base_model()}
    inputs, found = batch(5, 5), []

    def ask(ids, scores):
        for own in ({"adapter_names": ["two"] * 2}, {}):
            found.append(callers[through](**inputs, **own).logits)
        return scores

    with torch.no_grad():
        one, two = (model(**inputs, adapter_names=[name] * 2).logits for name in ("one", "two"))
        callers[around].generate(
            **inputs, adapter_names=["one"] * 2, max_new_tokens=2, min_new_tokens=2, logits_processor=[ask]
        )
        assert model.base_model._current_state.running.adapter_names is None
    assert not torch.allclose(one, two, **CLOSE)
    assert len(found) == 4
    for got, expected in zip(found, (two, one) * 2):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("through", ["PeftModel", "base model"])
@pytest.mark.parametrize("names", [["one"], ["one", "two"], ["one"] * 8])
def test_names_that_are_not_one_per_row_are_refused(names, through):
    """A part of the rows is not taken for rows that `generate` repeats."""
    adapters = adapters_of(*[ReftConfig(task_type="CAUSAL_LM", positions="l1", r=2)] * 2)
    model = adapters.model if through == "PeftModel" else adapters.model.get_base_model()
    with pytest.raises(ValueError, match=f"got {len(names)} and 4 respectively. Pass one name per row"):
        model.generate(**batch(5, 5, 3, 4), adapter_names=names, max_new_tokens=1)
    with pytest.raises(ValueError, match=f"got {len(names)} and 4 respectively. Pass one name per row"):
        model(**batch(5, 5, 3, 4), adapter_names=names)
    assert model.generate(**batch(5, 5, 3, 4), adapter_names=["one"] * 4, max_new_tokens=1).shape == (4, 6)
