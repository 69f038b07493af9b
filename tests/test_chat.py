"""`python -m peft_reft chat`: a conversation driven through a pipe, with what each line should be answered."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time

import pytest
import torch
from conftest import reft_model, tiny_model
from safetensors.torch import load_file, save_file
from test_tools import ENVIRONMENT, word_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from peft_reft import set_strength
from peft_reft.chat import command
from peft_reft.chat.command import talk
from peft_reft.chat.loading import adapter_folders
from peft_reft.chat.session import HELP, Session, known_commands
from peft_reft.chat.talker import Talker
from peft_reft.integrations.loading import load_adapters

TOKENS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model, and a folder with two adapters."""
    folder = tmp_path_factory.mktemp("chat")
    base = tiny_model("llama")
    base.save_pretrained(folder / "base")
    word_tokenizer().save_pretrained(folder / "base")
    base.name_or_path = str(folder / "base")
    for number, name in enumerate(("loud", "quiet")):
        model = reft_model(tiny_model("llama"), seed=number + 1, task_type="CAUSAL_LM", positions="f1+l2")
        model.peft_config["default"].base_model_name_or_path = str(folder / "base")
        model.save_pretrained(folder / "adapters" / name)
    return folder


def expected(said, adapter=None, strength=1.0):
    """The answer to a conversation, generated without the command: what it decodes to, and its tokens as text."""
    seed = {"loud": 1, "quiet": 2}.get(adapter)
    model = tiny_model("llama")
    if seed is not None:
        model = reft_model(model, seed=seed, task_type="CAUSAL_LM", positions="f1+l2")
        set_strength(model, strength)
    tokenizer = word_tokenizer()
    roles = ("user", "assistant") * len(said)
    messages = [{"role": role, "content": text} for role, text in zip(roles, said)]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_a_conversation_through_a_pipe(folder):
    """Who answers, at what strength, to which conversation: each answer is the one that generate gives for it."""
    lines = ["w3 w4", "/base", "w5", "/adapter quiet", "/strength 0.5", "/new", "w6 w7", "/quit", "never"]
    arguments = [sys.executable, "-m", "peft_reft", "chat", str(folder / "adapters"), "--max-new-tokens", str(TOKENS)]
    done = subprocess.run(
        arguments, input="\n".join(lines), capture_output=True, text=True, env=ENVIRONMENT, cwd=folder, timeout=120
    )
    assert done.returncode == 0, done.stderr
    first = expected(["w3 w4"], "loud")
    second = expected(["w3 w4", first, "w5"])
    third = expected(["w6 w7"], "quiet", 0.5)
    answers = [line.strip() for line in done.stdout.splitlines() if not line.startswith(("you>", "The "))]
    assert answers == [
        f"loud, quiet on {folder / 'base'}. /help lists the commands, /quit ends.",
        f"loud> {first}",
        f"base> {second}",
        "quiet answers.",
        f"quiet 0.5> {third}",
    ]
    assert third not in (expected(["w6 w7"], "quiet"), expected(["w6 w7"]))


def test_bytes_that_are_no_text_and_streams_that_lack_characters(folder):
    """What a terminal or a pipe cannot say or show is a question mark, and no end of the chat."""
    arguments = [sys.executable, "-m", "peft_reft", "chat", str(folder / "adapters" / "loud"), "--max-new-tokens", "2"]
    said = b"w3 \xe9\n/adapter \xf0\x9f\x90\xa2\nw4\n"
    done = subprocess.run(
        arguments, input=said, capture_output=True, env={**ENVIRONMENT, "PYTHONIOENCODING": "ascii"}, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(b"\nyou> ") == 4 and b"There is no adapter '????'" in done.stdout


@pytest.fixture
def session():
    model = reft_model(tiny_model("llama"), task_type="CAUSAL_LM", positions="f1+l2", adapter="loud")
    return Session(Talker(model, word_tokenizer(), max_new_tokens=TOKENS), ["loud"], adapter="loud")


def test_answers_come_in_pieces_and_the_conversation_is_kept(session):
    pieces = list(session.answer("w3 w4"))
    assert len(pieces) > 1
    assert "".join(pieces).strip() == expected(["w3 w4"], "loud")
    assert [message["role"] for message in session.messages] == ["user", "assistant"]


def test_a_repetition_penalty_reaches_generate(session):
    plain = "".join(session.answer("w3 w4"))
    session.messages.clear()
    session.talker.repetition_penalty = 50.0
    words = "".join(session.answer("w3 w4")).split()
    assert plain.split() != words and len(set(words)) == len(words)


def test_an_answer_that_is_cut_short_ends_the_generation(session):
    session.talker.max_new_tokens = 100
    forwards = []

    def count(*args):
        forwards.append(time.sleep(0.005))  # so that the answer is not there before it can be cut short

    session.talker.model.get_base_model().register_forward_pre_hook(count)
    answer = session.answer("w3 w4")
    piece = next(answer)
    answer.close()
    assert session.messages[-1] == {"role": "assistant", "content": piece.strip()}
    assert 0 < len(forwards) < 100
    forwards.clear()
    assert "".join(session.answer("w3 w4"))
    assert len(forwards) == 100, "an answer that is not cut short takes all of its steps"


def test_an_answer_ends_where_the_model_takes_no_more_tokens(session, monkeypatch, capsys):
    """Beyond them, learned positions have no vector: an index error on a CPU, the end of the process on a GPU."""
    session.talker.max_new_tokens = 50
    prompt = len(session.talker.prompt_ids([{"role": "user", "content": "w4"}]))
    session.talker.model.get_base_model().config.max_position_embeddings = prompt + 3
    columns = []
    session.talker.model.get_base_model().register_forward_pre_hook(
        lambda module, args, given: columns.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    lines = iter(["w4", "w5"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines, None) or (_ for _ in ()).throw(EOFError))
    talk(session)
    assert columns == [prompt, 1, 1]
    assert f"the model takes at most {prompt + 3} (max_position_embeddings in its config)" in capsys.readouterr().out
    assert [message["content"] for message in session.messages[::2]] == ["w4"], "what was refused is not kept"


REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}w3"


def test_a_conversation_that_the_template_refuses_is_not_kept(session, monkeypatch, capsys):
    session.talker.tokenizer.chat_template = REFUSES
    session.system = "w9"
    lines = iter(["w4", "w5"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines, None) or (_ for _ in ()).throw(EOFError))
    talk(session)
    assert capsys.readouterr().out.count("does not take the roles system, user: TemplateError: no system role") == 2
    assert session.messages == []
    session.system = None
    assert "".join(session.answer("w4"))


def test_what_generate_raises_is_raised_here(session):
    session.adapter = "nothing"
    with pytest.raises(ValueError, match="nothing"):
        list(session.answer("w3"))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/help", HELP),
        ("/strenght 2", "/strenght is no command. Did you mean /strength? /help lists them."),
        ("/xyz", "/xyz is no command. /help lists them."),
        ("/adapter", "The adapters are loud."),
        ("/adapter lout", "There is no adapter 'lout'. Did you mean loud? The adapters are loud."),
        ("/strength much", "'much' is no strength; give a number, as in /strength 0.5"),
        ("/strength nan", "'nan' is no strength; give a number, as in /strength 0.5"),
        ("/strength 1.5", "The strength is 1.5."),
        ("/strength", "The strength is 1; /strength 0.5 changes it."),
        ("/quit", None),
    ],
)
def test_commands(line, said, session):
    assert session.command(line) == said


def test_every_command_that_the_help_lists_is_one(session):
    assert {"adapter", "base", "strength", "new", "quit"} <= {*known_commands()}
    for name in known_commands():
        assert "is no command" not in (session.command(f"/{name}") or "")


def test_folders_of_the_same_name_get_names_of_their_own(folder, tmp_path):
    shutil.copytree(folder / "adapters" / "loud", tmp_path / "v1.0")
    found = adapter_folders([str(folder / "adapters"), str(folder / "adapters" / "loud"), str(tmp_path / "v1.0")])
    assert list(found) == ["loud", "quiet", "loud_2", "v1_0"]


@pytest.mark.parametrize("name", ["train", "__base__"])
def test_a_folder_with_a_name_that_peft_does_not_take_can_be_opened(name, folder, tmp_path):
    shutil.copytree(folder / "adapters" / "loud", tmp_path / name)
    (found,) = adapter_folders([str(tmp_path / name)])
    assert found == f"{name.strip('_')}_adapter"
    load_adapters({found: tmp_path / name})


def test_an_adapter_without_a_source_is_refused_as_it_would_edit_nothing(tmp_path):
    model = reft_model(tiny_model("llama"), task_type="CAUSAL_LM", intervention="interchange", r=2)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="intervention='interchange', which takes its values from a second input"):
        adapter_folders([str(tmp_path)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-folder"], "no saved adapter"),
        (["adapters/loud", "--model", "no-such-model"], "no-such-model"),
    ],
)
def test_what_cannot_be_loaded_ends_as_one_line(arguments, message, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert command.main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0]


def changed(path, **settings):
    """Other settings in a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def cut(path):
    path.write_bytes(path.read_bytes()[:100])


DAMAGED = {
    "a number for a name": (lambda base, own: changed(own / "adapter_config.json", base_model_name_or_path=5), "=5"),
    "a list for a name": (
        lambda base, own: changed(own / "adapter_config.json", base_model_name_or_path=["a"]),
        "which is no name; give it with --model",
    ),
    "a name that steers": (
        lambda base, own: changed(own / "adapter_config.json", base_model_name_or_path="\x1b[2J"),
        r"The base model '\x1b[2J' cannot be loaded",
    ),
    "a task that steers": (lambda base, own: changed(own / "adapter_config.json", task_type="\x1b[2J"), r"\x1b[2J;"),
    "cut weights": (lambda base, own: cut(base / "model.safetensors"), "SafetensorError"),
    "text for a width": (lambda base, own: changed(base / "config.json", hidden_size="wide"), "'hidden_size'"),
    "another width": (lambda base, own: changed(base / "config.json", hidden_size=8), "--model names another"),
    "no activation": (lambda base, own: changed(base / "config.json", hidden_act="x"), "KeyError"),
    "no tokenizer's config": (lambda base, own: (own / "tokenizer_config.json").write_text("[]"), "The tokenizer in"),
    "no class": (lambda base, own: (own / "tokenizer_config.json").write_text('{"tokenizer_class": 5}'), "int"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_models_and_tokenizers_end_as_one_line(case, folder, tmp_path, capsys):
    damage, said = DAMAGED[case]
    base, own = shutil.copytree(folder / "base", tmp_path / "base"), tmp_path / "own"
    shutil.copytree(folder / "adapters" / "loud", own)
    changed(own / "adapter_config.json", base_model_name_or_path=str(base))
    damage(base, own)
    assert command.main([str(own)]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and said in error and "\x1b" not in error


def test_warnings_of_a_stranger_s_tensors_steer_no_terminal(folder, tmp_path):
    own = shutil.copytree(folder / "adapters" / "loud", tmp_path / "own")
    weights = own / "adapter_model.safetensors"
    save_file({**load_file(weights), "\x1b[2J": torch.zeros(1)}, weights)
    with pytest.warns(UserWarning, match=r"that are not loaded: \\x1b\[2J"):
        load_adapters({"own": own})


def steering_tokenizer():
    """Words 50 to 99 end in characters by which a terminal is steered, but for two that are none."""
    words = {f"w{i}" if i < 50 else f"w{i}\x1b]0;x\x07\x9b\r\tも": i for i in range(100)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0", eos_token="w1")


def talked(session, monkeypatch, capsys, *said):
    lines = iter(said)
    monkeypatch.setattr("builtins.input", lambda _: next(lines, None) or (_ for _ in ()).throw(EOFError))
    talk(session)
    return capsys.readouterr().out


def test_an_answer_steers_no_terminal(session, monkeypatch, capsys):
    """An adapter chooses what the model says, and a template what the error says."""
    session.talker.tokenizer, session.talker.max_new_tokens = steering_tokenizer(), 40
    out = talked(session, monkeypatch, capsys, "w3 w4")
    assert "\x1b" in session.messages[-1]["content"], "there is something to keep away"
    assert not {"\x1b", "\x07", "\x9b", "\r"} & {*out} and r"\x1b]0;x\x07\x9b\x0d" in out and "\tも" in out
    session.talker.tokenizer.chat_template = "{{ raise_exception('\x1b[2J') }}"
    assert r"TemplateError: \x1b[2J" in talked(session, monkeypatch, capsys, "w3")
    session.adapters.append("a\x1b[2J")
    assert r"loud, a\x1b[2J" in talked(session, monkeypatch, capsys, "/adapter")


def test_what_no_answer_can_be_given_to_ends_no_chat(session, monkeypatch, capsys):
    session.talker.temperature = 1.0
    out = talked(session, monkeypatch, capsys, "/strength 1e38", "w3", "/strength 1", "/new", "w4")
    assert out.count("There is no answer (RuntimeError: probability tensor") == 1
    assert "loud> w" in out, "the chat goes on"
    session.talker.tokenizer.chat_template = "{{ '' }}"
    assert "make no token of the conversation" in talked(session, monkeypatch, capsys, "w3")
    words = {"<unk>": 0, "w3": 500}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    session.talker.tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<unk>")
    said = "the token id 500, and the model's vocabulary has 100 ids. It is another model's tokenizer"
    assert said in talked(session, monkeypatch, capsys, "w3")


def test_a_number_of_hundreds_of_digits_is_no_option(capsys):
    with pytest.raises(SystemExit):
        command.main(["adapter", "--max-new-tokens", "9" * 400])
    error = capsys.readouterr().err
    assert "has more digits than any number that is used here" in error and error.count("\n") == 1 and len(error) < 300


def test_without_a_chat_template_the_line_itself_is_the_prompt(session):
    session.talker.tokenizer.chat_template = None
    ids = session.talker.tokenizer("w3 w4", return_tensors="pt")
    model = session.talker.model
    generated = model.generate(**ids, max_new_tokens=TOKENS, do_sample=False)[0, ids["input_ids"].shape[1] :]
    answer = session.talker.tokenizer.decode(generated, skip_special_tokens=True)
    assert "".join(session.answer("w3 w4")).strip() == answer
