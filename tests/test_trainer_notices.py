"""What a Trainer's user is told once: a learning rate that trains nothing, an evaluation without prompt ends."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from conftest import EOS, PAD, batch, reft_model, tiny_model
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from peft_reft import ReftDataCollator
from peft_reft.integrations.trainer import LOW_RATE, UNLABELLED_EVALUATION, ReftNotices

ROWS = [{"input_ids": torch.arange(3, 3 + n).tolist(), "answer": 2} for n in (6, 8, 5, 7)]


def collate(rows):
    inputs = batch(*(len(row["input_ids"]) for row in rows))
    for number, row in enumerate(rows):
        inputs["input_ids"][number, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
    order = inputs["attention_mask"].cumsum(1)
    ends = inputs["attention_mask"].sum(1, keepdim=True) - torch.tensor([[row["answer"]] for row in rows])
    hidden = (inputs["attention_mask"] == 0) | (order <= ends)
    return {**inputs, "labels": inputs["input_ids"].masked_fill(hidden, -100)}


def own_loss(outputs, labels, num_items_in_batch=None):
    return torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def trainer(model, tmp_path, collator=collate, compute_loss_func=None, optimizers=(None, None), **settings):
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, label_names=["labels"],
        remove_unused_columns=False, max_steps=2, save_strategy="no", **settings,
    )  # fmt: skip
    return Trainer(model, arguments, collator, ROWS, ROWS, compute_loss_func=compute_loss_func, optimizers=optimizers)


def told(run) -> list[str]:
    """ReFT's warnings, in order."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if "ReFT" in str(w.message)]


@pytest.mark.parametrize(("rate", "messages"), [(2e-5, [LOW_RATE.format(2e-5)]), (1e-4, []), (1e-3, [])])
def test_a_learning_rate_for_whole_models_is_told_once(rate, messages, tmp_path, llama):
    made = []
    model = reft_model(llama, task_type="CAUSAL_LM")
    assert told(lambda: made.append(trainer(model, tmp_path, learning_rate=rate, warmup_steps=1))) == []
    assert told(made[0].train) == messages  # not before anything runs
    assert told(made[0].train) == []


@pytest.mark.parametrize("disabled", [True, False])
def test_a_trainer_that_disables_dropout_disables_that_of_the_edits(disabled, tmp_path, llama):
    model = reft_model(llama, task_type="CAUSAL_LM", dropout=0.5)
    made = trainer(model, tmp_path, learning_rate=1e-3)
    made.args.disable_dropout = disabled  # as TRL's arguments have it
    made.train()
    model.train()
    one, other = (model(**collate(ROWS)).logits for _ in range(2))
    assert torch.equal(one, other) is disabled


def test_a_schedule_that_ends_at_a_low_rate_is_told_nothing(tmp_path, llama):
    settings = {"learning_rate": 1e-3, "lr_scheduler_type": "linear", "warmup_steps": 2}
    run = trainer(reft_model(llama, task_type="CAUSAL_LM"), tmp_path, **settings)
    assert told(run.train) == []
    assert run.lr_scheduler.get_last_lr()[0] < 1e-4


def test_a_low_rate_of_a_run_that_only_evaluates_is_told_nothing(tmp_path, llama):
    run = trainer(reft_model(llama, task_type="CAUSAL_LM"), tmp_path, learning_rate=1e-5)
    assert told(run.evaluate) == []


def test_the_rate_is_that_of_the_adapter_s_own_group(tmp_path, llama):
    model = reft_model(llama, task_type="CAUSAL_LM", modules_to_save=["lm_head"])
    ours = [p for n, p in model.named_parameters() if p.requires_grad and "lm_head" not in n]
    head = [p for n, p in model.named_parameters() if p.requires_grad and "lm_head" in n]
    for rates, messages in (((1e-3, 1e-6), []), ((1e-6, 1e-3), [LOW_RATE.format(1e-6)])):
        groups = [{"params": ours, "lr": rates[0]}, {"params": head, "lr": rates[1]}]
        run = trainer(model, tmp_path, optimizers=(torch.optim.AdamW(groups), None), learning_rate=5e-5)
        assert told(run.train) == messages


def test_other_methods_and_frozen_adapters_may_have_any_rate(tmp_path, llama):
    lora = get_peft_model(llama, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert told(trainer(lora, tmp_path, learning_rate=1e-6).train) == []
    model = reft_model(tiny_model("llama"), task_type="CAUSAL_LM", inference_mode=True)
    model.lm_head.weight.requires_grad_(True)
    assert told(trainer(model, tmp_path, learning_rate=1e-6).train) == []


LABELS_TAKEN = {"label smoothing": {"label_smoothing_factor": 0.1}, "own loss": {"compute_loss_func": own_loss}}


@pytest.mark.parametrize("settings", LABELS_TAKEN.values(), ids=LABELS_TAKEN)
def test_a_prediction_without_labels_is_told_once(settings, tmp_path, llama):
    model = reft_model(llama, task_type="CAUSAL_LM", positions="f1+l1")
    run = trainer(model, tmp_path, per_device_eval_batch_size=2, **settings)
    assert told(lambda: (run.predict(ROWS), run.predict(ROWS))) == [UNLABELLED_EVALUATION.format("f1+l1")]


def test_a_classifier_s_evaluation_is_told_nothing(tmp_path):
    """Its labels are classes, and its rows are prompts from end to end."""
    model = reft_model(tiny_model("llama", "classifier"), positions="f1+l1", task_type="SEQ_CLS")

    def with_classes(rows):
        return {**collate(rows), "labels": torch.tensor([len(row["input_ids"]) % 2 for row in rows])}

    run = trainer(model, tmp_path, with_classes, label_smoothing_factor=0.1)
    assert told(run.evaluate) == []


@pytest.mark.parametrize("settings", LABELS_TAKEN.values(), ids=LABELS_TAKEN)
def test_an_evaluation_without_labels_is_told_once(settings, tmp_path, llama):
    model = reft_model(llama, task_type="CAUSAL_LM", positions="f1+l1")
    run = trainer(model, tmp_path, per_device_eval_batch_size=2, **settings)
    assert told(lambda: (run.evaluate(), run.evaluate())) == [UNLABELLED_EVALUATION.format("f1+l1")]
    collator = ReftDataCollator(collate, model.peft_config["default"])
    wrapped = trainer(model, tmp_path, collator, **settings)
    assert told(wrapped.evaluate) == []
    assert wrapped.evaluate()["eval_loss"] != pytest.approx(run.evaluate()["eval_loss"], abs=1e-4)


@pytest.mark.parametrize(
    ("adapter", "settings"),
    [
        ({"positions": "f1+l1"}, {}),  # labels reach the model
        ({"positions": "f2"}, LABELS_TAKEN["own loss"]),
        ({"positions": "l1", "prompt_end": [5]}, LABELS_TAKEN["own loss"]),
    ],
    ids=["labels", "first tokens", "a marker"],
)
def test_an_evaluation_that_knows_its_prompts_is_told_nothing(adapter, settings, tmp_path, llama):
    model = reft_model(llama, task_type="CAUSAL_LM", **adapter)
    messages = told(trainer(model, tmp_path, **settings).evaluate)
    assert not [message for message in messages if message.startswith("In evaluation")]


def test_a_forward_of_the_user_s_own_before_an_evaluation_is_not_taken_for_it(tmp_path, llama):
    model = reft_model(llama, task_type="CAUSAL_LM", positions="f1+l1")
    run = trainer(model, tmp_path)
    with torch.no_grad():
        model(torch.tensor([[3, 4, 5]]))
    assert told(run.evaluate) == []


def test_a_disabled_adapter_is_evaluated_without_a_word(tmp_path, llama):
    model = reft_model(llama, task_type="CAUSAL_LM", positions="f1+l1")
    run = trainer(model, tmp_path, **LABELS_TAKEN["own loss"])
    with model.disable_adapter():
        assert told(run.evaluate) == []


def test_a_trainer_has_the_callback_once_also_if_trainers_are_loaded_after_the_adapter_was_made(tmp_path, llama):
    model = reft_model(llama)
    reft_model(tiny_model("llama"))
    for own in ([], [ReftNotices()]):
        arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
        made = Trainer(model, arguments, callbacks=own)
        assert [type(callback) for callback in made.callback_handler.callbacks].count(ReftNotices) == 1
    code = (
        "import sys, peft_reft, torch, transformers; from peft import get_peft_model\n"
        f"from transformers import LlamaConfig, LlamaForCausalLM\nc = dict(pad_token_id={PAD}, eos_token_id={EOS})\n"
        "base = LlamaForCausalLM(LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1,\n"
        "    num_key_value_heads=1, intermediate_size=8, vocab_size=9, **c))\n"
        "model = get_peft_model(base, peft_reft.ReftConfig())\n"
        "print([name for name in ('transformers.trainer', 'lm_eval', 'trl') if name in sys.modules])\n"
        "made = transformers.Trainer(model, transformers.TrainingArguments(use_cpu=True, report_to='none'))\n"
        "print([type(callback).__name__ for callback in made.callback_handler.callbacks].count('ReftNotices'))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.split("\n") == ["[]", "1", ""]
