"""Checkpoints made by pyreft, with the logits that it gives. Needs make_base.py to have run.

Made with Python 3.11 and torch==2.13.0 transformers==4.45.1 pyreft==0.1.0 pyvene==0.1.8 numpy==2.2.6 datasets==3.0.1
accelerate==0.34.2 (pyreft and pyvene installed with --no-deps): `python make_pyreft.py` writes pyreft/<name>/, each as
`ReftModel.save` leaves it, plus logits.safetensors: input_ids, attention_mask, unit_locations (as handed to pyvene,
[interventions, rows, positions]) and the logits. Dropout is off; every checkpoint is trained for a few steps.
"""

import json
import shutil
from pathlib import Path

import pyreft
import torch
from pyreft.dataset import ReftGenerationDataset, get_intervention_locations
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, RobertaForSequenceClassification

HERE = Path(__file__).parent
OUT = HERE / "pyreft"
LENGTHS = (6, 9)
KINDS = {
    "loreft": pyreft.LoreftIntervention,
    "noreft": pyreft.NoreftIntervention,
    "consreft": pyreft.ConsreftIntervention,
    "lobireft": pyreft.LobireftIntervention,
    "direft": pyreft.DireftIntervention,
    "nodireft": pyreft.NodireftIntervention,
}


def rows(lengths, front=0, behind=0):
    """Random rows padded on the right, with `front` pad tokens before each and at least `behind` behind it."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.zeros(len(lengths), front + max(lengths) + behind, dtype=torch.long)
    for row, length in zip(ids, lengths):
        row[front : front + length] = torch.randint(3, 40, (length,), generator=generator)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def component(form, layer):
    return form.format(layer) if "{" in form else form


def build(base, kind, layers, r=3, form="block_output", dtype=torch.float32, **settings):
    """A pyreft model with one intervention per entry of `layers`; a layer that is named twice has separate weights."""
    made = [
        {
            "layer": layer,
            "component": component(form, layer),
            "low_rank_dimension": r,
            "intervention": KINDS[kind](embed_dim=16, low_rank_dimension=r, dtype=dtype, **settings),
        }
        for layer in layers
    ]
    return pyreft.get_reft_model(base, pyreft.ReftConfig(representations=made))


def forward(model, batch, locations):
    _, output = model(batch, unit_locations={"sources->base": (None, locations)})
    return output.logits


def train(model, batch, locations, decay=(), more=()):
    """A few steps towards random logits; interventions of the layers in `decay` with weight decay."""
    parameters = {True: list(more), False: []}
    for key, intervention in model.interventions.items():
        wants_decay = any(f"layer_{layer}_" in key for layer in decay)
        parameters[wants_decay] += list(intervention.parameters())
    parameters[False] += parameters[True] if not decay else []
    groups = [{"params": parameters[False], "weight_decay": 0.0}]
    if decay:
        groups.append({"params": parameters[True], "weight_decay": 0.5})
    optimizer = torch.optim.AdamW(groups, lr=0.05)
    target = torch.randn_like(forward(model, batch, locations).float())
    for _ in range(8):
        loss = (forward(model, batch, locations).float() - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def store(name, model, batch, locations, **saving):
    directory = OUT / name
    shutil.rmtree(directory, ignore_errors=True)
    model.save(str(directory), **saving)
    with torch.no_grad():
        logits = forward(model, batch, locations)
    save_file(
        {**batch, "unit_locations": torch.tensor(locations), "logits": logits.contiguous()},
        str(directory / "logits.safetensors"),
    )
    return directory


def places(positions, lengths, interventions, share_weights, front=0, less=0, pad_mode="first"):
    """pyreft's own locations for each row, as [interventions][row][position]."""
    first_n, last_n = positions
    found = [
        get_intervention_locations(
            last_position=n - less,
            first_n=first_n,
            last_n=last_n,
            num_interventions=interventions,
            share_weights=share_weights,
            pad_mode=pad_mode,
        )
        for n in lengths
    ]
    return [[[place + front for place in row[number]] for row in found] for number in range(interventions)]


def llama(dtype=torch.float32):
    return LlamaForCausalLM.from_pretrained(HERE / "base" / "llama", torch_dtype=dtype).eval()


def main():
    torch.manual_seed(0)
    batch = rows(LENGTHS)
    shared, separate = ([0, 2], [0, 2, 0, 2])
    for kind in KINDS:
        for name, layers in {"shared": shared, "separate": separate}.items():
            settings = {"add_bias": name == "shared"} if kind in ("noreft", "nodireft") else {}
            model = build(llama(), kind, layers, **settings)
            where = places((2, 2), LENGTHS, len(layers), name == "shared")
            train(model, batch, where)
            store(f"{kind}-{name}", model, batch, where)

    where = places((2, 2), LENGTHS, 2, True)
    model = build(llama(), "loreft", shared, act_fn="relu")
    train(model, batch, where)
    store("loreft-relu", model, batch, where)

    model = build(llama(), "consreft", shared)
    train(model, batch, where, decay=[0])  # R of block 0 becomes zero: -0.99 is cut to 0
    store("consreft-decay", model, batch, where)

    model = build(llama(), "loreft", shared, r=16)
    train(model, batch, where)
    store("loreft-square", model, batch, where)
    model = build(llama(), "direft", shared, r=16)
    train(model, batch, where)
    store("direft-square", model, batch, where)

    for kind in ("loreft", "direft"):
        model = build(llama(torch.bfloat16), kind, shared, dtype=torch.bfloat16)
        train(model, batch, where)
        store(f"{kind}-bfloat16", model, batch, where)

    for name, form, layers in (
        ("loreft-path", "model.layers[{}].output", [0, 2]),
        ("loreft-mlp-path", "model.layers[{}].mlp.output", [0, 2]),
        ("loreft-block-input", "block_input", [1, 2]),
        ("loreft-mlp-output", "mlp_output", [0, 2]),
    ):
        model = build(llama(), "loreft", layers, form=form)
        train(model, batch, where)
        store(name, model, batch, where)

    torch.manual_seed(0)
    base = RobertaForSequenceClassification.from_pretrained(HERE / "base" / "roberta").eval()
    model = build(base, "loreft", separate, form="roberta.encoder.layer[{}].output")
    for parameter in base.classifier.parameters():
        parameter.requires_grad = True
    batch = rows(LENGTHS, behind=1)  # as pyreft's GLUE data set: a group with fewer positions is filled up with the pad
    where = places((2, 1), LENGTHS, 4, False, pad_mode="last")
    train(model, batch, where, more=base.classifier.parameters())
    store("loreft-roberta", model, batch, where, include_model=True)

    # Positions: prompts of 3 to 8 tokens behind a pad token, counted to the prompt's end and, as
    # ReftGenerationDataset does, to one before it. (Shorter ones among longer ones pyreft cannot put in one batch.)
    lengths = tuple(range(3, 9))
    batch = rows(lengths, front=1)
    for name, less in {"short": 0, "short-one-less": 1}.items():
        where = places((2, 2), lengths, 4, False, front=1, less=less)
        model = build(llama(), "loreft", separate)
        train(model, batch, where)
        store(f"loreft-{name}", model, batch, where)
    generation_dataset()


def generation_dataset():
    """What pyreft's own data set makes of a few prompts: its columns and its ids."""
    words = ["<pad>", "<eos>", "<unk>", *(f"w{number}" for number in range(37))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=64
    )
    data = [
        {"prompt": " ".join(f"w{number}" for number in range(n)) + " ", "completion": "w30 w31 "} for n in range(1, 9)
    ]
    for share_weights in (True, False):
        made = ReftGenerationDataset(
            "t",
            "t",
            tokenizer,
            dataset=data,
            position="f2+l2",
            num_interventions=2,
            share_weights=share_weights,
            prompt_field="prompt",
            completion_field="completion",
        )
        listed = [
            {
                "input_ids": item["input_ids"].tolist(),
                "labels": item["labels"].tolist(),
                "intervention_locations": item["intervention_locations"],
            }
            for item in made
        ]
        name = "shared" if share_weights else "separate"
        (OUT / f"generation-dataset-{name}.json").write_text(json.dumps(listed) + "\n")


if __name__ == "__main__":
    main()
