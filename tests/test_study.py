"""The machinery of benchmarks/study: splits without leaks, methods that train what they should, resuming, a report."""

import json
import pathlib
import random
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from benchmarks.study import (
    causal,
    cells,
    edits,
    encoder,
    grid,
    instructions,
    memory,
    methods,
    report,
    run,
    styles,
    task,
)
from benchmarks.study.methods import Method
from benchmarks.study.store import Store

TASK = task.load(0, (4, 2, 3))


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory):
    """A BERT with random weights and a tokenizer of the task's words, in a folder."""
    path = tmp_path_factory.mktemp("bert")
    words = sorted({word for example in TASK.train for word in task.normalized(example.text).split()})
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(vocabulary), **sizes)).save_pretrained(path)
    return path


# The data.


@pytest.mark.parametrize("split", [0, 1])
def test_no_file_and_no_text_is_in_two_splits(split):
    loaded = task.load(split)
    parts = [loaded.train, loaded.validation, loaded.test]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert not {e.file for e in parts[first]} & {e.file for e in parts[second]}
        texts = [{task.normalized(e.text) for e in parts[i]} for i in (first, second)]
        assert not texts[0] & texts[1]
    for part in parts:
        assert {e.label for e in part} == set(range(len(task.FAMILIES)))
        assert len({task.normalized(e.text) for e in part}) == len(part)


def test_splits_differ_and_are_the_same_each_time():
    assert task.load(0).fingerprint == task.load(0).fingerprint != task.load(1).fingerprint


def test_a_text_of_two_files_is_left_out_of_both(monkeypatch):
    same = "Return the number of messages in the box."
    other = "Close the connection and forget everything about it."
    library = {"email/a.py": [same, other], "asyncio/b.py": [same.upper().replace(" ", "\n")]}
    monkeypatch.setattr(task, "library", lambda: library)
    kept = [example.text for examples in task.labelled().values() for example in examples]
    assert kept == [other]


def test_few_tests_have_a_twin_in_training():
    """Splitting by file would be worth little if other files had almost the same texts."""
    loaded = task.load(0)
    train = [set(task.normalized(e.text).split()) for e in loaded.train]
    words = [set(task.normalized(e.text).split()) for e in loaded.test]
    twins = sum(any(len(w & t) >= 0.7 * len(w | t) for t in train) for w in words)
    assert twins <= 0.02 * len(words)


# The methods.

ONE_OF_EACH = {
    "reft": Method("reft", {"r": 2, "positions": "f1"}),
    "lora": Method("lora", {"r": 2, "target_modules": ["query", "value"]}),
    "ia3": Method("ia3"),
    "bitfit": Method("bitfit"),
    "head": Method("head"),
    "full": Method("full"),
}
# Of the tiny BERT: per block 2rd + r; two matrices of r (d + d); three vectors of d, and d_ff for the last; all biases.
PARAMETERS = {"reft": 2 * (2 * 2 * 16 + 2), "lora": 2 * 2 * 2 * 32, "ia3": 2 * (3 * 16 + 32), "head": 0}


@pytest.mark.parametrize("kind", methods.KINDS)
def test_a_cell_of_each_method(tiny_bert, kind):
    result = encoder.run(TASK, ONE_OF_EACH[kind], 1e-2, 0, ("validation", "test"), epochs=1, every=2, path=tiny_bert)
    assert 0 <= result["test"] <= 1
    assert [step for step, _ in result["curve"]] == [0, 2, 3]
    assert result["with_head"] - result["parameters"] == 16 * 10 + 10  # the same head for all
    assert result["parameters"] == PARAMETERS.get(kind, result["parameters"])
    if kind == "bitfit":
        assert 0 < result["parameters"] < result["with_head"] < 1000
    if kind == "full":
        assert result["parameters"] > 5000


@pytest.mark.parametrize("kind", methods.KINDS)
def test_training_moves_what_is_counted_and_nothing_else(tiny_bert, kind):
    model = ONE_OF_EACH[kind].apply(encoder.base_model(tiny_bert, 10, 0).requires_grad_(False), "SEQ_CLS", 0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    encoder.train(model, TASK, tiny_bert, 1e-2, 0, 1)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    counted = methods.trainable(model)
    assert moved <= set(counted)
    assert any(methods.in_head(name) for name in moved)
    if kind != "head":
        assert any(not methods.in_head(name) for name in moved)


def test_all_methods_start_from_the_same_head_and_weights(tiny_bert):
    batch = next(encoder.batches(tiny_bert, TASK.test, 8, None))
    outputs = []
    for kind in methods.KINDS:
        model = ONE_OF_EACH[kind].apply(encoder.base_model(tiny_bert, 10, 3).requires_grad_(False), "SEQ_CLS", 3)
        outputs.append(model.eval()(**batch).logits)
    other = encoder.base_model(tiny_bert, 10, 4).eval()(**batch).logits
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0])
    assert not torch.allclose(other, outputs[0])


def test_batches_hold_every_text_once(tiny_bert):
    shuffled = list(encoder.batches(tiny_bert, TASK.train, 16, random.Random(0)))
    plain = list(encoder.batches(tiny_bert, TASK.train, 16, None))
    rows = [sorted(str(row[row != 0].tolist()) for b in found for row in b["input_ids"]) for found in (shuffled, plain)]
    assert rows[0] == rows[1] and len(rows[0]) == len(TASK.train)


def test_where_edits_act(tiny_bert):
    first = edits.run(TASK, grid.reft("loreft", 2, "f1"), 1e-2, 0, 1, path=tiny_bert)
    assert [len(row) for row in first["relative"]] == [9, 9]
    assert first["places"][0] == "f1" and first["places"][-1] == "l1" and first["texts"] > 0
    for row in first["relative"]:
        assert row[0] > 0 and not any(row[1:])  # f1 edits the first token, and no other
    last = edits.run(TASK, grid.reft("loreft", 2, "l2"), 1e-2, 0, 1, path=tiny_bert)
    assert not any(last["relative"][0][:-2]) and all(last["relative"][0][-2:])
    assert not any(last["relative"][1])  # behind the last block nothing reads these tokens, so that it learns nothing


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match=r"kind='dora'.*lora"):
        Method("dora")


def test_the_pretrained_encoder():
    try:
        path = encoder.model_path()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    small = task.load(0, (2, 1, 1))
    result = encoder.run(small, grid.MAIN["LoReFT r4 f1"], 1e-2, 0, epochs=1)
    assert path.is_dir() and result["parameters"] == 6 * (2 * 4 * 384 + 4)


# The run.


def fake_run(cell, log):
    log.append(cells.key(cell))
    good = {"LoReFT r4 f1": 1e-2}.get(cell["name"], 1e-3)
    result = {"test": 0.5, "validation": -abs(cell["lr"] - good), "loss": [1.0]}
    return {**cell, "result": {**result, "parameters": 1, "with_head": 2, "seconds": 1.0, "curve": []}}


def run_all(store, log, scale=cells.FULL, seeds=(0,), **options):
    with ThreadPoolExecutor(1) as pool:
        plan = lambda: cells.plan(store, list(seeds), scale, options.pop("topics", cells.TOPICS))  # noqa: E731
        run.run_all(store, plan, lambda cell: fake_run(cell, log), pool, 1, **options)


def test_a_run_resumes_where_it_was_killed(tmp_path):
    log, again = [], []
    run_all(Store(tmp_path, "s"), log)
    assert len(log) == len(set(log)) > 100
    run_all(Store(tmp_path, "s"), again)
    assert again == []
    path = tmp_path / "cells.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-2]) + lines[-2][:20])  # killed while it wrote the last but one
    run_all(Store(tmp_path, "s"), again)
    assert again == [json.loads(line)["key"] for line in lines[-2:]]
    assert path.read_text() == "".join(lines)


def test_cells_of_another_setup_are_kept_and_not_used(tmp_path):
    Store(tmp_path, "old").add("a", {"part": "encoder"})
    store = Store(tmp_path, "new")
    assert store.cells == {} and store.others == 1
    store.add("a", {"part": "encoder"})
    assert list(Store(tmp_path, "old").cells) == list(Store(tmp_path, "new").cells) == ["a"]


def test_time_that_is_over_begins_no_cell(tmp_path):
    log = []
    run_all(Store(tmp_path, "s"), log, until=0)
    assert log == []


def test_the_rate_that_was_best_on_validation_is_taken(tmp_path):
    store, log = Store(tmp_path, "s"), []
    assert not any(cell["part"] in ("encoder", "styles") for cell in cells.plan(store, [0], cells.FULL))
    run_all(store, log)
    rates = {cell["name"]: cell["lr"] for cell in store.of("encoder")}
    assert rates["LoReFT r4 f1"] == 1e-2 and rates["DiReFT r4 f1"] == 1e-3
    assert {cell["seed"] for cell in store.of("encoder tuning")} == {cells.TUNING_SEED}
    order = [key.split("|")[0] for key in log]
    assert order.index("base") < order.index("styles") and order.index("encoder tuning") < order.index("encoder")


def test_seed_after_seed(tmp_path):
    store, log = Store(tmp_path, "s"), []
    run_all(store, log, seeds=(0, 1), scale=cells.QUICK)
    seeds = [key.rsplit("=", 1)[1] for key in log if key.startswith("encoder|")]
    assert seeds == sorted(seeds) and set(seeds) == {"0", "1"}
    assert not any("tuning" in key for key in log)


# The language model.


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return causal.base(TASK, 4, tmp_path_factory.mktemp("cache"))


def test_the_base_saw_no_text_of_test_files_and_is_trained_once(base, monkeypatch):
    train, held_out = causal.texts(TASK)
    assert held_out and not set(train) & set(held_out)
    monkeypatch.setattr(causal, "train_base", None)  # the cache is used, so that it is not called
    assert causal.base(TASK, 4, base.path.parent).record == base.record
    assert [path.name for path in base.path.parent.iterdir()] == [base.path.name]


def test_a_killed_training_of_the_base_leaves_nothing(tmp_path, monkeypatch):
    def train_base(task, steps, folder):
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr(causal, "train_base", train_base)
    with pytest.raises(KeyboardInterrupt):
        causal.base(TASK, 4, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_only_completions_have_labels():
    batch = causal.collate([([5, 6, 7], [8, 1]), ([5], [9, 9, 9, 1])])
    assert batch["labels"].tolist() == [[-100, -100, -100, 8, 1], [-100, 9, 9, 9, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1]]


def test_recited_counts_up_to_the_first_error():
    def model(input_ids, **others):
        guesses = input_ids.roll(-1, 1)  # always right ...
        guesses[1, 2] = 50  # ... but for the second row's second token
        return types.SimpleNamespace(logits=torch.nn.functional.one_hot(guesses, 60))

    model.eval = lambda: None
    assert memory.recited(model, [([5, 6], [7, 8, 9]), ([5, 6], [7, 8, 9])]) == [3, 1]


def test_styles_are_told_apart():
    assert styles.in_style("A b\nC") == {"lines": 0.5, "capitals": 2 / 3}
    assert styles.in_style("") == {"lines": None, "capitals": None}
    pair = styles.pairs(TASK, "train", "both")[0]
    assert styles.in_style(pair.completion) == {"lines": 1.0, "capitals": 1.0}
    assert len(pair.prompt.split()) == styles.PROMPT_WORDS and len(pair.completion.split()) == styles.ANSWER_WORDS


def test_instructions_are_split_by_file():
    loaded = task.load(0)
    train, test = ({pair.prompt for pair in instructions.pairs(loaded, part)} for part in ("train", "test"))
    assert len(train) > 300 and len(test) > 300
    assert len(train & test) <= 0.01 * len(test)  # a sentence may stand in two files


def test_a_cell_of_each_part_with_the_language_model(base, monkeypatch):
    monkeypatch.setattr(styles, "HELD_OUT", 4)
    monkeypatch.setattr(styles, "ANSWER_TOKENS", 8)
    monkeypatch.setattr(styles, "ROWS", 6)
    monkeypatch.setattr(instructions, "PER_SUBJECT", 3)
    monkeypatch.setattr(memory, "LENGTHS", (4,))
    monkeypatch.setattr(memory, "NUMBERS", (2,))
    reft = grid.STYLES["LoReFT r4 f1+l1+d"]
    style = styles.run(TASK, base, reft, 1e-2, 0, 2)
    assert len(style["quarters"]["lines"]) == 4 and style["parameters"] == 4 * (2 * 4 * 128 + 4)
    answer = instructions.run(TASK, base, reft, 1e-2, 0, 2)
    assert 0 <= answer["exact"] <= answer["form"] <= 1
    both = styles.run_composition(TASK, base, reft, 1e-1, 0, 2)
    assert len({json.dumps(both[name]["loss"]) for name in ("base", "lines", "capitals", "lines + capitals")}) == 4
    assert both["rows"]["equal"] == 1
    recital = memory.run(TASK, base, grid.MEMORY["l1, one block, r1"], 1e-2, 0, 2)
    assert recital["parameters"] == 2 * 128 + 1 and set(recital["random"]) == {"4"}
    assert isinstance(causal.finetune(base, reft, styles.pairs(TASK, "train", "lines"), 1e-2, 0, 1)[0], PeftModel)


# The report.


def test_the_report_has_means_spreads_and_paired_differences(tmp_path, base):
    store = Store(tmp_path, "s")
    (tmp_path / "environment.json").write_text(json.dumps(report.common.environment()))
    for seed, (reft, lora, ablated) in enumerate([(0.60, 0.50, 0.55), (0.70, 0.62, 0.67)]):
        common = {
            "parameters": 100,
            "with_head": 110,
            "seconds": 2.0,
            "loss": [1.0] * 10,
            "curve": [[0, 0.1], [5, 0.2]],
        }
        for part, name, value in (
            ("encoder", "LoReFT r4 f1", reft),
            ("encoder", "LoRA r8", lora),
            ("ablation", "rank: 1", ablated),
        ):
            cell = cells.cell_of(part, name, Method("reft"), 3e-3, seed)
            store.add(cells.key(cell), {**cell, "result": {**common, "test": value}})
    text = report.write(store, tmp_path, 0).read_text()
    assert "| LoReFT r4 f1 | 100 | 110 | 65.0 ± 7.1 | 9.0 ± 1.4 | 0.003 |" in text
    assert "| rank: 1 | 100 | 61.0 ± 8.5 | -4.0 ± 1.4 | 2 |" in text
    assert {path.name for path in tmp_path.glob("*.png")} == {"accuracy.png", "curves.png", "ablations.png"}
