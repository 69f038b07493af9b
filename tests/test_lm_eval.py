"""lm-eval with the tool installed: its own class warns and is wrong; ours scores as `generate` would edit."""

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
import transformers
from conftest import EOS, PAD, randomize, reft_model, tiny_model
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers

from peft_reft import ReftConfig
from peft_reft.positions import parse_positions

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -c constraints.txt 'lm-eval[hf]'")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from peft_reft.integrations.lm_eval import ReftLM, scoring_locations
from peft_reft.integrations.lm_eval_notice import SCORED_BLINDLY

CHAT = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
# Contexts and continuations of many lengths, so that rows of a batch are padded; one continuation is a single token.
REQUESTS = [
    ("w3 w4 w5 w6 w7 w8 w9", " w10 w11 w12"),
    ("w20 w21", " w22 w23 w24 w25 w26 w27"),
    ("w30 w31 w32 w33", " w34"),
    ("w40", " w41 w42"),
    ("w50 w51 w52 w53 w54 w55 w56 w57 w58", " w59 w60"),
]


def word_tokenizer(line_feeds=False):
    """One word, one token; with `line_feeds` each of them is one, too."""
    words = {"<pad>": PAD, "<eos>": EOS, "<unk>": 2, **{f"w{i}": i for i in range(3, 90)}, "user": 90, "assistant": 91}
    words |= {f"x{i}": i for i in range(92, 100)}
    words |= {"\n": words.pop("x99")} if line_feeds else {}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    lines = [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n", "isolated")]
    backend.pre_tokenizer = pre_tokenizers.Sequence(lines) if line_feeds else pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def evaluated(kind, model, batch_size=4, **settings):
    return kind(pretrained=model, tokenizer=word_tokenizer(), batch_size=batch_size, device="cpu", **settings)


def instances(requests, kind="loglikelihood"):
    return [Instance(kind, {}, arguments, number) for number, arguments in enumerate(requests)]


def scores(lm, requests=REQUESTS):
    answers = lm.loglikelihood(instances(requests), disable_tqdm=True)
    return torch.tensor([score for score, _ in answers])


def own_scores(model, columns_of, requests=REQUESTS, max_length=None):
    """The log-likelihoods row by row, in forwards that edit the columns `columns_of(context tokens, all tokens)`."""
    tokenizer = word_tokenizer()
    found = []
    for context, continuation in requests:
        before, behind = tokenizer.encode(context), tokenizer.encode(continuation)
        ids = (before + behind)[-max_length:] if max_length else before + behind
        start = len(ids) - len(behind)
        locations = torch.tensor([columns_of(start, len(ids) - 1)])
        with torch.no_grad():
            logits = model(torch.tensor([ids[:-1]]), intervention_locations=locations).logits[0].log_softmax(-1)
        found.append(sum(logits[start - 1 + i, token].item() for i, token in enumerate(behind)))
    return torch.tensor(found)


def ends(first, last, shift=0):
    """Columns of `f{first}+l{last}`, by hand; for contexts that are too short the first tokens go to the prefix."""

    def columns(context, _):
        prefix = min(first, max(context - last, -(-context // 2)))
        suffix = [column + shift for column in range(max(prefix, context - last), context)]
        found = [*range(prefix), *suffix]
        return found + [-1] * (first + last - len(found))

    return columns


COLUMNS = {
    "f1+l2": ends(1, 2),
    "l1": ends(0, 1),
    "all": lambda context, _: [*range(context)],
    "m1": lambda context, _: [(context - 1) // 2],
    "l1+d": lambda context, total: [*range(context - 1, total)],
    "f1+d2": lambda context, total: [0, *range(context + 1, total, 2)],
}


@pytest.mark.parametrize("positions", COLUMNS)
def test_scores_equal_forwards_with_explicit_locations_whatever_the_batch(positions, llama):
    model = reft_model(llama, task_type="CAUSAL_LM", positions=positions)
    own = own_scores(model, COLUMNS[positions])
    for batch_size in (1, 4):
        torch.testing.assert_close(scores(evaluated(ReftLM, model, batch_size)), own, rtol=0, atol=1e-4)
    with model.disable_adapter():
        base = own_scores(model, COLUMNS[positions])
    assert (own - base).abs().min() > 1e-3


def test_a_suffix_that_is_off_by_one_scores_otherwise(llama):
    model = reft_model(llama, task_type="CAUSAL_LM", positions="f1+l2")
    requests = [REQUESTS[0], REQUESTS[4]]  # a token later must be one that is run
    mine = scores(evaluated(ReftLM, model), requests)
    for shift in (-1, 1):
        assert ((own_scores(model, ends(1, 2, shift), requests) - mine).abs() > 1e-3).all()


@pytest.mark.parametrize("share_weights", [False, "position"])
def test_separate_weights_are_scored_each_at_its_place(share_weights, llama):
    model = reft_model(llama, task_type="CAUSAL_LM", positions="f1+l2", share_weights=share_weights)
    together, alone = (scores(evaluated(ReftLM, model, size)) for size in (4, 1))
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)
    # The same columns in a group too early: of the wrong weights.
    groups = {False: [[[0, -1], [5, 6]]], "position": [[[0], [5], [6]]]}[share_weights]
    ids = torch.tensor([word_tokenizer().encode(" ".join(REQUESTS[0]))])
    with torch.no_grad():
        for locations, equal in ((groups, True), ([groups[0][1:] + groups[0][:1]], False)):
            logits = model(ids[:, :-1], intervention_locations=torch.tensor(locations)).logits[0].log_softmax(-1)
            score = sum(logits[6 + i, token] for i, token in enumerate(ids[0, 7:].tolist()))
            assert (abs(score.item() - alone[0].item()) < 1e-4) is equal


@pytest.mark.parametrize("positions", ["f1+l2", "all", "f1+l1+d", "l1+d2"])
def test_what_generate_answers_has_the_score_that_generate_gave_it(positions, llama):
    model = reft_model(llama, task_type="CAUSAL_LM", positions=positions)
    tokenizer = word_tokenizer()
    requests, expected = [], []
    for context, _ in REQUESTS:
        inputs = tokenizer(context, return_tensors="pt")
        out = model.generate(
            **inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, output_logits=True,
            return_dict_in_generate=True, pad_token_id=PAD,
        )  # fmt: skip
        answer = out.sequences[0, inputs["input_ids"].shape[1] :]
        requests.append((context, " " + tokenizer.decode(answer)))
        expected.append(sum(step[0].log_softmax(-1)[token].item() for step, token in zip(out.logits, answer)))
        assert tokenizer.encode(requests[-1][1]) == answer.tolist()
    torch.testing.assert_close(scores(evaluated(ReftLM, model), requests), torch.tensor(expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize("positions", ["f1+l2", "l1", "all", "f1+d2"])
def test_the_line_feed_that_ends_a_chat_s_prompt_is_edited_as_generate_edits_it(positions, llama):
    """lm-eval moves white space at the end of a context to the continuation."""
    tokenizer = word_tokenizer(line_feeds=True)
    model = reft_model(llama, task_type="CAUSAL_LM", positions=positions)
    context = "user w3 w4 w5 assistant\n"
    inputs = tokenizer(context, return_tensors="pt")
    out = model.generate(
        **inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, output_logits=True,
        return_dict_in_generate=True, pad_token_id=PAD,
    )  # fmt: skip
    row, start = out.sequences, inputs["input_ids"].shape[1]
    labels = torch.where(torch.arange(row.shape[1]) < start, -100, row)
    with torch.no_grad():
        predicted = model(row, labels=labels).logits[0, :-1].log_softmax(-1).gather(1, row[0, 1:, None])[:, 0]
    generated = sum(step[0].log_softmax(-1)[token].item() for step, token in zip(out.logits, row[0, start:]))
    assert predicted[start - 1 :].sum().item() == pytest.approx(generated, abs=1e-4)
    words = " ".join(tokenizer.convert_ids_to_tokens(row[0, start:]))
    # The second has the same tokens, but a prompt without the line feed.
    requests = [(context, words), (context.rstrip(), f"\n{words}"), (context, "w9 w10 w11")]
    found = scores(ReftLM(pretrained=model, tokenizer=tokenizer, batch_size=4, device="cpu"), requests)
    assert found[0].item() == pytest.approx(predicted[start - 2 :].sum().item(), abs=1e-4)
    assert abs(found[1] - found[0]) > 1e-3


@pytest.mark.parametrize("turns", ["first", "last", "all"])
def test_earlier_turns_are_edited_as_generate_edits_them(turns, llama):
    model = reft_model(llama, task_type="CAUSAL_LM", positions="f1+l1", turns=turns, prompt_end=[91])
    tokenizer = word_tokenizer()
    context = "user w3 w4 assistant w5 w6 user w7 w8 w9 assistant"
    inputs = tokenizer(context, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
    expected = out.logits[0][0].log_softmax(-1)[33].item()
    request = [(context, " w33"), ("w3 w4 w5 assistant", " w6 w7 w8")]
    assert scores(evaluated(ReftLM, model), request)[0].item() == pytest.approx(expected, abs=1e-4)


def test_requests_of_equal_tokens_share_a_row_only_if_their_contexts_are_equal(llama):
    model = reft_model(llama, task_type="CAUSAL_LM", positions="l1")
    same_tokens = [("w3 w4 w5 w6", " w7"), ("w3 w4", " w5 w6 w7"), ("w3 w4 w5 w6", " w8"), ("w3", " w4 w5 w6 w7")]
    lm = evaluated(ReftLM, model)
    runs = []
    handle = model.get_base_model().register_forward_pre_hook(
        lambda module, args, kwargs: runs.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    mine = scores(lm, same_tokens)
    handle.remove()
    assert sum(runs) == 3  # the first and the third request need the same row
    torch.testing.assert_close(mine, own_scores(model, ends(0, 1), same_tokens), rtol=0, atol=1e-4)
    with pytest.warns(UserWarning):
        assert (scores(evaluated(HFLM, model), same_tokens) - mine).abs().max() > 1e-2


def test_a_row_that_is_too_long_loses_its_start(llama):
    model = reft_model(llama, task_type="CAUSAL_LM", positions="f1+l2")
    lm = evaluated(ReftLM, model, max_length=7)
    own = own_scores(model, ends(1, 2), max_length=8)
    torch.testing.assert_close(scores(lm), own, rtol=0, atol=1e-4)


def test_rolling_scores_and_generations_do_not_depend_on_the_batch(llama):
    model = reft_model(llama, task_type="CAUSAL_LM", positions="f1+l2")
    texts = [(f"{context}{continuation}",) for context, continuation in REQUESTS]
    questions = [(context, {"until": ["<eos>"], "max_gen_toks": 4}) for context, _ in REQUESTS]
    results = []
    for batch_size in (1, 4):
        lm = evaluated(ReftLM, model, batch_size)
        rolling = lm.loglikelihood_rolling(instances(texts, "loglikelihood_rolling"), disable_tqdm=True)
        generated = lm.generate_until(instances(questions, "generate_until"), disable_tqdm=True)
        results.append((rolling, generated))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-4)
    assert results[0][1] == results[1][1]
    # The context of a text is the token in front of it (here the one that ends texts), which is the whole prompt.
    own = own_scores(model, lambda *_: [0], [("<eos>", text) for (text,) in texts])
    torch.testing.assert_close(torch.tensor(results[0][0]), own, rtol=0, atol=1e-4)
    with model.disable_adapter():
        assert evaluated(HFLM, model).generate_until(instances(questions, "generate_until")) != results[0][1]


def test_a_batch_size_that_lm_eval_looks_for(llama, capsys):
    model = reft_model(llama, task_type="CAUSAL_LM", positions="f1+l2", share_weights=False)
    lm = evaluated(ReftLM, model, "auto", max_batch_size=2, max_length=16)
    torch.testing.assert_close(scores(lm), own_scores_by_one(model), rtol=0, atol=1e-4)
    assert "Determined largest batch size: 2" in capsys.readouterr().out


def own_scores_by_one(model):
    return scores(evaluated(ReftLM, model, 1))


def test_an_encoder_decoder_model_is_scored_as_by_lm_evals_own_class():
    model = reft_model(tiny_model("t5"), task_type="SEQ_2_SEQ_LM", positions="f1+l1")
    lm = evaluated(ReftLM, model, backend="seq2seq")
    alone = evaluated(HFLM, model, 1, backend="seq2seq")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        torch.testing.assert_close(scores(lm), scores(alone), rtol=0, atol=1e-4)


def blind_warnings(caught):
    return [str(w.message) for w in caught if "lm-eval scores continuations" in str(w.message)]


def test_lm_evals_own_class_depends_on_the_batch_and_warns_once(llama):
    model = reft_model(llama, task_type="CAUSAL_LM", positions="f1+l2")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        together, alone = (scores(evaluated(HFLM, model, size)) for size in (4, 1))
    assert (together - alone).abs().max() > 1e-2
    assert (alone - scores(evaluated(ReftLM, model))).abs().max() > 1e-2  # even alone it edits the continuation
    assert blind_warnings(caught) == [SCORED_BLINDLY.format("f1+l2")]
    assert "--model reft" in SCORED_BLINDLY


@pytest.mark.parametrize("settings", [{"positions": "f1"}, {"positions": "f1+l1", "prompt_end": [91]}], ids=str)
def test_positions_that_the_tokens_tell_need_no_warning(settings, llama):
    model = reft_model(llama, task_type="CAUSAL_LM", **settings)
    requests = [(f"{context} assistant", continuation) for context, continuation in REQUESTS]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        own_class = scores(evaluated(HFLM, model), requests)
    torch.testing.assert_close(own_class, scores(evaluated(ReftLM, model), requests), rtol=0, atol=1e-4)


def test_a_disabled_adapter_is_scored_as_the_base_model_without_a_warning(llama):
    model = reft_model(llama, task_type="CAUSAL_LM", positions="f1+l2")
    with warnings.catch_warnings(), model.disable_adapter():
        warnings.simplefilter("error", UserWarning)
        base = scores(evaluated(HFLM, model))
    torch.testing.assert_close(base, scores(evaluated(HFLM, tiny_model("llama"))), rtol=0, atol=1e-4)


def test_other_forwards_than_lm_evals_do_not_warn(llama):
    model = reft_model(llama, task_type="CAUSAL_LM", positions="f1+l2")
    ids = torch.randint(3, 90, (3, 7))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(ids)
        model(ids, attention_mask=torch.ones_like(ids))
        scores(evaluated(ReftLM, model))
        evaluated(HFLM, model).generate_until(instances([("w3 w4", {"until": ["w9"], "max_gen_toks": 2})]))


def test_a_model_without_a_reft_adapter_is_refused_with_the_way_out(llama):
    with pytest.raises(ValueError, match=r"no active ReFT adapter.*peft=ADAPTER.*--model hf"):
        evaluated(ReftLM, get_peft_model(llama, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")))


def test_several_active_adapters_are_evaluated_if_their_positions_are_the_same(llama):
    model = reft_model(llama, task_type="CAUSAL_LM", positions="f1+l2")
    for name, positions in (("same", "f1+l2"), ("other", "l1")):
        model.add_adapter(name, ReftConfig(task_type="CAUSAL_LM", positions=positions))
        randomize(model, name, seed=5)
    model.base_model.set_adapter(["default", "same"])
    torch.testing.assert_close(scores(evaluated(ReftLM, model)), own_scores(model, ends(1, 2)), rtol=0, atol=1e-4)
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"different positions \(f1\+l2, l1\)"):
        evaluated(ReftLM, model)


def test_locations_stop_at_the_last_token_that_is_run():
    ids = torch.arange(1, 11).view(2, 5)
    contexts, lengths = torch.tensor([2, 1]), torch.tensor([4, 5])
    found = scoring_locations(parse_positions("l1+d2"), False, ids, contexts, lengths)
    assert [sorted(set(row) - {-1}) for row in found.flatten(1).tolist()] == [[1, 3], [0, 2, 4]]


TASKS = {
    "reft_choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "reft_free": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["w9"], max_gen_toks: 3, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}
QUESTIONS = [
    {"question": "w3 w4 w5 w6 w7", "choices": ["w10 w11 w12", "w13"], "answer": 0},
    {"question": "w20", "choices": ["w21", "w22 w23 w24 w25 w26 w27"], "answer": 1},
    {"question": "w30 w31 w32", "choices": ["w33 w34", "w35 w36"], "answer": 0},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model with its tokenizer, an adapter, and two tasks with their data; all local."""
    folder = tmp_path_factory.mktemp("lm_eval")
    base = tiny_model("llama")
    base.save_pretrained(folder / "base")
    word_tokenizer().save_pretrained(folder / "base")
    reft_model(base, task_type="CAUSAL_LM", positions="f1+l2").save_pretrained(folder / "adapter")
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (folder / "tasks").mkdir()
    for name, text in TASKS.items():
        source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        (folder / "tasks" / f"{name}.yaml").write_text(f"task: {name}\n{source}{text}")
    return folder


def expected_scores(chat=False):
    model = reft_model(tiny_model("llama"), task_type="CAUSAL_LM", positions="f1+l2")
    contexts = [f"user {q['question']} assistant" if chat else q["question"] for q in QUESTIONS]
    requests = [(context, f" {choice}") for context, q in zip(contexts, QUESTIONS) for choice in q["choices"]]
    return model, contexts, own_scores(model, ends(1, 2), requests)


def choice_scores(samples):
    return torch.tensor([float(score) for sample in samples for score, _ in sample["filtered_resps"]])


def simple_evaluate(folder, model, **settings):
    return lm_eval.simple_evaluate(
        model=model,
        model_args=f"pretrained={folder}/base,peft={folder}/adapter",
        tasks=["reft_choice"],
        task_manager=TaskManager(include_path=folder / "tasks", include_defaults=False),
        device="cpu",
        batch_size=4,
        bootstrap_iters=0,
        **settings,
    )["samples"]["reft_choice"]


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_the_model_class_has_a_name_in_lm_evals_registry(chat, folder):
    got = choice_scores(simple_evaluate(folder, "reft", apply_chat_template=chat))
    torch.testing.assert_close(got, expected_scores(chat)[2], rtol=0, atol=1e-3)


def test_lm_evals_own_class_warns_when_it_loads_a_saved_adapter(folder):
    with pytest.warns(UserWarning, match="--model reft"):
        got = choice_scores(simple_evaluate(folder, "hf"))
    assert (got - expected_scores()[2]).abs().max() > 1e-2


def test_the_command_line_scores_a_saved_adapter(folder, tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "peft_reft", "-m", "lm_eval", "run", "--model", "reft", "--device", "cpu"),
            *("--model_args", f"pretrained={folder}/base,peft={folder}/adapter", "--tasks", "reft_choice,reft_free"),
            *("--include_path", "tasks", "--batch_size", "4", "--log_samples", "--output_path", str(tmp_path)),
        ],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    samples = {}
    for task in TASKS:
        (file,) = tmp_path.glob(f"*/samples_{task}_*.jsonl")
        samples[task] = sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    model, contexts, expected = expected_scores()
    torch.testing.assert_close(choice_scores(samples["reft_choice"]), expected, rtol=0, atol=1e-3)
    tokenizer = word_tokenizer()
    for context, sample in zip(contexts, samples["reft_free"]):
        out = model.generate(**tokenizer(context, return_tensors="pt"), max_new_tokens=3, do_sample=False)
        text = tokenizer.decode(out[0, len(tokenizer.encode(context)) :], skip_special_tokens=True)
        assert sample["filtered_resps"] == [text.split("w9")[0]]
