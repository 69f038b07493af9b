"""In vLLM's workers: hooks on blocks when a model is loaded, adapters in slots, and the places of each step.

Each function stands around one of vLLM's, which it gets first; patches.py says around which. What it does with a step
or an adapter is in worker.py.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch

from peft_reft.integrations.vllm.adapter_of import reft_adapter
from peft_reft.integrations.vllm.worker import Blocks, Sizes, Worker, find_blocks

TRIAL = 4  # tokens of the forward in which the residual stream is found
logger = logging.getLogger("vllm.peft_reft")

_workers: weakref.WeakKeyDictionary[Any, Worker] = weakref.WeakKeyDictionary()  # by the manager of its adapters


def load_lora_model(original: Any, self: Any, model: Any, vllm_config: Any, device: Any) -> Any:
    from vllm.model_executor.models import supports_lora

    if not supports_lora(model):
        raise ValueError(
            f"vLLM's own {type(model).__name__} takes no adapters, neither LoRA nor ReFT. The same model run by "
            "transformers' modules does: start with --model-impl transformers (LLM(..., model_impl='transformers'))."
        )
    drafts = vllm_config.speculative_config is not None
    worker = Worker(list(_obstacles(model, vllm_config)), drafts, _renaming(model))
    model_config, lora_config = vllm_config.model_config, vllm_config.lora_config
    compilation = vllm_config.compilation_config
    sizes = Sizes(
        lora_config.max_loras,
        lora_config.max_lora_rank,
        model_config.get_hidden_size(),
        # A captured graph may have more tokens than a step, which fills it up.
        max([vllm_config.scheduler_config.max_num_batched_tokens, *(compilation.cudagraph_capture_sizes or ())]),
    )
    from vllm.forward_context import set_forward_context

    # Before vLLM wraps linear layers, which then expect to be told of a step's adapters. Without metadata attention
    # has no cache to read, and the model runs as it is written, not compiled.
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


def reset_lora_state(original: Any, self: Any) -> Any:
    result = original(self)
    worker = _worker_of(self)
    if worker is not None:
        worker.reset()
    return result


def remove_lora(original: Any, self: Any, lora_id: int) -> Any:
    worker = _worker_of(self)
    if worker is not None:
        worker.versions.pop(lora_id, None)
    return original(self, lora_id)


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
    if getattr(vllm_config.speculative_config, "enable_adaptive_verification", False):
        yield "only the device knows which guesses a step holds (enable_adaptive_verification); start without it"
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


def load_adapter(original: Any, self: Any, lora_request: Any) -> Any:
    served = reft_adapter(lora_request)
    if served is None:
        return original(self, lora_request)
    from vllm.lora.lora_model import LoRAModel

    lora = LoRAModel(lora_request.lora_int_id, 1, {})
    lora.reft = _workers[self._adapter_manager].load(served, lora_request.lora_int_id, lora_request.load_inplace)
    return lora


def create_merged_loras_inplace(original: Any, self: Any, lora_model: Any) -> None:
    if lora_model.loras:
        original(self, lora_model)


def activate_adapter(original: Any, self: Any, lora_id: int) -> Any:
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
        if new.lora_request is not None:
            extra = getattr(new.sampling_params, "extra_args", None)
            worker.note(new.req_id, new.lora_request.lora_int_id, new.prompt_token_ids, new.prompt_len, extra)


def prepare_inputs_v1(original: Any, self: Any, scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
    result = original(self, scheduler_output, num_scheduled_tokens)
    worker = _worker_of(self)
    if worker is not None:
        _note_requests(worker, scheduler_output, self.requests)
        count = len(num_scheduled_tokens)
        batch = self.input_batch
        worker.begin_step(batch.req_ids[:count], batch.num_computed_tokens_cpu[:count], num_scheduled_tokens)
    return result


def make_lora_inputs_v1(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    *mappings, _ = original(self, *args, **kwargs)
    return (*mappings, list(self.lora_id_to_lora_request.values()))


def make_lora_inputs_v2(original: Any, self: Any, req_ids: Any, *args: Any, **kwargs: Any) -> Any:
    *mappings, _ = original(self, req_ids, *args, **kwargs)
    found = [self.lora_requests[request] for request in req_ids if request in self.lora_requests]
    return (*mappings, list({request.lora_int_id: request for request in found}.values()))


_prepared: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()  # the coming forward's batch, by runner


def prepare_inputs_v2(original: Any, self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
    batch = original(self, scheduler_output, *args, **kwargs)
    worker = _worker_of(self)
    if worker is not None:
        _note_requests(worker, scheduler_output, self.req_states.req_id_to_index)
        _prepared[self] = batch  # its adapters take their slots later
    return batch


def set_active_loras_v2(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(self, *args, **kwargs)
    batch, worker = _prepared.pop(self, None), _worker_of(self)
    if batch is not None and worker is not None:
        worker.begin_step(batch.req_ids, batch.num_computed_tokens_np, batch.num_scheduled_tokens)
    return result
