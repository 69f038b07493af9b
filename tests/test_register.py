"""REFT as a peft type: it looks like one of PEFT's own, in every process and whatever was imported first."""

from __future__ import annotations

import copy
import importlib.metadata
import multiprocessing
import pickle
import re
import subprocess
import sys
import textwrap
import warnings

import peft
import pytest
from conftest import tiny_model
from peft import PeftConfig, get_peft_config, get_peft_model
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.utils.peft_types import PeftType

import peft_reft
from peft_reft import ReftConfig, ReftModel
from peft_reft.tuner import private, versions
from peft_reft.tuner.versions import TESTED, check_peft_version, supported

SHAPE_OF_A_MODEL = """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def tiny():
        torch.manual_seed(0)
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        return LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)).eval()
"""


def run(code: str, *args: str) -> subprocess.CompletedProcess:
    """Python code in a process of its own, with the same modules to import."""
    code = textwrap.dedent(SHAPE_OF_A_MODEL) + textwrap.dedent(code) if "tiny()" in code else textwrap.dedent(code)
    paths = f"import sys; sys.path[:] = {sys.path!r}\n"
    return subprocess.run([sys.executable, "-c", paths + code, *args], capture_output=True, text=True, timeout=300)


def succeed(code: str, *args: str) -> str:
    done = run(code, *args)
    assert done.returncode == 0, done.stderr
    return done.stdout


# The member.


def test_reft_is_a_member_of_the_enum():
    assert PeftType.REFT.name == PeftType.REFT.value == PeftType.REFT == "REFT"
    assert isinstance(PeftType.REFT, PeftType)
    assert isinstance(PeftType.REFT, str)
    assert PeftType("REFT") is PeftType["REFT"] is PeftType.REFT
    assert list(PeftType).count(PeftType.REFT) == 1
    assert list(PeftType)[-1] is PeftType.REFT
    assert "REFT" in PeftType.__members__
    assert len(PeftType) == len(list(PeftType)) == len(set(PeftType))
    assert {PeftType.REFT: 1}[PeftType("REFT")] == 1
    assert type(repr(PeftType.REFT)) is str
    assert "REFT" in repr(PeftType.REFT)


def test_reft_behaves_as_members_made_by_the_enum_do():
    for method in (repr, str, format, hash):
        own, other = method(PeftType.REFT), method(PeftType.LORA)
        if isinstance(own, str):
            assert own.replace("REFT", "LORA") == other
    assert hash(PeftType.REFT) == hash(PeftType("REFT"))
    assert dir(PeftType.REFT) == dir(PeftType.LORA)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_the_member_is_itself_after_pickling(protocol):
    assert pickle.loads(pickle.dumps(PeftType.REFT, protocol)) is PeftType.REFT


def test_the_member_is_itself_after_copying():
    assert copy.copy(PeftType.REFT) is PeftType.REFT
    assert copy.deepcopy({"type": PeftType.REFT})["type"] is PeftType.REFT


def test_a_value_that_is_no_type_is_still_rejected():
    with pytest.raises(ValueError, match="REFTT"):
        PeftType("REFTT")


# The mappings.


def test_pefts_mappings_know_reft():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.REFT] is ReftConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.REFT] is ReftModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.REFT] == ReftModel.prefix == "reft_"


def test_a_config_builds_without_arguments_as_pefts_own_tests_want():
    assert set(PEFT_TYPE_TO_CONFIG_MAPPING) == set(PeftType)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.REFT]().peft_type is PeftType.REFT


def test_get_peft_config_makes_a_reft_config():
    config = get_peft_config({"peft_type": "REFT", "r": 2, "positions": "f3", "task_type": "CAUSAL_LM"})
    assert type(config) is ReftConfig
    assert (config.r, config.positions, config.task_type) == (2, "f3", "CAUSAL_LM")
    assert config.peft_type is PeftType.REFT


def test_from_peft_type_makes_a_reft_config():
    assert type(PeftConfig.from_peft_type(peft_type="REFT", r=2)) is ReftConfig


def test_get_peft_model_makes_a_reft_model(llama):
    model = get_peft_model(llama, ReftConfig())
    assert type(model.base_model) is ReftModel
    assert model.active_peft_config.peft_type is PeftType.REFT


# Importing.


def test_importing_again_and_reloading_change_nothing():
    member, types = PeftType.REFT, list(PeftType)
    for module in (peft_reft, importlib.import_module("peft_reft.tuner.register")):
        importlib.reload(module)
    assert importlib.import_module("peft_reft") is peft_reft
    assert PeftType.REFT is member
    assert list(PeftType) == types
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.REFT] is ReftConfig
    assert type(get_peft_model(tiny_model("llama"), ReftConfig()).base_model) is ReftModel


def test_public_names_are_those_of_the_contract():
    wanted = {"ReftConfig", "ReftModel", "ReftDataCollator", "get_interventions", "register_intervention"}
    assert wanted <= set(peft_reft.__all__)
    assert all(hasattr(peft_reft, name) for name in peft_reft.__all__)


def test_importing_after_peft_has_been_used_and_importing_afresh_work():
    out = succeed(
        """
        from peft import LoraConfig, get_peft_model
        from peft.utils.peft_types import PeftType
        before = list(PeftType)
        lora = get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"]))

        import peft_reft
        member = PeftType.REFT
        assert list(PeftType) == [*before, member]
        model = get_peft_model(tiny(), peft_reft.ReftConfig())

        for name in [name for name in sys.modules if name.split(".")[0] == "peft_reft"]:
            del sys.modules[name]
        first, config_cls = peft_reft, peft_reft.ReftConfig
        import peft_reft
        assert peft_reft is not first and peft_reft.ReftConfig is not config_cls
        assert PeftType.REFT is member and list(PeftType) == [*before, member]
        again = get_peft_model(tiny(), peft_reft.ReftConfig())
        assert type(again.base_model) is peft_reft.ReftModel
        print("ids", again.get_nb_trainable_parameters()[0], model.get_nb_trainable_parameters()[0])
        """
    )
    assert out.split()[-3:] == ["ids", "68", "68"]


def test_importing_before_peft_works():
    out = succeed(
        """
        import peft_reft
        import peft
        lora = peft.get_peft_model(tiny(), peft.LoraConfig(target_modules=["q_proj"]))
        model = peft.get_peft_model(tiny(), peft_reft.ReftConfig())
        print(type(lora.base_model).__name__, type(model.base_model).__name__)
        """
    )
    assert out.split()[-2:] == ["LoraModel", "ReftModel"]


def test_a_hotswap_that_was_imported_before_takes_reft_and_is_wrapped_once(tmp_path):
    out = succeed(
        """
        import importlib.metadata
        from peft.utils import hotswap
        from peft.utils.hotswap import hotswap_adapter
        pefts = hotswap.hotswap_adapter_from_state_dict

        import peft_reft
        from peft import get_peft_model
        importlib.reload(peft_reft)
        bases = [tiny(), tiny()]
        models = [get_peft_model(base, peft_reft.ReftConfig(init_weights=False)) for base in bases]

        def equal():
            return all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models)))

        models[0].save_pretrained(sys.argv[1])
        before = equal()
        hotswap_adapter(models[1], sys.argv[1], "default", torch_device="cpu")
        print(before, equal(), hotswap.hotswap_adapter_from_state_dict.__wrapped__ is pefts)
        """,
        str(tmp_path),
    )
    assert out.split()[-3:] == ["False", "True", "True"]


# Other processes.


def type_in_worker(config: ReftConfig) -> tuple[str, bool, PeftType]:
    return type(config).__name__, config.peft_type is PeftType.REFT, config.peft_type


def test_a_config_reaches_a_spawned_worker_and_comes_back():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        name, same, member = pool.apply(type_in_worker, (ReftConfig(r=2),))
    assert (name, same) == ("ReftConfig", True)
    assert member is PeftType.REFT


def test_a_pickled_config_opens_in_a_process_that_has_imported_nothing(tmp_path):
    path = tmp_path / "config.pickle"
    path.write_bytes(pickle.dumps(ReftConfig(r=2, positions="f3")))
    out = succeed(
        """
        import pickle
        config = pickle.load(open(sys.argv[1], "rb"))
        print(config.r, config.positions, config.peft_type.value, config.peft_type is type(config.peft_type)("REFT"))
        """,
        str(path),
    )
    assert out.split()[-4:] == ["2", "f3", "REFT", "True"]


# What cannot work says so.


def test_a_reft_type_of_pefts_own_is_not_overwritten():
    done = run(
        """
        import dataclasses
        from peft import PeftConfig
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
        from peft.utils.peft_types import PeftType

        member = str.__new__(PeftType, "REFT")
        member._name_ = member._value_ = "REFT"
        PeftType._member_names_.append("REFT")
        PeftType._member_map_["REFT"] = PeftType._value2member_map_["REFT"] = member
        type.__setattr__(PeftType, "REFT", member)

        @dataclasses.dataclass
        class ReftConfig(PeftConfig):
            __module__ = "peft.tuners.reft.config"

        PEFT_TYPE_TO_CONFIG_MAPPING[member] = ReftConfig
        try:
            import peft_reft
        except ImportError as error:
            print(error)
        assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.REFT] is ReftConfig
        assert PeftType.REFT is member
        """
    )
    assert done.returncode == 0, done.stderr
    assert "already has a REFT type" in done.stdout
    assert "peft.tuners.reft.config.ReftConfig" in done.stdout
    assert peft.__version__ in done.stdout


def test_an_unsupported_peft_is_refused_at_import_and_left_as_it_was():
    done = run(
        """
        import importlib.metadata
        from peft.utils.peft_types import PeftType

        version = importlib.metadata.version
        importlib.metadata.version = lambda name: "0.5.0" if name == "peft" else version(name)
        try:
            import peft_reft
        except ImportError as error:
            print(error)
        print("REFT" in PeftType.__members__)
        """
    )
    assert done.returncode == 0, done.stderr
    assert "peft 0.5.0 is installed" in done.stdout
    assert done.stdout.split()[-1] == "False"


@pytest.mark.parametrize("installed", ["0.5.0", "0.20.9", "0.22.0", "0.22.0.dev0", "1.0", "0.22.1rc1"])
def test_an_unsupported_version_is_refused_with_both_versions(installed):
    with pytest.raises(ImportError, match=rf"peft {re.escape(installed)} is installed") as error:
        check_peft_version(installed)
    assert supported("peft") in str(error.value)


@pytest.mark.parametrize(
    "installed", ["0.21.0", "0.21.2", "0.21.9", "0.21.0.dev0", "0.21.3.dev0", "0.21.0+local", peft.__version__]
)
def test_a_supported_version_is_accepted(installed):
    check_peft_version(installed)


@pytest.mark.parametrize("package", ["torch", "transformers", "trl"])
def test_a_version_above_those_that_were_tested_is_named_in_a_warning(package, monkeypatch):
    installed = dict(zip(TESTED, ("0.21.2", "2.13.0+cpu", "5.23.0", "1.16.0"), strict=True))
    monkeypatch.setattr(versions, "version", installed.__getitem__)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.warn_of_untested_versions()
    below = TESTED[package][1]
    installed[package] = f"{below}.0"
    with pytest.warns(UserWarning, match=rf"{package}.*{re.escape(installed[package])} is installed") as said:
        versions.warn_of_untested_versions()
    assert len(said) == 1 and f'pip install "{package}<{below}"' in str(said[0].message)


def test_a_package_that_is_not_installed_is_not_warned_of(monkeypatch):
    def installed(package):
        if package == "trl":
            raise importlib.metadata.PackageNotFoundError(package)
        return TESTED[package][0]

    monkeypatch.setattr(versions, "version", installed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.warn_of_untested_versions()


@pytest.mark.parametrize("module", ["peft.utils.other", "peft.utils.no_such_module"])
def test_a_private_part_that_is_gone_is_an_error_that_names_the_versions(module):
    with pytest.raises(ImportError, match=f"{module}._gone, which peft_reft uses") as error:
        private._part(module, "_gone")
    assert f"peft {peft.__version__} has no" in str(error.value)
    assert f'pip install "{supported("peft")}"' in str(error.value)
