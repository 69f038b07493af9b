"""Whether a backbone's file is the model: greedy answers of both, with an adapter and without.

Each token of the file's answer is chosen behind the model's answer so far. So rounded weights, which choose another
token now and then, are not counted wrong for all that follows; and if all are equal, the file's own answer is, too.

The adapter is a random one, edited at both ends of the prompt and in generated tokens; nothing has to be trained. For a
backbone with an adapter inside, that one is used.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoTokenizer, GenerationConfig

from peft_reft.export.answers import greedy_answer
from peft_reft.export.models import plain_generation
from peft_reft.export.programs import open_backbone
from peft_reft.export.tensors import read_edits
from peft_reft.tuner.adapters import set_strength
from peft_reft.tuner.config import ReftConfig

PROMPT = "The capital of France is Paris, and the capital of Italy is"
PROMPT_LENGTH = 16  # tokens of it at most, and of a prompt of random tokens
STRENGTHS = (1.0, 4.0, 16.0, 64.0)  # tried until the adapter changes the answer


def check_backbone(model: nn.Module, folder: Path, tokens: int = 12) -> tuple[list[str], bool]:
    """Compare a file with the model that it was made from.

    Args:
        model: the model, or the `PeftModel` whose adapter is in the graph.
        folder: where `export_backbone` wrote it. The prompt is a sentence if there is a tokenizer, too; else random
            tokens.
        tokens: length of the answers.

    Returns:
        Lines to be read, and whether all answers are equal.
    """
    run, description = open_backbone(folder)
    adapted: Any
    if description.baked is None:
        groups = min(2, description.max_groups or 2)
        config = ReftConfig(
            r=min(2, description.max_rank or 2),
            intervention="direft",
            positions="f2+l2" if groups == 1 else "f2+d2",
            share_weights=groups == 1,
            init_weights=False,
            task_type="CAUSAL_LM",
        )
        torch.manual_seed(0)
        adapted = get_peft_model(model, config, adapter_name="check")
        found = replace(read_edits(adapted, "check"), base_model=None)  # whatever the files call the model
        adapter, positions, share = description.inputs(found), found.positions, found.share_weights
    else:
        assert description.baked_sharing is not None
        adapted, adapter = model, None
        positions, share = description.baked, description.baked_sharing
    assert isinstance(adapted, PeftModel)
    columns = description.max_columns or PROMPT_LENGTH + tokens
    prompt = _prompt(folder, description.vocabulary, min(PROMPT_LENGTH, (columns + 1) // 2))
    length = len(prompt)
    tokens = min(tokens, columns - length + 1)  # the last token is not run
    lines, equal = [], True
    plain = _of_model(adapted, prompt, tokens, 0.0, description.end_tokens)
    for strength in (0.0, *STRENGTHS):
        expected = plain if strength == 0 else _of_model(adapted, prompt, tokens, strength, description.end_tokens)
        if strength and expected == plain and strength != STRENGTHS[-1]:
            continue
        past = description.empty_past()
        got = greedy_answer(run, prompt, adapter, positions, share, past, len(expected), strength, given=expected)
        same = sum(one == other for one, other in zip(got, expected))
        what = "the base model" if strength == 0 else f"an adapter at {positions}"
        lines.append(f"{what}: {same} of {len(expected)} tokens equal")
        equal = equal and got == expected
        if strength:
            if expected == plain:
                lines.append("the adapter does not change the answer, so that this shows nothing of it")
            break
    if description.baked is None:
        adapted.unload()
    return lines, equal


def _prompt(folder: Path, vocabulary: int, length: int) -> list[int]:
    """At most `length` tokens."""
    if (folder / "tokenizer_config.json").exists():
        ids: list[int] = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)(PROMPT)["input_ids"][:length]
        if ids and max(ids) < vocabulary:
            return ids
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, vocabulary, (length,), generator=generator).tolist()


def _of_model(model: Any, prompt: list[int], tokens: int, strength: float, ends: tuple[int, ...]) -> list[int]:
    """What the package answers greedily, up to the first token that ends an answer."""
    base, ids = model.get_base_model(), torch.tensor([prompt])
    settings = GenerationConfig(
        max_new_tokens=tokens, do_sample=False, eos_token_id=list(ends) or None, pad_token_id=ends[0] if ends else 0
    )
    set_strength(model, strength)
    with plain_generation(base), torch.no_grad():
        found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    set_strength(model, 1.0)
    return found[0, len(prompt) :].tolist()
