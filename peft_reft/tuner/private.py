"""Every private part of PEFT and transformers that this package uses: what, where, why, and what would replace it.

Run with the versions that versions.py names. A part that is missing raises ImportError here, which names the version;
nothing falls back in silence. docs/upstream.md describes the public hooks for the maintainers of both projects.

part                                              used in                          why
                                                  what would make it unnecessary
------------------------------------------------  -------------------------------  ----------------------------------
peft PeftType's tables of members                 tuner/register.py                the enum is closed
                                                  peft types from entry points
peft _ExcludedModule                              tuner/targets.py, model.py       what the matcher of names returns
                                                  a public class
peft _maybe_include_all_linear_layers             tuner/model.py                   "all-linear" is expanded too late
                                                  expand it before _prepare_model
peft _get_input_embeddings_name                   tuner/fit.py                     which embedding trained tokens have
                                                  a public function
peft _insert_adapter_name_into_state_dict         integrations/hotswap.py          names in a swapped state dict
peft hotswap_adapter_from_state_dict, wrapped     integrations/hotswap.py          only LoRA is swapped
peft hotswap_adapter, wrapped                     integrations/hotswap.py          it may read files of two saves
peft CONFIG_KEYS_TO_CHECK                         integrations/hotswap.py          as above
                                                  hotswap by peft type
peft PeftModel.load_adapter, wrapped              tuner/loading.py                 checks before and after loading
transformers PeftAdapterMixin.load_adapter, ditto tuner/loading.py                 as above
                                                  a hook of the tuner after loading
peft PeftModel.save_pretrained, wrapped           tuner/saving.py                  files are written in their places
                                                  files written beside and renamed
transformers _gradient_checkpointing_func         context/replay.py                blocks run again in backward
                                                  a context around what a checkpoint runs
transformers _prepare_decoder_input_ids_for_generation  context/generate.py        it may lengthen a decoder's prompt
                                                  the prompt's length during generate
transformers _attn_implementation_internal        blocks/tracing/weightless.py     a trace runs on no device: eager code
transformers _experts_implementation_internal     blocks/tracing/weightless.py     as above
                                                  set_attn_implementation on a config
transformers _pad_to_* of models, by name         blocks/structure.py              a model pads its own input
                                                  a declared "pads to a multiple of"
transformers _true_initial_tokens of a request    integrations/continuous_batching where the prompt of a request ends
                                                  the prompt's length of a request
peft _active_adapter, _disable_adapters           context/, causal/                read in each block of each step
                                                  they are its public properties
peft BaseTuner's methods for tuners, overridden   tuner/model.py                   as in PEFT's own tuners
                                                  (the contract of a tuner)
peft BaseTunerLayer._all_available_adapter_names  tuner/layer.py                   the adapter after the active one
peft _move_adapter_to_device_of_base_layer        tuner/layer.py                   a layer has no weight to ask
                                                  the tuner chooses; a layer says its device
transformers CallbackHandler.__init__, wrapped    integrations/trainer.py          notices when training starts
                                                  callbacks that a model brings
lm-eval HFLM._model_call, wrapped                 integrations/lm_eval.py          where a context ends is not passed on
                                                  passing the context's length
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import Any

from peft_reft.tuner.versions import supported


def _part(module: str, name: str) -> Any:
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        package = module.partition(".")[0]
        raise ImportError(
            f"{package} {version(package)} has no {module}.{name}, which peft_reft uses. Install a version that was "
            f'tested with it: pip install "{supported(package)}"'
        ) from error


ExcludedModule = _part("peft.tuners.tuners_utils", "_ExcludedModule")
maybe_include_all_linear_layers = _part("peft.tuners.tuners_utils", "_maybe_include_all_linear_layers")
get_input_embeddings_name = _part("peft.utils.other", "_get_input_embeddings_name")
insert_adapter_name_into_state_dict = _part("peft.utils.save_and_load", "_insert_adapter_name_into_state_dict")
