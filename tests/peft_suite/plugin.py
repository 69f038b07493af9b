"""pytest plugin: puts ReFT into the parametrisation of PEFT's own tests. Used by run.py; holds nothing of PEFT's.

PEFT's test modules keep what they parametrise over in module-level lists, and pytest reads those when it generates
tests, after import. So the lists are changed in place in between: they keep the cases of the method asked for.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from typing import Any
from unittest import mock

import peft
import pytest
from peft import PeftConfig

from peft_reft import ReftConfig

METHOD = os.environ.get("PEFT_SUITE_METHOD", "reft")
CLASSES: dict[str, type[PeftConfig]] = {"reft": ReftConfig, "lora": peft.LoraConfig, "ia3": peft.IA3Config}
KEPT = CLASSES[METHOD]


def settings_of_transformers(task_type: str) -> list[dict[str, Any]]:
    """Adapters that are tried on every model of PEFT's lists."""
    settings: list[dict[str, Any]] = [
        {"positions": "f2+l2", "r": 2},
        {"intervention": "direft", "positions": "all", "dropout": 0.05},
        {"intervention": "noreft", "share_weights": False},
        {"layers_to_transform": [0, -1], "positions": "l1"},
        {"positions": "f1", "trainable_token_indices": [0, 1, 3]},
    ]
    return [{"task_type": task_type, "target_modules": None, **setting} for setting in settings]


CUSTOM = [
    ("MLP", {"target_modules": "lin0"}),
    ("MLP", {"target_modules": ["lin0"], "intervention": "direft"}),
    ("MLP", {"target_modules": ["lin1"], "r": 1}),
    ("MLP", {"target_modules": ["lin0", "lin1"], "r": 2, "intervention": "noreft"}),
    ("MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("MLP", {"target_modules": ["lin0"], "dropout": 0.1, "intervention": "odireft"}),
    ("MLP_LayerNorm", {"target_modules": ["layernorm0"]}),
    ("MLP_LayerNorm", {"target_modules": ["lin0", "layernorm1"]}),
    # conv1d is of width 1, where R could only be 1 or -1.
    ("EmbConv1D", {"target_modules": ["conv1d"], "r": 1, "intervention": "noreft"}),
    ("EmbConv1D", {"target_modules": ["emb"]}),
    ("EmbConv1D", {"target_modules": ["emb", "conv1d"], "r": 1, "intervention": "noreft"}),
    ("EmbConv1D", {"target_modules": ["lin0"], "r": 2, "trainable_token_indices": {"emb": [0, 10]}}),
    ("EmbConv1D", {"target_modules": ["emb"], "positions": "f1"}),
    ("Conv1dBigger", {"target_modules": ["conv1d"]}),
    ("Conv2d", {"target_modules": ["conv2d"]}),
    ("Conv2d", {"target_modules": ["conv2d", "lin0"], "r": 2, "intervention": "direft"}),
    ("Conv2dGroups", {"target_modules": ["conv2d"]}),
    ("Conv3d", {"target_modules": ["conv3d"]}),
    ("MHA", {"target_modules": ["mha"]}),
    ("MHA", {"target_modules": ["mha", "lin0"], "r": 2}),
]
SAME_AND_DIFFERENT = [
    (name, "reft", ReftConfig, *({"r": 2, "init_weights": False, **setting} for setting in settings))
    for name, *settings in [
        ("ReFT Same", *2 * [{"target_modules": ["lin0"], "positions": "all"}]),
        ("ReFT Different", *({"target_modules": [name], "positions": "all"} for name in ("lin0", "lin1"))),
    ]
]


def mixed_batches() -> list[tuple[Any, ...]]:
    common = {"target_modules": ["lin0"], "positions": "all", "init_weights": False}
    return [("ReFT mixed adapter", ReftConfig(**common), ReftConfig(r=2, intervention="direft", **common))]


def additions(module: Any) -> dict[str, list[Any]]:
    """What ReFT adds to the lists of a test module, by their names."""
    name = module.__name__.rpartition(".")[2]
    tasks = {
        "test_decoder_models": "CAUSAL_LM",
        "test_encoder_decoder_models": "SEQ_2_SEQ_LM",
        "test_feature_extraction_models": "FEATURE_EXTRACTION",
        "test_seq_classifier": "SEQ_CLS",
    }
    lists: dict[str, list[Any]] = {}
    if name in tasks:
        lists["ALL_CONFIGS"] = [(ReftConfig, setting) for setting in settings_of_transformers(tasks[name])]
    elif name == "test_token_classification_qa":
        for key, task in {"TOKEN_CLS_CONFIGS": "TOKEN_CLS", "QA_CONFIGS": "QUESTION_ANS"}.items():
            lists[key] = [(ReftConfig, setting) for setting in settings_of_transformers(task)]
    elif name == "test_custom_models":
        lists["TEST_CASES"] = [
            (f"{model} {number} ReFT", model, ReftConfig, {"positions": "all", **setting})
            for number, (model, setting) in enumerate(CUSTOM)
        ]
        lists["ALL_PEFT_CONFIG_CLASSES"] = [ReftConfig]
        lists["MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES"] = SAME_AND_DIFFERENT
        lists["MIXED_ADAPTER_TEST_CASES"] = mixed_batches()
    elif name == "test_config":
        lists["ALL_CONFIG_CLASSES"] = [(ReftConfig, {})]
    return lists


def config_classes(value: Any) -> set[type]:
    """The classes of configs that a parameter names."""
    if isinstance(value, type) and issubclass(value, PeftConfig):
        return {value}
    if isinstance(value, PeftConfig):
        return {type(value)}
    values = value if isinstance(value, (list, tuple)) else getattr(value, "values", ())
    return set().union(*map(config_classes, values)) if isinstance(values, (list, tuple)) else set()


def config_parameters(function: Any) -> list[list[Any]]:
    """The lists of PEFT configs that a test is parametrised over."""
    marks = [mark for mark in getattr(function, "pytestmark", []) if mark.name == "parametrize"]
    values = [mark.args[1] if len(mark.args) > 1 else mark.kwargs["argvalues"] for mark in marks]
    return [found for found in values if isinstance(found, (list, tuple)) and any(map(config_classes, found))]


INLINE: dict[str, Any] = {  # where PEFT lists the configs at the test itself
    "test_multiple_adapters_mixed_modules_to_save": lambda: [ReftConfig],
    "test_multiple_adapters_mixed_modules_to_save_order_switched": lambda: [ReftConfig],
    "test_adapter_name_makes_no_difference": lambda: [
        ReftConfig(target_modules=["lin0"], positions="all", init_weights=False)
    ],
}


CONV1D_SKIPS = ("_skip_if_not_conv1d_supported", "_skip_if_conv1d_not_supported")  # GPT-2's layers: no matter for ReFT
SUMS = "test_weighted_combination_of_adapters"
BY_ROW = {"test_mixed_adapter_batches", "test_generate_with_mixed_adapter_batches"}


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: Any) -> None:
    module = metafunc.module
    if not hasattr(module, "_reft_suite"):
        module._reft_suite = additions(module)
        if METHOD == "reft":
            for name, cases in module._reft_suite.items():
                replace_in_place(module, name, cases)
    if METHOD == "reft" and metafunc.function.__name__ in INLINE:
        for values in config_parameters(metafunc.function):
            if ReftConfig not in set().union(*map(config_classes, values)):
                values[:] = INLINE[metafunc.function.__name__]()


def replace_in_place(module: Any, name: str, cases: list[Any]) -> None:
    """Make a list, and the marks that refer to it, hold other cases."""
    old = getattr(module, name)
    if isinstance(old, list):
        old[:] = cases
        return
    for owner in [module, *(value for value in vars(module).values() if isinstance(value, type))]:
        for function in vars(owner).values():
            for number, mark in enumerate(getattr(function, "pytestmark", []) if callable(function) else []):
                if mark.name == "parametrize" and len(mark.args) > 1 and mark.args[1] is old:
                    function.pytestmark[number] = pytest.mark.parametrize(mark.args[0], cases, **mark.kwargs).mark


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Leave only tests whose parameters name the method asked for, and no other method."""

    def kept(item: Any) -> bool:
        parameters = getattr(item, "callspec", None)
        named = set() if parameters is None else set().union(*map(config_classes, parameters.params.values()))
        return named == {KEPT}

    if os.environ.get("PEFT_SUITE_ALL") != "1":
        config.hook.pytest_deselected(items=[item for item in items if not kept(item)])
        items[:] = [item for item in items if kept(item)]


def pytest_configure(config: Any) -> None:
    utils: Any = importlib.import_module("tests.testing_utils")
    common: Any = importlib.import_module("tests.testing_common")
    utils.hub_online_once = common.hub_online_once = contextlib.nullcontext  # offline, always
    merging_is_supported = common._skip_if_merging_not_supported

    def skip_if_merging_not_supported(model_id: str, config_cls: type, config_kwargs: dict[str, Any]) -> None:
        if issubclass(config_cls, ReftConfig):
            pytest.skip("ReFT does not support merging, skipping this test.")
        merging_is_supported(model_id, config_cls, config_kwargs)

    common._skip_if_merging_not_supported = skip_if_merging_not_supported


@pytest.hookimpl(hookwrapper=True)
def pytest_pyfunc_call(pyfuncitem: Any) -> Any:
    """Let ReFT into tests of what few methods have, which ask for those: adapters by row, as LoRA; sums, as IA3."""
    with contextlib.ExitStack() as stack:
        if METHOD == "reft" and pyfuncitem.originalname == SUMS:
            if pyfuncitem.callspec.params["config_kwargs"].get("trainable_token_indices"):
                pytest.skip("ReFT does not sum tokens that are trained in full, skipping this test.")
            common = importlib.import_module("tests.testing_common")
            stack.enter_context(mock.patch.object(common, "IA3Config", ReftConfig))
        if METHOD == "reft" and pyfuncitem.originalname in BY_ROW:
            for module in (pyfuncitem.module, importlib.import_module("tests.testing_common")):
                stack.enter_context(mock.patch.object(module, "LoraConfig", ReftConfig))
        for module in (pyfuncitem.module, importlib.import_module("tests.testing_common")):
            for name in CONV1D_SKIPS if METHOD == "reft" else ():
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, lambda *_: None))
        yield
