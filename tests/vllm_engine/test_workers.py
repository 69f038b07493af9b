"""Engines with processes of their own: two tensor-parallel workers, two pipeline stages, and `vllm serve` over HTTP."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from engines import every_pair
from kit import Comparison, Truth, make_adapter, make_model, prompts

HERE = pathlib.Path(__file__).parent
ADAPTERS = {
    "formal": {"positions": "f2+l3", "r": 4},
    "brief": {"positions": "l2+d", "r": 2, "act_fn": "relu"},
    "late": {"positions": "f1+l1", "r": 2, "share_weights": False},
}


@pytest.fixture(scope="module")
def base(place):
    return make_model("llama", place)


@pytest.fixture(scope="module")
def adapters(base, place):
    return {
        name: make_adapter(base, place / name, seed, **settings)
        for seed, (name, settings) in enumerate(ADAPTERS.items(), 1)
    }


@pytest.fixture(scope="module")
def truth(base, adapters):
    return Truth(base, adapters)


def answers(base, adapters, settings, pairs):
    """Answers of an engine in a process of its own, by a program that prints them."""
    order = {
        "base": str(base),
        "adapters": {k: str(v) for k, v in adapters.items()},
        "settings": settings,
        "pairs": pairs,
    }
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    done = subprocess.run(
        [sys.executable, str(HERE / "answering.py")],
        input=json.dumps(order),
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS ")]
    assert lines, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(lines[-1].removeprefix("ANSWERS "))


@pytest.mark.parametrize("implementation", ["auto", "transformers"])
def test_two_tensor_parallel_workers(base, adapters, truth, implementation):
    pairs = every_pair([None, *adapters], prompts(6))
    settings = {"tensor_parallel_size": 2, "model_impl": implementation}
    comparison = Comparison()
    for (name, prompt), tokens in zip(pairs, answers(base, adapters, settings, pairs)):
        comparison.add(f"{name}, {len(prompt)}", tokens, None, truth.answer(name, prompt))
    assert comparison.equal == comparison.total, comparison.wrong[:3]


class Server:
    """`vllm serve` with two adapters; a third is loaded while it runs."""

    def __init__(self, base, adapters, log):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = log
        modules = [f"{name}={adapters[name]}" for name in ("formal", "brief")]
        options = [
            "--dtype",
            "float32",
            "--enforce-eager",
            "--max-model-len",
            "256",
            "--block-size",
            "32",
            "--port",
            str(self.port),
        ]
        command = [
            sys.executable,
            "-m",
            "vllm.entrypoints.cli.main",
            "serve",
            str(base),
            "--enable-lora",
            "--max-loras",
            "2",
        ]
        environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
        self.process = subprocess.Popen(
            [*command, *options, "--lora-modules", *modules],
            stdout=open(log, "w"),  # noqa: SIM115 (the process keeps it)
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )

    def wait(self, seconds=400):
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                return self.get("/health")
            except OSError:
                time.sleep(1)
        raise AssertionError(self.log.read_text()[-4000:])

    def get(self, path):
        return urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=120).read()

    def post(self, path, **body):
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def complete(self, model, prompt, new=8, **body):
        status, text = self.post(
            "/v1/completions",
            **{
                "model": model,
                "prompt": prompt,
                "max_tokens": new,
                "temperature": 0,
                "ignore_eos": True,
            }
            | {"return_token_ids": True, **body},
        )
        assert status == 200, text
        return json.loads(text)["choices"][0]["token_ids"]

    def stop(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def server(base, adapters, place):
    running = Server(base, adapters, place / "server.log")
    try:
        running.wait()
        yield running
    finally:
        running.stop()


def test_adapters_over_http(server, base, adapters, truth):
    status, text = server.post("/v1/load_lora_adapter", lora_name="late", lora_path=str(adapters["late"]))
    assert status == 200, text
    pairs = every_pair([None, *adapters], prompts(6))
    with ThreadPoolExecutor(16) as clients:
        found = list(clients.map(lambda pair: server.complete(pair[0] or str(base), pair[1]), pairs))
    comparison = Comparison()
    for (name, prompt), tokens in zip(pairs, found):
        comparison.add(f"{name}, {len(prompt)}", tokens, None, truth.answer(name, prompt))
    assert comparison.equal == comparison.total, comparison.wrong[:3]


WRONG = [
    ({"reft_strength": "half"}, "reft_strength='half' is not a strength"),
    ({"reft_strength": "0.5"}, "reft_strength='0.5' is not a strength"),
    ({"reft_strength": [0.5, 1.0]}, "reft_strength=[0.5, 1.0] is not a strength"),
    ({"reft_strength": 1e999}, "reft_strength=inf is not a strength"),
    ({"reft_strength": None}, "vllm_xargs"),  # by vLLM itself
    ({"reft_strenght": 0.5}, "'reft_strenght' is no argument of a ReFT adapter"),
    ({"reft_prompt_length": 3}, "is more than the 2 tokens that are given"),
    ({"reft_prompt_length": 0}, "reft_prompt_length=0 is not a number of tokens"),
]


def test_strength_over_http(server, base, truth):
    for prompt in prompts(3):
        found = server.complete("formal", prompt, vllm_xargs={"reft_strength": 0.5})
        assert found == truth.answer("formal", prompt, strength=0.5).tokens
    for extra, said in WRONG:
        status, text = server.post("/v1/completions", model="formal", prompt=[5, 6], vllm_xargs=extra)
        assert status == 400 and said in text, (extra, text)
    status, text = server.post("/v1/completions", model=str(base), prompt=[5, 6], vllm_xargs={"reft_strength": 0.5})
    assert status == 400 and "is not for a ReFT adapter" in text
    status, text = server.post(
        "/v1/completions", model="formal", prompt=[5, 6], use_beam_search=True, vllm_xargs={"reft_strength": 0.5}
    )
    assert status == 400 and "beam search takes no vllm_xargs" in text


def test_a_chat_over_http(server, base, truth):
    """Each turn's prompt begins with the one before, whose blocks are in the cache."""
    texts = [" ".join(f"w{min(token, 499)}" for token in prompt) for prompt in prompts(7, longest=70, seed=4)[2:]]
    messages, prompt = [], []
    for number, text in enumerate(texts):
        messages.append({"role": "user" if number % 2 == 0 else "assistant", "content": text})
        prompt += [int(word[1:]) for word in [*text.split(), "w3"]]
        if number % 2:
            continue
        for name in ("formal", "brief", None):
            asked = {"max_tokens": 8, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
            status, answer = server.post("/v1/chat/completions", model=name or str(base), messages=messages, **asked)
            assert status == 200, answer
            assert json.loads(answer)["choices"][0]["token_ids"] == truth.answer(name, prompt).tokens


def test_beams_over_http(server, truth):
    for name in ("formal", "brief"):
        for prompt in prompts(3):
            found = server.complete(name, prompt, new=5, use_beam_search=True, n=1)
            assert found == truth.answer(name, prompt).tokens[:5]


def test_an_adapter_that_cannot_be_served_over_http(server, base, place, truth):
    odd = make_adapter(base, place / "odd-http", 1, target_modules=["o_proj"])
    status, text = server.post("/v1/load_lora_adapter", lora_name="odd", lora_path=str(odd))
    assert status >= 400 and "which is no block of this model" in text
    status, text = server.post("/v1/completions", model="odd", prompt=[5, 6])
    assert status == 404
    status, text = server.post("/v1/unload_lora_adapter", lora_name="brief")
    assert status == 200, text
    status, text = server.post("/v1/completions", model="brief", prompt=[5, 6])
    assert status == 404
    assert server.complete("formal", prompts(3)[2]) == truth.answer("formal", prompts(3)[2]).tokens


def test_a_killed_worker_ends_the_server_and_no_request_gets_the_base_models_answer(server, truth):
    """The last test with this server. Requests that run meanwhile are answered rightly, or with an error."""
    import psutil

    def ask(prompt):
        body = {"max_tokens": 150, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        try:
            status, text = server.post("/v1/completions", model="formal", prompt=prompt, **body)
        except OSError:  # the connection was closed
            return None
        return json.loads(text)["choices"][0]["token_ids"] if status == 200 else None

    asked = prompts(6)
    children = psutil.Process(server.process.pid).children(recursive=True)
    (worker,) = [
        child for child in children if child.is_running() and not child.children() and "VLLM::" in name_of(child)
    ]
    with ThreadPoolExecutor(len(asked)) as clients:
        answers = [clients.submit(ask, prompt) for prompt in asked]
        time.sleep(0.5)
        worker.kill()
        found = [answer.result() for answer in answers]
    assert None in found
    for prompt, tokens in zip(asked, found):
        assert tokens in (None, truth.answer("formal", prompt, 150).tokens)
    server.process.wait(60)
    assert server.process.returncode is not None and "EngineDeadError" in server.log.read_text()


def name_of(process):
    return " ".join(process.cmdline())
