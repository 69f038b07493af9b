"""`python -m peft_reft sft`: TRL's arguments and trainer, with the options of ReftConfig, on data that have prompts."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import fields

import pytest
import torch
import yaml
from conftest import EOS, PAD, tiny_model
from datasets import Dataset
from peft import PeftModel
from peft.config import PeftConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from peft_reft import ReftConfig, get_interventions
from peft_reft.commands import this_python
from peft_reft.integrations import sft

CHAT = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
SETTINGS = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "max_steps": 3,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 4,
    "save_strategy": "no",
    "disable_tqdm": True,
}


def text(draw, size):
    return " ".join(f"w{int(number)}" for number in torch.randint(3, 90, (size,), generator=draw))


def rows(chat=False, count=16):
    draw = torch.Generator().manual_seed(1)
    pairs = [(text(draw, 3 + row % 6), text(draw, 2 + row % 4)) for row in range(count)]
    if not chat:
        return [{"prompt": prompt, "completion": f" {completion}"} for prompt, completion in pairs]
    return [
        {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]}
        for prompt, completion in pairs
    ]


def write(path, data):
    path.write_text("".join(json.dumps(row) + "\n" for row in data))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model with its tokenizer, and data: prompts and completions, chats, and plain text."""
    folder = tmp_path_factory.mktemp("sft")
    tiny_model("llama").save_pretrained(folder / "base")
    words = {"<pad>": PAD, "<eos>": EOS, "<unk>": 2, **{f"w{i}": i for i in range(3, 90)}, "user": 90, "assistant": 91}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder / "base")
    write(folder / "pairs.jsonl", rows())
    write(folder / "chats.jsonl", rows(chat=True))
    write(folder / "texts.jsonl", [{"text": "w3 w4"}])
    write(folder / "unanswered.jsonl", [{"messages": [{"role": "user", "content": "w3"}]}])
    (folder / "two").mkdir()
    write(folder / "two" / "train.jsonl", rows())
    write(folder / "two" / "test.jsonl", rows(count=3))
    return folder


def options(**settings):
    found = []
    for name, value in settings.items():
        found += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return found


def train(folder, out, data="pairs.jsonl", **settings):
    """Weights of the adapter that the command saved."""
    arguments = {"model": folder / "base", "dataset": folder / data, "output_dir": out, **SETTINGS, **settings}
    assert sft.main(options(**arguments)) == 0
    return saved_weights(folder, out)


def saved_weights(folder, out):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), out)
    return torch.cat(
        [p.detach().flatten() for module in get_interventions(model).values() for p in module.parameters()]
    )


def trl_weights(folder, out, config, data=None):
    """The weights after training with TRL's SFTTrainer and the same settings, without the command."""
    trainer = SFTTrainer(
        model=str(folder / "base"),
        args=SFTConfig(output_dir=str(out), model_init_kwargs={"dtype": "float32"}, **SETTINGS),
        train_dataset=Dataset.from_list(data or rows()),
        peft_config=config,
    )
    trainer.train()
    return torch.cat([p.detach().flatten() for m in get_interventions(trainer.model).values() for p in m.parameters()])


@pytest.fixture(scope="module")
def reference(folder, tmp_path_factory):
    config = ReftConfig(task_type="CAUSAL_LM", positions="f2+l2", r=2, layers_to_transform=[0, -1])
    return trl_weights(folder, tmp_path_factory.mktemp("trl"), config)


REFT = {"reft_positions": "f2+l2", "reft_r": 2, "reft_layers": [0, -1]}


def test_it_trains_what_trls_trainer_trains(folder, tmp_path, reference):
    torch.testing.assert_close(train(folder, tmp_path / "out", **REFT), reference)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["positions"] == "f2+l2"
    other = train(folder, tmp_path / "other", **{**REFT, "reft_positions": "f2+l1"})
    assert (other - reference).abs().max() > 1e-3


def test_a_yaml_file_says_the_same_and_the_command_line_wins(folder, tmp_path, reference):
    values = {**SETTINGS, **REFT, "model": str(folder / "base"), "dataset": str(folder / "pairs.jsonl"), "max_steps": 9}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    arguments = [f"--config={tmp_path / 'run.yaml'}", "--max_steps", "3", f"--output-dir={tmp_path / 'out'}"]
    assert sft.main(arguments) == 0
    torch.testing.assert_close(saved_weights(folder, tmp_path / "out"), reference)


def test_the_last_message_of_a_chat_is_the_completion(folder, tmp_path):
    pairs = [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in rows(chat=True)]
    config = ReftConfig(task_type="CAUSAL_LM", positions="f2+l2", r=2, layers_to_transform=[0, -1])
    expected = trl_weights(folder, tmp_path / "trl", config, pairs)
    torch.testing.assert_close(train(folder, tmp_path / "out", "chats.jsonl", **REFT), expected)


@pytest.mark.parametrize(
    ("data", "settings"), [("pairs.jsonl", {"test_split_size": 0.2}), ("two", {"load_best_model_at_end": True})]
)
def test_it_evaluates(data, settings, folder, tmp_path):
    if data == "two":
        settings = {**settings, "save_strategy": "steps", "save_steps": 2}
    train(folder, tmp_path, data, eval_strategy="steps", eval_steps=2, **settings)
    results = json.loads((tmp_path / "eval_results.json").read_text())
    assert 0 < results["eval_loss"] < 20


def test_label_smoothing_leaves_the_positions_where_they_are(folder, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        weights = train(folder, tmp_path, label_smoothing_factor=0.1, **REFT)
    assert weights.abs().max() > 0


FORBIDDEN = {
    "positions that are none": (["--reft_positions", "l7+f7"], r"positions='l7\+f7'.*Did you mean 'f7\+l7'"),
    "an unknown intervention": (["--reft_intervention", "loraft"], "intervention='loraft' is unknown"),
    "LoRA's rank": (["--lora_r", "8"], "--lora_r would have no effect"),
    "LoRA's default rank": (["--lora_r", "16"], "--lora_r would have no effect"),
    "LoRA's flag": (["--use_dora"], "--use_dora would have no effect"),
    "an unknown option": (["--reft_positons", "f1"], "'--reft_positons' is no option. Did you mean --reft_positions"),
    "a short name misspelt": (["--datset", "x.jsonl"], r"'--datset' is no option. Did you mean --dataset\?"),
    "a field without its reft_": (["--r", "4"], r"'--r' is no option. Did you mean --reft_r\? --help lists them"),
    "a field with a value behind =": (
        ["--positions=f1"],
        r"'--positions' is no option. Did you mean --reft_positions\?",
    ),
    "what several begin with": (["--eval", "x"], r"'--eval' .*mean (--eval\w+, ){4}--eval\w+ or one of \d others\?"),
    "a name that is nothing here": (["--dataset", "nothing"], "no such file or folder here"),
    "a number that is none": (["--reft_r", "x"], "--reft_r.*invalid int value: 'x'"),
    "an empty file": (["--dataset", "empty.jsonl"], "the file is empty"),
    "a checkpoint that is not there": (["--resume_from_checkpoint", "gone"], "gone is no folder"),
    "the prompt's loss": (["--completion_only_loss", "False"], "completion_only_loss"),
    "a file that is not there": (["--config", "nothing.yaml"], "nothing.yaml"),
    "data that are not there": (
        ["--dataset", "nothing.jsonl"],
        "'nothing.jsonl' cannot be read: there is no such file",
    ),
    "plain text": (["--dataset", "texts.jsonl"], r"columns \['text'\].*`prompt` and a `completion`"),
    "a chat without an answer": (["--dataset", "unanswered.jsonl"], r"roles \['user'\]"),
    "an empty cell": (["--dataset", "cell.csv"], r"Row 1 of the data has the prompt 'w4' and completion None;"),
    "numbers": (["--dataset", "numbers.csv"], "Row 0 of the data has the prompt 'w3' and completion 4;"),
    "a chat and a text": (
        ["--dataset", "mixed.jsonl"],
        r"Row 0 .*and completion 'w4'; both must be texts, or both lists",
    ),
    "messages that are texts": (["--dataset", "lines.jsonl"], r"The messages \['w3', 'w4'\] are no list of messages"),
    "messages in a table": (["--dataset", "messages.csv"], "The messages 'w3' are no list of messages"),
    "tokens alone": (["--dataset", "tokens.jsonl"], r"columns \['input_ids'\].*`labels` or a `completion_mask`"),
    "no split to evaluate on": (["--eval_strategy", "steps"], "not 'test'.*--test_split_size"),
    "a negative seed": (["--seed", "-1"], "--seed -1 cannot be used; it must be from 0 to 4294967295"),
    "a rate that is no number": (["--learning_rate", "nan"], "--learning_rate nan .* a number above 0"),
    "a negative rate": (["--learning_rate", "-1"], "--learning_rate -1.0 .* a number above 0"),
    "an infinite rate": (["--learning_rate", "inf"], "--learning_rate inf .* a number above 0"),
    "no epoch": (["--num_train_epochs", "0", "--max_steps", "-1"], "--num_train_epochs 0.0 .* a number above 0"),
    "no row": (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size 0 .* at least 1"),
    "no batch": (["--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps 0 .* at least 1"),
    "no length": (["--max_length", "-1"], "--max_length -1 .* at least 1"),
    "a folder that is a file": (["--output_dir", "pairs.jsonl"], "--output_dir cannot be 'pairs.jsonl': .*no files"),
    "a checkpoint that is none": (["--resume_from_checkpoint", "base"], "base is no checkpoint: it has no trainer_st"),
    "a null for rows": (
        ["--dataset", "null.jsonl"],
        "null.jsonl' cannot be read: it begins with 'n'; each row of JSON is an ob",
    ),
    "blanks": (["--dataset", "blank.jsonl"], "blank.jsonl' cannot be read: it begins with ''"),
    "another encoding": (["--dataset", "latin.jsonl"], "holds bytes that are no text.*Save it in UTF-8"),
    "empty chats": (["--dataset", "nobody.jsonl"], r"Row 0 of the data has the prompt \[\] and completion \[\];"),
    "a name that steers": (["--dataset", "\x1b[2J"], r"\\x1b\[2J"),
    "a model that is not there": ([], r"The base model '\./no-such-model' cannot be loaded"),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_what_cannot_be_used_ends_as_one_line_before_a_model_is_loaded(what, folder, monkeypatch, capsys):
    arguments, message = FORBIDDEN[what]
    monkeypatch.chdir(folder)
    (folder / "empty.jsonl").touch()
    (folder / "cell.csv").write_text("prompt,completion\nw3,w5\nw4,\n")
    (folder / "numbers.csv").write_text("prompt,completion\nw3,4\n")
    (folder / "messages.csv").write_text("messages\nw3\n")
    write(folder / "mixed.jsonl", [{"prompt": [{"role": "user", "content": "w3"}], "completion": "w4"}])
    write(folder / "lines.jsonl", [{"messages": ["w3", "w4"]}])
    write(folder / "tokens.jsonl", [{"input_ids": [3, 4, 5]}])
    (folder / "null.jsonl").write_text("null")
    (folder / "blank.jsonl").write_text(" \n")
    (folder / "latin.jsonl").write_bytes(b'{"prompt": "w3 \xe9", "completion": "w4"}')
    write(folder / "nobody.jsonl", [{"prompt": [], "completion": []}])
    common = options(model="./no-such-model", dataset="pairs.jsonl", output_dir="never", **SETTINGS)
    assert sft.main([*common, *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("python -m peft_reft sft: error: ")
    assert re.search(message, error), error
    assert "\x1b" not in error
    assert not (folder / "never").exists()


def test_a_training_that_diverges_is_told_and_replaces_no_adapter(folder, tmp_path, capsys):
    weights = train(folder, tmp_path)
    common = options(model=folder / "base", dataset=folder / "pairs.jsonl", output_dir=tmp_path)
    assert sft.main([*common, *options(**{**SETTINGS, "learning_rate": 1e38})]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "the training diverged: the adapter holds numbers that are infinite or NaN, and is not saved" in error
    assert torch.equal(saved_weights(folder, tmp_path), weights)


def test_data_of_a_stranger_steer_no_terminal(folder, tmp_path, capsys):
    write(tmp_path / "evil.jsonl", [{"prompt": "w3 \x1b[2J", "completion": "w4 \x1b[2J"}])
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    tokenizer.add_tokens(["\x1b[2J"])
    shutil.copytree(folder / "base", tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    common = options(model=tmp_path / "base", dataset=tmp_path / "evil.jsonl", output_dir=tmp_path / "out", **SETTINGS)
    assert sft.main(common) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and r"\x1b[2J" in out and "--prompt ..." in out


def test_rows_that_have_no_room_for_a_completion_are_named(folder, tmp_path, capsys):
    common = options(model=folder / "base", dataset=folder / "pairs.jsonl", output_dir=tmp_path / "never", **SETTINGS)
    assert sft.main([*common, "--max_length", "2"]) == 2
    assert "every prompt takes up all of --max_length 2" in capsys.readouterr().err


def test_a_file_is_the_one_of_that_name_and_tokens_with_a_mask_have_prompts(folder, tmp_path, capsys):
    """Brackets in a name are no pattern, an ending may be in capitals, and a `completion_mask` is not ignored."""
    write(tmp_path / "t.JSONL", [{"input_ids": [3, 4, 5, 6], "completion_mask": [0, 1, 1, 1]}])
    write(tmp_path / "[t].JSONL", [{"input_ids": [33, 34, 35, 36], "completion_mask": [0, 0, 0, 1]}])
    common = options(model=folder / "base", dataset=tmp_path / "[t].JSONL", output_dir=tmp_path / "made", **SETTINGS)
    assert sft.main([*common, "--reft_positions", "f1+l1"]) == 0
    assert "prompt«w33»w34«w35»" in capsys.readouterr().out.replace(" ", "")


def test_a_model_and_data_are_asked_for(folder, capsys):
    common = options(output_dir="never", use_cpu=True, bf16=False)
    assert sft.main(common) == 2
    assert "--model is missing" in capsys.readouterr().err
    assert sft.main([*common, "--model", "m"]) == 2
    assert "--dataset is missing" in capsys.readouterr().err


GIVEN = {
    "r": ("8", 8),
    "intervention": ("direft", "direft"),
    "positions": ("f1+l3", "f1+l3"),
    "share_weights": ("false", False),
    "share_layers": ("true", True),
    "prompt_end": ("<|assistant|>", "<|assistant|>"),
    "turns": ("last", "last"),
    "layers_to_transform": (["0", "-1"], [0, -1]),
    "target_modules": (["mlp", "self_attn"], {"mlp", "self_attn"}),
    "exclude_modules": (["lm_head"], {"lm_head"}),
    "modules_to_save": (["score"], ["score"]),
    "rank_pattern": ('{"layers.0": 2}', {"layers.0": 2}),
    "trainable_token_indices": (["3", "4"], [3, 4]),
    "dropout": ("0.1", 0.1),
    "act_fn": ("gelu", "gelu"),
    "init_weights": ("false", False),
    "train_bias": ("false", False),
    "subspaces": ('{"german": 3, "formal": 1}', {"german": 3, "formal": 1}),
}


def parse(*arguments):
    return sft.Parser().parse(["--model", "m", *arguments])[0]


@pytest.mark.parametrize("name", GIVEN)
def test_every_field_of_the_config_is_an_option(name):
    value, expected = GIVEN[name]
    extra = [] if name != "rank_pattern" else ["--reft_share_layers", "false"]
    config = parse(f"--reft_{name}", *([value] if isinstance(value, str) else value), *extra)
    assert getattr(config, name) == expected
    assert config.task_type == "CAUSAL_LM"


def test_the_options_are_those_of_the_config_and_their_defaults_too():
    inherited = {f.name for f in fields(PeftConfig)}
    assert {f.name for f in fields(ReftConfig)} - inherited == {*GIVEN, "frozen_subspaces"}
    with pytest.raises(sft.UserError, match="reft_frozen_subspaces"):
        parse("--reft_frozen_subspaces", "german")
    assert parse() == ReftConfig(task_type="CAUSAL_LM")
    assert parse("--reft_share_weights", "position").share_weights == "position"


def test_defaults_suit_reft_and_this_machine(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    config, _, training, *_ = sft.Parser().parse(["--model", "m", "--output_dir", "out"])
    assert training.learning_rate == 1e-3
    assert training.use_cpu and not training.bf16, "a machine without a GPU needs no further options"
    assert sft.Parser().parse(["--model", "m", "--learning_rate", "0.02"])[2].learning_rate == 0.02
    assert config.prompt_end is None


def test_a_gpu_trains_as_trl_does(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert sft.Parser().get_default("use_cpu") is not True


def test_the_yaml_file_changes_the_defaults_too(tmp_path):
    (tmp_path / "run.yaml").write_text("model: m\nlearning_rate: 0.03\n")
    assert sft.Parser().parse(["--config", str(tmp_path / "run.yaml")])[2].learning_rate == 0.03


def test_the_help_begins_with_reft_and_its_true_defaults(capsys):
    with pytest.raises(SystemExit):
        sft.main(["--help"])
    text = " ".join(capsys.readouterr().out.partition("What is trained")[2].split())
    names = ("--reft_r ", "--reft_positions ", "--learning_rate ", "--adam_beta1")  # Python 3.13 puts a comma there
    places = [text.index(name) for name in names]
    assert places == sorted(places)
    for name in GIVEN:
        shown = text[text.index(f"--reft_{name} ") :].split(" --")[0]
        default = getattr(ReftConfig(), name)
        assert (f"(default: {default})" in shown) == (default not in (None, {})), shown
    assert "(default: 0.001)" in text[places[2] :].split(" --")[0]


def test_it_says_what_it_trains_and_what_comes_next(folder, tmp_path, capsys):
    train(folder, tmp_path / "out", "chats.jsonl", **REFT)
    out = capsys.readouterr().out
    first = rows(chat=True)[0]["messages"]
    question, answer = (message["content"] for message in first)
    assert "Training 260 of " in out  # two blocks, of 2 x 2 x 32 numbers and 2 of the bias each
    words = ["user", *question.split(), "assistant"]  # f2+l2
    marked = f"«{' '.join(words[:2])}»{' '.join(words[2:-2])}«{' '.join(words[-2:])}»"
    prompt = next(line for line in out.splitlines() if line.startswith("  prompt  ")).removeprefix("  prompt  ")
    assert prompt.replace(" ", "") == marked.replace(" ", "")
    assert f"  answer  {answer}" in out
    assert f"  {this_python()} -m peft_reft chat {tmp_path / 'out'}\n" in out
    assert f"  {this_python()} -m peft_reft inspect {tmp_path / 'out'} --prompt '{question}'" in out


@pytest.mark.parametrize(
    ("saves", "way"), [(["no"], "--save_steps N"), (["steps", "--save_steps", "1"], "checkpoint-1")]
)
def test_ctrl_c_in_training_says_how_far_it_came_and_how_to_go_on(saves, way, folder, tmp_path, monkeypatch, capsys):
    step = SFTTrainer.training_step

    def stopped_in_the_second(self, *given):
        if self.state.global_step == 1:
            raise KeyboardInterrupt
        return step(self, *given)

    monkeypatch.setattr(SFTTrainer, "training_step", stopped_in_the_second)
    given = {"model": folder / "base", "dataset": folder / "pairs.jsonl", "output_dir": tmp_path / "out"}
    assert sft.main([*options(**given, **SETTINGS), "--save_strategy", *saves]) == 130
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "stopped in step 2 of 3; the adapter was not saved." in said and way in said
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_chats_give_the_adapter_the_marker_of_their_template(folder, tmp_path):
    train(folder, tmp_path / "chats", "chats.jsonl", **REFT)
    assert json.loads((tmp_path / "chats" / "adapter_config.json").read_text())["prompt_end"] == [91]  # assistant
    train(folder, tmp_path / "given", "chats.jsonl", **REFT, reft_prompt_end="user")
    assert json.loads((tmp_path / "given" / "adapter_config.json").read_text())["prompt_end"] == "user"
    train(folder, tmp_path / "pairs", **REFT)
    assert json.loads((tmp_path / "pairs" / "adapter_config.json").read_text())["prompt_end"] is None


def test_accelerate_launches_it_in_two_processes(folder, tmp_path):
    arguments = {"model": folder / "base", "dataset": folder / "pairs.jsonl", "output_dir": tmp_path / "out"}
    settings = {**SETTINGS, **REFT, "per_device_train_batch_size": 2, "ddp_backend": "gloo"}
    launch = [
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--main_process_port",
        "0",
    ]
    done = subprocess.run(
        [sys.executable, *launch, "-m", "peft_reft", "sft", *options(**arguments, **settings)],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("The adapter is in") == 1, "the second process prints nothing"
    assert saved_weights(folder, tmp_path / "out").abs().max() > 0
