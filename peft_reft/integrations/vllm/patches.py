"""Every place of vLLM that is patched: what, in which process, and why. Tested with the versions of `TESTED`.

place                                              process      why
-------------------------------------------------  -----------  ------------------------------------------------------
InputProcessor.process_inputs                      front end    what a request asks for is checked before it is queued
LLMEngine, AsyncLLM: add_request                   front end    an adapter that cannot be served is an error of its
                                                                request; in a worker's step it would end the engine
LLMEngine, AsyncLLM: add_lora, remove_lora         front end    notes which adapter an id stands for
BeamSearchSequence.get_prompt                      front end    a beam is a new request, with a longer prompt
ChatCompletionRequest, CompletionRequest:          front end    vLLM drops `vllm_xargs` there, and the strength in them
  to_beam_search_params
generate_block_hash_extra_keys                     engine core  cached blocks depend on which tokens are edited
VllmConfig.compute_hash                            all          compiled graphs hold the operation or do not
LoRAModelRunnerMixin.load_lora_model               worker       hooks on blocks, before anything is compiled
LoRAModelRunnerMixin.reset_lora_state              worker       adapters leave their slots when weights are replaced
LoRAModelRunnerMixin.remove_lora                   worker       other files may be loaded under the id afterwards
WorkerLoRAManager._load_adapter                    worker       vLLM reads LoRA's settings and weights only
LoRAModelManager._create_merged_loras_inplace      worker       fails for an adapter without LoRA weights
LoRAModelManager.activate_adapter                  worker       an adapter takes a slot
GPUModelRunner._prepare_inputs (V1; CPU too)       worker       which tokens the step holds
InputBatch.make_lora_inputs (V1),                  worker       vLLM tells adapters apart by their names, and loads one
  LoraState.make_lora_inputs (V2)                               of two; a name can be loaded anew while requests run
GPUModelRunner.prepare_inputs, _set_active_loras   worker       the same for the V2 runner
  (V2)

Each place is compared with the parameters that it had when it was tested, before anything is patched. With another
version, or where a place differs, no place is patched but one, which refuses ReFT adapters with the reason. What would
make this unnecessary upstream: an adapter type that brings its loader, a key of its own per cached block, and a hook of
the runner between input preparation and forward.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

from packaging.version import Version

from peft_reft.integrations.vllm import engine_core, front_end, runner
from peft_reft.integrations.vllm.adapter_of import reft_adapter

TESTED = ("0.32.0", "0.34")  # from, and below
logger = logging.getLogger("vllm.peft_reft")


class Place(NamedTuple):
    """A function of vLLM.

    Attributes:
        module: where it is defined, below "vllm".
        name: its name there, with that of its class.
        parameters: the names of its first parameters when it was tested.
        around: what is called instead, with the original and its arguments.
    """

    module: str
    name: str
    parameters: str
    around: Callable[..., Any]

    def owner(self) -> tuple[Any, str]:
        """What holds the function, and its name in it."""
        owner = import_module(f"vllm.{self.module}")
        *classes, name = self.name.split(".")
        return functools.reduce(getattr, classes, owner), name

    def difference(self) -> str | None:
        """How the place differs from what was tested, in words; None if it does not."""
        try:
            owner, name = self.owner()
            found = list(inspect.signature(getattr(owner, name)).parameters)
        except (ImportError, AttributeError) as error:
            return f"vllm.{self.module} has no {self.name} ({error})"
        wanted = self.parameters.split()
        if found[: len(wanted)] != wanted:
            return f"vllm.{self.module}.{self.name} takes {found}, and not {wanted}"
        return None

    def patch(self) -> None:
        """Put `around` in its place."""
        owner, name = self.owner()
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return self.around(original, *args, **kwargs)

        setattr(owner, name, wrapped)
        if inspect.ismodule(owner):  # those who imported the function by its name
            for module in list(sys.modules.values()):
                if getattr(module, "__name__", "").startswith("vllm.") and vars(module).get(name) is original:
                    setattr(module, name, wrapped)


def apply() -> None:
    """Patch vLLM in this process, once; or arrange that ReFT adapters are refused."""
    global _applied
    if _applied:
        return
    _applied = True
    import vllm

    reason = untested(vllm.__version__) or next(filter(None, (place.difference() for place in PLACES)), None)
    if reason is None:
        for place in PLACES:
            place.patch()
        return
    logger.warning("ReFT adapters cannot be served: %s", reason)
    refusing = Place("lora.worker_manager", "WorkerLoRAManager._load_adapter", "self lora_request", _refusing(reason))
    if refusing.difference() is None:  # else vLLM refuses the adapter's config, in words of its own
        refusing.patch()


_applied = False


def untested(version: str) -> str | None:
    """Why a version of vLLM is not patched; None if it was tested."""
    low, below = map(Version, TESTED)
    if low <= Version(Version(version).base_version) < below:
        return None
    return (
        f"this version of peft_reft was tested with vLLM {low} to below {below}, and {version} is installed. "
        f'Install one of those (pip install "vllm>={low},<{below}"), or a newer peft_reft'
    )


def _refusing(reason: str) -> Callable[..., Any]:
    def _load_adapter(original: Any, self: Any, lora_request: Any) -> Any:
        if reft_adapter(lora_request) is not None:
            raise ValueError(f"The ReFT adapter {lora_request.lora_name!r} cannot be served: {reason}.")
        return original(self, lora_request)

    return _load_adapter


_LORA = "v1.worker.lora_model_runner_mixin"
_OPENAI = "entrypoints.openai"
PLACES = (
    Place(
        "v1.engine.input_processor",
        "InputProcessor.process_inputs",
        "self request_id prompt params supported_tasks arrival_time lora_request",
        front_end.process_inputs,
    ),
    Place(
        "v1.engine.llm_engine",
        "LLMEngine.add_request",
        "self request_id prompt params arrival_time lora_request",
        front_end.add_request,
    ),
    Place("v1.engine.llm_engine", "LLMEngine.add_lora", "self lora_request", front_end.add_lora),
    Place("v1.engine.llm_engine", "LLMEngine.remove_lora", "self lora_id", front_end.remove_lora),
    Place(
        "v1.engine.async_llm",
        "AsyncLLM.add_request",
        "self request_id prompt params arrival_time lora_request",
        front_end.add_request_async,
    ),
    Place("v1.engine.async_llm", "AsyncLLM.add_lora", "self lora_request", front_end.add_lora_async),
    Place("v1.engine.async_llm", "AsyncLLM.remove_lora", "self lora_id", front_end.remove_lora),
    Place("entrypoints.generate.beam_search.utils", "BeamSearchSequence.get_prompt", "self", front_end.get_prompt),
    Place(
        f"{_OPENAI}.chat_completion.protocol",
        "ChatCompletionRequest.to_beam_search_params",
        "self",
        front_end.to_beam_search_params,
    ),
    Place(
        f"{_OPENAI}.completion.protocol",
        "CompletionRequest.to_beam_search_params",
        "self",
        front_end.to_beam_search_params,
    ),
    Place(
        "v1.core.kv_cache_utils",
        "generate_block_hash_extra_keys",
        "request start_token_idx end_token_idx start_mm_idx",
        engine_core.extra_keys,
    ),
    Place("config.vllm", "VllmConfig.compute_hash", "self", engine_core.compute_hash),
    Place(_LORA, "LoRAModelRunnerMixin.load_lora_model", "self model vllm_config device", runner.load_lora_model),
    Place(_LORA, "LoRAModelRunnerMixin.reset_lora_state", "self", runner.reset_lora_state),
    Place(_LORA, "LoRAModelRunnerMixin.remove_lora", "self lora_id", runner.remove_lora),
    Place("lora.worker_manager", "WorkerLoRAManager._load_adapter", "self lora_request", runner.load_adapter),
    Place(
        "lora.model_manager",
        "LoRAModelManager._create_merged_loras_inplace",
        "self lora_model",
        runner.create_merged_loras_inplace,
    ),
    Place("lora.model_manager", "LoRAModelManager.activate_adapter", "self lora_id", runner.activate_adapter),
    Place(
        "v1.worker.gpu_model_runner",
        "GPUModelRunner._prepare_inputs",
        "self scheduler_output num_scheduled_tokens",
        runner.prepare_inputs_v1,
    ),
    Place(
        "v1.worker.gpu_input_batch",
        "InputBatch.make_lora_inputs",
        "self num_scheduled_tokens num_sampled_tokens",
        runner.make_lora_inputs_v1,
    ),
    Place(
        "v1.worker.gpu.lora_utils",
        "LoraState.make_lora_inputs",
        "self req_ids idx_mapping num_scheduled_tokens",
        runner.make_lora_inputs_v2,
    ),
    Place(
        "v1.worker.gpu.model_runner", "GPUModelRunner.prepare_inputs", "self scheduler_output", runner.prepare_inputs_v2
    ),
    Place(
        "v1.worker.gpu.model_runner",
        "GPUModelRunner._set_active_loras",
        "self prompt_lora_mapping token_lora_mapping lora_requests",
        runner.set_active_loras_v2,
    ),
)
