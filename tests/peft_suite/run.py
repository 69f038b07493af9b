"""Run PEFT's own tests with ReFT in their parametrisation: `python run.py PATH_TO_PEFT [pytest arguments]`.

See README.md, next to this file.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from standins import make_standins

HERE = Path(__file__).resolve().parent
MODULES = (
    "test_decoder_models",
    "test_encoder_decoder_models",
    "test_feature_extraction_models",
    "test_seq_classifier",
    "test_token_classification_qa",
    "test_custom_models",
    "test_config",
)
WITH_LORA = (
    "test_mapping",
    "test_other",
    "test_low_level_api",
    "test_hub_features",
    "test_tuners_utils",
    "test_trainable_tokens",
    "test_initialization",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peft", type=Path, help="a checkout (or unpacked sdist) of PEFT that has tests/")
    parser.add_argument("--method", choices=("reft", "lora", "ia3"), default="reft", help="whose cases are run")
    parser.add_argument("--in-place-of-lora", action="store_true", help="the tests that PEFT has with LoRA only")
    parser.add_argument("--cache", type=Path, help="where the stand-ins are kept; a temporary directory otherwise")
    arguments, rest = parser.parse_known_args()
    if not (arguments.peft / "tests" / "testing_common.py").exists():
        parser.error(f"{arguments.peft} has no tests/testing_common.py; pass a checkout of PEFT or its unpacked sdist.")
    (arguments.peft / "tests" / "__init__.py").touch()  # sdists leave it out
    plugin, modules = ("in_place_of_lora", WITH_LORA) if arguments.in_place_of_lora else ("plugin", MODULES)
    with tempfile.TemporaryDirectory() as temporary:
        cache = (arguments.cache or Path(temporary)).resolve()
        make_standins(cache)
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_CACHE": str(cache),
            "PEFT_SUITE_METHOD": arguments.method,
            "PYTHONPATH": os.pathsep.join([str(arguments.peft.resolve()), str(HERE), os.environ.get("PYTHONPATH", "")]),
        }
        tests = [] if any(".py" in word for word in rest) else [f"tests/{module}.py" for module in modules]
        options = ["-p", plugin, "-o", "addopts=", "-q"]
        options += ["-W", "default::FutureWarning"]  # of transformers, about what PEFT itself calls; errors otherwise
        command = [sys.executable, "-m", "pytest", *options, *tests, *rest]
        return subprocess.run(command, cwd=arguments.peft, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
