"""The paper's experiments: answers are read right, recipes have the paper's numbers, and each runs from end to end.

The runs are smoke runs: tiny models with random weights, and data of the same formats that were written for it.
"""

from __future__ import annotations

import doctest
import functools
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import PartialState
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from trl import SFTConfig, SFTTrainer

from peft_reft import ReftDataCollator

PAPER = Path(__file__).parents[1] / "examples" / "paper"


def paper_modules() -> dict[str, object]:
    """The modules of examples/paper, imported as by run.py, without taking their names away from other examples."""
    names = [file.stem for file in sorted(PAPER.glob("*.py"))]
    others = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(PAPER))
    try:
        return {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(PAPER))
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(others)


modules = paper_modules()
answers, classifying, generating, methods = (modules[n] for n in ("answers", "classifying", "generating", "methods"))
prompts, recipe, report, run = (modules[name] for name in ("prompts", "recipe", "report", "run"))
scores, sources, tiny = (modules[name] for name in ("scores", "sources", "tiny"))

RECIPES = ("commonsense", "arithmetic", "instruct", "instruct_1k", "glue_base", "glue_large")
GLUE = ["mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb"]


@functools.cache
def load(name: str):
    return recipe.load(PAPER / f"{name}.yaml")


# Answers.

NUMBERS = {
    # text: by the paper's rule, by the careful one
    "The answer is 18.": (18, 18),
    "He pays $1,200.50. The answer is $1,200.50.": (1200.5, 1200.5),
    "The answer is -20": (-20, -20),
    "It fell to \u22127": (7, -7),
    "5-3": (-3, 3),
    "5 - 3 = 2": (2, 2),
    "a fraction of 3/4": (4, 0.75),
    "The answer is 1 1/2 cups.": (2, 1.5),
    r"\frac{3}{4}": (4, 0.75),
    "that makes 25%": (25, 25),
    "The answer is .5": (5, 0.5),
    "1e3": (3, 1000),
    "The answer is 12 apples for 3 people.": (3, 12),
    "The answer is 3 + 4 = 7. That took 2 steps.": (2, 7),
    "one of 1,2,3": (123, 3),
    "#### 1,000": (1000, 1000),
    "The answer is 5. The answer is 5. The answer is": (5, 5),
    "The answer is 5. The answer is 6.": (6, 6),
    "The answer is 4.5": (4.5, 4.5),
    "Let x2 be what x1 was. 3 of them": (3, 3),
    "-$5": (5, -5),
    "The answer is $9 500. That took 2 steps.": (2, 9500),
    "Of 9 500 is the last": (500, 500),
    "3/0": (0, None),
    "I do not know": (None, None),
    "": (None, None),
}


@pytest.mark.parametrize("text", NUMBERS)
def test_numbers_are_read(text):
    assert (answers.paper_number(text), answers.careful_number(text)) == NUMBERS[text]


AQUA = "What? Answer Choices: (A) 450 gms (B) 100 gms (C) 252 gms (D) 1,240 gms (E) None of these"
LETTERS = {
    "The answer is (C).": ("C", "C"),
    "C": ("C", "C"),
    " c) 252 gms": ("", "C"),
    "After that it is clear. The answer is (C).": ("A", "C"),
    "A train takes 5 hours": ("A", None),
    "The answer is a train": ("", None),
    "The answer is B because it is lighter": ("B", "B"),
    "The answer is option d": ("", "D"),
    "252 gms": ("", "C"),
    "The answer is 1,240.": ("", "D"),
    "none of these": ("", "E"),
    "The answer is (A). The answer is (B).": ("A", "B"),
    "not (A) but (D)": ("A", "D"),
    "The answer is (C": ("C", "C"),
    "The answer is": ("", None),
    "Each weighs 7": ("E", None),
    "": ("", None),
}


@pytest.mark.parametrize("text", LETTERS)
def test_letters_are_read(text):
    assert (answers.paper_letter(text), answers.careful_letter(text, AQUA)) == LETTERS[text]


PIQA = "Choose: x\n\nSolution1: Use a tin can.\n\nSolution2: Use a bag, tied.\n\nAnswer format: solution1/solution2"
OPTIONS = {
    "the correct answer is solution2": ("solution2", "solution2"),
    " the correct answer is solution2 ": ("solution2", "solution2"),
    "The correct answer is: Solution2.": ("", "solution2"),
    "the correct answer is SOLUTION2": ("SOLUTION2", "solution2"),
    "solution1": ("", "solution1"),
    "the correct answer is solution2 the correct answer is solution1": (
        "solution2 the correct answer is solution1",
        "solution2",
    ),
    "the correct answer is Use a bag, tied": ("Use a bag, tied", "solution2"),
    "the correct answer is solution12": ("solution12", None),
    "the correct answer is solut": ("solut", None),
    "the correct answer is solution3": ("solution3", None),
    "the correct answer is": ("", None),
    "": ("", None),
}


@pytest.mark.parametrize("text", OPTIONS)
def test_options_are_read(text):
    assert (answers.paper_option(text), answers.careful_option(text, PIQA)) == OPTIONS[text]


@pytest.mark.parametrize(
    "gold, text, paper, careful",
    [
        ("7.0", "The answer is 7.", True, True),
        (22.0, "22", True, True),
        (["4.5"], "The answer is 4.5 liters.", True, True),
        ("4.5", "The answer is 4.5009", True, True),
        ("4.5", "The answer is 4.51", False, False),
        ("so 9 + 9 = 18\n#### 1,018", "1018", True, True),
        ("C", "After all, (C)", False, True),
        ("true", "the correct answer is True", False, True),
        ("true", "the correct answer is true", True, True),
        ("false", "the correct answer is true", False, False),
        ("12", "", False, False),
    ],
)
def test_judging_goes_by_the_kind_of_the_right_answer(gold, text, paper, careful):
    row = {"answer": gold, "instruction": "... Answer format: true/false" if gold in ("true", "false") else AQUA}
    verdict = answers.judge(text, row)
    assert (verdict["paper"], verdict["careful"]) == (paper, careful)


def test_the_examples_in_the_docstrings_hold():
    failed, tried = doctest.testmod(answers)
    assert tried == 3 and not failed


def test_a_row_with_two_right_answers_is_refused():
    with pytest.raises(ValueError, match=r"answer=\['A', 'B'\] .*exactly one"):
        answers.judge("A", {"answer": ["A", "B"]})


def test_a_task_is_scored_by_the_answers_to_its_rows(tmp_path):
    rows = json.loads((PAPER / "smoke" / "gsm8k.json").read_text(encoding="utf-8"))
    result = generating.score(
        rows, ["6 * 200 = 1,200. The answer is 1200.", "11. The answer is 17."], tmp_path / "x.jsonl"
    )
    assert result == {"score": 0.5, "careful": 0.5, "rows": 2, "too_long": 0}
    written = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["read"]["careful"] for line in written] == [1200, 17]
    assert [line["gold"] for line in written] == [1200, 18]


# Metrics.


def test_metrics_are_those_of_their_definitions():
    predicted, right = [1, 1, 1, 0, 0, 1], [1, 1, 0, 0, 1, 1]  # 3 true, 1 false positive; 1 false, 1 true negative
    assert scores.accuracy(predicted, right) == pytest.approx(4 / 6)
    assert scores.f1(predicted, right) == pytest.approx(6 / 8)
    assert scores.matthews(predicted, right) == pytest.approx((3 * 1 - 1 * 1) / (4 * 4 * 2 * 2) ** 0.5)
    assert scores.matthews([1, 1, 1], [1, 0, 1]) == 0
    assert scores.pearson([1, 2, 3], [2, 4, 7]) == pytest.approx(5 / (2 * 38 / 3) ** 0.5)
    assert scores.pearson([1, 2, 3], [-1, -2, -3]) == pytest.approx(-1)
    assert scores.spearman([1, 10, 100], [1, 2, 3]) == pytest.approx(1)
    assert scores.spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(0.75**0.5)  # ranks 1.5, 1.5, 3


def test_the_paper_s_metric_comes_first():
    main = {task: next(iter(scores.glue_scores(task, [0, 1], [0, 1]))) for task in GLUE}
    assert main == {**dict.fromkeys(GLUE, "accuracy"), "cola": "matthews", "stsb": "pearson"}
    assert all(scores.main_metric(task) == name for task, name in main.items())
    assert set(scores.glue_scores("qqp", [0, 1], [0, 1])) == {"accuracy", "f1"}
    with pytest.raises(ValueError, match="'wnli' is not in GLUE as the paper uses it"):
        scores.glue_scores("wnli", [0], [0])


@pytest.mark.parametrize("size, selected", [(10, 5), (277, 138), (5000, 2500), (5001, 1000), (9815, 1000)])
def test_a_validation_set_is_split_by_the_seed(size, selected):
    selection, held_out = scores.halves(size, 42)
    assert len(selection) == selected
    assert sorted(selection + held_out) == list(range(size))
    assert scores.halves(size, 42) == (selection, held_out) != scores.halves(size, 43)


# Recipes.

LLAMA = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
LLAMA = transformers.LlamaConfig(**LLAMA, num_attention_heads=32)
ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
BASE = transformers.RobertaConfig(**ROBERTA)
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
LARGE = transformers.RobertaConfig(**ROBERTA, **LARGE)


@pytest.mark.parametrize(
    "name, config, task, percents",
    [
        ("commonsense", LLAMA, None, {"loreft": 0.031, "direft": 0.031}),
        ("arithmetic", LLAMA, None, {"loreft": 0.031, "direft": 0.031}),
        ("instruct", LLAMA, None, {"loreft": 0.0039, "loreft_half": 0.0019, "direft": 0.0039, "lora": 0.1245}),
        ("glue_base", BASE, "qqp", {"loreft": 0.015, "direft": 0.015}),
        ("glue_large", LARGE, "qqp", {"loreft": 0.014, "direft": 0.014}),
    ],
)
def test_parameters_are_the_paper_s_share(name, config, task, percents):
    for method, percent in percents.items():
        assert load(name)["published"][method]["percent"] == percent
        counted = methods.count(recipe.resolve(load(name), method, task), config)["percent"]
        assert round(counted, len(str(percent).split(".")[1])) == percent


@pytest.mark.parametrize("method, percent", [("lora", 0.826), ("dora", 0.838)])
def test_baselines_have_the_quoted_share_of_all_parameters(method, percent):
    counted = methods.count(recipe.resolve(load("commonsense"), method), LLAMA)
    assert round(100 * counted["trainable"] / (counted["base"] + counted["trainable"]), 3) == percent


def test_glue_settings_are_those_of_the_paper_s_tables():
    def column(name, method, key):
        resolved = [recipe.resolve(load(name), method, task) for task in GLUE]
        return [settings["adapter"].get(key, settings["training"].get(key)) for settings in resolved]

    assert column("glue_base", "loreft", "positions") == ["f1", "f3", "f3", "f3", "f11", "f11", "f3", "f3"]
    assert column("glue_base", "loreft", "learning_rate") == [6e-4, 6e-4, 3e-4, 4e-4, 9e-4, 6e-4, 9e-4, 6e-4]
    assert column("glue_base", "loreft", "warmup_steps") == [0.06, 0.1, 0, 0.005, 0.1, 0, 0, 0.03]
    assert column("glue_large", "loreft", "dropout") == [0.05, 0.05, 0.2, 0.2, 0.05, 0.05, 0.05, 0.05]
    assert column("glue_large", "loreft", "num_train_epochs") == [20, 20, 30, 30, 20, 20, 30, 30]
    assert column("glue_base", "direft", "weight_decay") == [0, 0, 0, 0.04, 0, 0, 0.04, 0]
    assert column("glue_base", "direft", "per_device_train_batch_size") == [32] * 6 + [8, 32]
    assert column("glue_large", "direft", "positions") == ["f1", "f3", "f1", "f1", "f11", "f7", "f3", "f3"]
    assert column("glue_large", "direft", "learning_rate") == [6e-4, 6e-4, 9e-4, 9e-4, 9e-4, 9e-4, 6e-4, 8e-4]


@pytest.mark.parametrize("name", RECIPES)
def test_every_method_of_a_recipe_builds(name):
    found = load(name)
    assert {"loreft", "direft", "lora", "dora", "ia3", "full"} <= set(found["methods"])
    for method in found["methods"]:
        for task in GLUE if name.startswith("glue") else [None]:
            settings = recipe.resolve(found, method, task)
            config = methods.adapter_config(settings)
            assert (config is None) == (method == "full")
            assert isinstance(settings["training"]["learning_rate"], float)


def test_settings_are_laid_over_each_other_and_overridden():
    settings = recipe.resolve(
        load("glue_base"), "direft", "rte", True, "some/model", ["training.learning_rate=1e-3", "adapter.r=2"]
    )
    assert settings["model"] == "some/model"
    assert settings["training"]["learning_rate"] == 1e-3
    assert settings["training"]["weight_decay"] == 0.04  # of the task
    assert settings["training"]["num_train_epochs"] == 2  # of the smoke section
    assert (settings["adapter"]["r"], settings["adapter"]["positions"]) == (2, "f1")


def test_a_recipe_may_extend_another():
    shared, extended = load("instruct"), load("instruct_1k")
    assert extended["train"] == {**shared["train"], "max_examples": 1000}
    assert extended["methods"] == shared["methods"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["commonsense.yaml", "adapter.rank=3"], "'rank' is not a setting of a REFT adapter"),
        (["commonsense.yaml", "training.learning_rat=1"], "did you mean learning_rate"),
        (["commonsense.yaml", "r=3"], "'r' is not a setting of a recipe"),
        (["commonsense.yaml", "training.learning_rate"], "write key=value"),
        (["commonsense.yaml", "evaluation.generation.num_beam=2"], "'num_beam' is not .* did you mean num_beams"),
        (["commonsense.yaml", "evaluation.tasks.boolq.dat=x.json"], "'dat' is not a setting of evaluation.tasks.boolq"),
        (["commonsense.yaml", "evaluation.tasks.mine.split=test"], "evaluation.tasks.mine has no data"),
        (
            ["glue_base.yaml", "train.data=x.csv", "--tasks", "cola,rte"],
            "train.data='x.csv' is for one task, not cola, rte",
        ),
        (
            ["glue_base.yaml", "--model", "TINY", "evaluation.tasks.rte.data=x.csv", "--tasks", "rte"],
            "x.csv' is one file, to evaluate by. .* evaluation.tasks.rte.train=",
        ),
        (["commonsense.yaml", "--method", "bitfit"], "--method bitfit: commonsense has loreft, direft, lora"),
        (["commonsense.yaml", "--tasks", "boolq,cola"], "--tasks boolq,cola: commonsense has boolq, piqa"),
        (["commonsense.yaml", "--seed", "x"], "--seed x must be a number, or all"),
        (["other.yaml"], "There is no recipe .*arithmetic.yaml, commonsense.yaml"),
        (["commonsense.yaml", "--smoke", "train.data=nowhere.json"], "The data 'nowhere.json' cannot be loaded"),
        (["commonsense.yaml", "--model", "./nowhere"], r"The model './nowhere' cannot be loaded .*--model"),
    ],
)
def test_a_wrong_call_is_explained_in_one_line(arguments, message, tmp_path, capsys):
    name, *rest = arguments
    if "TINY" in rest:
        tiny.save_tiny(tmp_path / "tiny", "glue", load(name.removesuffix(".yaml"))["smoke"]["model"], ["a text"])
        rest[rest.index("TINY")] = str(tmp_path / "tiny")
    assert run.main([str(PAPER / name), *rest, "--output", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert re.search(message, lines[-1])


# Positions.


@pytest.mark.parametrize("name", ["commonsense", "arithmetic", "instruct"])
def test_the_edited_positions_are_the_ends_of_the_prompt(name, tmp_path):
    settings = recipe.resolve(load(name), "loreft", smoke=True)
    folder = tiny.save_tiny(tmp_path / "tiny", "causal", settings["model"], generating.texts(settings))
    tokenizer = methods.load_tokenizer({"model": folder})
    examples = generating.examples(settings, 42)
    config = methods.adapter_config(settings)
    trainer = SFTTrainer(
        model=methods.load_model({**settings, "model": folder}),
        args=SFTConfig(str(tmp_path), use_cpu=True, bf16=False, max_length=512, report_to="none"),
        train_dataset=examples,
        processing_class=tokenizer,
        peft_config=config,
    )
    first, last = (int(term[1:]) for term in config.positions.split("+"))
    for example, row in zip(examples, trainer.train_dataset, strict=True):
        prompt = tokenizer(example["prompt"])["input_ids"]
        assert row["input_ids"][: len(prompt)] == prompt  # as it will be in generation
        assert row["input_ids"][-1] == tokenizer.eos_token_id
        batch = ReftDataCollator(trainer.data_collator, config)([row])
        edited = sorted(set(batch["intervention_locations"].flatten().tolist()) - {-1})
        assert edited == [*range(first), *range(len(prompt) - last, len(prompt))]


def test_prompts_have_the_original_formats():
    row = {"instruction": " Is ice cold? \n\nAnswer format: true/false ", "answer": "true", "output": "x"}
    assert prompts.commonsense(row) == (
        "Is ice cold? \n\nAnswer format: true/false\n",
        "the correct answer is true",
    )
    prompt, completion = prompts.instruct({"instruction": "Rewrite.", "input": "He walks.", "output": "He walked."})
    assert prompt.endswith("### Instruction:\nRewrite.\n\n### Input:\nHe walks.\n\n### Response:\n")
    assert "further context" in prompt and completion == "He walked."
    prompt, _ = prompts.arithmetic({"instruction": "1 + 1?", "input": "", "output": "2"})
    assert "Input" not in prompt and prompt.endswith("### Instruction:\n1 + 1?\n\n### Response:\n")
    raw = {
        "instruction": "Hi",
        "completions": [{"response": "a", "overall_score": "3"}, {"response": "b", "overall_score": 8.5}],
    }
    assert prompts.instruct(raw)[1] == "b"
    raw["completions"][0] |= {"fine-grained_score": 4.25}
    raw["completions"][1] |= {"fine-grained_score": 1.5, "overall_score": 10.0}  # the known fault of that score
    assert prompts.instruct(raw)[1] == "a"
    assert prompts.instruct({"instruction": "Hi", "completions": []})[1] == ""
    assert prompts.commonsense({"instruction": "Hi", "answer": None})[1] == ""


# Data.


def in_file(folder: Path, rows: list[dict], kind: str = ".json") -> str:
    """The file that `rows` are written to."""
    file = folder / f"data{len(list(folder.iterdir()))}{kind}"
    if kind == ".jsonl":
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif kind == ".json":
        file.write_text(json.dumps(rows, indent=4), encoding="utf-8")
    else:
        data = Dataset.from_list(rows)
        data.to_csv(file, index=False) if kind == ".csv" else data.to_parquet(file)
    return str(file)


@pytest.mark.parametrize("kind", [".json", ".jsonl", ".csv", ".parquet"])
def test_files_of_every_kind_have_the_same_rows(kind, tmp_path):
    texts = ["null", "NA", 'Say "hi", twice', "Ünïcödé ☕ 日本", " space "]
    rows = [{"sentence": text, "label": number % 2, "idx": number} for number, text in enumerate(texts)]
    found = classifying.labelled({"data": in_file(tmp_path, rows, kind)}, "cola", 0, "train")
    assert found.to_list() == rows


@pytest.mark.parametrize(
    "task, row, message",
    [
        ("rte", {"label": -1}, "Row 1 .*label=-1; in rte a label is a whole number from 0 to 1"),  # GLUE's test splits
        ("rte", {"label": None}, "Row 1 .*label=None"),
        ("rte", {"label": 2}, "Row 1 .*label=2"),
        ("rte", {"label": "entailment"}, "Row 0 .*label='0'|Row 1 .*label='entailment'"),
        ("stsb", {"label": -1.0}, "Row 1 .*label=-1.0; in stsb a label is a similarity from 0 to 5"),
        ("rte", {"sentence2": None}, "Row 1 .*sentence2=None, which is no text"),
        ("mnli", {}, "2 rows with the columns sentence1, sentence2, label; .*premise, hypothesis, label"),
    ],
)
def test_rows_without_a_label_are_refused(task, row, message, tmp_path):
    good = {"sentence1": "a", "sentence2": "b", "label": 0.5 if task == "stsb" else 0}
    with pytest.raises(recipe.RecipeError, match=message):
        classifying.labelled({"data": in_file(tmp_path, [good, {**good, **row}])}, task, 0, "test")


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"instruction": "1?", "answer": "1"}, {"instruction": "2?", "answer": None}], "Row 1 .*answer=None"),
        ([{"instruction": "1?", "answer": " "}], "Row 0 .*no answer"),
        ([{"instruction": "1?", "answer": ["1", "2"]}], "Row 0 .*exactly one"),
        ([{"instruction": None, "answer": "1"}], "Row 0 .*instruction=None must be a text"),
        ([{"question": "1?", "answer": "1"}], "1 rows with the columns question, answer; .*instruction, answer"),
    ],
)
def test_rows_that_cannot_be_judged_are_refused_before_training(rows, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(generating, "SFTTrainer", None)
    arguments = ["--smoke", "--tasks", "gsm8k", f"evaluation.tasks.gsm8k.data={in_file(tmp_path, rows)}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generating, "texts", lambda settings: ["a text"])
        assert run.main([str(PAPER / "arithmetic.yaml"), *arguments, "--output", str(tmp_path / "out")]) == 2
    assert re.search(message, capsys.readouterr().err.strip().splitlines()[-1])


def test_training_rows_without_a_completion_are_left_out(tmp_path):
    rows = [
        {"instruction": "1?", "output": "1"},
        {"instruction": "2?", "output": None},
        {"instruction": "", "output": "3"},
    ]
    settings = {"prompts": "arithmetic", "train": {"data": in_file(tmp_path, rows)}}
    with pytest.warns(UserWarning, match="2 of 3 training rows lack"):
        (example,) = generating.examples(settings, 0)
    assert example["completion"] == "1"
    settings["train"]["data"] = in_file(tmp_path, rows[1:])
    with pytest.raises(recipe.RecipeError, match=r"No row .* columns instruction, output"):
        generating.examples(settings, 0)


def test_a_validation_set_of_one_row_is_refused(tmp_path, capsys):
    data = in_file(tmp_path, [{"sentence": "a", "label": 1}], ".csv")
    arguments = ["--smoke", "--tasks", "cola", f"evaluation.tasks.cola.data={data}", "--output", str(tmp_path / "out")]
    assert run.main([str(PAPER / "glue_base.yaml"), *arguments]) == 2
    assert "has one row; one to select the epoch by and one to report" in capsys.readouterr().err


# Runs.


def smoke(folder: Path, name: str, *arguments: str) -> list[dict]:
    assert run.main([str(PAPER / f"{name}.yaml"), "--smoke", "--output", str(folder), *arguments]) == 0
    return report.collect(folder)


def test_commonsense_is_learnt_and_answered(tmp_path, capsys):
    """All weights are trained on the test questions, so that right answers show that nothing is lost on the way."""
    settings = ["training.max_steps=60", "training.learning_rate=5e-3", "training.logging_steps=60"]
    (result,) = smoke(tmp_path, "commonsense", "--method", "full", "--seed", "1", *settings)
    scored = {task: entry["score"] for task, entry in result["tasks"].items()}
    assert list(scored) == list(load("commonsense")["evaluation"]["tasks"])
    assert sum(scored.values()) / 8 > 0.6  # guessing among the options would give 0.36
    assert result["parameters"]["percent"] == 100
    assert "| full | tiny llama | 1 | 100.0000 |" in capsys.readouterr().out


def test_a_run_saves_what_it_measured_and_an_adapter_that_gives_the_same_answers(tmp_path):
    settings = ["--tasks", "boolq,piqa", "training.learning_rate=3e-2", "training.max_steps=12"]
    (result,) = smoke(tmp_path, "commonsense", *settings)
    assert result["parameters"]["trainable"] == 2 * (2 * 8 * 64 + 8)
    assert result["training"]["losses"][-1] < result["training"]["losses"][0] - 0.02
    assert result["training"]["seconds"] > 0 and result["memory_bytes"] > 2**20
    folder = tmp_path / "commonsense" / "tiny" / "loreft" / "seed42"
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "tiny-model")
    tokenizer = methods.load_tokenizer({"model": str(folder / "tiny-model")})
    written = [json.loads(line) for line in (folder / "boolq.jsonl").read_text(encoding="utf-8").splitlines()]
    asked = [prompts.commonsense(row)[0] for row in written]

    def outputs(model):
        return generating.generate(model.eval(), tokenizer, result["settings"], asked)

    plain = outputs(base)
    assert outputs(PeftModel.from_pretrained(base, folder / "adapter")) == [row["output"] for row in written]
    assert plain != [row["output"] for row in written]


def test_arithmetic_is_decoded_by_sampling_with_beams(tmp_path, monkeypatch):
    seen = []
    generate = transformers.GenerationMixin.generate

    def spy(self, *args, generation_config=None, **kwargs):
        seen.append(generation_config)
        return generate(self, *args, generation_config=generation_config, **kwargs)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "generate", spy)
    (result,) = smoke(tmp_path, "arithmetic", "evaluation.generation.max_new_tokens=8", "--method", "lora")
    assert set(result["tasks"]) == {"AQuA", "gsm8k", "mawps", "SVAMP"}
    decoding = ("do_sample", "num_beams", "temperature", "top_p", "top_k", "early_stopping")
    assert {tuple(getattr(config, name) for name in decoding) for config in seen} == {(True, 4, 0.3, 0.75, 40, True)}


def test_decoding_is_the_recipe_s_whatever_the_model_brings_along(tmp_path):
    config = {**load("commonsense")["smoke"]["model"], "num_hidden_layers": 1}
    folder = Path(tiny.save_tiny(tmp_path / "tiny", "causal", config, ["one two three"]))
    settings = {"kind": "causal", "model": str(folder)}
    settings["evaluation"] = {"batch_size": 2, "generation": {"max_new_tokens": 12, "do_sample": False}}
    tokenizer = methods.load_tokenizer(settings)

    def answered(model):
        return generating.generate(model.eval(), tokenizer, settings, ["one", "two three"])

    plain = answered(methods.load_model(settings))
    penalised = transformers.GenerationConfig(repetition_penalty=50.0, no_repeat_ngram_size=1, max_length=4)
    penalised.save_pretrained(folder)
    assert answered(methods.load_model(settings)) == plain
    assert answered(transformers.AutoModelForCausalLM.from_pretrained(folder)) != plain


def test_prompts_that_are_too_long_are_never_cut(tmp_path):
    """In training they are left out; in a test they are not asked and count as wrong; both are said."""
    rows = json.loads((PAPER / "smoke" / "gsm8k.json").read_text(encoding="utf-8"))
    data = in_file(tmp_path, [{**rows[0], "instruction": "how many " * 300}, *rows])
    settings = ["--tasks", "gsm8k", "training.max_steps=1", f"train.data={data}", f"evaluation.tasks.gsm8k.data={data}"]
    settings += ["evaluation.generation.num_beams=1", "evaluation.generation.do_sample=false"]
    with pytest.warns(UserWarning, match="1 of 3 prompts have 512 tokens or more: not asked"):
        (result,) = smoke(tmp_path / "out", "arithmetic", *settings)
    assert (result["training"]["examples"], result["training"]["too_long"]) == (2, 1)
    assert (result["tasks"]["gsm8k"]["rows"], result["tasks"]["gsm8k"]["too_long"]) == (3, 1)
    (file,) = tmp_path.rglob("gsm8k.jsonl")
    first, *others = (json.loads(line) for line in file.open(encoding="utf-8"))
    assert (first["output"], first["paper"], first["careful"]) == ("", False, False)
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent / "tiny-model")
    model = PeftModel.from_pretrained(model, file.parent / "adapter").eval()
    tokenizer = methods.load_tokenizer({"model": str(file.parent / "tiny-model")})
    alone = generating.generate(model, tokenizer, result["settings"], [prompts.arithmetic(row)[0] for row in rows])
    assert alone == [row["output"] for row in others] != ["", ""]


@pytest.mark.parametrize("name, rows", [("instruct", 6), ("instruct_1k", 5)])
def test_instructions_are_answered_in_the_judge_s_format(name, rows, tmp_path):
    (result,) = smoke(tmp_path, name, "training.max_steps=2")
    assert result["parameters"]["trainable"] == 4 * 2 * (2 * 4 * 32 + 4)  # four blocks, two ends of the prompt
    assert result["tasks"]["alpaca_eval"]["score"] is None
    (file,) = tmp_path.rglob("alpaca_eval.jsonl")
    assert all(set(json.loads(line)) == {"instruction", "output", "generator"} for line in file.open(encoding="utf-8"))
    assert len(generating.examples(result["settings"], 42)) == rows


def test_glue_trains_each_task_and_keeps_the_best_epoch(tmp_path):
    results = smoke(tmp_path, "glue_base", "--tasks", "cola,stsb,mnli")
    assert {task for result in results for task in result["tasks"]} == {"cola", "stsb", "mnli"}
    for result in results:
        ((task, entry),) = result["tasks"].items()
        assert entry["rows"] == 8 and -1 <= entry["score"] <= 1
        assert entry["score"] == entry[scores.main_metric(task)]
        positions = {"cola": "f3", "stsb": "f3", "mnli": "f1"}[task]
        assert result["settings"]["adapter"]["positions"] == positions
        assert result["parameters"]["trainable"] == 2 * (2 * 64 + 1)  # without the head
        folder = next(path.parent for path in tmp_path.rglob("adapter_config.json") if f"/{task}/adapter/" in str(path))
        assert PeftConfig.from_pretrained(folder).positions == positions


def test_glue_tasks_may_have_files_of_their_own(tmp_path):
    settings = []
    for task, kind in (("cola", ".csv"), ("rte", ".parquet")):
        rows = [json.loads(line) for line in (PAPER / "smoke" / f"{task}.jsonl").open(encoding="utf-8")]
        settings += [f"evaluation.tasks.{task}.data={in_file(tmp_path, rows[:5], kind)}"]
        settings += [f"evaluation.tasks.{task}.train={in_file(tmp_path, rows[5:], kind)}"]
    results = smoke(tmp_path / "out", "glue_base", "--tasks", "cola,rte", "training.num_train_epochs=1", *settings)
    for result in results:
        ((task, entry),) = result["settings"]["evaluation"]["tasks"].items()
        assert classifying.training_source(result["settings"], task)["data"] == entry["train"] != entry["data"]
    assert {task: entry["rows"] for result in results for task, entry in result["tasks"].items()} == {
        "cola": 3,
        "rte": 3,
    }


def test_glue_reports_the_epoch_that_was_best_on_the_selection_half(tmp_path, monkeypatch):
    seen = []
    predict = transformers.Trainer.predict

    def spy(self, *args, **kwargs):
        by_epoch = [entry["eval_pearson"] for entry in self.state.log_history if "eval_pearson" in entry]
        seen.append((by_epoch, self.evaluate()["eval_pearson"]))
        return predict(self, *args, **kwargs)

    monkeypatch.setattr(transformers.Trainer, "predict", spy)
    settings = ["training.num_train_epochs=4", "training.learning_rate=2e-2", "training.lr_scheduler_type=constant"]
    (result,) = smoke(tmp_path, "glue_base", "--tasks", "stsb", "--seed", "4", *settings)
    ((by_epoch, loaded),) = seen
    assert loaded == pytest.approx(max(by_epoch)) == result["tasks"]["stsb"]["selection"]
    assert by_epoch[-1] < max(by_epoch) - 1e-3  # the last epoch would have been worse


def test_the_runner_is_a_program_of_two_processes_and_goes_on_where_it_was(tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(PAPER / "run.py"), str(PAPER / "glue_large.yaml"), "--smoke", "--method", "full"]
    command += ["--tasks", "rte", "--output", "out"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("| full | tiny roberta | 1 | 100.0000 |") == 1
    (file,) = tmp_path.rglob("results.json")
    assert json.loads(file.read_text(encoding="utf-8"))["environment"]["processes"] == 2
    before = file.stat().st_mtime_ns
    arguments = [str(PAPER / "glue_large.yaml"), "--smoke", "--method", "full", "--tasks", "rte"]
    arguments += ["--output", str(tmp_path / "out")]
    assert run.main(arguments) == 0
    assert file.stat().st_mtime_ns == before
    assert run.main([*arguments, "training.learning_rate=1e-4"]) == 2  # other settings do not pass for the same run
    assert file.stat().st_mtime_ns == before


def test_processes_without_a_gpu_find_each_other_before_anything_is_written(monkeypatch):
    """Else each takes itself for the main one until the trainer is made, and both write the tiny model."""
    asked = []
    monkeypatch.setattr(run, "PartialState", lambda **how: asked.append(how) or PartialState(**how))
    assert run.main(["nowhere.yaml"]) == 2
    assert asked[0] == {"cpu": not torch.cuda.is_available()}


def test_the_table_has_means_over_seeds_beside_the_paper_s_numbers():
    def result(seed, score, method="loreft"):
        return {
            "recipe": "r",
            "method": method,
            "model": "m",
            "seed": seed,
            "smoke": False,
            "parameters": {"percent": 0.031},
            "training": {"seconds": 10},
            "memory_bytes": 2**30,
            "tasks": {"a": {"score": score, "seconds": 1}, "b": {"score": 0.5, "seconds": 1}},
            "published": {"loreft": {"model": "M", "percent": 0.03, "a": 80.0, "b": 60.0, "c": 1.0}},
        }

    table = report.table([result(1, 0.6), result(2, 0.8), result(1, 0.1, "lora")])
    assert "| loreft | m | 2 | 0.0310 | 70.0 (14.1) | 50.0 (0.0) | 60.0 | 20 | 4 | 1,024 |" in table
    assert "| lora | m | 1 | 0.0310 | 10.0 | 50.0 | 30.0 |" in table
    assert "| loreft (paper) | M |  | 0.03 | 80.0 | 60.0 | 70.0 |" in table


# PEFT's method comparison.

EXPERIMENTS = sorted((PAPER / "metamathqa" / "experiments" / "reft").iterdir())
QUERY = "Question: {query} Think step by step.\nAnswer:"  # PEFT's default_training_params.json


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory) -> str:
    """A tiny model and a tokenizer that knows the template."""
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "tie_word_embeddings": True}
    texts = [QUERY.format(query="What is half of 8?") + "It is 4. The answer is: 4"] * 2
    return tiny.save_tiny(tmp_path_factory.mktemp("llama"), "causal", config, texts)


@pytest.mark.parametrize("folder", EXPERIMENTS, ids=lambda path: path.name)
def test_an_experiment_for_peft_s_comparison_loads_and_builds(folder, llama_folder):
    config = PeftConfig.from_pretrained(folder)  # as PEFT's run.py does
    assert set(json.loads((folder / "training_params.json").read_text(encoding="utf-8"))) == {"optimizer_kwargs"}
    llama_3b = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    llama_3b._name_or_path = llama_folder  # for the tokenizer that encodes the marker
    with torch.device("meta"):
        base = transformers.LlamaForCausalLM(llama_3b)
    trainable, _ = get_peft_model(base, config, low_cpu_mem_usage=True).get_nb_trainable_parameters()
    assert trainable == 28 * (2 * config.r * 3072 + config.r)


@pytest.mark.parametrize("folder", EXPERIMENTS, ids=lambda path: path.name)
def test_peft_s_comparison_edits_the_same_tokens_in_training_and_generation(folder, llama_folder):
    """Its labels are a copy of the tokens, up to the first of padding; text for its test of forgetting has none."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama_folder)
    base = transformers.AutoModelForCausalLM.from_pretrained(llama_folder)
    config = PeftConfig.from_pretrained(folder)
    config.init_weights = False
    model = get_peft_model(base, config).eval()
    queries = [QUERY.format(query=query) for query in ("What is half of 8?", "How many is 3 and 4, and 2 more?")]
    rows = [tokenizer(query + "It is 4. The answer is: 4") for query in queries]
    batch = tokenizer.pad(rows, return_tensors="pt")
    columns = torch.arange(7).expand(2, -1)
    with torch.no_grad():
        labels = batch["input_ids"].clone()
        for row, given in zip(labels, rows):
            row[len(given["input_ids"]) + 1 :] = -100
        got = model(**batch, labels=labels).logits
        torch.testing.assert_close(got, model(**batch, intervention_locations=columns).logits)
        assert not torch.allclose(got, model(**batch, intervention_locations=columns[:, :1]).logits, atol=1e-3)
        texts = ["Eight is a number with a half.", "Four and four are eight, and so are two and six."]
        text = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
        padding = (text["attention_mask"] == 0).sum(1, keepdim=True)
        with pytest.warns(UserWarning, match="without the marker"):
            got = model(**text).logits
        torch.testing.assert_close(got, model(**text, intervention_locations=columns + padding).logits)
    given = tokenizer(queries, return_tensors="pt", padding=True, padding_side="left")
    padding = (given["attention_mask"] == 0).sum(1, keepdim=True)
    settings = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    free = model.generate(**given, **settings).logits
    told = model.generate(**given, **settings, intervention_locations=columns + padding).logits
    torch.testing.assert_close(torch.stack(free), torch.stack(told))
