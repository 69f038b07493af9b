"""The web page of examples/browser: its mask is Python's (in node), and the page itself in headless Chromium.

PEFT_REFT_BROWSER=1 pytest tests/export/test_browser.py   (needs '.[export]', selenium, chromium, chromedriver, and
                                                           `npm install` in examples/browser)
"""

import contextlib
import functools
import http.server
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import browser
import pytest
import torch
from conftest import randomize, reft_model, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_tools import word_tokenizer

from peft_reft import ReftConfig
from peft_reft.export import edit_mask, export_backbone, exportable, load_adapter_tensors, save_adapter_tensors
from peft_reft.export.description import describe
from peft_reft.export.graph import Sizes

EXAMPLE = Path(__file__).parents[2] / "examples" / "browser"
POSITIONS = ["f2", "l3", "f2+l1", "f1+l3", "m2", "m3+e2", "e3", "all", "d", "d2", "f2+m1+l2+e3+d2", "all+d3", "l1+d"]
PENALTY, MOST = 1.15, 60  # of the page
ADAPTERS = {"loud": ("f2+d2", False), "quiet": ("l1", True)}


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_mask_in_javascript_is_that_of_python(tmp_path):
    cases = [
        [positions, share, prompt, generated]
        for positions in POSITIONS
        for share in (True, False, "position")
        if share != "position" or not set(positions) & set("ead")
        for prompt in range(1, 10)
        for generated in (0, 1, 5)
    ]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    program = f"""
        import {{ readFileSync }} from "fs";
        import {{ editMask }} from {json.dumps((EXAMPLE / "mask.mjs").as_uri())};
        const cases = JSON.parse(readFileSync("cases.json"));
        console.log(JSON.stringify(cases.map((c) => {{ const m = editMask(...c); return [m.groups, [...m.mask]]; }})));
    """
    (tmp_path / "program.mjs").write_text(program)
    done = subprocess.run(["node", "program.mjs"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert len(cases) > 800
    for (positions, share, prompt, generated), (groups, mask) in zip(cases, json.loads(done.stdout), strict=True):
        wanted = edit_mask(positions, prompt_length=prompt, generated=generated, share_weights=share)
        assert (groups, mask) == (wanted.shape[-1], wanted.flatten().tolist()), (positions, share, prompt, generated)


def in_javascript(folder: Path, adapters: list[Path], description: dict) -> list:
    """What the page makes of adapters' files: the inputs of a backbone, or what it says."""
    (folder / "given.json").write_text(json.dumps([[str(file) for file in adapters], description]))
    program = f"""
        import {{ readFileSync }} from "fs";
        import {{ fitEdits, readEdits }} from {json.dumps((EXAMPLE / "edits.mjs").as_uri())};
        const [files, description] = JSON.parse(readFileSync("given.json"));
        const made = files.map((file) => {{
            try {{
                const bytes = readFileSync(file);
                const found = fitEdits(readEdits(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length)), description);
                return ["down", "bias", "up"].map((name) => [...found[name]]);
            }} catch (error) {{
                return error.message;
            }}
        }});
        console.log(JSON.stringify(made));
    """  # noqa: E501
    (folder / "program.mjs").write_text(program)
    done = subprocess.run(["node", "program.mjs"], cwd=folder, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_adapters_in_javascript_are_those_of_python_and_bad_ones_are_refused_by_both(tmp_path):
    model = two_adapters()
    description = replace(
        describe(exportable(model), "backbone.onnx", Sizes(rank=4, groups=3), "tiny"), blocks=["model.layers.1", "x"]
    )
    sound, bad = tmp_path / "sound.safetensors", tmp_path / "bad.safetensors"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            save_adapter_tensors(model, sound, dtype, adapter_name="loud", base_model="tiny")
            expected = [
                tensor.flatten().tolist() for tensor in description.inputs(load_adapter_tensors(sound)).values()
            ]
            assert in_javascript(tmp_path, [sound], asdict(description)) == [expected]
    tensors = load_file(sound)
    with safe_open(sound, "pt") as file:
        metadata = file.metadata()
    whole = sound.read_bytes()
    files = []
    for number, (changed, other) in enumerate((
        ({"down": tensors["down"].to(torch.int32)}, {}),
        ({"bias": tensors["bias"][:, :1]}, {}),
        ({"up": tensors["up"] * float("nan")}, {}),
        ({}, {"positions": "f2"}),
        ({}, {"positions": "sofa"}),
        ({}, {"blocks": "["}),
        ({}, {"blocks": '["model.layers.7"]'}),
        ({}, {"base_model": "other"}),
        ({}, {"version": "7"}),
        ({}, {"format": "pt"}),
        ({name: torch.cat((part, part), dim=2) for name, part in tensors.items()}, {}),
        ({name: torch.cat((part, part), dim=-1) for name, part in tensors.items() if name != "bias"}, {}),
    )):  # fmt: skip
        files.append(tmp_path / f"{number}.safetensors")
        save_file({**tensors, **changed}, files[-1], {**metadata, **other})
    for size in (0, 5, 100, len(whole) - 1):
        files.append(bad.with_suffix(f".{size}.safetensors"))
        files[-1].write_bytes(whole[:size])
    for file, said in zip(files, in_javascript(tmp_path, files, asdict(description)), strict=True):
        assert isinstance(said, str) and said.endswith((".", '"')) and "undefined" not in said, (file.name, said)
        with pytest.raises(ValueError):  # whose words test_edit_files.py reads
            description.inputs(load_adapter_tensors(file))
    assert len({*in_javascript(tmp_path, files, asdict(description))}) >= 11  # each has its own reason


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_webgpu_is_taken_where_there_is_a_gpu_and_wasm_where_it_fails(tmp_path):
    program = f"""
        import {{ Backbone, chooseProvider }} from {json.dumps((EXAMPLE / "backbone.mjs").as_uri())};
        const gpu = (found) => ({{ requestAdapter: async () => found() }});
        const real = gpu(() => ({{ info: {{ isFallbackAdapter: false }} }}));
        const imitated = gpu(() => ({{ info: {{ isFallbackAdapter: true }} }}));
        const fails = gpu(() => {{ throw new Error("lost"); }});
        const chosen = [];
        for (const [wanted, found] of [
          [null, real], ["webgpu", real], ["webgpu", imitated], [null, imitated], ["wasm", real], [null, null],
          [null, gpu(() => null)], [null, fails],
        ]) chosen.push(Object.values(await chooseProvider(wanted, found)));
        const said = await chooseProvider("cuda", real).catch((error) => error.message);
        const calls = [];
        const load = (broken) => async (provider) => {{
            if (broken === "load" && provider === "webgpu") throw new Error("no file");
            return {{ InferenceSession: {{ create: async (graph, options) => {{
                calls.push([graph, options.executionProviders, Object.keys(options.extra)]);
                if (broken === provider || broken === "all") throw new Error("no memory");
                return {{ run: async () => {{ throw new Error("lost"); }} }};
            }} }} }};
        }};
        const description = {{ format: "peft_reft.backbone", version: 1, cache: [], cache_dtype: "float32" }};
        const opened = [];
        for (const broken of ["none", "webgpu", "load", "all"]) {{
            const first = {{ provider: "webgpu", why: "" }};
            const found = await Backbone.open(load(broken), first, description, "graph").catch((error) => error.message);
            opened.push(found.provider ? [found.provider, found.why, await found.forward({{}}).catch((e) => e.message)] : found);
        }}
        console.log(JSON.stringify([chosen, said, opened, calls]));
    """  # noqa: E501
    (tmp_path / "program.mjs").write_text(program)
    done = subprocess.run(["node", "program.mjs"], cwd=tmp_path, capture_output=True, text=True, check=True)
    chosen, said, opened, calls = json.loads(done.stdout)
    assert [provider for provider, _ in chosen] == ["webgpu"] * 3 + ["wasm"] * 5
    assert [why for _, why in chosen[:3]] == [""] * 3 and len({why for _, why in chosen[3:]}) == 5
    assert chosen[-1][1] == "WebGPU failed: lost"
    assert "on=cuda is nothing that the page runs on" in said
    gpu_fails, wasm_fails = "The backbone failed on webgpu: lost. Add ?on=wasm", "The backbone failed on wasm: lost."
    assert [one[:2] for one in opened[:3]] == [
        ["webgpu", ""], ["wasm", "WebGPU failed: no memory"], ["wasm", "WebGPU failed: no file"],
    ]  # fmt: skip
    assert opened[0][2].startswith(gpu_fails) and opened[1][2] == opened[2][2] == wasm_fails
    assert opened[3] == "no memory"
    gpu, wasm = ["graph", ["webgpu"], []], ["graph", ["wasm"], ["session"]]
    assert calls == [gpu, gpu, wasm, wasm, gpu, wasm]


def missing() -> list[str]:
    needed = ("selenium", "onnx", "onnxscript", "onnxruntime")
    found = [name for name in needed if importlib.util.find_spec(name) is None]
    found += [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return found + ([] if (EXAMPLE / "node_modules").is_dir() else ["npm install in examples/browser"])


needs_a_browser = pytest.mark.skipif(
    os.environ.get("PEFT_REFT_BROWSER") != "1" or bool(missing()),
    reason=f"opt-in by PEFT_REFT_BROWSER=1; missing: {missing()}",
)


def two_adapters():
    base = tiny_model("llama", num_hidden_layers=2)
    settings = {"positions": "f2+d2", "share_weights": False, "layers_to_transform": [1]}
    model = reft_model(base, adapter="loud", r=3, task_type="CAUSAL_LM", **settings)
    model.add_adapter("quiet", ReftConfig(r=2, positions="l1", task_type="CAUSAL_LM"))
    return randomize(model, "quiet", seed=4, scale=1.0)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The address of the page with a tiny model and two adapters."""
    sys.path.insert(0, str(EXAMPLE))
    from prepare import copy_page

    folder, model = tmp_path_factory.mktemp("site"), two_adapters()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export_backbone(exportable(model), folder / "model", base_model="tiny")
    word_tokenizer().save_pretrained(folder / "model")
    (folder / "adapters").mkdir()
    menu = []
    for name in (*ADAPTERS, "cut"):
        file = folder / "adapters" / f"{name}.safetensors"
        save_adapter_tensors(model, file, torch.float32, adapter_name=name if name in ADAPTERS else "loud")
        menu.append({"name": name, "file": f"adapters/{name}.safetensors", "bytes": file.stat().st_size})
    file.write_bytes(file.read_bytes()[:-9])
    for name, other in (("wide", {"hidden_size": 64}), ("deep", {"num_hidden_layers": 4})):
        save_adapter_tensors(
            reft_model(tiny_model("llama", **other), task_type="CAUSAL_LM"), folder / f"{name}.safetensors"
        )
    save_adapter_tensors(model, folder / "other.safetensors", adapter_name="loud", base_model="other")
    (folder / "adapters.json").write_text(json.dumps(menu))
    copy_page(folder)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/", folder
    server.shutdown()


@contextlib.contextmanager
def opened(address, profile, flags=browser.FLAGS):
    page = browser.Page(address, profile, size=(900, 900), flags=flags)
    try:
        page.wait(lambda: "on w" in page.find("#status").text or page.find("#error").text)
        assert page.find("#error").text == ""
        yield page
    finally:
        page.driver.quit()


@pytest.fixture
def page(site, tmp_path):
    with opened(site[0], tmp_path / "profile") as page:
        yield page


def ask(page, question):
    field = page.find("#question")
    field.clear()
    field.send_keys(question)
    before = len(page.driver.find_elements("css selector", ".answer"))
    page.find("#send").click()
    page.wait(lambda: len(page.driver.find_elements("css selector", ".answer")) == before + 1)
    page.wait(lambda: page.find("#send").is_enabled())
    assert page.find("#error").text == ""
    return page.driver.find_elements("css selector", ".answer")[-1].text.split()


def choose(page, label):
    option = next(
        option for option in page.driver.find_elements("css selector", "#adapter option") if label in option.text
    )
    option.click()
    page.wait(lambda: page.find("#about").text or page.find("#error").text or label == "none")


def dial(page, strength):
    script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))"
    page.driver.execute_script(script, page.find("#strength"), str(strength))


def expected(question, adapter=None):
    model, tokenizer = two_adapters(), word_tokenizer()
    ids = tokenizer(f"user {question} assistant ", return_tensors="pt", add_special_tokens=False)["input_ids"]
    settings = {"max_new_tokens": MOST, "do_sample": False, "repetition_penalty": PENALTY}
    if adapter is not None:
        model.set_adapter(adapter)
    with torch.no_grad() if adapter is not None else model.disable_adapter():
        found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    return tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True).split()


@needs_a_browser
def test_the_page_answers_as_the_package_for_every_adapter(page):
    question = "w3 w4 w5"
    assert ask(page, question) == expected(question)
    for adapter, (positions, share) in ADAPTERS.items():
        choose(page, adapter)
        assert ask(page, question) == expected(question, adapter) != expected(question)
        tokens = page.driver.find_elements("css selector", "#prompt > *")
        marked = [token.tag_name == "mark" for token in tokens]
        mask = edit_mask(positions, prompt_length=len(tokens), share_weights=share)[0].any(-1).tolist()
        assert marked == mask and len(marked) == 5
    dial(page, 0)
    assert ask(page, question) == expected(question)
    dial(page, 1)
    choose(page, "none")
    assert ask(page, question) == expected(question)


# Chromium's own imitation of a graphics processor: slow, and the same code of the page and of the runtime.
IMITATED = f"{browser.FLAGS} enable-unsafe-webgpu use-webgpu-adapter=swiftshader".replace("disable-gpu ", "")


@needs_a_browser
def test_webgpu_answers_as_the_package(site, tmp_path):
    with opened(f"{site[0]}?on=webgpu", tmp_path / "profile", IMITATED) as page:
        assert page.find("#status").text.endswith("on webgpu")
        for adapter in (None, *ADAPTERS):
            choose(page, adapter or "none")
            assert ask(page, "w3 w4 w5") == expected("w3 w4 w5", adapter)
        assert page.driver.execute_script("return navigator.gpu.requestAdapter().then((found) => !!found)")


@needs_a_browser
@pytest.mark.parametrize(
    ("query", "flags", "why"),
    [
        ("", browser.FLAGS, "WebGPU finds no graphics processor"),
        ("", IMITATED, "software imitates the graphics processor, which is slower"),
        ("?on=wasm", IMITATED, "the address asks for it"),
        ("?on=webgpu", IMITATED, "WebGPU failed: "),
    ],
)
def test_webassembly_takes_over_and_says_why(query, flags, why, site, tmp_path):
    runtime = site[1] / "vendor" / "ort.webgpu.bundle.min.mjs"
    broken = without(runtime) if why.startswith("WebGPU failed") else contextlib.nullcontext()
    with broken, opened(site[0] + query, tmp_path / "profile", flags) as page:
        assert f"on wasm ({why}" in page.find("#status").text
        choose(page, "loud")
        assert ask(page, "w3 w4") == expected("w3 w4", "loud")


@contextlib.contextmanager
def without(file):
    aside = file.rename(file.with_suffix(".aside"))
    try:
        yield
    finally:
        aside.rename(file)


@needs_a_browser
def test_adapters_are_fetched_when_they_are_chosen(page):
    def fetched():
        return [name for name in page.fetched() if name.endswith(".safetensors")]

    assert fetched() == []
    choose(page, "loud")
    assert [name.rsplit("/", 1)[1] for name in fetched()] == ["loud.safetensors"]
    assert "2 kB" in page.find("#adapter option:checked").text


@needs_a_browser
def test_what_does_not_fit_is_said_and_changes_nothing(page, site):
    choose(page, "loud")
    choose(page, "cut")
    page.wait(lambda: "damaged or was cut off" in page.find("#error").text)
    assert page.find("#adapter option:checked").get_attribute("value") == "loud"
    for name, why in (("wide", "of width 64"), ("deep", "model.layers.2"), ("other", 'trained on "other"')):
        page.find("#file").send_keys(str(site[1] / f"{name}.safetensors"))
        page.wait(lambda why=why: why in page.find("#error").text)
    page.find("#file").send_keys(str(site[1] / "model" / "tokenizer.json"))
    page.wait(lambda: "cut off" in page.find("#error").text or "no file of edits" in page.find("#error").text)
    assert ask(page, "w3 w4") == expected("w3 w4", "loud")
