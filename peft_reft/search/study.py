"""Running a search on top of Optuna: it continues where it stopped, reports its progress, and leaves a folder.

Optuna proposes (TPE), gives up on what falls behind (median pruning) and keeps the trials in a SQLite file.
"""

from __future__ import annotations

import functools
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from peft_reft.search.attempt import Attempt
from peft_reft.search.picture import draw_trials
from peft_reft.search.space import SearchSpace, positions_of
from peft_reft.search.trials import FINISHED, TRAINED, finished, scored
from peft_reft.tuner.config import ReftConfig
from peft_reft.tuner.sizes import is_integer, shown
from peft_reft.tuner.staging import staged, write_text

if TYPE_CHECKING:
    import optuna

TRIALS, BEST, PICTURE = "trials.db", "best", "trials.png"  # what a search leaves in its folder
STUDY = "reft"  # the name of the study within the file
say = functools.partial(print, flush=True)


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        config: of the best trial; also in `<folder>/best`, for `ReftConfig.from_pretrained`.
        learning_rate: its learning rate.
        value: its metric.
        trial: its number.
        params: what Optuna chose, by name.
        study: all trials, for Optuna's own tools.
    """

    config: ReftConfig
    learning_rate: float
    value: float
    trial: int
    params: dict[str, Any]
    study: optuna.Study


def search(
    objective: Callable[[Attempt], float],
    space: SearchSpace,
    config: ReftConfig,
    folder: str | os.PathLike[str],
    *,
    metric: str = "eval_loss",
    direction: Literal["minimize", "maximize"] | None = None,
    n_trials: int = 40,
    seed: int | None = 0,
    pruner: optuna.pruners.BasePruner | None = None,
    progress: Callable[[str], Any] | None = say,
) -> SearchResult:
    """Try settings until the folder has so many finished trials, and save the best config and a picture of all.

    A search that was stopped goes on when it is called again with the same arguments; with a larger `n_trials` it goes
    further. Several processes may share a folder, if they have different seeds.

    Args:
        objective: trains and scores one attempt; see `Attempt.run` for Trainers and `Attempt.report` for other loops.
            An error that it raises ends the search.
        space: what is tried.
        config: all other fields of the configs. Its own blocks, positions and rank are tried first, with the middle of
            the learning rates, if the space has them.
        folder: gets `trials.db` (Optuna's SQLite storage), `best/adapter_config.json`, `best/search.json` with the
            learning rate and the score, and `trials.png`. The best config is up to date after every trial.
        metric: what the score is called; for `Attempt.run`, its name in the results of the trainer's evaluation.
        direction: None: smaller is better if the metric's name ends in "loss", else larger.
        n_trials: finished trials in the end, those given up early and those of earlier calls included.
        seed: of the proposals; None for another one each time.
        pruner: Optuna's, in place of the median rule, which begins once five trials are complete.
        progress: is given a line about each finished trial, and one that says where the best config is; None for
            silence.

    Raises:
        ValueError: before any training, for settings that cannot be; or if no trial got a score.
    """
    import optuna

    for name, value, kind in (("space", space, SearchSpace), ("config", config, ReftConfig), ("metric", metric, str)):
        if not isinstance(value, kind):
            raise ValueError(f"{name}={shown(value)} must be a {kind.__name__}.")
    if not callable(objective):
        raise ValueError(f"objective={shown(objective)} must be a function that trains and scores one attempt.")
    if seed is not None and not (is_integer(seed) and 0 <= seed < 2**31):
        raise ValueError(
            f"seed={shown(seed)} must be an integer from 0 to {2**31 - 1}, or None for another one each time."
        )
    if not isinstance(n_trials, int) or isinstance(n_trials, bool) or n_trials < 1:
        raise ValueError(f"n_trials={n_trials!r} must be an integer of at least 1.")
    direction = direction or ("minimize" if metric.endswith("loss") else "maximize")
    if direction not in ("minimize", "maximize"):
        raise ValueError(f"direction={direction!r} must be 'minimize', 'maximize' or None.")
    space.check(config)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # `progress` tells the same
    try:
        make_trials_file(folder, direction)
        study = optuna.create_study(
            study_name=STUDY,
            storage=address_of(folder / TRIALS),
            direction=direction,
            load_if_exists=True,
        )
        refuse_other_search(study, description(space, config, metric, direction), folder)
        # A seed of its own for each sitting: the same one would propose the same random settings again.
        sitting = None if seed is None else seed + len(study.trials)
        study.sampler = optuna.samplers.TPESampler(seed=sitting)
        start = space.start(config)
        kept = [trial for trial in study.trials if trial.state.name != "FAIL"]  # what was interrupted is tried again
        if start is not None and not any(start.items() <= _asked(trial).items() for trial in kept):
            study.enqueue_trial(start)
        study.pruner = pruner or optuna.pruners.MedianPruner()

        def run(trial: optuna.Trial) -> float:
            space.propose(trial)
            returned = objective(Attempt(trial, space.config(config, trial.params), metric))
            try:
                value = float(returned)
            except (TypeError, ValueError) as error:
                raise TypeError(
                    f"The objective returned {returned!r}, and not a number. It must return the score of the attempt, "
                    "as in: return attempt.run(trainer)"
                ) from error
            if not math.isfinite(value):
                raise optuna.TrialPruned(f"{metric} is {value}")
            return value

        def after(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
            if trial.state.name in FINISHED:
                if scored(study):
                    save_best(result_of(study, space, config), metric, folder)
                if progress is not None:
                    progress(line_about(study, trial, n_trials))

        done = len(finished(study))
        if done and progress is not None:
            progress(f"{done} trials of earlier calls are in {folder}")
        if done < n_trials:
            states = tuple(optuna.trial.TrialState[name] for name in FINISHED)
            enough = optuna.study.MaxTrialsCallback(n_trials, states)  # those of other processes, too, count
            study.optimize(run, callbacks=[after, enough], gc_after_trial=True)
    finally:
        optuna.logging.set_verbosity(verbosity)
    if not scored(study):
        raise ValueError(
            f"None of {len(finished(study))} trials got a finite {metric}. Look at the objective, and at "
            f"learning_rate={space.learning_rate!r}, which may be too high."
        )
    result = result_of(study, space, config)
    save_best(result, metric, folder)
    with staged(folder) as stage:
        draw_trials(study, space, metric).savefig(stage / PICTURE, format="png")
    if progress is not None:
        progress(last_line(result, metric, folder))
    return result


def make_trials_file(folder: Path, direction: str) -> None:
    """Put the file of an empty study in its place in one step, unless there is one: processes may begin at once."""
    import optuna

    if (folder / TRIALS).exists():
        return
    with tempfile.TemporaryDirectory(prefix=".making-", dir=folder) as made:
        fresh = Path(made) / TRIALS
        storage = optuna.storages.RDBStorage(address_of(fresh))
        optuna.create_study(study_name=STUDY, storage=storage, direction=direction)
        storage.engine.dispose()
        try:
            os.link(fresh, folder / TRIALS)
        except FileExistsError:  # another process was faster
            return
        except OSError:  # a file system without links, where the name cannot be taken in one step
            if not (folder / TRIALS).exists():
                fresh.rename(folder / TRIALS)


def address_of(file: Path) -> str:
    """A SQLite file as Optuna is given it. A path may hold a ? or a %, which mean something else in an address."""
    from sqlalchemy import URL  # Optuna's own means

    return str(URL.create("sqlite", database=str(file.resolve())))


def _asked(trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
    """The settings of a trial: those it was enqueued with, or has run with."""
    return {**trial.system_attrs.get("fixed_params", {}), **trial.params}


def description(space: SearchSpace, config: ReftConfig, metric: str, direction: str) -> dict[str, Any]:
    """What must be the same for trials to be comparable, as JSON has it."""
    fields = {name: value for name, value in config.to_dict().items() if name != "peft_version"}
    parts = {"metric": metric, "direction": direction, "config": fields, **asdict(space)}
    return json.loads(json.dumps(parts, default=lambda value: sorted(value) if isinstance(value, set) else str(value)))


def refuse_other_search(study: optuna.Study, wanted: dict[str, Any], folder: Path) -> None:
    """Note down what a new study is about.

    Raises:
        ValueError: if an old one is about something else.
    """
    stored = study.user_attrs.get("search")
    if stored is None:
        study.set_user_attr("search", wanted)
    elif stored != wanted:
        changed = [f"{k}: {stored.get(k)!r} there, {v!r} here" for k, v in wanted.items() if stored.get(k) != v]
        raise ValueError(
            f"The trials in {str(folder)!r} are of another search, with which these cannot be compared "
            f"({'; '.join(changed)}). Give this search a folder of its own, or the same arguments."
        )


def result_of(study: optuna.Study, space: SearchSpace, config: ReftConfig) -> SearchResult:
    """The best trial so far."""
    best = study.best_trial
    assert best.value is not None
    found = space.config(config, best.params)
    return SearchResult(found, best.params["learning_rate"], best.value, best.number, dict(best.params), study)


def save_best(result: SearchResult, metric: str, folder: Path) -> None:
    """Write the best config and what goes with it; a reader finds the old files or the new ones, never half of one."""
    best = folder / BEST
    best.mkdir(exist_ok=True)
    about = {"metric": metric, "value": result.value, "learning_rate": result.learning_rate, "trial": result.trial}
    about |= {"params": result.params, "finished": len(finished(result.study)), "complete": len(scored(result.study))}
    result.config.save_pretrained(str(best))
    write_text(best / "search.json", json.dumps(about, indent=2) + "\n")


def line_about(study: optuna.Study, trial: optuna.trial.FrozenTrial, n_trials: int) -> str:
    """One finished trial, the best until now and the time that the others will take, in a line."""
    done = finished(study)
    seconds = [t.duration.total_seconds() for t in done if t.duration is not None]
    if trial.value is not None and trial.state.name == TRAINED:
        outcome = f"{trial.value:.4g}"
    else:
        steps = trial.intermediate_values
        outcome = f"given up at step {max(steps)} with {steps[max(steps)]:.4g}" if steps else "diverged"
    best = f"best {study.best_trial.value:.4g} (trial {study.best_trial.number})" if scored(study) else "no best yet"
    took = trial.duration.total_seconds() if trial.duration is not None else 0.0
    left = sum(seconds) / len(seconds) * max(0, n_trials - len(done))
    return (
        f"{len(done)}/{n_trials}  trial {trial.number}: {outcome}  [{in_words(trial.params)}]  {took:.0f} s; "
        f"{best}; about {left / 60:.0f} min left"
    )


def last_line(result: SearchResult, metric: str, folder: Path) -> str:
    """Where the best config is, and how to load it."""
    best = folder / BEST
    return (
        f"Best: trial {result.trial} with {metric} {result.value:.4g}  [{in_words(result.params)}]. Its config is in "
        f"{best}: ReftConfig.from_pretrained({str(best)!r}), learning_rate={result.learning_rate:.4g}. "
        f"All trials: {folder / PICTURE}"
    )


def in_words(params: Mapping[str, Any]) -> str:
    """The settings of a trial.

    >>> in_words({"blocks": "last 3", "prefix": 4, "suffix": 1, "rank": 8, "learning_rate": 0.00123, "dropout": 0.1})
    'blocks last 3, f4+l1, rank 8, lr 0.0012, dropout 0.1'
    """
    named = {"blocks", "prefix", "suffix", "suffix_alone", "rank", "learning_rate"}
    others = "".join(f", {name} {value}" for name, value in params.items() if name not in named)
    words = f"blocks {params['blocks']}, {positions_of(params)}, rank {params['rank']}"
    return f"{words}, lr {params['learning_rate']:.2g}{others}"
