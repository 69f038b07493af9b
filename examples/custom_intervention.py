"""An intervention of your own: register a module, and train, save and load it by its name.

    python examples/custom_intervention.py    # seconds, no network

The edit here turns the hidden state within r directions instead of replacing what is there: with orthonormal
rows R and a skew-symmetric matrix S, h becomes h + Rᵀ(exp(S) - 1)Rh. Only the subspace's own content moves, and its
length stays what it was. A fresh adapter has S = 0 and changes nothing.
"""

from __future__ import annotations

import tempfile

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_reft import ReftConfig, get_interventions, register_intervention


class RotationReft(nn.Module):
    """h + Rᵀ(exp(S) - 1)Rh, applied to every vector of [..., d]."""

    def __init__(self, d: int, r: int):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(r, d) / d**0.5)
        self.turn = nn.Parameter(torch.zeros(r, r))

    @property
    def subspace(self) -> Tensor:
        """The edited directions [r, d], orthonormal; optional, but `get_interventions` shows it."""
        return torch.linalg.qr(self.rows.float().T).Q.T

    def forward(self, h: Tensor) -> Tensor:
        basis = self.subspace
        rotation = torch.linalg.matrix_exp((self.turn - self.turn.T).float())
        content = h.float() @ basis.T
        return h + ((content @ rotation.T - content) @ basis).to(h.dtype)


register_intervention("rotation", RotationReft)  # before an adapter that names it is made or loaded


def main() -> None:
    """Train it to answer four random prompts of a tiny model, then save and load it."""
    torch.manual_seed(0)
    settings = LlamaConfig(vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=4)
    base = LlamaForCausalLM(settings)
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    tokens = torch.randint(100, (4, 12))
    labels = tokens.masked_fill(torch.arange(12) < 8, -100)  # eight tokens of prompt, four of answer

    config = ReftConfig(intervention="rotation", r=8, positions="all", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    model.print_trainable_parameters()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for step in range(51):
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 0:
            print(f"step {step:2d}  loss {loss.item():.2f}")

    model.eval()
    for block, interventions in get_interventions(model).items():
        print(f"{block}: turns by up to {interventions[0].turn.detach().abs().max():.2f}")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        fresh = LlamaForCausalLM(settings)
        fresh.load_state_dict(weights)
        reloaded = PeftModel.from_pretrained(fresh, folder)
        assert torch.equal(reloaded(tokens).logits, model(tokens).logits)
    print("saved, loaded into a fresh model, and equal")


if __name__ == "__main__":
    main()
