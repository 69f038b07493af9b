"""pytest plugin: runs PEFT's tests that are written with LoRA, with ReFT in LoRA's place. Used by run.py.

Much of what PEFT promises for every method (the low-level functions, statuses, target names, model cards, trained
tokens, hot-swapping) it tests with a `LoraConfig` only. That name means a class here which makes a `ReftConfig` of the
settings that both have. Tests of what ReFT has otherwise, or not, are skipped with the reason; the rest has to pass.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import re
from typing import Any

import peft
import pytest
from plugin import config_classes

from peft_reft import ReftConfig

FIELDS = {field.name for field in dataclasses.fields(ReftConfig) if field.init}
RENAMED = {"init_lora_weights": "init_weights", "lora_dropout": "dropout"}


class InPlaceOfLora(ReftConfig):
    """Makes a ReftConfig of a LoraConfig's arguments; the rank is 1 where LoRA's could be more than the width."""

    def __new__(cls, *args: Any, **settings: Any) -> Any:
        settings = {RENAMED.get(name, name): value for name, value in settings.items()}
        settings |= {"task_type": args[0]} if args else {}
        settings["init_weights"] = bool(settings.get("init_weights", True))
        settings["r"] = 1 if settings.get("r", 8) >= 8 else settings["r"]
        return ReftConfig(**{"positions": "all"} | {name: settings[name] for name in settings.keys() & FIELDS})


# Of test_initialization, most of which is about LoRA's and other methods' weights.
GENERAL = (
    "TestNoInfiniteRecursionDeepspeed",
    "TestCustomModelConfigWarning",
    "TestLowCpuMemUsage",
    "TestNamingConflictWarning",
    "TestHotSwapping",
    "TestLoadPeftKeyMapping",
    "test_from_pretrained_missing_keys_warning",
)

# What ReFT has otherwise: reason -> pattern of the tests' names.
DIFFERENT = {
    "names, weights, numbers or tags of LoRA's": r"TestLowLevelFunctional::test_(inject_adapter_in_model$|get|modules)|"
    r"(missing|extra)_keys_warning|unsharded_state_dict|module_matching_lora|realistic_example|all_linear_(does|works)|"
    r"second_adapter_with_all_linear|layer_names_|module_type_|adapter_model_type_|peft_types_(small|large)|nb_params_|"
    r"requires_grad(_model)?_irregular|model_status_with|model_with_injected|irregular_with|merged_adapters_irregular|"
    r"KeyPrefixes::test_prefixes_(lora|select|model_with|multiple)|applies_find_target_modules|"
    r"model_card_has|dont_have_transformers_tag|custom_peft_type|get_peft_model_(with_task_type_)?low_cpu|peft_types_raises",
    "options of LoRA's": r"arget(ed)?_?[Pp]arameter|RankAndAlphaPattern|ensure_weight_tying|compiled_hotswap",
    "a function of PEFT's for which ReFT has its own": r"test_regex_matching_valid",
    "mixed models": r"[Mm]ixed",
    "hot-swapping other ranks or fewer layers is refused": r"test_hotswap_(works_different|missing_key|extra_key)",
    "another error for the same thing": r"test_targeting_trainable_tokens_raises",
    "a module of OPT that returns all rows as one": r"(pretrained|(load|inject)_adapter)_low_cpu_mem_usage_works",
    "a stand-in is not tied": r"when_model_is_tied(_standalone)?\[|test_save_pretrained_auto",
    "merging": r"test_load_merged_and_unmerged",
}
AT_RUN_TIME = {  # reason -> what is raised
    "merging": "A ReFT adapter cannot be merged",
    "needs the hub": r"couldn't connect|Can't find 'adapter_config.json'|offline mode|OfflineMode|not fully cached",
}


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: Any) -> None:
    for name in ("tests.testing_utils", "tests.testing_common"):
        importlib.import_module(name).hub_online_once = contextlib.nullcontext  # offline, always
    peft.LoraConfig = InPlaceOfLora


def source_of(thing: Any) -> str:
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):
        return ""


def is_about_lora(item: Any) -> bool:
    """Whether a test uses a LoraConfig, and no other method's config as its parameter."""
    parameters = getattr(item, "callspec", None)
    named = set() if parameters is None else set().union(*map(config_classes, parameters.params.values()))
    if named - {ReftConfig, InPlaceOfLora}:
        return False
    if item.module.__name__.endswith("test_initialization") and not any(name in item.nodeid for name in GENERAL):
        return False
    if (
        item.module.__name__.endswith(("custom_models", "decoder_models", "extraction_models", "classifier", "qa"))
        and named
    ):
        return False
    return bool(named) or "LoraConfig" in source_of(item.cls or item.function)


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    kept = [item for item in items if is_about_lora(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
    for item in items:
        for reason, pattern in DIFFERENT.items():
            if re.search(pattern, item.nodeid):
                item.add_marker(pytest.mark.skip(reason=reason))
                break


@pytest.hookimpl(hookwrapper=True)
def pytest_pyfunc_call(pyfuncitem: Any) -> Any:
    outcome = yield
    if outcome.excinfo is not None:
        for reason, message in AT_RUN_TIME.items():
            if re.search(message, str(outcome.excinfo[1])):
                outcome.force_exception(pytest.skip.Exception(reason))
