"""What ReFT costs the host: its Python and its small operations, next to LoRA and to the same edit in plain hooks.

    python benchmarks/host_time.py                       # everything, in about two minutes; writes JSON and Markdown
    python benchmarks/host_time.py --only forward,train  # some parts
    python benchmarks/host_time.py --rounds 100          # narrower quartiles

On a model so small that arithmetic costs next to nothing (hidden 64, 30 blocks, 2 x 16 tokens) time is what the host
needs to get from one operation to the next; a GPU waits for the same. *Base* is the model without adapter, *floor* the
model with one trained vector in its first block, *plain hooks* the adapter's own edit as a hook of five lines that is
told the columns: the least that the edit can cost. LoRA has r=8 on q and v; LoReFT r=4, f2+l2.

Ratios are of CPU time within one round of one process with one thread: every method runs once a round, in rotating
order. The table gives the median and quartiles of the rounds' ratios; a goal is judged by the median.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import common
import torch
from common import Q_V, Floor, Times, lora_config, markdown_table, met_or_not, reft_config, show, with_same_weights
from peft import get_peft_model
from torch import Tensor, nn

from peft_reft import get_interventions

METHODS = {"reference": "base or floor, ms", "hooks": "plain hooks", "reft": "LoReFT", "lora": "LoRA q,v"}
POSITIONS = "f2+l2"
VOCAB = 100


class Figure(NamedTuple):
    """One line of the table.

    Attributes:
        name: what is measured.
        value: the figure; a spread (`common.spread`) or a number.
        goal: the largest value that is good, and in `goal_words` what else is asked.
        met: whether it is.
        methods: what the figure is made of, by method: milliseconds of the reference, ratios to it of the others.
    """

    name: str
    value: Any
    goal: float
    met: bool
    methods: dict[str, Any]
    goal_words: str = ""


# The models.


class PlainHooks(nn.Module):
    """The edit of a ReFT model in one hook per block, with the places of one batch written down.

    What is trained is what LoReFT trains besides its rows: the projection down and the bias.

    Args:
        model: a copy of the base model.
        adapted: the ReFT model whose edit it is; its equation is affine, so that its effect on zero and on the unit
            vectors says all about it.
        places: LongTensor [N], the edited tokens of a batch that is flattened to [B * S, D].
    """

    def __init__(self, model: nn.Module, adapted: nn.Module, places: Tensor):
        super().__init__()
        self.model = model
        self.down, self.bias = nn.ParameterList(), nn.ParameterList()
        for name, (intervention,) in get_interventions(adapted).items():
            up = intervention.subspace.detach()
            with torch.no_grad():
                zero, units = torch.zeros(up.shape[-1]), torch.eye(up.shape[-1])
                bias = nn.Parameter(intervention(zero) @ up.mT)
                down = nn.Parameter((intervention(units) - units) @ up.mT - bias)
            self.down.append(down)
            self.bias.append(bias)

            def edit(block: nn.Module, args: Any, h: Tensor, down: Tensor = down, bias: Tensor = bias, up: Tensor = up):
                if h.shape[1] == 1:  # a decode step
                    return h
                flat = h.view(-1, h.shape[-1])
                edits = torch.addmm(bias, flat.index_select(0, places), down) @ up
                return flat.index_add(0, places, edits).view(h.shape)

            model.get_submodule(name).register_forward_hook(edit)

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


class Work:
    """The settings of one run, and the small model that most parts share."""

    def __init__(self, rounds: int):
        self.rounds = rounds
        self.base = common.llama(
            hidden=64, blocks=30, intermediate=128, vocab=VOCAB, num_attention_heads=4, num_key_value_heads=4
        )
        self.inputs = common.batch(2, 16, VOCAB)

    def unlabelled(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.inputs.items() if name != "labels"}


def adapted(base: nn.Module, config: Any, name: str = "default") -> nn.Module:
    """The base model with an adapter that does something: random weights, so that no part of an edit is zero."""
    model = get_peft_model(with_same_weights(base), config, adapter_name=name)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def compared(base: nn.Module, inputs: dict[str, Tensor], training: bool) -> dict[str, nn.Module]:
    """The methods, on the base model's own weights; the plain hooks are made for `inputs`.

    Raises:
        RuntimeError: if the hooks and the ReFT model are not the same edit.
    """
    rows, columns = inputs["input_ids"].shape
    end = columns // 2 if "labels" in inputs else columns
    places = (torch.arange(rows)[:, None] * columns + torch.tensor([0, 1, end - 2, end - 1])).flatten()
    reft = adapted(base, reft_config(positions=POSITIONS))
    models = {
        "reference": Floor(with_same_weights(base)) if training else with_same_weights(base),
        "hooks": PlainHooks(with_same_weights(base), reft, places),
        "reft": reft,
        "lora": adapted(base, lora_config(Q_V)),
    }
    for model in models.values():
        model.train(training)
    with torch.no_grad():
        reference, hooks, reft = (models[name](**inputs).logits for name in ("reference", "hooks", "reft"))
    if (reft - hooks).abs().max() > 1e-3 * (reft - reference).abs().max():
        raise RuntimeError("The plain hooks do not make the adapter's edit, so that their times say nothing.")
    return models


# What is timed.


def forward(model: nn.Module, inputs: dict[str, Tensor]) -> Callable[[], Any]:
    """Without gradients. The mode is set each time, as a trainer does; what that costs grows with the modules."""

    @torch.no_grad()
    def run() -> None:
        model.eval()
        model(**inputs)

    return run


def training_step(model: nn.Module, inputs: dict[str, Tensor]) -> Callable[[], Any]:
    """Forward and backward; the optimizer's own time depends on how many tensors there are, not on the method."""

    def run() -> None:
        model.train()
        model(**inputs).loss.backward()
        for parameter in trained:
            parameter.grad = None

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return run


def time_methods(base: nn.Module, inputs: dict[str, Tensor], training: bool, rounds: int) -> Times:
    step = training_step if training else forward
    models = compared(base, inputs, training)
    return common.interleaved({name: step(model, inputs) for name, model in models.items()}, rounds)


def ratio(times: Times, name: str, reference: str) -> dict[str, float]:
    return times.ratio(name, reference, "cpu")


def extra(times: Times) -> float:
    """What ReFT adds to the reference, in what LoRA adds to it; of medians, since a round's differences are noisy."""
    reft, lora = (ratio(times, name, "reference")["median"] - 1 for name in ("reft", "lora"))
    return reft / lora


def by_method(times: Times) -> dict[str, Any]:
    values = {name: ratio(times, name, "reference") for name in times.cpu if name != "reference"}
    return {"reference": times.milliseconds("reference", "cpu"), **values}


def figure(name: str, value: Any, goal: float, methods: dict[str, Any] | None = None) -> Figure:
    return Figure(name, value, goal, (value["median"] if isinstance(value, dict) else value) <= goal, methods or {})


# The parts.


def forward_part(work: Work) -> list[Figure]:
    """A forward without gradients, of an adapter in training: its weights are not frozen."""
    times = time_methods(work.base, work.unlabelled(), False, work.rounds)
    return [
        figure("forward / plain hooks", ratio(times, "reft", "hooks"), 1.06, by_method(times)),
        figure("forward: extra / LoRA's extra", extra(times), 0.55),
    ]


def train_part(work: Work) -> list[Figure]:
    times = time_methods(work.base, work.inputs, True, work.rounds)
    return [
        figure("training step / plain hooks", ratio(times, "reft", "hooks"), 1.08, by_method(times)),
        figure("training: extra / LoRA's extra", extra(times), 0.75),
    ]


def generate_part(work: Work) -> list[Figure]:
    times = time_generate(work.base, work.unlabelled(), work.rounds // 4 or 1)
    return [figure("generate 24 tokens / base", ratio(times, "reft", "reference"), 1.01, by_method(times))]


def time_generate(base: nn.Module, prompt: dict[str, Tensor], rounds: int) -> Times:
    """Greedy, one prefill and 23 decode steps, in which the plain hooks return at their first line."""
    models: dict[str, Any] = compared(base, prompt, training=False)
    models["hooks"] = models["hooks"].model
    settings = {"min_new_tokens": 24, "max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    functions = {name: lambda m=model: m.generate(**prompt, **settings) for name, model in models.items()}
    return common.interleaved(functions, rounds)


def operations_part(work: Work) -> list[Figure]:
    """Tensor operations, views left out, that a forward has beside those of its blocks' edits."""
    figures = []
    for training, goal in ((False, 30), (True, 40)):
        _, once = common.per_block_and_once(common.added_operations(common.batch(4, 128, 1000), 1000, training))
        figures.append(figure(f"small operations once per forward{' in training' * training}", once, goal))
    return figures


def large_part(work: Work) -> list[Figure]:
    """Where arithmetic counts: hidden 768, 12 blocks, 4 x 128 tokens. Few rounds: one takes seconds."""
    base = common.llama(vocab=1000)
    inputs = common.batch(4, 128, 1000)
    figures = []
    for name, training in (("forward / base", False), ("training step / floor", True)):
        times = time_methods(base, inputs, training, work.rounds // 8 or 1)
        value, lora = (ratio(times, method, "reference") for method in ("reft", "lora"))
        below = value["median"] < lora["median"]
        judged = figure(f"hidden 768: {name}", value, 1.02, by_method(times))
        figures.append(judged._replace(met=judged.met and below, goal_words=", and below LoRA"))
    prompt = {name: tensor for name, tensor in inputs.items() if name != "labels"}
    times = time_generate(base, prompt, work.rounds // 8 or 1)
    value = ratio(times, "reft", "reference")
    return [*figures, figure("hidden 768: generate 24 tokens / base", value, 1.01, by_method(times))]


def adapters_part(work: Work) -> list[Figure]:
    """64 rows with an adapter each in one forward, hidden 768, 12 blocks; the longer the rows, the less it matters."""
    base = common.llama(vocab=1000)
    names = [f"a{number}" for number in range(64)]
    models = {}
    for method, make in (("reft", lambda: reft_config(positions=POSITIONS)), ("lora", lambda: lora_config(Q_V))):
        models[method] = adapted(base, make(), names[0])
        for name in names[1:]:
            models[method].add_adapter(name, make())
        models[method].eval().requires_grad_(False)
    figures = []
    for columns in (8, 16):
        inputs = common.batch(64, columns, 1000, labelled=False) | {"logits_to_keep": 1}
        functions = {"reference": forward(with_same_weights(base), inputs)}
        for method, model in models.items():
            functions[method] = forward(model, inputs | {"adapter_names": names})
            functions[f"{method}, one"] = forward(model, inputs)
        times = common.interleaved(functions, work.rounds // 10 or 1, warmup=1)
        one = {method: ratio(times, method, f"{method}, one") for method in models}
        words = f"; the base model has {ratio(times, 'reference', 'lora')['median']:.3f}"
        title = f"64 adapters in one batch of 64 × {columns} tokens"
        figures += [
            figure(f"{title} / one", one["reft"], 1.05, one),
            figure(f"{title} / LoRA's", ratio(times, "reft", "lora"), 0.85)._replace(goal_words=words),
        ]
    return figures


def import_part(work: Work) -> list[Figure]:
    """On top of peft, in CPU time, which other work disturbs less."""
    value = common.import_milliseconds(3)["cpu"]
    return [figure("import peft_reft after peft, ms", value, 40)]


PARTS: dict[str, Callable[[Work], list[Figure]]] = {
    "forward": forward_part,
    "train": train_part,
    "generate": generate_part,
    "operations": operations_part,
    "large": large_part,
    "adapters": adapters_part,
    "import": import_part,
}


def table(figures: list[Figure]) -> str:
    cells = (
        [
            line.name,
            show(line.value),
            f"≤ {line.goal:g}{line.goal_words}",
            met_or_not(line.met),
            *(
                show(line.methods.get(name)) + " ms" * (name == "reference" and name in line.methods)
                for name in METHODS
            ),
        ]
        for line in figures
    )
    return markdown_table(["figure", "LoReFT", "goal", "met", *METHODS.values()], cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME", help=f"parts, separated by commas: {','.join(PARTS)}")
    parser.add_argument("--rounds", type=int, default=40, help="rounds of the short measurements (default 40)")
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    environment = {**common.environment(), "command": " ".join(["python", *sys.argv])}
    path = common.result_path("host-time", "json")
    work = Work(arguments.rounds)
    figures: list[Figure] = []
    for name in arguments.only.split(",") if arguments.only else PARTS:
        begin = time.perf_counter()
        found = PARTS[name](work)
        gc.collect()
        seconds = round(time.perf_counter() - begin)
        print(f"[{name}: {seconds} s]", file=sys.stderr, flush=True)
        figures += found
        if not arguments.no_write:
            part = {"run": environment, "seconds": seconds, "rows": [line._asdict() for line in found]}
            parts = common.keep(path, name, part, PARTS)
            kept = [Figure(**line) for part in parts.values() for line in part["rows"]]
            text = f"# What ReFT costs the host\n\n{table(kept)}\n\n{common.origins(parts)}\n"
            path.with_suffix(".md").write_text(text)
    print(table(figures))


if __name__ == "__main__":
    main()
