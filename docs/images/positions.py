"""Draws the pictures of docs/positions.md and docs/index.md as SVG: python docs/images/positions.py

What is coloured is worked out by the package itself: by `mark`, which names the columns to edit, and in the picture of
a model by what an adapter did to a real (tiny) one. `tests/test_docs_site.py` draws them anew and compares.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_reft import ReftConfig
from peft_reft.inspect import inspect_adapter
from peft_reft.positions import mark, parse_positions
from peft_reft.positions.prompts import IGNORED, Prompts, Tokens, find_prompts

IMAGES = Path(__file__).parent
CELL, GAP, LEFT, TOP, EDGE = 34, 4, 150, 16, 14  # pixels
COLOURS = {  # of the terms: fill
    "f": "#4c8edb",
    "l": "#e8833a",
    "m": "#57a773",
    "e": "#9b6bcc",
    "all": "#2fa6a0",
    "d": "#d1495b",
}
NAMES = {
    "f": "prefix (f)",
    "l": "suffix (l)",
    "m": "middle (m)",
    "e": "every K-th (e)",
    "all": "all",
    "d": "generated (d)",
}
SHADES = ["#4c8edb", "#e8833a", "#57a773", "#9b6bcc", "#2fa6a0", "#d1495b"]  # of interventions
PADDING = "pad"


@dataclass
class Row:
    """A line of a picture: its name; its tokens ("pad" for padding), each with a colour or None; which are answers."""

    name: str
    tokens: list[str]
    fills: list[str | None]
    answer: list[bool]
    gap: bool = False  # some room above


def svg(rows: list[Row], legend: dict[str, str], note: str, left: int = LEFT) -> str:
    """A picture of rows of tokens, the legend of its colours below; `note` is for those who cannot see it."""
    parts: list[str] = []
    y = TOP
    for row in rows:
        y += 10 if row.gap else 0
        middle = y + CELL / 2 + 5
        parts.append(f'<text x="{EDGE}" y="{middle:g}" class="name">{escape(row.name)}</text>')
        for column, (token, fill, answer) in enumerate(zip(row.tokens, row.fills, row.answer)):
            x = left + column * (CELL + GAP)
            kind = "padding" if token == PADDING else "answer" if answer else "prompt"
            style = f' style="fill:{fill}"' if fill else ""
            parts.append(f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" rx="5" class="{kind}"{style}/>')
            text = "edited" if fill else kind
            parts.append(f'<text x="{x + CELL / 2:g}" y="{middle:g}" class="token {text}">{escape(token)}</text>')
        y += CELL + GAP
    y += 12
    x = EDGE
    for name, fill in legend.items():
        parts.append(f'<rect x="{x}" y="{y}" width="14" height="14" rx="3" style="fill:{fill}" class="prompt"/>')
        parts.append(f'<text x="{x + 20}" y="{y + 12}" class="legend">{escape(name)}</text>')
        x += 20 + 7 * len(name) + 24
    y += 14 + TOP if legend else 0
    width = max([left + max(len(row.tokens) for row in rows) * (CELL + GAP) + EDGE, x])
    style = (
        "text{font-family:sans-serif;font-size:14px;fill:#222}.name{font-family:monospace}.token{text-anchor:middle}"
        ".edited{fill:#fff;font-weight:bold}.padding{fill:#aaa;font-size:11px}.legend{font-size:12px}"
        "rect.prompt{fill:#fff;stroke:#777}rect.answer{fill:#f1f1f1;stroke:#777;stroke-dasharray:4 3}"
        "rect.padding{fill:#fafafa;stroke:#ddd}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y}" viewBox="0 0 {width} {y}" role="img">\n'
        f"<title>{escape(note)}</title>\n<style>{style}</style>\n"
        f'<rect width="{width}" height="{y}" rx="8" style="fill:#fff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def kinds(spec: str, prompts: Prompts, row: int = 0) -> list[str | None]:
    """The kind of the term that edits each column of a row, None for columns that are not edited."""
    parsed = parse_positions(spec)
    marks = mark(parsed, prompts)[row]  # [G, S]
    return [next((t.symbol for t, m in zip(parsed.terms, column) if m), None) for column in marks.T.tolist()]


def labelled(tokens: list[str], answer: list[bool], turns: str = "first") -> Prompts:
    """Where the prompts lie in one row, told by labels."""
    valid = torch.tensor([[token != PADDING for token in tokens]])
    labels = torch.tensor([[1 if is_answer else IGNORED for is_answer in answer]])
    return find_prompts(valid, labels, turns=turns)


def coloured(name: str, tokens: list[str], answer: list[bool], edited: list[str | None], gap: bool = False) -> Row:
    """A row whose colours are those of its terms."""
    return Row(name, tokens, [COLOURS[kind] if kind else None for kind in edited], answer, gap)


def legend(*terms: str) -> dict[str, str]:
    return {NAMES[term]: COLOURS[term] for term in terms} | {"not edited": "#fff"}


def notation() -> str:
    tokens, answer = list("ABCDEFGHIJ") + list("uvwxyz"), [False] * 10 + [True] * 6
    specs = ["f3", "l2", "f3+l2", "m2", "e4", "all", "d2", "f3+l3+d"]
    rows = [coloured(spec, tokens, answer, kinds(spec, labelled(tokens, answer))) for spec in specs]
    note = "Which tokens each term edits, in a prompt of ten tokens (A to J) with an answer of six (u to z)"
    return svg(rows, legend("f", "l", "m", "e", "all", "d"), note, left=100)


def short() -> str:
    rows = []
    for spec in ("f2+l2", "f3+l1"):
        for n in (6, 4, 3, 2, 1):
            tokens = list("ABCDEF"[:n])
            edited = kinds(spec, find_prompts(torch.ones(1, n, dtype=torch.bool)))
            rows.append(coloured(spec if n == 6 else "", tokens, [False] * n, edited, gap=n == 6))
    note = "f2+l2 and f3+l1 in prompts of six, four, three, two and one token: every token is edited at most once"
    return svg(rows, legend("f", "l"), note, left=80)


def padding() -> str:
    documents = [(list("ABCD"), list("xy")), (list("ABCDEF"), list("xy"))]
    rows = []
    for side in ("left", "right"):
        for number, (prompt, completion) in enumerate(documents):
            pads = [PADDING] * (8 - len(prompt) - len(completion))
            tokens = pads + prompt + completion if side == "left" else prompt + completion + pads
            answer = [token in completion for token in tokens]
            edited = kinds("f1+l2", labelled(tokens, answer))
            rows.append(coloured(f"padded {side}" if number == 0 else "", tokens, answer, edited, gap=number == 0))
    note = "f1+l2 in two prompts with their answers, padded on the left and on the right: the same tokens are edited"
    return svg(rows, legend("f", "l") | {"answer": "#f1f1f1"}, note)


def ends() -> str:
    prompt, completion = ["A", "B", "C", ":"], list("xyz")
    tokens, answer = prompt + completion, [False] * 4 + [True] * 3
    valid, ids = torch.ones(1, 7, dtype=torch.bool), torch.tensor([[1, 2, 3, 9, 4, 5, 6]])
    labels = torch.tensor([[1 if is_answer else IGNORED for is_answer in answer]])
    found = {
        "labels": Tokens(valid, labels, None, None, ids).prompts(),
        "generate": find_prompts(valid[:, :4]).followed_by(3),
        'prompt_end=":"': Tokens(valid, None, None, None, ids).prompts(prompt_end=[9]),
        "none of these": Tokens(valid, None, None, None, ids).prompts(),
    }
    rows = [coloured(name, tokens, answer, kinds("f1+l1", prompts)) for name, prompts in found.items()]
    note = "f1+l1 where labels, generate or a marker tell the prompt's end, and where nothing does: then all is prompt"
    return svg(rows, legend("f", "l") | {"answer": "#f1f1f1"}, note, left=170)


def turns() -> str:
    tokens = ["U", "u", "A", "a", "U", "u", "u", "A", "a"]
    answer = [column in (3, 8) for column in range(9)]
    rows = [
        coloured(f'turns="{which}"', tokens, answer, kinds("f1+l1", labelled(tokens, answer, which)))
        for which in ("first", "last", "all")
    ]
    note = "f1+l1 in a conversation of two turns: the prompt of the first, of the last, or of all turns is edited"
    return svg(rows, legend("f", "l") | {"answer": "#f1f1f1"}, note, left=140)


def weights() -> str:
    tokens, spec = list("ABCDEFGH"), parse_positions("f2+l3")
    prompts = find_prompts(torch.ones(1, 8, dtype=torch.bool))
    rows = []
    for share in (True, False, "position"):
        groups = mark(spec, prompts, share)[0].T.tolist()
        number = [None if not any(column) else 0 if share is True else column.index(True) for column in groups]
        assert len({n for n in number if n is not None}) == spec.num_interventions(share)
        rows.append(
            Row(f"share_weights={share!r}", tokens, [None if n is None else SHADES[n] for n in number], [False] * 8)
        )
    note = "f2+l3 with share_weights True, False and 'position': one, two and five interventions in each block"
    return svg(rows, {f"intervention {n + 1}": SHADES[n] for n in range(5)}, note, left=240)


def model() -> str:
    """What an adapter on two of four blocks did to a tiny model."""
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = ReftConfig(r=2, positions="f2+l1", layers_to_transform=[1, 3], init_weights=False, task_type="CAUSAL_LM")
    tiny = get_peft_model(LlamaForCausalLM(LlamaConfig(vocab_size=20, **size)), config).eval()
    tokens = list("ABCDEF")
    found = inspect_adapter(tiny, {"input_ids": torch.arange(6)[None]}, effects=False)
    moved = {(row["block"], row["position"]): row["term"] for row in found.edits if row["edit_norm"] > 0}
    rows = []
    for number in (3, 2, 1, 0):
        edited = [moved.get((f"model.layers.{number}", column)) for column in range(6)]
        rows.append(coloured(f"block {number}", tokens, [False] * 6, [term[0] if term else None for term in edited]))
    rows.append(Row("input", tokens, [None] * 6, [False] * 6, gap=True))
    note = 'positions="f2+l1", layers_to_transform=[1, 3]: the outputs of blocks 1 and 3 are edited at three tokens'
    return svg(rows, legend("f", "l"), note, left=100)


PICTURES = {
    "positions-notation.svg": notation,
    "positions-short.svg": short,
    "positions-padding.svg": padding,
    "positions-end.svg": ends,
    "positions-turns.svg": turns,
    "positions-weights.svg": weights,
    "positions-model.svg": model,
}


def main() -> None:
    """Write all pictures."""
    for name, draw in PICTURES.items():
        (IMAGES / name).write_text(draw(), encoding="utf-8")
        print(IMAGES / name)


if __name__ == "__main__":
    main()
