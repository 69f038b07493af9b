"""What the tests of trainers share: a tokenizer of words, data sets of random ones, and scores by a slow loop.

The words are the ids of the tiny models in conftest.py. What is expected of a trainer is computed here row by row,
without padding, with columns that are named one by one; trainers, labels and collators play no part in it.
"""

from __future__ import annotations

from typing import Any

import reference
import torch
import transformers
from conftest import EOS, PAD
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

CHAT = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
QUIET = {
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "disable_tqdm": True,
}


def word_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """w3 ... w89 are words; the chat template writes roles as words."""
    words = {"<pad>": PAD, "<eos>": EOS, "<unk>": 2, **{f"w{i}": i for i in range(3, 90)}, "user": 90, "assistant": 91}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def rows_of_text(rows: int, seed: int = 1, **sizes: tuple[int, int]) -> Dataset:
    """A data set whose columns hold random words.

    Args:
        sizes: name of a column -> (fewest words, how many different lengths); prompts of one word included if so.
    """
    draw = torch.Generator().manual_seed(seed)

    def text(size: int) -> str:
        return " ".join(f"w{int(number)}" for number in torch.randint(3, 90, (size,), generator=draw))

    data = [{name: text(least + row % kinds) for name, (least, kinds) in sizes.items()} for row in range(rows)]
    return Dataset.from_list([{k: v if k == "prompt" else " " + v for k, v in row.items()} for row in data])


def tokens_of(model: Any) -> list[Tensor]:
    """All trained weights, detached copies."""
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


def locations_in_prompt(positions: str, prompt: int, answer: int = 0) -> Tensor:
    """Columns [1, P] that `positions` names in a row of so many prompt and answer tokens, by the reference loop."""
    terms = [term for term in positions.split("+") if term[0] != "d"]
    columns = [column for group in reference.select("+".join(terms), prompt) for column in group] if terms else []
    for term in positions.split("+"):
        if term[0] == "d":
            every = int(term[1:] or 1)
            columns += [prompt + number for number in range(answer) if (number + 1) % every == 0]
    return torch.tensor([columns or [-1]])


@torch.no_grad()
def answer_log_probs(model: Any, ids: Tensor, prompt: int, positions: str | None, temperature: float = 1.0) -> Tensor:
    """Log-probabilities [n - prompt] of the tokens after the prompt, in a forward of this row alone.

    Args:
        ids: [n], without padding.
        positions: None to count over the whole row, as a forward without labels does.
    """
    answer = ids.shape[0] - prompt
    locations = None if positions is None else locations_in_prompt(positions, prompt, answer)
    logits = model(input_ids=ids[None], intervention_locations=locations).logits[0, prompt - 1 : -1]
    return (logits.float() / temperature).log_softmax(-1).gather(-1, ids[prompt:, None])[:, 0]


def sequence_scores(model: Any, batch: dict[str, Tensor], positions: str | None, prefix: str = "") -> Tensor:
    """Summed log-probabilities [B] of the completions in a batch of one of TRL's preference collators."""
    ids, mask, completion = (batch[prefix + name] for name in ("input_ids", "attention_mask", "completion_mask"))
    scores = []
    for row in range(ids.shape[0]):
        own = mask[row].bool()
        prompt = int((mask[row] - completion[row]).sum())
        scores.append(answer_log_probs(model, ids[row][own], prompt, positions).sum())
    return torch.stack(scores)
