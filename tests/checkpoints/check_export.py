"""Whether pyreft itself loads what `to_pyreft` writes, with the same logits. It runs in two environments:

python check_export.py write DIR     in this package's: adapters with random weights, exported, and their logits
python check_export.py read DIR      in pyreft's, see make_pyreft.py: loads them and prints max|dlogits| of each
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

BASE = Path(__file__).parent / "base" / "llama"
KINDS = ("loreft", "noreft", "direft", "odireft", "consreft", "lobireft")
LENGTHS = (6, 9)


def write(directory):
    from peft import get_peft_model

    from peft_reft import ReftConfig, get_interventions
    from peft_reft.convert import to_pyreft

    generator = torch.Generator().manual_seed(3)
    ids = torch.zeros(2, 9, dtype=torch.long)
    for row, length in zip(ids, LENGTHS):
        row[:length] = torch.randint(3, 40, (length,), generator=generator)
    for kind in KINDS:
        for share_weights in (True, False):
            config = ReftConfig(
                r=3, intervention=kind, positions="f2+l2", share_weights=share_weights, layers_to_transform=[0, 2]
            )
            model = get_peft_model(LlamaForCausalLM.from_pretrained(BASE), config).eval()
            for interventions in get_interventions(model).values():
                for parameter in interventions.parameters():
                    values = torch.randn(parameter.shape, generator=generator) * 0.5
                    parameter.data = values.bfloat16().float()  # ReftModel.load rounds the learned source to that
            name = f"{kind}-{'shared' if share_weights else 'separate'}"
            model.save_pretrained(directory / "ours" / name)
            to_pyreft(directory / "ours" / name, directory / "theirs" / name)
            batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
            with torch.no_grad():
                logits = model(**batch).logits
            save_file({**batch, "logits": logits}, directory / f"{name}.safetensors")


def read(directory):
    import pyreft

    places = [[[0, 1] for _ in LENGTHS], [[n - 2, n - 1] for n in LENGTHS]]
    for file in sorted(directory.glob("*.safetensors")):
        kind, weights = file.stem.split("-")
        stored, theirs = load_file(file), directory / "theirs" / file.stem
        base = LlamaForCausalLM.from_pretrained(BASE).eval()
        separate = weights == "separate"
        both = [a + b for a, b in zip(*places)]
        where = [places[0], places[0], places[1], places[1]] if separate else [both, both]
        how = "ReftModel.load"
        if kind in ("noreft", "direft"):
            how = "get_reft_model, load_state_dict"
            cls = {"noreft": pyreft.NoreftIntervention, "direft": pyreft.NodireftIntervention}[kind]
            settings = {"embed_dim": 16, "low_rank_dimension": 3, "add_bias": False, "dtype": torch.float32}
            listed = [
                {"layer": n, "component": "block_output", "low_rank_dimension": 3, "intervention": cls(**settings)}
                for n in ([0, 2, 0, 2] if separate else [0, 2])
            ]
            model = pyreft.get_reft_model(base, pyreft.ReftConfig(representations=listed))
            for key, intervention in model.interventions.items():
                intervention.load_state_dict(torch.load(theirs / f"intkey_{key}.bin", weights_only=True))
        else:
            model = pyreft.ReftModel.load(str(theirs), base)
            for intervention in model.interventions.values():
                intervention.float()  # the values are exact in bfloat16; computing with it would not be
        batch = {name: stored[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            _, output = model(batch, unit_locations={"sources->base": (None, where)})
        real = batch["attention_mask"].bool()
        off = (output.logits - stored["logits"])[real].abs().max().item()
        changed = (base(**batch).logits - stored["logits"])[real].abs().max().item()
        print(f"{file.stem:20} {how:32} max|dlogits| {off:.1e}, the adapter changes them by {changed:.1f}")


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
