"""TRL's SFTTrainer runs unmodified, and trains at the same tokens on every path by which it calls the model."""

import logging
import warnings

import pytest
import torch
import transformers
from conftest import EOS, PAD, tiny_model
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from trl import SFTConfig, SFTTrainer

from peft_reft import ReftConfig, ReftDataCollator, get_interventions
from peft_reft.context.notices import UNLABELLED_TRAINING
from peft_reft.context.training import NOTHING_EDITED
from peft_reft.tuner.injection import state_of

CHAT = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
STEPS = 4


@pytest.fixture(scope="module")
def tokenizer():
    words = {"<pad>": PAD, "<eos>": EOS, "<unk>": 2, **{f"w{i}": i for i in range(3, 90)}, "user": 90, "assistant": 91}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def text(draw, size):
    return " ".join(f"w{int(number)}" for number in torch.randint(3, 90, (size,), generator=draw))


def completions(kind="plain", rows=16):
    """Prompt/completion examples of many lengths, prompts of one token included."""
    draw = torch.Generator().manual_seed(1)
    data = []
    for row in range(rows):
        prompt, completion = text(draw, 1 + row % 6), text(draw, 2 + row % 4)
        if kind == "conversational":
            data.append(
                {
                    "prompt": [{"role": "user", "content": prompt}],
                    "completion": [{"role": "assistant", "content": completion}],
                }
            )
        else:
            data.append({"prompt": prompt, "completion": " " + completion})
    return Dataset.from_list(data)


CONFIG = {"task_type": "CAUSAL_LM", "positions": "f2+l2"}


def trainer(tokenizer, tmp_path, data=None, ready=False, collator=False, config=None, trainer_kwargs=None, **settings):
    config = config or ReftConfig(**CONFIG)
    settings = {"max_length": 64, **settings}
    args = SFTConfig(
        output_dir=str(tmp_path / "trainer"),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
        **settings,
    )
    model = tiny_model("llama")
    if ready:
        transformers.set_seed(args.seed)
        model = get_peft_model(model, config)
    made = SFTTrainer(
        model=model,
        args=args,
        train_dataset=completions() if data is None else data,
        eval_dataset=completions() if data is None else data,
        processing_class=tokenizer,
        peft_config=None if ready else config,
        **(trainer_kwargs or {}),
    )
    if collator:
        made.data_collator = ReftDataCollator(made.data_collator, config)
    return made


def run(*args, **kwargs):
    """Losses of training, the loss of an evaluation, and the trained weights."""
    made = trainer(*args, **kwargs)
    made.train()
    evaluation = made.evaluate()["eval_loss"]
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert len(losses) == STEPS
    weights = torch.cat([p.detach().flatten() for p in made.model.parameters() if p.requires_grad])
    return losses, evaluation, weights


def assert_same_run(got, expected):
    torch.testing.assert_close(torch.tensor(got[0]), torch.tensor(expected[0]), rtol=1e-4, atol=1e-4)
    assert got[1] == pytest.approx(expected[1], rel=1e-4)
    torch.testing.assert_close(got[2], expected[2], rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def plain_run(tokenizer, tmp_path_factory):
    return run(tokenizer, tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize(
    "settings",
    [
        {"ready": True},
        {"collator": True},
        {"ready": True, "collator": True},
        {"gradient_checkpointing": False},
        {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"padding_free": True, "max_length": None},
        {"padding_free": True, "max_length": None, "collator": True},
        {"dataloader_num_workers": 1, "collator": True},
    ],
    ids=str,
)
def test_every_way_of_running_it_trains_the_same(settings, tokenizer, tmp_path, plain_run):
    assert_same_run(run(tokenizer, tmp_path, **settings), plain_run)


def test_other_positions_train_something_else(tokenizer, tmp_path, plain_run):
    other = run(tokenizer, tmp_path, config=ReftConfig(task_type="CAUSAL_LM", positions="f2+l1"))
    assert (other[2] - plain_run[2]).abs().max() > 1e-3


def test_training_equals_a_plain_loop(tokenizer, tmp_path, plain_run):
    made = trainer(tokenizer, tmp_path, ready=True, gradient_checkpointing=False)
    model = made.model
    batches = list(made.get_train_dataloader())[:STEPS]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    losses = []
    for step, inputs in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / STEPS)  # the trainer's linear schedule
        optimizer.zero_grad()
        loss = model.train()(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(plain_run[0], rel=1e-3)


def test_conversational_data_trains_and_generates(tokenizer, tmp_path):
    made = trainer(tokenizer, tmp_path, data=completions("conversational"))
    by_labels = run(tokenizer, tmp_path, data=completions("conversational"))
    by_locations = run(tokenizer, tmp_path, data=completions("conversational"), collator=True)
    assert_same_run(by_locations, by_labels)
    made.train()
    changed = [p.detach().abs().max() for p in made.model.parameters() if p.requires_grad]
    assert max(changed) > 0
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "w5 w6"}], add_generation_prompt=True, tokenize=False
    )
    made.model.eval()
    assert made.model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=3).shape[1] > 3


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_packed_rows_train(strategy, tokenizer, tmp_path):
    losses, evaluation, _ = run(tokenizer, tmp_path, packing=True, packing_strategy=strategy, max_length=16)
    assert all(map(torch.isfinite, map(torch.tensor, [*losses, evaluation])))


def test_packed_rows_edit_each_document_as_the_unpacked_ones(tokenizer, tmp_path):
    packed = trainer(tokenizer, tmp_path, ready=True, packing=True, max_length=24)
    single = trainer(tokenizer, tmp_path, ready=True)
    interventions = get_interventions(packed.model)
    for module, other in zip(interventions.values(), get_interventions(single.model).values()):
        for p, q in zip(module.parameters(), other.parameters()):
            p.data.normal_(0, 0.5)
            q.data.copy_(p.data)
    assert packed.train_dataset.num_rows < single.train_dataset.num_rows
    totals = []
    for made in (packed, single):
        made.model.eval()
        total = count = 0.0
        for inputs in torch.utils.data.DataLoader(made.train_dataset, batch_size=2, collate_fn=made.data_collator):
            with torch.no_grad():
                loss = made.model(**inputs, use_cache=False).loss
            tokens = int((inputs["labels"][:, 1:] != -100).sum())
            total, count = total + float(loss) * tokens, count + tokens
        totals.append((total / count, count))
    assert totals[0][1] == totals[1][1]
    assert totals[0][0] == pytest.approx(totals[1][0], rel=1e-4)
    with single.model.disable_adapter(), torch.no_grad():
        inputs = single.data_collator([single.train_dataset[i] for i in range(4)])
        base = single.model(**inputs).loss
    assert abs(float(base) - float(single.model(**inputs).loss)) > 1e-2


def own_loss(outputs, labels, num_items_in_batch=None):
    return torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


DROP_LABELS = {
    "label smoothing": {"label_smoothing_factor": 0.1},
    "compute_loss_func": {"trainer_kwargs": {"compute_loss_func": own_loss}},
}


@pytest.mark.parametrize("how", DROP_LABELS)
def test_where_labels_are_taken_away_the_collators_locations_arrive(how, tokenizer, tmp_path):
    made = trainer(tokenizer, tmp_path, ready=True, collator=True, **DROP_LABELS[how])
    seen = []
    made.model.get_base_model().model.register_forward_pre_hook(
        lambda module, args: seen.append(state_of(made.model).running.context.locations)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        made.train()
    assert seen and all(locations is not None for locations in seen)


@pytest.mark.parametrize("how", DROP_LABELS)
def test_a_training_forward_without_labels_or_locations_warns_once_and_names_the_collator(how, tokenizer, tmp_path):
    made = trainer(tokenizer, tmp_path, **DROP_LABELS[how])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made.train()
    messages = [str(warning.message) for warning in caught if str(warning.message) == UNLABELLED_TRAINING]
    assert len(messages) == 1
    assert "ReftDataCollator" in messages[0]


@pytest.mark.parametrize("collator", [False, True])
def test_an_evaluation_with_metrics_gets_the_logits_of_the_labelled_forward_with_the_collator_and_is_told_without(
    collator, tokenizer, tmp_path
):
    def metrics(prediction):
        logits, labels = torch.tensor(prediction.predictions), torch.tensor(prediction.label_ids)
        flat = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum", ignore_index=-100
        )
        return {"from_logits": float(flat / (labels[:, 1:] != -100).sum())}

    made = trainer(
        tokenizer,
        tmp_path,
        ready=True,
        collator=collator,
        trainer_kwargs={"compute_metrics": metrics},
        eval_strategy="no",
    )
    for interventions in get_interventions(made.model).values():
        for parameter in interventions.parameters():
            parameter.data.normal_(0, 0.5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = made.evaluate()
    told = [str(warning.message) for warning in caught if "In evaluation a ReFT model" in str(warning.message)]
    assert len(told) == (0 if collator else 1)  # TRL takes the labels out of a second forward, which gives the logits
    by_batch = []
    made.model.eval()
    for inputs in made.get_eval_dataloader():
        with torch.no_grad():
            tokens = int((inputs["labels"][:, 1:] != -100).sum())
            by_batch.append((float(made.model(**inputs).loss) * tokens, tokens))
    labelled = sum(loss for loss, _ in by_batch) / sum(tokens for _, tokens in by_batch)
    assert (result["eval_from_logits"] == pytest.approx(labelled, rel=1e-4)) is collator


def test_a_bare_forward_after_a_labelled_one_edits_the_whole_row():
    from conftest import batch, logits, reft_model

    model = reft_model(tiny_model("llama"), **CONFIG)
    inputs = batch(9, 6)
    labels = torch.where(torch.arange(9) < 3, -100, inputs["input_ids"])
    alone = logits(model, inputs)
    labelled = logits(model, inputs, labels=labels)
    torch.testing.assert_close(logits(model, inputs), alone)
    assert (alone - labelled).abs().max() > 1e-3


def test_a_run_in_which_nothing_is_edited_says_so(tokenizer, tmp_path):
    config = ReftConfig(task_type="CAUSAL_LM", positions="e50")
    with pytest.warns(UserWarning, match="edited no token at all") as caught:
        trainer(tokenizer, tmp_path, config=config).train()
    assert [str(warning.message) for warning in caught].count(NOTHING_EDITED) == 1


def test_a_run_that_edits_says_nothing(tokenizer, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tokenizer, tmp_path).train()
    assert not [w for w in caught if "ReFT" in str(w.message)]


def test_a_saved_run_is_loaded_and_resumed(tokenizer, tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    whole = run(tokenizer, tmp_path / "whole")
    made = trainer(tokenizer, tmp_path / "parts")
    made.args.save_strategy, made.args.save_steps = "steps", 2
    made.train()
    again = trainer(tokenizer, tmp_path / "parts")
    again.train(resume_from_checkpoint=str(tmp_path / "parts" / "trainer" / "checkpoint-2"))
    weights = torch.cat([p.detach().flatten() for p in again.model.parameters() if p.requires_grad])
    torch.testing.assert_close(weights, whole[2], rtol=0, atol=0)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "parts" / "trainer" / "checkpoint-4")
    found = torch.cat([p.flatten() for i in get_interventions(loaded).values() for p in i.parameters()])
    expected = torch.cat(
        [p.detach().flatten() for i in get_interventions(again.model).values() for p in i.parameters()]
    )
    assert torch.equal(found, expected)
