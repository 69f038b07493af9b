"""The rows of benchmarks/real_llm: which are read and held out, what is measured on them, and where answers end."""

from __future__ import annotations

import json
import pathlib
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from smollm2_stand_in import byte_level

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from benchmarks import common
from benchmarks.real_llm import cells, evaluate, grid, instructions, model, report, rows, sizes, tasks
from benchmarks.real_llm.training import Training
from benchmarks.study.store import Store

FOUR = "Please choose the correct answer to the question: Who?\n\nAnswer1: a Answer2: b Answer3: c Answer4: d\n\nAnswer"
TRUE_FALSE = "Please answer the following question with true or false, question: is it?\n\nAnswer format: true/false"


class Words:
    """A tokenizer of words with the space before them, of digits, and of what is neither."""

    eos_token_id, pad_token_id = 0, None

    def __init__(self) -> None:
        self.known: dict[str, int] = {}

    def ids(self, text: str) -> list[int]:
        return [self.known.setdefault(word, len(self.known) + 1) for word in re.findall(r" ?[a-z]+|\d|\W|[A-Z]", text)]

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": [self.ids(text) for text in texts]}


def entry(instruction: str, answer: str) -> dict[str, str]:
    return {"instruction": instruction, "output": f"the correct answer is {answer}", "answer": answer}


def test_questions_with_four_choices_and_with_true_and_false_are_read(tmp_path):
    path = tmp_path / "some-train.json"
    entries = [
        entry(FOUR, "answer3"),
        entry(FOUR.replace(" Answer4: d", ""), "answer1"),  # three choices
        entry(TRUE_FALSE, "false"),
        entry(FOUR + " and more" * 99, "answer1"),  # too long
    ]
    path.write_text(json.dumps(entries))
    tokenizer = Words()
    first, second = tasks.read(path, tokenizer, longest=96)
    assert (first.words[first.choice], second.words[second.choice]) == ("answer3", "false")
    for row, texts in ((first, "1234"), (second, [" true", " false"])):
        assert list(row.tokens) == [tokenizer.known[text] for text in texts]
        assert row.answer[-1] == tokenizer.eos_token_id
        assert row.answer[-2] == row.tokens[row.choice]  # where the likelihood of the choices is read
    assert first.prompt == tokenizer.ids(FOUR + "\n")


def test_a_file_without_such_questions_is_refused(tmp_path):
    path = tmp_path / "none-train.json"
    path.write_text(json.dumps([entry("Which?", "solution1")]))
    with pytest.raises(ValueError, match="no question with the choices"):
        tasks.read(path, Words(), longest=96)


def tiny(tokenizer):
    """A small model for a tokenizer, with the loss that model.py gives a loaded one."""
    lm = common.llama(64, 2, 64, len(tokenizer))
    lm.loss_function = model.loss_of_last_columns
    return lm


def test_an_answer_in_the_format_ends_where_training_rows_end(tmp_path):
    """The cells of one run had almost none in the format: its tokenizer ended rows in another token than the model."""
    path = tmp_path / "some-test.json"
    path.write_text(json.dumps([entry(FOUR, "answer3")]))
    tokenizer = byte_level([FOUR, "the correct answer is answer3"] * 2)
    tokenizer.eos_token = "<|im_start|>"
    data = rows.Data([], [], {}, rows.pad_of(tokenizer), tokenizer)
    questions = tasks.read(path, tokenizer, longest=999)
    base = tiny(tokenizer)
    base.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    batch = rows.collate(questions, data.pad)
    training = Training(base.requires_grad_(True), [batch] * 40, 3e-3, keep=rows.answer_columns(questions) + 1)
    for _ in training.batches:
        training.step()
    training.finish()
    assert len(questions[0].answer) <= evaluate.NEW_TOKENS
    assert evaluate.by_generation(base, data, questions, 1) == {"accuracy": 1.0, "in_format": 1.0}


def test_a_tokenizer_that_ends_texts_as_the_model_does_not_is_refused():
    tokenizer = SimpleNamespace(eos_token="<|im_start|>", eos_token_id=1)
    for ends in (1, [2, 1]):
        model.check_end(tokenizer, ends)
    with pytest.raises(ValueError, match=r"'<\|im_start\|>' \(1\), the model in \[2\]"):
        model.check_end(tokenizer, 2)


@pytest.fixture
def taught(tmp_path):
    """A file of instructions, of which every tenth is too long, and its tokenizer."""
    texts = [f"Say {i}." + " Please." * (99 if i % 10 == 0 else 0) for i in range(400)]
    entries = [{"instruction": text, "input": "", "output": f"It is {i}. " * 9} for i, text in enumerate(texts)]
    (tmp_path / f"{sizes.INSTRUCTIONS}.json").write_text("\n".join(json.dumps(entry) for entry in entries) + "\n")
    return tmp_path, byte_level([f"system\nYou are helpful. user assistant {text} It is 5." for text in texts[:9]] * 9)


def load(taught, **changes):
    folder, tokenizer = taught
    settings = {"longest": 80, "validation": 99, "test": 999, **changes}
    return instructions.load(folder, tokenizer, (sizes.INSTRUCTIONS,), **settings)


def test_an_instruction_is_a_chat_and_its_answer_ends_as_one(taught):
    _, tokenizer = taught
    row = instructions.chat_row(tokenizer, "Say 5.", "It is 5.")
    messages = [{"role": "user", "content": "Say 5."}, {"role": "assistant", "content": "It is 5."}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(row.prompt + row.answer) == whole.rstrip("\n")
    assert row.answer[-1] == tokenizer.eos_token_id and tokenizer.decode(row.prompt).endswith("assistant\n")


def test_what_is_held_out_depends_on_nothing_and_is_never_trained(taught):
    def prompts(some):
        return {tuple(row.prompt) for row in some}

    short, long = load(taught), load(taught, longest=3000)
    for data in (short, long):
        (test,) = data.test.values()
        parts = [prompts(data.train), prompts(data.validation), prompts(test)]
        assert len(set.union(*parts)) == sum(map(len, parts))
    assert len(prompts(long.train)) == 400 - instructions.TEST - instructions.VALIDATION
    (few,), (many,) = short.test.values(), long.test.values()
    assert prompts(few) < prompts(many) and len(many) == instructions.TEST  # the long ones are missing, no more
    assert not prompts(short.train) & prompts(many)
    for row in few:
        whole = next(other for other in many if other.prompt == row.prompt)
        assert row.answer == whole.answer[: 80 - len(row.prompt)] and len(row.prompt) <= 40
    with pytest.raises(ValueError, match="longest=9 leaves 0, 0 and 0 rows"):
        load(taught, longest=9)


def test_the_loss_of_answers_is_the_one_that_is_trained_row_by_row(taught):
    data = load(taught, test=5)
    (test,) = data.test.values()
    test[1] = rows.Row(test[1].prompt, test[1].answer[:3])  # of another length
    lm = tiny(taught[1])
    found = evaluate.of_answers(lm, data, test, size=2)
    for row, nats, tokens in zip(test, found["nats"], found["tokens"]):
        ids = torch.tensor([row.prompt + row.answer])
        likely = lm(ids).logits[0].log_softmax(-1)[len(row.prompt) - 1 : -1]
        assert tokens == len(row.answer)
        assert nats == pytest.approx(-sum(likely[i, id] for i, id in enumerate(row.answer)).item(), abs=2e-3)
    assert found["answer"] == pytest.approx(sum(found["nats"]) / sum(found["tokens"]))


def of_instructions(nats, validation=1.0):
    test = {sizes.INSTRUCTIONS: {"answer": sum(nats) / 30, "nats": nats, "tokens": [10, 20]}}
    return {"parameters": 7, "validation": {"answer": validation}, "test": test}


def test_rates_are_chosen_on_validation_rows_and_seeds_follow(tmp_path):
    name = "LoReFT r8 all"
    setup = cells.Setup("model", "data", **{**sizes.TAUGHT_CPU.setup, "tasks": (sizes.INSTRUCTIONS,), "seeds": (0, 1)})
    store = Store(tmp_path, setup.of_results())
    for number, rate in enumerate(grid.CHAT_RATES["reft"]):
        assert len(list(cells.plan(store, setup, [name]))) == 1 + 4  # the base model, and four rates
        result = of_instructions([number, 0.0], validation=[2.0, 1.5, 1.7, float("nan")][number])
        store.add(str(rate), {**cells.cell_of("main", name, rate, 0, 16), "result": result})
    last = list(cells.plan(store, setup, [name]))[-1]
    assert (last["seed"], last["lr"]) == (1, grid.CHAT_RATES["reft"][1])
    assert evaluate.best_rate(report.by_name(store)[name]) == grid.CHAT_RATES["reft"][1]


def test_a_rate_that_fails_with_the_next_seed_is_given_up_for_another(tmp_path):
    name = "LoReFT r8 all"
    setup = cells.Setup("model", "data", **{**sizes.TAUGHT_CPU.setup, "tasks": (sizes.INSTRUCTIONS,)})
    store = Store(tmp_path, setup.of_results())
    first, second, *others = grid.CHAT_RATES["reft"]
    nats = {(rate, 0): 2.0 for rate in others} | {(first, 0): 1.5, (second, 0): 1.6, (first, 1): 1.8}
    for (rate, seed), value in nats.items():
        result = of_instructions([1.0, 2.0], validation=value)
        store.add(f"{rate} {seed}", {**cells.cell_of("main", name, rate, seed, 16), "result": result})
    assert evaluate.best_rate(report.by_name(store)[name]) == second  # 1.6, the mean of the other is 1.65
    planned = [(cell["lr"], cell["seed"]) for cell in cells.plan(store, setup, [name])]
    assert planned[-2:] == [(second, 1), (second, 2)]


def test_differences_of_losses_are_taken_row_by_row():
    ours, theirs = of_instructions([11.0, 23.0]), of_instructions([12.0, 25.0])
    assert report.difference([ours], [theirs]) == "-0.100 ± 0.000"  # every token by a tenth, whatever the row
    assert report.difference([ours, theirs], [theirs]) == "-0.050 ± 0.000"
    assert report.difference([of_instructions([12.0, 22.0])], [theirs]) == "-0.100 ± 0.067"


def test_instructions_are_not_run_together_with_questions():
    assert sizes.size_of((sizes.INSTRUCTIONS,), cpu=True) is sizes.TAUGHT_CPU
    assert sizes.size_of(("boolq",), cpu=False) is sizes.QUESTIONS
    with pytest.raises(ValueError, match="one after the other"):
        sizes.size_of(("boolq", sizes.INSTRUCTIONS), cpu=True)
