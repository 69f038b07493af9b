"""The section that a saved adapter's README.md gets, whoever writes the rest of the card."""

from __future__ import annotations

import os
import re
import stat
import types
from pathlib import Path

import pytest
import torch
from conftest import inputs_of, logits, randomize, reft_model, tiny_model
from datasets import Dataset
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast
from transformers.utils import hub
from trl import SFTConfig, SFTTrainer

import peft_reft.integrations.model_card
from peft_reft import ReftConfig, register_intervention
from peft_reft.info import adapter_info
from peft_reft.info.words import in_bytes
from peft_reft.integrations.model_card import BEGIN, END, with_section
from peft_reft.interventions import REGISTRY, DireftIntervention


def section(path) -> str:
    """The one section in the card of a directory."""
    text = (path / "README.md").read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1
    return text.split(BEGIN)[1].split(END)[0]


def around(path) -> list[str]:
    """What stands before and behind the section."""
    text = (path / "README.md").read_text(encoding="utf-8")
    return [text.split(BEGIN)[0], text.split(END)[1]]


def loading_code(path) -> str:
    (code,) = re.findall(r"^```python\n(.*?)^```$", section(path), re.S | re.M)
    return code


@pytest.mark.parametrize(
    ("family", "task", "auto_class"),
    [
        ("llama", "CAUSAL_LM", AutoModelForCausalLM),
        ("bert", "SEQ_CLS", AutoModelForSequenceClassification),
        ("llama", None, AutoModelForCausalLM),
    ],
)
def test_the_card_s_code_loads_the_adapter(tmp_path, family, task, auto_class):
    tiny_model(family, "classifier" if task == "SEQ_CLS" else None).save_pretrained(tmp_path / "base")
    model = reft_model(auto_class.from_pretrained(tmp_path / "base"), task_type=task)
    model.save_pretrained(tmp_path / "adapter")
    code = loading_code(tmp_path / "adapter")
    assert code.startswith("import peft_reft")
    assert ("num_labels=N" in code) is (task == "SEQ_CLS")  # which no file of an adapter's says
    names: dict[str, object] = {}
    exec(code.replace("path/to/this/directory", str(tmp_path / "adapter")), names)
    inputs = inputs_of(model)
    assert torch.equal(logits(names["model"], inputs), logits(model, inputs))
    assert not torch.equal(logits(model.get_base_model(), inputs), logits(model.unload(), inputs))


def test_the_card_tells_what_the_adapter_is(tmp_path):
    reft_model(tiny_model("llama"), positions="f2+l3", r=3, share_weights=False, prompt_end=[5]).save_pretrained(
        tmp_path
    )
    text, info = section(tmp_path), adapter_info(tmp_path)
    for told in (
        "`f2+l3`: the first 2 tokens and the last 3 tokens of the prompt",
        "LoReFT(h) = h + Rᵀ(Wh + b - Rh)",
        "| Rank | 3 |",
        "| Blocks | 3: model.layers.0, model.layers.1, model.layers.2 |",
        "one per term (f2, l3)",
        "everything up to the last marker [5]",
        "`KeyError: 'REFT'` means that the package was not imported",
        f"| Parameters | {info.parameters:,} in float32 |",
        f"| Size | {in_bytes((tmp_path / 'adapter_model.safetensors').stat().st_size)} |",
    ):
        assert told in text, told
    front, behind = around(tmp_path)
    assert "library_name: peft" in front and "## Model Details" in behind and "- PEFT" in behind  # PEFT's own card


def test_saving_again_updates_the_section_and_leaves_what_the_user_wrote(tmp_path):
    reft_model(tiny_model("llama"), positions="f1").save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    first = section(tmp_path)
    text = card.read_text(encoding="utf-8").replace("## Model Details", "Mine: ä 漢字 $x$ \\1 `|`\n\n## Model Details")
    card.write_text(text.replace("# Model Card for Model ID", "# My adapter"), encoding="utf-8")
    kept = around(tmp_path)
    again = reft_model(tiny_model("llama"), positions="l2")
    for _ in range(2):
        again.save_pretrained(tmp_path)
        assert around(tmp_path) == [kept[0], kept[1].rstrip("\n")] or around(tmp_path) == kept
    assert "`l2`" in section(tmp_path) and "`f1`" in first and "`f1`" not in section(tmp_path)
    assert "# My adapter" in kept[0] and "Mine: ä 漢字 $x$ \\1 `|`" in kept[1]


@pytest.mark.parametrize("text", ["", "only words", "---\nlicense: mit\n---\n", "# Title\n\n```\n## no heading\n```\n"])
def test_any_card_can_take_the_section_once(text):
    once = with_section(text, "first \\1 text")
    assert once.startswith(text.rstrip()) and once.count(BEGIN) == 1 and once.endswith(f"{END}\n")
    twice = with_section(once, "second")
    assert twice == once.replace("first \\1 text", "second")


def test_the_section_stands_in_front_of_the_first_heading_of_second_order():
    text = "# Title\r\n\r\nIntroduction\r\n\r\n## Use\r\n\r\n## Limits\r\n"
    changed = with_section(text, "one\ntwo")
    assert changed == text.replace("## Use", f"{BEGIN}\r\none\r\ntwo\r\n{END}\r\n\r\n## Use")


def test_half_a_section_costs_no_text_of_the_user_s():
    text = f"# Title\n\n{BEGIN}\nkept\n\n## Use\n"
    changed = with_section(with_section(text, "one"), "two")
    assert "kept" in changed and "one" not in changed and changed.count("two") == 1


def test_adapters_in_sub_directories_have_cards_of_their_own(tmp_path):
    model = reft_model(tiny_model("llama"), positions="f1")
    model.add_adapter("other", ReftConfig(positions="l2"))
    model.save_pretrained(tmp_path)
    assert "`f1`" in section(tmp_path) and "`l2`" in section(tmp_path / "other")
    assert ModelCard.load(tmp_path / "other" / "README.md").data.library_name == "peft"
    PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "other").save_pretrained(tmp_path / "other")
    assert "`l2`" in section(tmp_path / "other")


def test_other_methods_cards_are_left_alone(tmp_path):
    get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert BEGIN not in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_config_alone_makes_no_card(tmp_path):
    ReftConfig().save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]


def test_a_card_that_cannot_be_written_costs_a_warning_and_not_the_adapters(tmp_path, monkeypatch):
    model = reft_model(tiny_model("llama"))
    model.add_adapter("other", ReftConfig(r=2))
    randomize(model, "other")

    def fail(*args):
        raise RuntimeError("no card today")

    monkeypatch.setattr(peft_reft.integrations.model_card, "section_of", fail)
    with pytest.warns(UserWarning, match="is saved in .*no card today"):
        model.save_pretrained(tmp_path)
    inputs = inputs_of(model)
    for name, directory in (("default", tmp_path), ("other", tmp_path / "other")):
        model.set_adapter(name)
        loaded = PeftModel.from_pretrained(tiny_model("llama"), directory)
        assert torch.equal(logits(loaded, inputs), logits(model, inputs))


def test_a_write_that_fails_leaves_the_card_as_it_was(tmp_path, monkeypatch):
    model = reft_model(tiny_model("llama"))
    model.save_pretrained(tmp_path)
    before = section(tmp_path)

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(peft_reft.integrations.model_card, "write_text", fail)
    with pytest.warns(UserWarning, match="disk full"):
        reft_model(tiny_model("llama"), positions="l2").save_pretrained(tmp_path)
    assert section(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors"
    }  # fmt: skip


@pytest.mark.skipif(os.name == "nt", reason="permissions and links of POSIX")
def test_links_and_permissions_stay(tmp_path):
    real = tmp_path / "real.md"
    real.write_text("# Mine\n", encoding="utf-8")
    real.chmod(0o640)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "README.md").symlink_to(real)
    reft_model(tiny_model("llama")).save_pretrained(adapter)
    assert (adapter / "README.md").is_symlink() and BEGIN in real.read_text(encoding="utf-8")
    assert stat.S_IMODE(real.stat().st_mode) == 0o640


def test_an_intervention_of_the_user_s_own_is_pointed_out(tmp_path):
    class Own(DireftIntervention):
        """Own(h) = h + something | else"""

    register_intervention("own_for_the_card", Own)
    try:
        reft_model(tiny_model("llama"), intervention="own_for_the_card").save_pretrained(tmp_path)
    finally:
        del REGISTRY["own_for_the_card"]
    assert "register_intervention" in section(tmp_path) and "something \\| else" in section(tmp_path)


# Trainers, and the hub.


@pytest.fixture
def trainer(tmp_path):
    words = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", "a", "b", "c", "d"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    settings = {"report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True}
    return SFTTrainer(
        model=tiny_model("llama"),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": "a b", "completion": " c"}] * 4),
        peft_config=ReftConfig(positions="f1+l1", task_type="CAUSAL_LM"),
        args=SFTConfig(str(tmp_path / "run"), max_steps=2, save_steps=1, **settings),
    )


def test_trl_s_checkpoints_and_its_final_model_have_the_section(trainer, tmp_path):
    trainer.train()
    for step in (1, 2):
        assert "`f1+l1`" in section(tmp_path / "run" / f"checkpoint-{step}")
    for _ in range(2):
        trainer.save_model()
    assert "`f1+l1`" in section(tmp_path / "run")
    assert "fine-tuned version" in around(tmp_path / "run")[0] and "## Quick start" in around(tmp_path / "run")[1]
    trainer.create_model_card(model_name="mine")  # TRL replaces the whole card; the next save adds the section again
    assert BEGIN not in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    trainer.save_model()
    assert "`f1+l1`" in section(tmp_path / "run") and "Model Card for mine" in around(tmp_path / "run")[0]


@pytest.mark.parametrize("on_the_hub", [None, "# What is there\n\n## Use\n\nWords of its author\n"])
def test_a_push_replaces_the_card_and_a_saved_directory_keeps_the_section(tmp_path, monkeypatch, on_the_hub):
    """PEFT's `push_to_hub` writes its own card last; should that change, the section goes along and this fails."""
    pushed = []

    def load(repository, token=None):
        if on_the_hub is None:
            raise EntryNotFoundError("no card")
        return ModelCard(on_the_hub)

    def upload(self, directory, *args, **kwargs):
        pushed.append({path.name: path.read_bytes() for path in Path(directory).iterdir()})

    monkeypatch.setattr(
        hub, "hf_api", lambda: types.SimpleNamespace(create_repo=lambda name, **_: types.SimpleNamespace(repo_id=name))
    )
    monkeypatch.setattr(hub.ModelCard, "load", staticmethod(load))
    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", upload)
    model = reft_model(tiny_model("llama"), positions="f2+l3")
    model.push_to_hub("someone/adapter")
    (files,) = pushed
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    text = files["README.md"].decode()
    assert BEGIN not in text
    assert on_the_hub is None or "Words of its author" in text
    model.save_pretrained(tmp_path)  # the way out: what `huggingface_hub.upload_folder` is given
    assert "`f2+l3`" in section(tmp_path)
