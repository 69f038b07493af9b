"""Finding good settings: `search` tries blocks × prefix × suffix × rank × learning rate on a trainer of yours.

How a trial trains and is scored is the caller's business, in one function:

    def objective(attempt):
        args = SFTConfig(learning_rate=attempt.learning_rate, eval_strategy="steps", eval_steps=50, ...)
        trainer = SFTTrainer(load_model(), args=args, peft_config=attempt.config, ...)
        return attempt.run(trainer)

    search(objective, SearchSpace.of(load_model()), ReftConfig(task_type="CAUSAL_LM"), "my-search")

Needs Optuna and matplotlib, the extra `search` of the package. space.py says what is tried, attempt.py how a trial is
scored, trials.py which trials count, study.py runs the search, picture.py draws it.
"""

from peft_reft.search.attempt import Attempt
from peft_reft.search.space import SearchSpace, block_choices
from peft_reft.search.study import SearchResult, search

__all__ = ["Attempt", "SearchResult", "SearchSpace", "block_choices", "search"]
