"""Boundless interchange: its mask by slow loops, and the size of a variable where it is known."""

import math

import pytest
import torch
from conftest import batch, logits, tiny_model
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils.data import default_collate
from trainer_kit import QUIET
from transformers import PretrainedConfig, Trainer, TrainerCallback, TrainingArguments

from peft_reft import ReftConfig, get_interventions
from peft_reft.causal import BoundaryAnnealing, InterchangeCollator, interchange_accuracy, set_temperature
from peft_reft.interventions import BoundlessIntervention

WIDTH, BITS = 12, 3
BASE, SOURCE = batch(7, 7, seed=1), batch(7, 7, seed=2)


# The equation.


def slow(intervention, h, s, temperature):
    """A vector at a time, a direction at a time; temperature None for a hard boundary."""
    R, (boundary,) = intervention.subspace.tolist(), intervention.boundary.tolist()
    out = h.clone()
    for row in range(len(h)):
        for i, direction in enumerate(R):
            x = boundary * len(R) - i - 0.5
            m = float(x > 0) if temperature is None else 1 / (1 + math.exp(-x / temperature))
            size = sum(a * b for a, b in zip(direction, (s[row] - h[row]).tolist()))
            out[row] += m * size * torch.tensor(direction)
    return out


@pytest.mark.parametrize(("d", "r"), [(6, 6), (6, 4)])
@pytest.mark.parametrize(("boundary", "size"), [(0.5, None), (0.3, None), (-0.2, 0), (1.2, "r")])
def test_it_is_what_slow_loops_do(d, r, boundary, size):
    torch.manual_seed(d + r)
    intervention = BoundlessIntervention(d, r)
    nn.init.constant_(intervention.boundary, boundary)
    h, s = torch.randn(2, 5, d)
    for temperature in (3.0, 0.2):
        intervention.train().temperature = temperature
        torch.testing.assert_close(intervention(h, s), slow(intervention, h, s, temperature), atol=1e-5, rtol=1e-4)
    intervention.eval()
    torch.testing.assert_close(intervention(h, s), slow(intervention, h, s, None), atol=1e-5, rtol=1e-4)
    assert intervention.size == {None: round(boundary * r), 0: 0, "r": r}[size]


def test_the_soft_boundary_becomes_the_hard_one_and_has_a_gradient():
    torch.manual_seed(0)
    intervention, (h, s) = BoundlessIntervention(6, 6), torch.randn(2, 5, 6)
    hard = intervention.eval()(h, s)
    intervention.train().temperature = 1.0
    assert (intervention(h, s) - hard).abs().max() > 0.05
    intervention(h, s).square().sum().backward()
    assert intervention.boundary.grad.abs() > 0.1
    intervention.temperature = 0.01
    torch.testing.assert_close(intervention(h, s), hard)


# Known answers.


class Bits(nn.Module):
    """Three numbers along random directions of h, whose signs are the class, and nine more that nothing reads."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.config = PretrainedConfig(hidden_size=WIDTH)
        self.first = nn.Linear(WIDTH, WIDTH, bias=False)
        self.first.weight.data = torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0]
        self.register_buffer(
            "signs", torch.tensor([[1.0 if c >> j & 1 else -1.0 for j in range(BITS)] for c in range(8)])
        )

    def forward(self, x, labels=None):
        z = self.first(x[:, None])[:, 0] @ self.first.weight
        logits = 4 * z[:, :BITS] @ self.signs.T
        return {**({} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}), "logits": logits}


def examples(count, seed, known):
    """The first `known` of the numbers are the source's, the other ones the base's."""
    numbers = torch.randn(2, count, WIDTH, generator=torch.Generator().manual_seed(seed))
    base, source = numbers + 0.3 * numbers.sign()  # none so near to 0 that its sign is chance
    mixed = torch.cat([source[:, :known], base[:, known:BITS]], 1)
    labels = ((mixed > 0) * 2 ** torch.arange(BITS)).sum(1)
    return [{"x": x, "source_x": s, "labels": y} for x, s, y in zip(base, source, labels)]


def align(known, callback, steps=200, **options):
    network = Bits()
    torch.manual_seed(1)
    config = ReftConfig(r=WIDTH, intervention="boundless", target_modules=["first"], positions="all")
    model = get_peft_model(network, config)
    settings = {"per_device_train_batch_size": 64, "max_steps": steps, "learning_rate": 4e-2, "label_names": ["labels"]}
    settings |= {"remove_unused_columns": False, "logging_strategy": "no", **options}
    trainer = Trainer(
        model,
        TrainingArguments("unused", **{**QUIET, **settings}),
        train_dataset=examples(4000, 0, known),
        data_collator=InterchangeCollator(default_collate),
        callbacks=[callback],
    )
    trainer.train()
    return model, network.first.weight.detach()[:, :known].T


@pytest.mark.parametrize("known", [1, 2])
def test_the_boundary_shrinks_to_the_size_of_the_variable(known):
    model, truth = align(known, BoundaryAnnealing(start=4.0, end=0.1, penalty=0.5))
    (intervention,) = get_interventions(model)["first"]
    assert intervention.size == known
    assert interchange_accuracy(model, examples(1000, 1, known), batch_size=250) >= 0.99
    R = intervention.subspace.detach()[:known]
    assert (R @ truth.T).square().sum() / known >= 0.99  # of the squared length lies in the true subspace


def test_without_a_penalty_directions_that_do_no_harm_stay():
    model, _ = align(1, BoundaryAnnealing(start=4.0, end=0.1, penalty=0.0))
    assert get_interventions(model)["first"][0].size > 2
    assert interchange_accuracy(model, examples(1000, 1, 1), batch_size=250) >= 0.99


def test_the_temperature_falls_with_the_steps_and_the_penalty_is_a_term_of_the_loss():
    class Look(TrainerCallback):
        """Right before the optimizer's step, behind BoundaryAnnealing."""

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            (intervention,) = get_interventions(model)["first"]
            seen.append((intervention.temperature, intervention.boundary.grad.item()))

    class Both(BoundaryAnnealing, Look):
        def on_pre_optimizer_step(self, *args, **kwargs):
            BoundaryAnnealing.on_pre_optimizer_step(self, *args, **kwargs)
            Look.on_pre_optimizer_step(self, *args, **kwargs)

    found = {}
    for penalty in (0.0, 2.0):
        seen = found[penalty] = []
        align(1, Both(start=4.0, end=1.0, penalty=penalty), steps=4, gradient_accumulation_steps=2, learning_rate=0.0)
    assert [round(temperature, 6) for temperature, _ in found[2.0]] == [4.0, 3.0, 2.0, 1.0]
    for (_, without), (_, term) in zip(found[0.0], found[2.0], strict=True):
        assert term - without == pytest.approx(2.0, abs=1e-5)


# In a language model.


def boundless(**settings):
    torch.manual_seed(0)
    config = ReftConfig(**{"r": 32, "intervention": "boundless", "task_type": "CAUSAL_LM", **settings})
    return get_peft_model(tiny_model("llama"), config)


def test_it_is_saved_and_loaded_with_its_boundary(tmp_path):
    model = boundless(layers_to_transform=[1]).eval()
    (intervention,) = get_interventions(model)["model.layers.1"]
    nn.init.constant_(intervention.boundary, 0.25)
    expected = logits(model, BASE, source_inputs=SOURCE)
    assert (expected - logits(model, BASE)).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path).eval()
    torch.testing.assert_close(logits(loaded, BASE, source_inputs=SOURCE), expected)
    (intervention,) = get_interventions(loaded)["model.layers.1"]
    assert (intervention.size, intervention.temperature) == (8, None)


def test_a_temperature_is_needed_in_training_alone():
    model = boundless().train()
    assert torch.isfinite(model(**BASE).logits).all()  # without a source nothing is exchanged
    with pytest.raises(ValueError, match="training mode without a temperature"):
        model(**BASE, source_inputs=SOURCE)
    assert torch.isfinite(logits(model.eval(), BASE, source_inputs=SOURCE)).all()
    set_temperature(model.train(), 2)
    model(**BASE, source_inputs=SOURCE).logits.square().sum().backward()
    gradients = [groups[0].boundary.grad for groups in get_interventions(model).values()]
    assert all(gradient.abs() > 0 for gradient in gradients)


# Refused.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"subspaces": {"a": 32}}, "subspaces have no meaning for the intervention 'boundless'"),
        ({"dropout": 0.1}, "dropout=0.1 has no meaning"),
        ({"train_bias": False}, "train_bias=False has no meaning"),
        ({"r": 33}, "r=33 is not a rank"),
    ],
)
def test_settings_without_meaning_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        boundless(**settings)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf, True, "50"])
def test_a_temperature_is_a_positive_number(temperature):
    with pytest.raises(ValueError, match="must be a finite number above 0"):
        set_temperature(boundless(), temperature)
    with pytest.raises(ValueError, match="must be a finite number above 0"):
        BoundaryAnnealing(start=temperature, end=0.1, penalty=1.0)


def test_callbacks_that_could_do_nothing_are_refused():
    with pytest.raises(ValueError, match="a temperature falls"):
        BoundaryAnnealing(start=1.0, end=2.0, penalty=0.0)
    with pytest.raises(ValueError, match=r"penalty=-1\.0 must be a finite number, at least 0"):
        BoundaryAnnealing(start=2.0, end=1.0, penalty=-1.0)
    with pytest.raises(ValueError, match="no boundless intervention"):
        set_temperature(get_peft_model(tiny_model("llama"), ReftConfig(task_type="CAUSAL_LM")), 1.0)
    with pytest.raises(TypeError):
        BoundaryAnnealing()  # no temperature is guessed
