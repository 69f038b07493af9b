"""Make the folder of the page: python examples/browser/prepare.py

First `python examples/quickstart.py`, which leaves the model, a pirate and a robot in quickstart-output,
and `npm install` in this folder. The model becomes one ONNX file with 4-bit weights, in which edits are inputs; each
adapter becomes a small file. All of it goes to the folder `site` beside this file, which any static server serves.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from peft_reft.export import main as export_command

HERE = Path(__file__).parent
NAME = "SmolLM2-135M-Instruct"  # what the files call the model
PAGE = ("index.html", "app.mjs", "backbone.mjs", "edits.mjs", "mask.mjs")
PACKAGES = {  # what of the packages the page loads, and under which name
    "onnxruntime-web/dist/ort.wasm.bundle.min.mjs": "ort.wasm.bundle.min.mjs",
    "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm": "ort-wasm-simd-threaded.wasm",
    "onnxruntime-web/dist/ort.webgpu.bundle.min.mjs": "ort.webgpu.bundle.min.mjs",
    "onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify.wasm": "ort-wasm-simd-threaded.asyncify.wasm",
    "@huggingface/tokenizers/dist/tokenizers.min.mjs": "tokenizers.min.mjs",
    "@huggingface/jinja/dist/index.js": "jinja.mjs",
}


def main() -> int:
    """Make what is missing; returns the exit status."""
    parser = argparse.ArgumentParser(description="Make the folder of the page: model, adapters and what npm installed.")
    parser.add_argument("--source", type=Path, default=Path("quickstart-output"), help="what the quickstart has left")
    parser.add_argument("--model", help=f"folder of the model (default: {NAME} in the source)")
    parser.add_argument("--adapters", nargs="+", default=["pirate", "robot"], help="their folders in the source")
    parser.add_argument("--dtype", default="int4", choices=["int4", "int8", "float32"], help="of the backbone (int4)")
    parser.add_argument("--site", type=Path, default=HERE / "site", help="for what is served (default: site)")
    options = parser.parse_args()
    copy_page(options.site)
    backbone = options.site / "model"
    if not (backbone / "backbone.onnx").is_file():
        model = options.model or str(options.source / NAME)
        status = export_command([model, str(backbone), "--dtype", options.dtype, "--base-model", NAME])
        if status:
            return status
    menu = []
    for name in options.adapters:
        file = options.site / "adapters" / f"{name}.safetensors"
        status = export_command(["--adapter", str(options.source / name), str(file), "--base-model", NAME])
        if status:
            return status
        menu.append({"name": name, "file": f"adapters/{file.name}", "bytes": file.stat().st_size})
    (options.site / "adapters.json").write_text(json.dumps(menu, indent=1) + "\n")
    print(f"Serve it: python -m http.server --directory {options.site}")
    return 0


def copy_page(site: Path, modules: Path = HERE / "node_modules") -> None:
    """The page's own files, and those of the packages."""
    (site / "vendor").mkdir(parents=True, exist_ok=True)
    for name in PAGE:
        shutil.copy(HERE / name, site / name)
    for path, name in PACKAGES.items():
        source = modules / path
        if not source.is_file():
            raise SystemExit(f"{path} is missing in {modules}: run `npm install` in {HERE} first.")
        shutil.copy(source, site / "vendor" / name)


if __name__ == "__main__":
    sys.exit(main())
