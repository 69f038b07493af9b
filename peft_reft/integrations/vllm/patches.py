"""Every place of vLLM that is patched: what, in which process, and why. Tested with the versions of `TESTED`.

place                                              process      why
-------------------------------------------------  -----------  ------------------------------------------------------
InputProcessor.process_inputs                      front end    what a request asks for is checked before it is queued
LLMEngine, AsyncLLM: add_request                   front end    an adapter that cannot be served is an error of its
                                                                request; in a worker's step it would end the engine
LLMEngine, AsyncLLM: add_lora, remove_lora         front end    notes which adapters were accepted
BeamSearchSequence.get_prompt                      front end    a beam is a new request, with a longer prompt
ChatCompletionRequest, CompletionRequest:          front end    vLLM drops `vllm_xargs` there, and the strength in them
  to_beam_search_params
generate_block_hash_extra_keys                     engine core  cached blocks depend on which tokens are edited
VllmConfig.compute_hash                            all          compiled graphs hold the operation or do not
LoRAModelRunnerMixin.load_lora_model               worker       hooks on blocks, before anything is compiled
LoRAModelRunnerMixin.reset_lora_state              worker       adapters leave their slots when weights are replaced
WorkerLoRAManager._load_adapter                    worker       vLLM reads LoRA's settings and weights only
LoRAModelManager._create_merged_loras_inplace      worker       fails for an adapter without LoRA weights
LoRAModelManager.activate_adapter                  worker       an adapter takes a slot
GPUModelRunner._prepare_inputs (V1; CPU too)       worker       which tokens the step holds
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
import weakref
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from packaging.version import Version

from peft_reft.integrations.vllm.adapters import ServedAdapter, served_adapter
from peft_reft.integrations.vllm.keys import block_keys
from peft_reft.integrations.vllm.requests import PROMPT_LENGTH, STRENGTH, says_anything, wishes_of
from peft_reft.integrations.vllm.rule import RequestEdits
from peft_reft.integrations.vllm.worker import Blocks, Sizes, Worker, find_blocks

TESTED = ("0.32.0", "0.33")  # from, and below
TRIAL = 4  # tokens of the forward in which the residual stream is found
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


def reft_adapter(lora_request: Any) -> ServedAdapter | None:
    """The ReFT adapter that a LoRA request names; None for a LoRA adapter, or without a request.

    Raises:
        ValueError: if it cannot be read or served.
    """
    if lora_request is None:
        return None
    return served_adapter(_directory(lora_request.lora_path))


@functools.cache
def _directory(path: str) -> Path:
    """Where an adapter lies, as vLLM finds it: a directory, or a name on the hub, which is downloaded."""
    from vllm.lora.utils import get_adapter_absolute_path

    return Path(get_adapter_absolute_path(path))


# Front end.

# By engine: the adapters that its workers took, by id, each with its path and version.
_accepted: weakref.WeakKeyDictionary[Any, dict[int, tuple[str, object]]] = weakref.WeakKeyDictionary()


def _process_inputs(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    given = SimpleNamespace(lora_request=None, resumable=False)
    vars(given).update(inspect.signature(original).bind(self, *args, **kwargs).arguments)
    extra = getattr(given.params, "extra_args", None)
    served = reft_adapter(given.lora_request)
    beam_of = given.prompt.get(PROMPT_LENGTH) if isinstance(given.prompt, dict) else None
    if served is None:
        if extra and says_anything(extra):
            raise ValueError(
                f"The request passes {sorted(extra)}, and is not for a ReFT adapter. Name one as its model, or leave "
                "these arguments out."
            )
        return original(self, *args, **kwargs)
    wishes = wishes_of(extra)
    if given.resumable:
        raise ValueError(
            "A session that streams its input cannot use a ReFT adapter: its prompt grows after a part of it was run, "
            f"and positions={served.config.positions!r} count from the prompt's end or start. Send the whole prompt at "
            "once."
        )
    request = original(self, *args, **kwargs)
    length = len(request.prompt_token_ids if request.prompt_token_ids is not None else request.prompt_embeds)
    if wishes.prompt_length is not None and wishes.prompt_length > length:
        raise ValueError(f"{PROMPT_LENGTH}={wishes.prompt_length} is more than the {length} tokens that are given.")
    if beam_of is not None:
        params = request.sampling_params.clone()  # all beams share it
        params.extra_args = {**(params.extra_args or {}), PROMPT_LENGTH: beam_of}
        request.sampling_params = params
    return request


def _get_prompt(original: Any, self: Any) -> Any:
    prompt = original(self)
    if self.lora_request is not None and prompt["type"] != "enc_dec":
        prompt[PROMPT_LENGTH] = len(self.orig_prompt["prompt_token_ids"])
    return prompt


def _to_beam_search_params(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    if says_anything(self.vllm_xargs):
        raise ValueError(
            f"vLLM's beam search takes no vllm_xargs, so that {STRENGTH} would be dropped. Leave it out, or generate "
            "without use_beam_search."
        )
    return original(self, *args, **kwargs)


def _unaccepted(engine: Any, lora_request: Any) -> bool:
    """Whether the workers of an engine have still to take the adapter of a request.

    Raises:
        ValueError: if they took other files under its id.
    """
    served = reft_adapter(lora_request)
    if served is None:
        return False
    known = _accepted.setdefault(engine, {}).get(lora_request.lora_int_id)
    if known is None or lora_request.load_inplace:
        return True
    if known != (lora_request.lora_path, served.version):
        raise ValueError(
            f"The adapter {lora_request.lora_name!r} has the id {lora_request.lora_int_id}, under which the files in "
            f"{known[0]!r} were loaded as they were before. Give it an id of its own, or load it with "
            "load_inplace=True."
        )
    return False


def _note_accepted(engine: Any, lora_request: Any) -> None:
    served = reft_adapter(lora_request)
    if served is not None:
        known = _accepted.setdefault(engine, {})
        known[lora_request.lora_int_id] = lora_request.lora_path, served.version


def _add_request(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    request = _lora_request_in(args, kwargs)
    if _unaccepted(self, request):
        self.add_lora(request)
    return original(self, *args, **kwargs)


async def _add_request_async(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    request = _lora_request_in(args, kwargs)
    if _unaccepted(self, request):
        await self.add_lora(request)
    return await original(self, *args, **kwargs)


def _lora_request_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The LoRA request among the arguments of `add_request`, or in a request that was made before."""
    named = dict(zip(("request_id", "prompt", "params", "arrival_time", "lora_request"), args)) | kwargs
    return named.get("lora_request") or getattr(named.get("prompt"), "lora_request", None)


def _add_lora(original: Any, self: Any, lora_request: Any) -> Any:
    result = original(self, lora_request)
    _note_accepted(self, lora_request)
    return result


async def _add_lora_async(original: Any, self: Any, lora_request: Any) -> Any:
    result = await original(self, lora_request)
    _note_accepted(self, lora_request)
    return result


def _remove_lora(original: Any, self: Any, lora_id: int) -> Any:
    _accepted.setdefault(self, {}).pop(lora_id, None)
    return original(self, lora_id)  # an awaitable, if the engine's method is one


# Engine core.

_edits: weakref.WeakKeyDictionary[Any, tuple[ServedAdapter, RequestEdits] | None] = weakref.WeakKeyDictionary()


def _extra_keys(original: Any, request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int) -> Any:
    keys, mm_idx = original(request, start_token_idx, end_token_idx, start_mm_idx)
    if request.lora_request is None:
        return keys, mm_idx
    if request not in _edits:
        _edits[request] = _edits_of(request)
    found = _edits[request]
    if found is not None:
        served, edits = found
        keys = block_keys(keys, edits, served.version, start_token_idx, end_token_idx)
    return keys, mm_idx


def _edits_of(request: Any) -> tuple[ServedAdapter, RequestEdits] | None:
    served = reft_adapter(request.lora_request)
    if served is None:
        return None
    wishes = wishes_of(getattr(request.sampling_params, "extra_args", None))
    length = request.num_prompt_tokens if wishes.prompt_length is None else wishes.prompt_length
    return served, RequestEdits(served.rule, length, wishes.strength, request.prompt_token_ids)


def _compute_hash(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    found = original(self, *args, **kwargs)
    if self.lora_config is None:
        return found
    from vllm.utils.hashing import safe_hash

    from peft_reft import __version__

    return safe_hash(f"{found} peft_reft {__version__}".encode(), usedforsecurity=False).hexdigest()[: len(found)]


# Worker.

_workers: weakref.WeakKeyDictionary[Any, Worker] = weakref.WeakKeyDictionary()  # by the manager of its adapters


def _load_lora_model(original: Any, self: Any, model: Any, vllm_config: Any, device: Any) -> Any:
    from vllm.model_executor.models import supports_lora

    if not supports_lora(model):
        raise ValueError(
            f"vLLM's own {type(model).__name__} takes no adapters, neither LoRA nor ReFT. The same model run by "
            "transformers' modules does: start with --model-impl transformers (LLM(..., model_impl='transformers'))."
        )
    drafts = vllm_config.speculative_config is not None
    worker = Worker(list(_obstacles(model, vllm_config)), drafts, _renaming(model))
    model_config, lora_config = vllm_config.model_config, vllm_config.lora_config
    sizes = Sizes(
        lora_config.max_loras,
        lora_config.max_lora_rank,
        model_config.get_hidden_size(),
        vllm_config.scheduler_config.max_num_batched_tokens,
    )
    from vllm.forward_context import set_forward_context

    # Before vLLM wraps linear layers, which then expect to be told of a step's adapters. Without metadata attention
    # has no
    # cache to read, and the model runs as it is written, not compiled.
    with set_forward_context(None, vllm_config, num_tokens=TRIAL, skip_compiled=True):
        worker.attach(
            lambda: _blocks_of(model, model_config),
            lambda: model(**_trial_inputs(self, model, model_config)),
            _attention_of(model),
            sizes,
            device,
        )
    if worker.problem is not None:
        logger.warning("ReFT adapters cannot be served by this engine: %s", worker.problem)
    result = original(self, model, vllm_config, device)
    _workers[self.lora_manager._adapter_manager] = worker
    return result


def _reset_lora_state(original: Any, self: Any) -> Any:
    result = original(self)
    worker = _worker_of(self)
    if worker is not None:
        worker.reset()
    return result


def _obstacles(model: Any, vllm_config: Any) -> Iterable[str]:
    """What keeps an engine from serving ReFT adapters, in words."""
    parallel, compilation = vllm_config.parallel_config, vllm_config.compilation_config
    if vllm_config.model_config.is_encoder_decoder:
        yield "the model has an encoder and a decoder, whose positions are counted apart"
    if vllm_config.kv_transfer_config is not None:
        yield "a KV connector (--kv-transfer-config) may name blocks by keys of its own; start without it"
    if parallel.use_ubatching:
        yield "a step is cut into micro-batches (--enable-dbo, --ubatch-size); start without it"
    if parallel.prefill_context_parallel_size > 1:
        yield "the tokens of a prompt are divided among workers (--prefill-context-parallel-size); start with 1"
    if getattr(compilation.pass_config, "enable_sp", False):
        yield "sequence parallelism divides the residual stream by tokens (pass_config.enable_sp); start without it"
    if vllm_config.cache_config.kv_sharing_fast_prefill:
        yield "fast prefill runs later blocks on some tokens only (--kv-sharing-fast-prefill); start without it"


def _renaming(model: Any) -> Callable[[str], str]:
    """From a module's name in transformers to its name in vLLM's model, as its weights are renamed."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return str
    renaming = mapper.get_rename_mapper()

    def rename(name: str) -> str:
        renamed = renaming.map_name(f"{name}.weight")  # a mapper knows the names of parameters
        return name if renamed is None else str(renamed).removesuffix(".weight")

    return rename


def _blocks_of(model: Any, model_config: Any) -> Blocks:
    from vllm.model_executor.models.utils import PPMissingLayer

    return find_blocks(model, model_config.get_total_num_hidden_layers(), (PPMissingLayer,))


def _attention_of(model: Any) -> list[torch.nn.Module]:
    """The modules that compute attention over the cache, which a trial forward does not have."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    found = [module for module in model.modules() if isinstance(module, AttentionLayerBase)]
    instances = getattr(model, "attention_instances", {})  # of transformers' models, kept beside the modules
    return list({id(module): module for module in [*found, *instances.values()]}.values())


def _trial_inputs(runner: Any, model: Any, model_config: Any) -> dict[str, Any]:
    """What a model is given to run `TRIAL` tokens."""
    from vllm.distributed import get_pp_group

    device = runner.device
    positions = torch.arange(TRIAL, device=device)
    if getattr(runner, "uses_mrope", False):
        positions = positions.expand(3, TRIAL)
    if get_pp_group().is_first_rank:
        return {"input_ids": torch.arange(1, TRIAL + 1, device=device), "positions": positions}
    stream = model.make_empty_intermediate_tensors(batch_size=TRIAL, dtype=model_config.dtype, device=device)
    for tensor in stream.tensors.values():
        tensor.normal_()
    return {"input_ids": None, "positions": positions, "intermediate_tensors": stream}


def _load_adapter(original: Any, self: Any, lora_request: Any) -> Any:
    served = reft_adapter(lora_request)
    if served is None:
        return original(self, lora_request)
    from vllm.lora.lora_model import LoRAModel

    lora = LoRAModel(lora_request.lora_int_id, 1, {})
    lora.reft = _workers[self._adapter_manager].load(served)
    return lora


def _create_merged_loras_inplace(original: Any, self: Any, lora_model: Any) -> None:
    if lora_model.loras:
        original(self, lora_model)


def _activate_adapter(original: Any, self: Any, lora_id: int) -> Any:
    changed = original(self, lora_id)
    worker = _workers.get(self)
    if changed and worker is not None:
        adapter = getattr(self._registered_adapters[lora_id], "reft", None)
        worker.activate(self.lora_index_to_id.index(lora_id), lora_id, adapter)
    return changed


def _worker_of(runner: Any) -> Worker | None:
    manager = getattr(runner, "lora_manager", None)
    return None if manager is None else _workers.get(manager._adapter_manager)


def _note_requests(worker: Worker, scheduler_output: Any, known: Any) -> None:
    worker.forget(scheduler_output.finished_req_ids, known)
    for new in scheduler_output.scheduled_new_reqs:
        worker.forget([new.req_id], known)
        served = reft_adapter(new.lora_request)
        if served is not None:
            extra = getattr(new.sampling_params, "extra_args", None)
            lora_id = new.lora_request.lora_int_id
            worker.note(new.req_id, lora_id, served, new.prompt_token_ids, new.prompt_len, extra)


def _prepare_inputs_v1(original: Any, self: Any, scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
    result = original(self, scheduler_output, num_scheduled_tokens)
    worker = _worker_of(self)
    if worker is not None:
        _note_requests(worker, scheduler_output, self.requests)
        count = len(num_scheduled_tokens)
        batch = self.input_batch
        worker.begin_step(batch.req_ids[:count], batch.num_computed_tokens_cpu[:count], num_scheduled_tokens)
    return result


_prepared: weakref.WeakKeyDictionary[Any, Any] = (
    weakref.WeakKeyDictionary()
)  # by runner: the batch of the coming forward


def _prepare_inputs_v2(original: Any, self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
    batch = original(self, scheduler_output, *args, **kwargs)
    worker = _worker_of(self)
    if worker is not None:
        _note_requests(worker, scheduler_output, self.req_states.req_id_to_index)
        _prepared[self] = batch  # its adapters take their slots later
    return batch


def _set_active_loras_v2(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(self, *args, **kwargs)
    batch, worker = _prepared.pop(self, None), _worker_of(self)
    if batch is not None and worker is not None:
        worker.begin_step(batch.req_ids, batch.num_computed_tokens_np, batch.num_scheduled_tokens)
    return result


_LORA = "v1.worker.lora_model_runner_mixin"
_OPENAI = "entrypoints.openai"
PLACES = (
    Place(
        "v1.engine.input_processor",
        "InputProcessor.process_inputs",
        "self request_id prompt params supported_tasks arrival_time lora_request",
        _process_inputs,
    ),
    Place(
        "v1.engine.llm_engine",
        "LLMEngine.add_request",
        "self request_id prompt params arrival_time lora_request",
        _add_request,
    ),
    Place("v1.engine.llm_engine", "LLMEngine.add_lora", "self lora_request", _add_lora),
    Place("v1.engine.llm_engine", "LLMEngine.remove_lora", "self lora_id", _remove_lora),
    Place(
        "v1.engine.async_llm",
        "AsyncLLM.add_request",
        "self request_id prompt params arrival_time lora_request",
        _add_request_async,
    ),
    Place("v1.engine.async_llm", "AsyncLLM.add_lora", "self lora_request", _add_lora_async),
    Place("v1.engine.async_llm", "AsyncLLM.remove_lora", "self lora_id", _remove_lora),
    Place("entrypoints.generate.beam_search.utils", "BeamSearchSequence.get_prompt", "self", _get_prompt),
    Place(
        f"{_OPENAI}.chat_completion.protocol",
        "ChatCompletionRequest.to_beam_search_params",
        "self",
        _to_beam_search_params,
    ),
    Place(f"{_OPENAI}.completion.protocol", "CompletionRequest.to_beam_search_params", "self", _to_beam_search_params),
    Place(
        "v1.core.kv_cache_utils",
        "generate_block_hash_extra_keys",
        "request start_token_idx end_token_idx start_mm_idx",
        _extra_keys,
    ),
    Place("config.vllm", "VllmConfig.compute_hash", "self", _compute_hash),
    Place(_LORA, "LoRAModelRunnerMixin.load_lora_model", "self model vllm_config device", _load_lora_model),
    Place(_LORA, "LoRAModelRunnerMixin.reset_lora_state", "self", _reset_lora_state),
    Place("lora.worker_manager", "WorkerLoRAManager._load_adapter", "self lora_request", _load_adapter),
    Place(
        "lora.model_manager",
        "LoRAModelManager._create_merged_loras_inplace",
        "self lora_model",
        _create_merged_loras_inplace,
    ),
    Place("lora.model_manager", "LoRAModelManager.activate_adapter", "self lora_id", _activate_adapter),
    Place(
        "v1.worker.gpu_model_runner",
        "GPUModelRunner._prepare_inputs",
        "self scheduler_output num_scheduled_tokens",
        _prepare_inputs_v1,
    ),
    Place("v1.worker.gpu.model_runner", "GPUModelRunner.prepare_inputs", "self scheduler_output", _prepare_inputs_v2),
    Place(
        "v1.worker.gpu.model_runner",
        "GPUModelRunner._set_active_loras",
        "self prompt_lora_mapping token_lora_mapping lora_requests",
        _set_active_loras_v2,
    ),
)
