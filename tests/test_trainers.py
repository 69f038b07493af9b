"""TRL's and transformers' trainers run unmodified: what they score and sample is edited at the right tokens.

SFTTrainer has tests of its own, in test_trl.py. Each test here compares with a loop over single rows in which the
columns to edit are named one by one.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import resume_program
import torch
import transformers
from conftest import PAD, batch, logits, randomize, reft_model, tiny_model
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from trainer_kit import (
    QUIET,
    answer_log_probs,
    locations_in_prompt,
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
    RewardConfig,
    RewardTrainer,
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


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_the_gradient_of_sampled_completions_is_that_of_a_loop_over_rows(kind, tmp_path):
    made = make(kind, tmp_path, config=ReftConfig(**{**CONFIG, "positions": "f2+l2"}), beta=0.0)
    made.current_gradient_accumulation_steps = 1
    made.model.train()
    inputs = made._prepare_inputs(first_batch(made))

    def gradient(loss):
        made.model.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in made.model.parameters() if p.requires_grad])

    got = gradient(made.compute_loss(made.model, inputs))
    total = 0.0
    for row in range(len(inputs["prompt_ids"])):
        prompt, answer = (
            inputs[f"{part}_ids"][row][inputs[f"{part}_mask"][row].bool()] for part in ("prompt", "completion")
        )
        ids, locations = torch.cat([prompt, answer]), locations_in_prompt("f2+l2", len(prompt))
        out = made.model(input_ids=ids[None], intervention_locations=locations).logits[0, len(prompt) - 1 : -1] / 0.7
        scores = out.log_softmax(-1).gather(-1, answer[:, None])[:, 0]
        total = total - inputs["advantages"][row] * scores.sum()
    expected = gradient(total)
    assert expected.norm() > 1e-3
    torch.testing.assert_close(got / got.norm(), expected / expected.norm(), rtol=1e-3, atol=1e-5)


# Rewards and classes.


def rewarded(folder, **settings):
    config = ReftConfig(task_type="SEQ_CLS", positions="f2+l2")
    return randomized(
        RewardTrainer(
            model=tiny_model("llama", "classifier", num_labels=1),
            args=RewardConfig(**QUIET, output_dir=str(folder), max_steps=2, **settings),
            train_dataset=preferences(),
            processing_class=word_tokenizer(),
            peft_config=config,
        )
    )


@torch.no_grad()
def class_logits(model, ids, prompt=None):
    """Logits of a row alone, its edited columns named; `prompt`: how many of its tokens count."""
    locations = locations_in_prompt("f2+l2", len(ids) if prompt is None else prompt)
    return model(input_ids=ids[None], intervention_locations=locations).logits[0]


def test_rewards_count_positions_over_the_whole_conversation(tmp_path):
    made = rewarded(tmp_path)
    inputs = first_batch(made)
    assert "labels" not in inputs
    made.model.eval()
    _, outputs = made.compute_loss(made.model, dict(inputs), return_outputs=True)
    assert inputs["attention_mask"].sum(1).unique().numel() > 1
    for row, got in enumerate(outputs.logits.detach()):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        torch.testing.assert_close(got, class_logits(made.model, ids), rtol=1e-4, atol=1e-4)
        if len(ids) > 4:
            assert (got - class_logits(made.model, ids, len(ids) - 1)).abs().max() > 1e-3


def test_a_reward_model_trains_its_head_and_is_saved_with_it(tmp_path):
    made = rewarded(tmp_path)
    before = {name: p.detach().clone() for name, p in made.model.named_parameters() if p.requires_grad}
    assert any("score" in name for name in before)
    made.train()
    changed = [name for name, p in made.model.named_parameters() if name in before and not torch.equal(p, before[name])]
    assert set(changed) == set(before)
    made.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(tiny_model("llama", "classifier", num_labels=1), tmp_path / "saved").eval()
    assert torch.equal(logits(loaded, batch(9, 6)), logits(made.model.eval(), batch(9, 6)))


def plain_trainer(folder, model, rows, evaluated=None, metrics=None, **settings):
    """transformers' Trainer with its padding collators; `model` is a PeftModel."""
    tokenizer = word_tokenizer()
    classes = not isinstance(rows[0]["labels"], list) or isinstance(rows[0]["labels"][0], float)
    collator = (transformers.DataCollatorWithPadding if classes else transformers.DataCollatorForSeq2Seq)(tokenizer)
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**{**QUIET, "output_dir": str(folder), "max_steps": 4, **settings}),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(evaluated or rows),
        data_collator=collator,
        processing_class=tokenizer,
        compute_metrics=metrics,
    )


def token_rows(count=12, label=None):
    """Rows of 2 to 8 tokens; label: a function of the row's number, or None for labels behind a prompt."""
    made = []
    for row, text in enumerate(rows_of_text(count, prompt=(2, 7))["prompt"]):
        ids = word_tokenizer()(text)["input_ids"]
        prompt = 1 + row % (len(ids) - 1)
        made.append({"input_ids": ids, "labels": label(row) if label else [-100] * prompt + ids[prompt:]})
    return made


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("several", [False, True], ids=["one class", "as many labels as columns"])
def test_class_labels_say_nothing_about_prompts(family, several, tmp_path):
    settings = {"num_labels": 8, "problem_type": "multi_label_classification"} if several else {"num_labels": 2}
    model = reft_model(tiny_model(family, "classifier", **settings), task_type="SEQ_CLS", positions="f2+l2")
    rows = token_rows(
        label=(lambda row: [float((row + k) % 3 == 0) for k in range(8)]) if several else lambda row: row % 2
    )
    made = plain_trainer(tmp_path, model, rows, metrics=lambda p: {"widest": float(p.predictions.shape[1])})
    predicted = made.predict(made.eval_dataset)
    assert predicted.metrics["test_widest"] == settings["num_labels"]
    for row, got in zip(rows, torch.tensor(predicted.predictions)):
        ids = torch.tensor(row["input_ids"])
        torch.testing.assert_close(got, class_logits(model, ids), rtol=1e-4, atol=1e-4)
    longest = max(rows, key=lambda row: len(row["input_ids"]))["input_ids"]
    assert len(longest) == 8
    one_less = class_logits(model, torch.tensor(longest), 7)
    assert (one_less - class_logits(model, torch.tensor(longest))).abs().max() > 1e-3
    before = tokens_of(model)
    made.train()
    assert any((p - q).abs().max() > 1e-3 for p, q in zip(before, tokens_of(model)))


# transformers' Trainer on causal language models.


def causal(folder, **settings):
    return plain_trainer(
        folder, reft_model(tiny_model("llama"), **{**CONFIG, "positions": "f2+l2"}), token_rows(), **settings
    )


def test_predictions_are_those_of_the_labelled_rows_alone(tmp_path):
    made = causal(tmp_path, metrics=lambda p: {"rows": len(p.predictions)})
    predicted = made.predict(made.eval_dataset)
    assert predicted.metrics["test_rows"] == 12 and made.evaluate()["eval_rows"] == 12
    for row, got in zip(token_rows(), torch.tensor(predicted.predictions)):
        ids, prompt = torch.tensor(row["input_ids"]), row["labels"].count(-100)
        scores = got[prompt - 1 : len(ids) - 1].log_softmax(-1).gather(-1, ids[prompt:, None])[:, 0]
        expected = answer_log_probs(made.model, ids, prompt, "f2+l2")
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
        if prompt < len(ids) - 1:
            assert (answer_log_probs(made.model, ids, prompt, None) - expected).abs().max() > 1e-3


def test_rows_grouped_by_length_are_trained_at_the_same_positions(tmp_path):
    made = causal(tmp_path, train_sampling_strategy="group_by_length", learning_rate=0.0, max_steps=3)
    lengths, total, tokens = [], 0.0, 0
    for inputs in made.get_train_dataloader():
        lengths += inputs["attention_mask"].sum(1).tolist()
        for ids, labels, mask in zip(inputs["input_ids"], inputs["labels"], inputs["attention_mask"].bool()):
            prompt = int((labels[mask] == -100).sum())
            total -= float(answer_log_probs(made.model.eval(), ids[mask], prompt, "f2+l2").sum())
            tokens += len(ids[mask]) - prompt
    assert sorted(lengths) != lengths and max(lengths[:4]) == max(lengths)  # the longest batch comes first
    made.train()
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    shares = [int((inputs["labels"] != -100).sum()) for inputs in made.get_train_dataloader()]
    assert sum(loss * share for loss, share in zip(losses, shares)) / tokens == pytest.approx(total / tokens, rel=1e-3)


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    scores = iter([0.1, 0.9, 0.3, 0.2])
    made = causal(
        tmp_path,
        metrics=lambda prediction: {"score": next(scores)},
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="score",
    )
    made.train()
    assert made.state.best_model_checkpoint.endswith("checkpoint-2")
    inputs = batch(9, 6)
    got = logits(made.model.eval(), inputs)
    best, last = (
        logits(PeftModel.from_pretrained(tiny_model("llama"), tmp_path / f"checkpoint-{step}").eval(), inputs)
        for step in (2, 4)
    )
    assert torch.equal(got, best)
    assert (got - last).abs().max() > 1e-4


# Going on where a run ended.


def test_a_resumed_run_ends_with_the_same_weights(tmp_path):
    def made(folder):
        model = reft_model(tiny_model("llama"), **{**CONFIG, "positions": "f2+l2", "dropout": 0.2}).train()
        return plain_trainer(folder, model, token_rows(), save_strategy="steps", save_steps=2)

    (whole := made(tmp_path / "whole")).train()
    made(tmp_path / "parts").train()
    again = made(tmp_path / "parts")
    randomize(again.model, seed=7)  # what it starts from must not matter
    again.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    for got, expected in zip(tokens_of(again.model), tokens_of(whole.model)):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_with_a_reference_ends_with_the_same_weights(kind, tmp_path):
    def made(folder):
        return make(kind, folder, ready=True, max_steps=4, save_strategy="steps", save_steps=2)

    (whole := made(tmp_path / "whole")).train()
    made(tmp_path / "parts").train()
    again = made(tmp_path / "parts")
    for name in ("default", "ref"):
        randomize(again.model, name, seed=7)
    again.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    ended = dict(whole.model.named_parameters())
    compared = [name for name in ended if "reft_interventions" in name]
    assert len(compared) == 18
    for name, parameter in again.model.named_parameters():
        if name in compared:
            assert torch.equal(parameter, ended[name]), name
            assert parameter.requires_grad == (".default." in name)


def test_a_killed_and_resumed_run_ends_with_the_same_weights(tmp_path):
    program = [sys.executable, str(Path(__file__).parent / "resume_program.py"), str(tmp_path / "parts")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    with open(tmp_path / "log", "w") as log:
        killed = subprocess.Popen(
            [*program, "--hold", "5"], env={**environment, "PYTHONHASHSEED": "1"}, stdout=log, stderr=log
        )
        until = time.monotonic() + 180
        while not (tmp_path / "parts" / "holding").exists():
            assert killed.poll() is None and time.monotonic() < until, (tmp_path / "log").read_text()
            time.sleep(0.1)
        killed.kill()
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "parts" / "final").exists()
    checkpoints = {path.name for path in (tmp_path / "parts" / "trainer").glob("checkpoint-*")}
    assert checkpoints == {"checkpoint-2", "checkpoint-4"}
    resumed = subprocess.run(
        [*program, "--resume"], env={**environment, "PYTHONHASHSEED": "2"}, capture_output=True, text=True
    )
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    resume_program.train(tmp_path / "whole")
    got, expected = (load_file(tmp_path / run / "final" / "adapter_model.safetensors") for run in ("parts", "whole"))
    start = load_file(tmp_path / "parts" / "trainer" / "checkpoint-4" / "adapter_model.safetensors")
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)
    assert not all(torch.equal(got[name], start[name]) for name in got)
