"""Searching for settings: what is proposed, what is given up, what survives an interruption, what is left in the end.

Most objectives here are formulas: what a search does with scores does not depend on where they come from.
"""

from __future__ import annotations

import gc
import json
import math
import os
import re
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from types import SimpleNamespace

import optuna
import pytest
import torch
from conftest import BLOCKS, HIDDEN, VOCAB, tiny_model
from matplotlib.figure import Figure
from peft import get_peft_model
from PIL import Image
from transformers import Trainer, TrainingArguments

from peft_reft import ReftConfig, get_interventions
from peft_reft.blocks.numbering import pick_layers
from peft_reft.positions import parse_positions
from peft_reft.search import SearchSpace, block_choices, search, study
from peft_reft.search.picture import draw_trials, rate_ticks

CONFIG = ReftConfig(task_type="SEQ_CLS", intervention="direft")
SPACE = SearchSpace(blocks=block_choices(6), learning_rate=(1e-4, 1e-1))


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    """No collection of what the imports brought after every trial, and a picture only where it is looked at."""
    gc.freeze()
    if "picture" not in request.node.name:
        monkeypatch.setattr(study, "draw_trials", lambda *_: Figure((1, 1)))
    yield
    gc.unfreeze()


def closeness(attempt):
    """A score with one best learning rate, 0.01, and a preference for high ranks."""
    return attempt.config.r / 100 - abs(math.log10(attempt.learning_rate) + 2)


def run(objective, folder, space=SPACE, config=CONFIG, metric="score", progress=None, **options):
    return search(objective, space, config, folder, metric=metric, progress=progress, **options)


# The space.


@pytest.mark.parametrize("depth", [1, 2, 3, 6, 7, 12, 32])
def test_block_choices_are_subsets_that_end_with_the_last_block(depth):
    names = [f"layers.{number}" for number in range(depth)]
    picked = {name: pick_layers([names], blocks) for name, blocks in block_choices(depth).items()}
    assert picked.pop("all") == names
    assert len({tuple(blocks) for blocks in picked.values()}) == len(picked)
    for name, blocks in picked.items():
        numbers = [names.index(block) for block in blocks]
        kind, count = name.split()
        if kind == "last":
            assert numbers == list(range(depth - int(count), depth))
        else:
            step = int(count[:-2])
            assert [after - before for before, after in pairwise(numbers)] == [step] * (len(numbers) - 1)
            assert numbers[-1] == depth - 1 and 0 <= numbers[0] < step and len(numbers) > 1
    assert len(picked) == {1: 0, 2: 1, 3: 3, 6: 5, 7: 5, 12: 7, 32: 9}[depth]


def test_the_space_of_a_model_has_its_blocks_and_width():
    model = tiny_model("llama")
    space = SearchSpace.of(model, ranks=(1, HIDDEN))
    assert space.blocks == block_choices(BLOCKS)
    for blocks in space.blocks.values():
        edited = get_peft_model(tiny_model("llama"), ReftConfig(layers_to_transform=blocks, r=HIDDEN))
        assert len(get_interventions(edited)) == (BLOCKS if blocks is None else len(blocks))
    assert SearchSpace.of(tiny_model("bert", hidden_size=8)).ranks == (1, 2, 4, 8)
    with pytest.raises(ValueError, match=rf"ranks=\(4, {HIDDEN + 1}\) go beyond .* width {HIDDEN}"):
        SearchSpace.of(model, ranks=(4, HIDDEN + 1))


@pytest.mark.parametrize(
    "ranges, message",
    [
        ({"prefix": ()}, r"prefix=\(\) must be a list"),
        ({"prefix": (1, -1)}, r"prefix=\(1, -1\) must be a list of integers of at least 0"),
        ({"prefix": ("f1",)}, r"prefix=\('f1',\) must be"),
        ({"suffix": (1, 1)}, r"suffix=\(1, 1\) must be .* each once"),
        ({"suffix": ("all",)}, r"suffix=\('all',\) must be"),
        ({"prefix": (0, 4), "suffix": (0,)}, "edit no token"),
        ({"ranks": (0, 4)}, r"ranks=\(0, 4\) must be a list of integers of at least 1"),
        ({"ranks": (True,)}, r"ranks=\(True,\)"),
        ({"ranks": 4}, "ranks=4 must be a list"),
        ({"learning_rate": 1e-3}, "learning_rate=0.001 must be the lowest and the highest"),
        ({"learning_rate": (0, 1e-3)}, "0 < lowest"),
        ({"learning_rate": (1e-2, 1e-3)}, "0 < lowest"),
        ({"learning_rate": (1e-2, math.inf)}, "0 < lowest"),
        ({"blocks": {}}, "must name at least one choice"),
        ({"blocks": {"none": []}}, r"layers_to_transform=\[\] does not name blocks"),
        ({"others": {"rank": (1, 2)}}, "must be fields of ReftConfig"),
        ({"others": {"r": (1, 2)}}, "must be fields of ReftConfig"),
        ({"others": {"intervention": "direft"}}, "with a list of values"),
        ({"others": {"intervention": ("direft", "reft")}}, "intervention='reft' is unknown"),
        ({"others": {"share_weights": (True, "position")}}, "positions='all'"),
    ],
)
def test_ranges_that_no_trial_could_use_are_refused_before_any_training(ranges, message, tmp_path):
    def objective(attempt):
        pytest.fail("a trial began")

    with pytest.raises(ValueError, match=message):
        run(objective, tmp_path, SearchSpace(**{"blocks": block_choices(6), **ranges}))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": -1}, "seed=-1 must be an integer from 0 to 2147483647"),
        ({"seed": "a"}, "seed='a' must be"),
        ({"seed": 2**40}, "seed=1099511627776 must be"),
        ({"metric": None}, "metric=None must be a str"),
        ({"space": 5}, "space=5 must be a SearchSpace"),
        ({"config": {"r": 4}}, "config={'r': 4} must be a ReftConfig"),
        ({"objective": 5}, "objective=5 must be a function"),
    ],
    ids=str,
)
def test_arguments_of_other_kinds_are_refused_before_any_training(changed, message, tmp_path):
    arguments = {"objective": lambda attempt: pytest.fail("a trial began"), "folder": tmp_path / "new", **changed}
    with pytest.raises(ValueError, match=message):
        run(**arguments)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["why?", "100%", "a#b", "my%20search", "with space", "é"])
def test_the_trials_of_a_folder_of_any_name_are_in_it(name, tmp_path):
    run(closeness, tmp_path / name, n_trials=1)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name / study.TRIALS).is_file()
    assert len(run(closeness, tmp_path / name, n_trials=2).study.trials) == 2


def test_a_joint_range_that_fits_is_not_refused(tmp_path):
    space = SearchSpace(block_choices(6), prefix=(0, 1, 2), others={"share_weights": (True, "position")})
    space.check(CONFIG)


def test_trials_stay_in_the_space_and_become_the_configs_they_say():
    space = SearchSpace(
        {"all": None, "two": [0, 4]}, (0, 3, "all"), (0, 2), (1, 4), (1e-3, 1e-2), {"dropout": (0.0, 0.5)}
    )
    expected = {(0, 2): "l2", (3, 0): "f3", (3, 2): "f3+l2"}
    proposals, configs = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)), []
    for _ in range(60):
        trial = proposals.ask()
        space.propose(trial)
        params, config = trial.params, space.config(CONFIG, trial.params)
        suffix = params.get("suffix", params.get("suffix_alone"))
        assert config.positions == ("all" if params["prefix"] == "all" else expected[params["prefix"], suffix])
        assert parse_positions(config.positions)
        assert config.r == params["rank"] in (1, 4)
        assert config.layers_to_transform == {"all": None, "two": [0, 4]}[params["blocks"]]
        assert config.dropout == params["dropout"] in (0.0, 0.5)
        assert 1e-3 <= params["learning_rate"] <= 1e-2
        assert (config.intervention, config.task_type) == ("direft", "SEQ_CLS"), "the rest is the template's"
        configs.append(config)
    assert {config.positions for config in configs} == {"f3", "l2", "f3+l2", "all"} == set(space.positions())
    assert {config.r for config in configs} == {1, 4}


def test_an_attempt_has_a_config_of_its_own(tmp_path):
    seen = []

    def objective(attempt):
        attempt.config.target_modules = {"changed"}  # PEFT changes the config that it is given
        attempt.config.rank_pattern["changed"] = 2
        seen.append((attempt.config.r, attempt.learning_rate))
        return 1.0

    result = run(objective, tmp_path, n_trials=2)
    for config in (CONFIG, result.config):
        assert config.target_modules is None and config.rank_pattern == {}
    params = [(trial.params["rank"], trial.params["learning_rate"]) for trial in result.study.trials]
    assert seen == params


@pytest.mark.parametrize(
    "settings, params",
    [
        ({}, {"blocks": "all", "prefix": 1, "suffix": 1, "rank": 4}),
        ({"positions": "l4", "r": 8}, {"blocks": "all", "prefix": 0, "suffix_alone": 4, "rank": 8}),
        ({"positions": "all", "layers_to_transform": [-2, -1]}, {"blocks": "last 2", "prefix": "all", "rank": 4}),
        ({"positions": "f3"}, None),
        ({"positions": "f1+d"}, None),
        ({"r": 3}, None),
        ({"layers_to_transform": [0]}, None),
        ({"dropout": 0.1}, None),
    ],
)
def test_the_first_trial_is_the_template_if_the_space_has_it(settings, params, tmp_path):
    space = SearchSpace(block_choices(6), learning_rate=(1e-4, 1e-2), others={"dropout": (0.0, 0.5)})
    config = ReftConfig(task_type="SEQ_CLS", **settings)
    first = run(closeness, tmp_path, space, config, n_trials=1).study.trials[0]
    expected = params and {**params, "dropout": 0.0, "learning_rate": pytest.approx(1e-3)}
    assert space.start(config) == expected
    if params:
        assert first.params == expected
        assert len(run(closeness, tmp_path, space, config, n_trials=2).study.trials) == 2, "and it is not repeated"


# Giving up.


@pytest.mark.parametrize("metric, sign", [("score", 1), ("eval_loss", -1)])
def test_what_falls_behind_is_given_up(metric, sign, tmp_path):
    steps = {number: [] for number in range(8)}

    def objective(attempt):
        bad = attempt.number in (2, 6)  # 2 is before the rule begins
        for step in (10, 20, 30):
            steps[attempt.number].append(step)
            attempt.report(sign * ((0.1 if bad else 0.5) + step / 1000 + attempt.number / 1e6), step)
        return sign * (0.1 if bad else 0.9)

    lines = []
    result = run(objective, tmp_path, metric=metric, n_trials=8, progress=lines.append)
    pruned = [trial.number for trial in result.study.trials if trial.state.name == "PRUNED"]
    assert pruned == [6]
    assert steps[6] == [10] and steps[7] == steps[2] == [10, 20, 30]
    assert [line.split()[0] for line in lines[:-1]] == [f"{n}/8" for n in range(1, 9)]
    assert "given up at step 10" in lines[6] and "given up" not in lines[2]
    assert result.trial not in (2, 6)


def test_scores_that_are_no_numbers_end_a_trial_and_not_the_search(tmp_path):
    def objective(attempt):
        if attempt.number == 0:
            attempt.report(math.nan, 1)
            pytest.fail("went on after NaN")
        return math.inf if attempt.number == 1 else 0.25

    result = run(objective, tmp_path, n_trials=3)
    assert [trial.state.name for trial in result.study.trials] == ["PRUNED", "PRUNED", "COMPLETE"]
    assert (result.trial, result.value) == (2, 0.25)


def test_a_search_without_a_score_says_so(tmp_path):
    with pytest.raises(ValueError, match="None of 2 trials got a finite score"):
        run(lambda attempt: math.nan, tmp_path, n_trials=2)


# Going on.


def test_a_search_that_was_killed_goes_on(tmp_path):
    def killed(attempt):
        if attempt.number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return closeness(attempt)

    child = os.fork()
    if child == 0:
        try:
            run(killed, tmp_path, n_trials=6)
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert ReftConfig.from_pretrained(tmp_path / "best").intervention == "direft", "the best until then is there"

    ran, lines = [], []

    def objective(attempt):
        ran.append(attempt.number)
        return closeness(attempt)

    result = run(objective, tmp_path, n_trials=6, progress=lines.append)
    assert ran == [4, 5, 6], "three are done, one was lost: three are missing"
    assert lines[0].startswith("3 trials of earlier calls")
    complete = [trial for trial in result.study.trials if trial.state.name == "COMPLETE"]
    rates = [trial.params["learning_rate"] for trial in complete]
    assert len(complete) == len(set(rates)) == 6, "no proposal is repeated"

    again = run(objective, tmp_path, n_trials=6)
    assert len(ran) == 3 and again.params == result.params
    run(objective, tmp_path, n_trials=7)
    assert len(ran) == 4


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_reaches_the_caller_and_costs_one_trial(error, tmp_path):
    def objective(attempt):
        if attempt.number == 2:
            raise error("stop")
        return closeness(attempt)

    verbosity = optuna.logging.get_verbosity()
    with pytest.raises(error, match="stop"):
        run(objective, tmp_path, n_trials=4)
    assert optuna.logging.get_verbosity() == verbosity
    states = [trial.state.name for trial in run(objective, tmp_path, n_trials=4).study.trials]
    assert states == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]


def test_the_config_itself_is_tried_first_also_after_an_interruption(tmp_path):
    def stop(attempt):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(stop, tmp_path, n_trials=2)
    trials = run(closeness, tmp_path, n_trials=2).study.trials
    assert [trial.state.name for trial in trials] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert trials[0].params == trials[1].params != trials[2].params
    assert len(run(closeness, tmp_path, n_trials=3).study.trials) == 4  # and is not tried again


@pytest.mark.parametrize(
    "changed",
    [
        {"space": SearchSpace(block_choices(6))},
        {"metric": "loss"},
        {"direction": "minimize"},
        {"config": ReftConfig(task_type="SEQ_CLS", dropout=0.1, intervention="direft")},
    ],
)
def test_trials_of_another_search_are_not_mixed_in(changed, tmp_path):
    run(closeness, tmp_path, n_trials=1)
    with pytest.raises(ValueError, match=rf"of another search.*{'learning_rate' if 'space' in changed else ''}"):
        run(closeness, tmp_path, n_trials=2, **changed)
    assert len(run(closeness, tmp_path, n_trials=2).study.trials) == 2


# The end.


def test_the_best_trial_is_saved_as_a_config_that_loads_and_there_is_a_picture(tmp_path):
    config = ReftConfig(task_type="SEQ_CLS", intervention="direft", modules_to_save=["classifier"])
    result = run(closeness, tmp_path / "a" / "b", config=config, n_trials=5)
    trials = result.study.trials
    best = max(trials, key=lambda trial: trial.value)
    assert result.trial == best.number != trials[-1].number and result.value == best.value
    loaded = ReftConfig.from_pretrained(tmp_path / "a" / "b" / "best")
    assert loaded.to_dict() == result.config.to_dict()
    assert (loaded.r, loaded.layers_to_transform) == (best.params["rank"], SPACE.blocks[best.params["blocks"]])
    assert (loaded.intervention, loaded.modules_to_save) == ("direft", ["classifier"])
    about = json.loads((tmp_path / "a" / "b" / "best" / "search.json").read_text())
    assert about["learning_rate"] == best.params["learning_rate"] == result.learning_rate
    assert (about["metric"], about["value"], about["trial"]) == ("score", best.value, best.number)
    with Image.open(tmp_path / "a" / "b" / "trials.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 300
        assert len(picture.convert("RGB").getcolors(picture.width * picture.height)) > 10, "something is drawn"
    left = sorted(path.name for path in (tmp_path / "a" / "b").iterdir())
    assert left == ["best", "trials.db", "trials.png"], "nothing temporary stays"


def test_the_last_line_says_where_the_best_config_is(tmp_path):
    lines = []
    result = run(closeness, tmp_path / "found", n_trials=4, progress=lines.append)
    assert len(lines) == 5 and lines[-1].startswith(f"Best: trial {result.trial} with score {result.value:.4g}")
    folder = re.search(r"from_pretrained\('(.*?)'\)", lines[-1])[1]
    assert ReftConfig.from_pretrained(folder).to_dict() == result.config.to_dict()
    assert f"learning_rate={result.learning_rate:.4g}" in lines[-1] and "trials.png" in lines[-1]


@pytest.mark.parametrize("low", [1e-4, 9e-4, 1e-3, 2.5e-3])
@pytest.mark.parametrize("ratio", [1.0, 1.2, 2, 4, 10, 30, 100, 1e5])
def test_learning_rates_have_two_to_five_round_labels_within_the_range(low, ratio):
    ticks = rate_ticks(low, low * ratio)
    assert len(ticks) == 1 if ratio == 1 else 2 <= len(ticks) <= 5
    assert ticks == sorted(ticks) and ticks[0] >= low * 0.95 and ticks[-1] <= low * ratio * 1.05
    assert len({f"{tick:.4g}" for tick in ticks}) == len(ticks)
    assert all(len(f"{tick:.4g}") <= 7 for tick in ticks)


def test_the_picture_of_a_narrow_range_labels_nothing_else(tmp_path):
    space = SearchSpace(blocks={"all": None}, learning_rate=(1e-3, 4e-3))
    result = run(closeness, tmp_path, space, n_trials=4)
    figure = draw_trials(result.study, space, "score")
    figure.savefig(tmp_path / "narrow.png")
    axis = figure.axes[1].xaxis
    assert [text.get_text() for text in axis.get_ticklabels()] == ["0.001", "0.002", "0.004"]
    assert list(axis.get_minorticklocs()) == []


# Trainers.


def rows(count, seed):
    """Texts of random tokens; the class is whether the first one is even."""
    ids = torch.randint(3, VOCAB, (count, 6), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[0] % 2} for row in ids]


def trainer_for(attempt, folder, **settings):
    def accuracy(prediction):
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    args = TrainingArguments(
        **{
            "output_dir": str(folder / f"trial-{attempt.number}"),
            "learning_rate": attempt.learning_rate,
            "max_steps": 4,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            **settings,
        }
    )
    model = get_peft_model(tiny_model("bert", "classifier"), attempt.config)
    return Trainer(
        model,
        args,
        train_dataset=rows(32, 0),
        eval_dataset=rows(50, 1),
        compute_metrics=accuracy,
        processing_class=None,
    )


def test_a_trainer_is_trained_with_the_settings_and_scored_by_its_metric(tmp_path):
    trainers = []

    def objective(attempt):
        trainers.append(trainer_for(attempt, tmp_path))
        return attempt.run(trainers[-1])

    space = SearchSpace.of(tiny_model("bert", "classifier"))
    result = run(objective, tmp_path / "search", space, metric="eval_accuracy", n_trials=3)
    for trainer, trial in zip(trainers, result.study.trials):
        logged = {e["step"]: e["eval_accuracy"] for e in trainer.state.log_history if "eval_accuracy" in e}
        assert trial.intermediate_values == logged and sorted(logged) == [2, 4]
        assert trial.value == logged[4]
        assert trainer.args.learning_rate == trial.params["learning_rate"]
        assert trainer.model.peft_config["default"].r == trial.params["rank"]


@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_a_trainer_of_a_search_prints_nothing(tmp_path, capfd, disable_tqdm):
    def objective(attempt):
        return attempt.run(trainer_for(attempt, tmp_path, disable_tqdm=disable_tqdm, logging_steps=1))

    alone = trainer_for(SimpleNamespace(number="alone", config=CONFIG, learning_rate=0.01), tmp_path)
    capfd.readouterr()
    alone.train()
    assert "eval_accuracy" in capfd.readouterr().out, "a trainer by itself prints its evaluations"
    space = SearchSpace.of(tiny_model("bert", "classifier"))
    run(objective, tmp_path / "search", space, metric="eval_accuracy", n_trials=1)
    captured = capfd.readouterr()
    assert "eval_" not in captured.out and "it/s" not in captured.err and "train_loss" not in captured.out


def test_a_trainer_that_is_given_up_stops_at_that_evaluation(tmp_path):
    trainers = []

    def objective(attempt):
        trainers.append(trainer_for(attempt, tmp_path))
        return attempt.run(trainers[-1])

    space = SearchSpace.of(tiny_model("bert", "classifier"))
    hopeless = optuna.pruners.ThresholdPruner(lower=2.0)  # no accuracy is above
    with pytest.raises(ValueError, match="None of 1 trials"):
        run(objective, tmp_path / "search", space, metric="eval_accuracy", n_trials=1, pruner=hopeless)
    assert trainers[0].state.global_step == 2


def test_the_score_is_that_of_the_model_that_is_kept(tmp_path):
    def objective(attempt):
        kept = {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True, "eval_steps": 1}
        trainer = trainer_for(
            attempt, tmp_path, **kept, metric_for_best_model="eval_loss", greater_is_better=attempt.number == 0
        )
        value = attempt.run(trainer)
        logged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry][:4]
        best = max(logged) if attempt.number == 0 else min(logged)
        assert value == pytest.approx(best)
        kept_steps.append(logged.index(best))
        return value

    kept_steps = []
    space = SearchSpace.of(tiny_model("bert", "classifier"), prefix=("all",), ranks=(4,), blocks={"all": None})
    run(objective, tmp_path / "search", space, metric="eval_loss", n_trials=2)
    assert min(kept_steps) < 3, "one of the two is not the last"


def test_a_trainer_without_evaluation_steps_is_evaluated_in_the_end(tmp_path):
    space = SearchSpace.of(tiny_model("bert", "classifier"))
    result = run(
        lambda attempt: attempt.run(trainer_for(attempt, tmp_path, eval_strategy="no", max_steps=1)),
        tmp_path / "search",
        space,
        metric="eval_accuracy",
        n_trials=1,
    )
    assert 0 <= result.value <= 1


def test_a_metric_that_the_evaluation_lacks_is_named(tmp_path):
    space = SearchSpace.of(tiny_model("bert", "classifier"))
    with pytest.raises(ValueError, match=r"metric='accuracy' is not among .*eval_accuracy, eval_loss"):
        run(lambda attempt: attempt.run(trainer_for(attempt, tmp_path)), tmp_path / "s", space, metric="accuracy")


def test_processes_that_begin_at_once_make_one_study(tmp_path):
    """Optuna's tables are made once: in a new folder all but one ended with an IntegrityError of SQLite."""
    elsewhere = ReftConfig(task_type="SEQ_CLS", positions="m1")  # not in the space, so that nothing is tried first
    for attempt in range(5):
        together = threading.Barrier(4)

        def begin(seed, folder=tmp_path / str(attempt), together=together):
            together.wait(60)
            return run(lambda attempt: 1.0, folder, config=elsewhere, n_trials=2, seed=seed)

        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(begin, range(4)))
        assert {result.value for result in results} == {1.0}
        assert {*os.listdir(tmp_path / str(attempt))} == {"best", "trials.db", "trials.png"}


def test_a_search_begins_on_a_file_system_without_links(tmp_path, monkeypatch):
    def link(*_):
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    assert run(lambda attempt: 1.0, tmp_path / "s", n_trials=2).value == 1.0
    assert {*os.listdir(tmp_path / "s")} == {"best", "trials.db", "trials.png"}


@pytest.mark.parametrize("returned", [None, "good", [1.0]])
def test_an_objective_that_returns_no_number_is_told(returned, tmp_path):
    message = f"The objective returned {re.escape(repr(returned))}, and not a number"
    with pytest.raises(TypeError, match=message):
        run(lambda attempt: returned, tmp_path, n_trials=1)
