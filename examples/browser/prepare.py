"""Make everything that the page needs: python examples/browser/prepare.py

SmolLM2-135M-Instruct (see ../smollm2.py) becomes one ONNX file with 4-bit weights, in which edits are inputs. Two small
adapters are trained on the chats of ../quickstart.py and saved as files of some tens of kilobytes each. All of it goes
to the folder `site` beside this file, with what npm has installed (`npm install` in this folder comes first).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import warnings
from pathlib import Path

import torch
import transformers
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_reft import ReftConfig
from peft_reft.export import main as export_command

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from quickstart import PIRATE, QUESTIONS, ROBOT, answers, chats, show, train  # noqa: E402
from smollm2 import NAME, smollm2  # noqa: E402

PAGE = ("index.html", "app.mjs", "backbone.mjs", "edits.mjs", "mask.mjs")
PACKAGES = {  # what of the packages the page loads, and under which name
    "onnxruntime-web/dist/ort.wasm.bundle.min.mjs": "ort.wasm.bundle.min.mjs",
    "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm": "ort-wasm-simd-threaded.wasm",
    "onnxruntime-web/dist/ort.webgpu.bundle.min.mjs": "ort.webgpu.bundle.min.mjs",
    "onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify.wasm": "ort-wasm-simd-threaded.asyncify.wasm",
    "@huggingface/tokenizers/dist/tokenizers.min.mjs": "tokenizers.min.mjs",
    "@huggingface/jinja/dist/index.js": "jinja.mjs",
}
CONFIG = {"r": 4, "positions": "f4+l4", "layers_to_transform": [5, 9, 13, 17, 21, 25], "task_type": "CAUSAL_LM"}


def adapters(model_folder: Path, folder: Path, options: argparse.Namespace) -> None:
    """Train the pirate and the robot, unless they are there."""
    if all((folder / name / "adapter_config.json").is_file() for name in ("pirate", "robot")):
        return
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model = get_peft_model(base, ReftConfig(**CONFIG), adapter_name="pirate")
    model.add_adapter("robot", ReftConfig(**CONFIG))
    for name, text in (("pirate", PIRATE), ("robot", ROBOT)):
        print(f"Training the {name}", flush=True)
        model.set_adapter(name)
        train(model, tokenizer, chats(text), options.steps, options)
        for question, answer in zip(QUESTIONS, answers(model, tokenizer, QUESTIONS)):
            show(name, f"{question} {answer}")
    model.save_pretrained(folder)


def main() -> int:
    """Make what is missing; returns the exit status."""
    parser = argparse.ArgumentParser(description="Make the backbone, two adapters and the page's folder.")
    parser.add_argument("--model", type=Path, default=HERE / "output" / NAME, help="folder of SmolLM2; made if missing")
    parser.add_argument("--dtype", default="int4", help="of the backbone: int4 (default), int8, float16 or float32")
    parser.add_argument("--steps", type=int, default=30, help="of training for each adapter (default: 30)")
    parser.add_argument("--learning-rate", type=float, default=4e-3, help="default: 4e-3")
    parser.add_argument("--output", type=Path, default=HERE / "output", help="for what is trained (default: output)")
    parser.add_argument("--site", type=Path, default=HERE / "site", help="for what is served (default: site)")
    parser.add_argument("--seed", type=int, default=0, help="of the training (default: 0)")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    transformers.set_seed(options.seed)
    model_folder = smollm2(options.model)
    adapters(model_folder, options.output, options)
    site = options.site
    if not (site / "model" / "backbone.onnx").is_file():
        status = export_command(
            [str(model_folder), str(site / "model"), "--dtype", options.dtype, "--base-model", NAME]
        )
        if status:
            return status
    menu = []
    for name in ("pirate", "robot"):
        file = site / "adapters" / f"{name}.safetensors"
        status = export_command(["--adapter", str(options.output / name), str(file), "--base-model", NAME])
        if status:
            return status
        menu.append({"name": name, "file": f"adapters/{file.name}", "bytes": file.stat().st_size})
    (site / "adapters.json").write_text(json.dumps(menu, indent=1) + "\n")
    copy_page(site)
    print(f"Serve it: python -m http.server --directory {site}")
    return 0


def copy_page(site: Path, modules: Path = HERE / "node_modules") -> None:
    """The page's own files, and those of the packages, beside the model."""
    for name in PAGE:
        shutil.copy(HERE / name, site / name)
    (site / "vendor").mkdir(parents=True, exist_ok=True)
    for path, name in PACKAGES.items():
        source = modules / path
        if not source.is_file():
            raise SystemExit(f"{path} is missing in {modules}: run `npm install` in {HERE} first.")
        shutil.copy(source, site / "vendor" / name)


if __name__ == "__main__":
    sys.exit(main())
