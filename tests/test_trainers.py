"""TRL's and transformers' trainers run unmodified: what they score and sample is edited at the right tokens.

SFTTrainer has tests of its own, in test_trl.py. Each test here compares with a loop over single rows in which the
columns to edit are named one by one.
"""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from conftest import PAD, batch, logits, randomize, tiny_model
from peft import PeftModel, get_peft_model
from trainer_kit import (
    QUIET,
    answer_log_probs,
    rows_of_text,
    sequence_scores,
    tokens_of,
    word_tokenizer,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
)
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from peft_reft import ReftConfig, ReftDataCollator

POSITIONS = "f2+l2+d3"
CONFIG = {"task_type": "CAUSAL_LM", "positions": POSITIONS}


def preferences(rows=12):
    return rows_of_text(rows, prompt=(1, 6), chosen=(2, 3), rejected=(3, 4))


def judged(rows=12):
    data = rows_of_text(rows, prompt=(1, 6), completion=(2, 4))
    return data.add_column("label", [row % 3 != 0 for row in range(rows)])


def first_letters(completions, **kwargs):
    """A reward that differs from completion to completion."""
    return [float(sum(map(ord, completion)) % 7) for completion in completions]


def online_settings(config_class, **settings):
    return config_class(
        **{**QUIET, "num_generations": 4, "max_completion_length": 5, "temperature": 0.7, "beta": 0.1, **settings}
    )


KINDS = {
    "dpo": (DPOTrainer, DPOConfig, preferences),
    "kto": (KTOTrainer, KTOConfig, judged),
    "grpo": (GRPOTrainer, GRPOConfig, lambda: rows_of_text(8, prompt=(1, 6))),
    "rloo": (RLOOTrainer, RLOOConfig, lambda: rows_of_text(8, prompt=(1, 6))),
}


def make(kind, folder, ready=False, config=None, **settings):
    """A trainer of one of `KINDS`; its adapter has random weights.

    Args:
        ready: give the trainer a PeftModel, so that its reference is a copy of the adapter, else the config.
    """
    trainer_class, config_class, data = KINDS[kind]
    config = config or ReftConfig(**CONFIG)
    settings = {"output_dir": str(folder), "max_steps": 3, **settings}
    online = kind in ("grpo", "rloo")
    args = online_settings(config_class, **settings) if online else config_class(**{**QUIET, **settings})
    model = tiny_model("llama")
    model = randomize(get_peft_model(model, config), scale=0.3) if ready else model
    made = trainer_class(
        model=model,
        args=args,
        train_dataset=data(),
        processing_class=word_tokenizer(),
        peft_config=None if ready else config,
        **({"reward_funcs": first_letters} if online else {}),
    )
    return made if ready else randomized(made)


def randomized(trainer):
    randomize(trainer.model, "default", scale=0.3)
    return trainer


def recorded(model):
    """A list that gets the log-probabilities of every forward of a model with TRL's fused head."""
    seen = []
    model.get_base_model().register_forward_hook(
        lambda module, args, output: seen.append(output.log_probs) if hasattr(output, "log_probs") else None
    )
    return seen


def first_batch(trainer):
    return next(iter(trainer.get_train_dataloader()))


# Preferences.


@pytest.mark.parametrize("collator", [False, True], ids=["labels", "collator"])
@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_preference_trainers_score_completions_with_the_prompts_positions(kind, collator, tmp_path):
    made = make(kind, tmp_path)
    if collator:
        made.data_collator = ReftDataCollator(made.data_collator, made.model.peft_config["default"])
    inputs = first_batch(made)
    assert ("intervention_locations" in inputs) == (collator and kind == "dpo")  # KTO: other completions, other `d3`
    seen = recorded(made.model)
    made.model.train()
    made.compute_loss(made.model, dict(inputs))
    made.model.eval()
    parts = ("KL_", "") if kind == "kto" else ("",)
    expected = [sequence_scores(made.model, inputs, POSITIONS, part) for part in parts]
    with made.model.disable_adapter():
        expected += [sequence_scores(made.model, inputs, POSITIONS, part) for part in parts]
    assert len(seen) == len(expected)
    for got, wanted in zip(seen, expected):
        torch.testing.assert_close(got.sum(1), wanted, rtol=1e-4, atol=1e-4)
    whole_rows = sequence_scores(made.model, inputs, None)
    assert (whole_rows - expected[len(parts) - 1]).abs().max() > 1e-2
    assert (expected[len(parts) - 1] - expected[-1]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_precomputed_reference_scores_are_those_of_the_base_model(kind, tmp_path):
    made = make(kind, tmp_path, precompute_ref_log_probs=True)
    inputs = first_batch(made)
    names = ("ref_chosen_logps", "ref_rejected_logps") if kind == "dpo" else ("ref_logps",)
    got = torch.cat([inputs[name] for name in names])
    assert (sequence_scores(made.model.eval(), inputs, POSITIONS) - got).abs().max() > 1e-2
    with made.model.disable_adapter():
        torch.testing.assert_close(sequence_scores(made.model, inputs, POSITIONS), got, rtol=1e-4, atol=1e-4)


def test_the_collator_takes_the_prompts_of_preference_batches_from_their_completion_mask():
    config = ReftConfig(task_type="CAUSAL_LM", positions="f1+l1")
    examples = [
        {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9], "rejected_ids": [10]},
        {"prompt_ids": [11], "chosen_ids": [12, 13, 14], "rejected_ids": [15]},
    ]
    got = ReftDataCollator(DataCollatorForPreference(PAD), config)(examples)
    assert got["intervention_locations"].tolist() == [[[0], [2]], [[0], [-1]]] * 2

    rows = [
        {"prompt_ids": e["prompt_ids"], "completion_ids": [8, 9], "KL_completion_ids": [9], "label": True}
        for e in examples
    ]
    got = ReftDataCollator(DataCollatorForUnpairedPreference(PAD), config)(rows)
    assert got["intervention_locations"].tolist() == [[[0], [2]], [[0], [-1]]]  # they hold for both sets of rows
    every = ReftDataCollator(DataCollatorForUnpairedPreference(PAD), ReftConfig(**{**CONFIG, "positions": "f1+d1"}))
    assert "intervention_locations" not in every(rows)


# The reference policy.


@pytest.mark.parametrize("settings", [{}, {"share_layers": True}, {"share_weights": "position"}], ids=str)
def test_dpo_starts_at_ln_2_from_an_exact_copy_of_the_adapter(settings, tmp_path):
    made = make("dpo", tmp_path, ready=True, config=ReftConfig(**{**CONFIG, "positions": "f2+l2"}, **settings))
    assert set(made.model.peft_config) == {"default", "ref"}
    seen = recorded(made.model)
    loss = made.compute_loss(made.model.train(), first_batch(made))
    assert loss.item() == math.log(2) or abs(loss.item() - math.log(2)) < 1e-7
    policy, copied = seen
    assert torch.equal(policy, copied)
    with made.model.disable_adapter():
        made.compute_loss(made.model, first_batch(made))
    assert (seen[2] - policy).abs().max() > 1e-2  # an adapter that does nothing would pass the lines above


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_stays_while_the_policy_trains(kind, tmp_path):
    made = make(kind, tmp_path, ready=True, max_steps=2)
    inputs = batch(9, 6)
    labels = torch.where(torch.arange(9) < 4, -100, inputs["input_ids"])
    before = logits(made.model.eval(), inputs, labels=labels)
    logged = made.train() and made.state.log_history
    made.model.eval()
    assert (logits(made.model, inputs, labels=labels) - before).abs().max() > 1e-3
    made.model.set_adapter("ref")
    assert torch.equal(logits(made.model, inputs, labels=labels), before)
    # At the first step policy and reference are equal, later they are not.
    difference = {"dpo": "rewards/chosen", "kto": "rewards/chosen", "grpo": "kl", "rloo": "kl"}[kind]
    first, last = (entry[difference] for entry in logged if difference in entry)
    assert abs(first) < 1e-6 < 1e-5 < abs(last)


@pytest.mark.parametrize("kind", KINDS)
def test_trainers_run_from_a_config_and_say_nothing(kind, tmp_path):
    made = make(kind, tmp_path, max_steps=2)
    before = tokens_of(made.model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made.train()
    assert not [w for w in caught if "ReFT" in str(w.message) or "intervention" in str(w.message)]
    assert any((p - q).abs().max() > 1e-3 for p, q in zip(before, tokens_of(made.model)))
    made.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "saved")
    inputs = batch(9, 6)
    assert torch.equal(logits(loaded.eval(), inputs), logits(made.model.eval(), inputs))


# Sampling.


@pytest.mark.parametrize("positions", ["f2+l2", "f1+l1+d2"])
@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_completions_are_scored_with_the_positions_that_they_were_sampled_with(kind, positions, tmp_path):
    made = make(kind, tmp_path, config=ReftConfig(**{**CONFIG, "positions": positions}))
    steps, scored = [], []
    made.model.get_base_model().lm_head.register_forward_hook(  # runs in generation only: the fused head does not
        lambda module, args, output: steps.append(output[:, -1].detach())
    )
    score = made._get_per_token_logps_and_entropies

    def recording(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        result = score(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        scored.append((made.model.active_adapter, input_ids, attention_mask, logits_to_keep, result[0].detach()))
        return result

    made._get_per_token_logps_and_entropies = recording
    made.current_gradient_accumulation_steps = 1  # `train` sets it
    made.model.train()
    inputs = made._prepare_inputs(first_batch(made))
    sampled = (torch.stack(steps, 1) / 0.7).log_softmax(-1)  # [B, T, V]
    made.compute_loss(made.model, inputs)
    _, ids, mask, keep, got = scored[-1]
    mask, rows = mask.bool(), len(ids)
    answered = mask[:, -keep:]
    made.model.eval()
    for row in range(rows):
        own = ids[row][mask[row]]
        prompt = int(mask[row, :-keep].sum())
        expected = answer_log_probs(made.model, own, prompt, positions, 0.7)
        torch.testing.assert_close(got[row][answered[row]], expected, rtol=1e-4, atol=1e-4)
        steps_of_row = sampled[:, : len(expected)].gather(-1, own[prompt:].expand(rows, -1)[..., None])[..., 0]
        assert (steps_of_row - expected).abs().amax(1).min() < 1e-4  # as it was when it was sampled
        whole_row = answer_log_probs(made.model, own, prompt, None, 0.7)
        assert (whole_row - expected).abs().max() > 1e-2
