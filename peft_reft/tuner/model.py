"""ReftModel: the PEFT tuner, with what PEFT asks of one; and looking at the interventions of a model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, ClassVar

from peft import PeftModel
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule, _maybe_include_all_linear_layers
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from peft_reft.blocks import ModelBlocks, device_and_dtype, refuse_unsound
from peft_reft.context.frame import adapter_names_scope
from peft_reft.context.host import Host
from peft_reft.tuner.attach import attach_hosts, is_causal_lm, reft_layers, remove_reft, tidy_up
from peft_reft.tuner.checkpoint import (
    blocks_of,
    cannot_replace,
    does_not_fit,
    intervention_shapes,
    mismatch,
    other_meaning,
)
from peft_reft.tuner.config import ReftConfig, prompt_end_ids
from peft_reft.tuner.layer import CHILD, ReftLayer, attach_layer
from peft_reft.tuner.native import CheckedLoading, call_of
from peft_reft.tuner.targets import check_shapes, check_trained_tokens, choose_targets, own_name, rank_of

INTERVENTIONS = f".{CHILD}.reft_interventions."  # what stands between a block's name and the adapter's in a key


class ReftModel(BaseTuner):
    """A model with ReFT adapters (https://arxiv.org/abs/2404.03592); made by `get_peft_model(model, ReftConfig(...))`.

    The model stays what it was: every edited block gets a child module `reft` and a forward hook, and the modules
    around the blocks get hooks that find each row's prompt. `unload()` removes all of it.
    """

    prefix = "reft_"
    tuner_layer_cls = ReftLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}  # no table of architectures: see blocks.py

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)  # __call__, so that the hooks run

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Entered by `PeftModel` around forward and generate, from which it has taken `adapter_names` out."""
        names = kwargs.get("adapter_names")
        host = Host.of(self.model)
        if names is None or host is None:
            yield
            return
        if self.training:  # refused by all of PEFT's methods
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        with ExitStack() as stack:
            stack.enter_context(adapter_names_scope(host.root, names))
            for module in modules_beside_layers(self.model):
                if isinstance(module, AuxiliaryTrainingWrapper):
                    hook = partial(pass_adapter_names, names=names)
                    stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield

    # Injection: which modules, and what is created there.

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        self._named_by_state_dict: set[str] = set()
        if kwargs.get("state_dict") is not None:
            # PEFT reads a target's name off each key, as what stands before ".reft_"; there is CHILD in between.
            middle = f".{CHILD}.{self.prefix}"
            self._named_by_state_dict = {
                own_name(key.split(middle)[0]) for key in kwargs["state_dict"] if middle in key
            }
            kwargs["state_dict"] = {k.replace(middle, f".{self.prefix}"): v for k, v in kwargs["state_dict"].items()}
        loading = CheckedLoading.begun(model, adapter_name)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            if loading is not None:
                self.peft_config.pop(adapter_name)
            raise
        attach_hosts(model, is_causal_lm(model, self.peft_config[adapter_name]), self._survey)
        if loading is not None:
            loading.expect(self.peft_config[adapter_name])

    def _prepare_adapter_config(self, peft_config: ReftConfig, model_config: dict) -> ReftConfig:
        return peft_config  # None means the model's own blocks, and is saved as such: it fits models of other depths

    def _prepare_model(self, peft_config: ReftConfig, model: nn.Module) -> None:
        _maybe_include_all_linear_layers(peft_config, model)  # PEFT expands "all-linear" after this method only
        host = Host.of(model)
        self._survey = survey = host.root.survey if host is not None else ModelBlocks(model)
        matched, excluded = choose_targets(peft_config, model, survey)
        self._matched, self._excluded = ({own_name(name) for name in names} for names in (matched, excluded))
        # A state dict, if given, says where an adapter goes, whatever the config says.
        named = {name for name, _ in model.named_modules() if own_name(name) in self._named_by_state_dict}
        targets = sorted(matched | named)
        refuse_unsound(model, targets)
        shapes = {own_name(name): survey.shape_of(name) for name in targets}
        survey.forget_trace()
        self._layouts = {name: layout for name, (_, layout) in shapes.items()}
        self._targets = {name: (width, rank_of(peft_config, name)) for name, (width, _) in shapes.items()}
        check_shapes(peft_config, self._targets)  # before anything is changed
        check_trained_tokens(peft_config, model, {*self._targets, *reft_layers(model)})
        self._prompt_end = prompt_end_ids(
            peft_config, None, getattr(getattr(model, "config", None), "_name_or_path", None)
        )
        self._shared: list[ReftLayer] = []  # the layer whose interventions the others share; in a list, so that it is
        # no submodule of the tuner, whose parameters would be saved once more

    def _check_target_module_exists(self, peft_config: ReftConfig, key: str) -> Any:
        return _ExcludedModule() if own_name(key) in self._excluded else own_name(key) in self._matched

    def _create_and_replace(
        self,
        peft_config: ReftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        name = own_name(current_key)
        width, r = self._targets[name]
        layer = attach_layer(target, width, self._layouts[name])
        layer.add_adapter(adapter_name, peft_config, r, self._prompt_end, *self._shared)
        if peft_config.share_layers:
            self._shared = [layer]
        if peft_is_loading():
            layer.being_loaded[adapter_name] = True
        if adapter_name not in self.active_adapters:
            layer.reft_interventions[adapter_name].requires_grad_(False)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Adapters are created in float32 and stay so; without autocast they take the dtype of their block."""
        if autocast_adapter_dtype:
            return super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer in reft_layers(self.model).values():
            if adapter_name in layer.reft_interventions:
                layer.reft_interventions[adapter_name].to(device_and_dtype(layer.block)[1])

    # Checkpoints.

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """`...reft_interventions.<adapter>.0.basis` -> `...reft_interventions.0.basis`."""
        return key.replace(f"{INTERVENTIONS}{adapter_name}.", INTERVENTIONS)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        own = [name for name in state_dict if f"{INTERVENTIONS}{adapter_name}." in name]
        # PEFT looks for the names of modules, which are others than in the state dict where FSDP1 has wrapped blocks.
        selected.update({name: state_dict[name] for name in own})
        if config.share_layers:
            repeated = {name for name in own if blocks_of([name]) != blocks_of(own)[:1]}
            selected = {name: tensor for name, tensor in selected.items() if name not in repeated}
        return selected

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's remapping of names, after a check that the adapter fits the model as a whole.

        Raises:
            ValueError: naming the mismatch. An adapter that was only created to be loaded into is removed again.
        """
        wanted = {
            cls._remove_adapter_name_from_key(name, adapter_name): tensor
            for name, tensor in model.state_dict().items()
            if f"{INTERVENTIONS}{adapter_name}." in name
        }
        if config.share_layers and wanted and state_dict:  # stored once, for the first of the blocks
            first = blocks_of(wanted)[0]
            stored = {name: tensor for name, tensor in state_dict.items() if name.startswith(first + INTERVENTIONS)}
            for block in blocks_of(wanted)[1:]:
                repeated = {name.replace(first, block, 1): tensor for name, tensor in stored.items()}
                state_dict = {**repeated, **state_dict}
        reason = mismatch(intervention_shapes(state_dict), intervention_shapes(wanted))
        if reason is not None:
            remove_if_being_loaded(model, adapter_name)
            base = model.get_base_model() if isinstance(model, PeftModel) else model
            raise ValueError(does_not_fit(base, reason, config))
        fresh = [layer.being_loaded.pop(adapter_name, False) for layer in reft_layers(model).values()]
        if not any(fresh):
            refuse_another_meaning(adapter_name, config)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    # Taking it off.

    def _check_merge_allowed(self) -> None:
        raise ValueError(
            "A ReFT adapter cannot be merged: it edits hidden states at some positions of the prompt only, which no "
            "change of the weights can do. Keep it as an adapter (save_pretrained writes a few kilobytes), or call "
            "unload() to get the base model back."
        )

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Take an auxiliary wrapper (`modules_to_save`, trainable tokens) off again; blocks are never replaced."""
        setattr(parent, child_name, new_module)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        remove_reft(model)
        return model


def pass_adapter_names(module: nn.Module, args: tuple, kwargs: dict[str, Any], names: list[str]) -> tuple[tuple, dict]:
    """Forward pre-hook of a module that was trained in full: each row's own copy of it is to be used."""
    times = args[0].shape[0] // len(names) if args else 1
    return args, {**kwargs, "adapter_names": [name for name in names for _ in range(times)]}


def modules_beside_layers(module: nn.Module) -> Iterator[nn.Module]:
    """`module.modules()` without the interventions, of which there may be very many."""
    if not isinstance(module, ReftLayer):
        yield module
        for child in module.children():
            yield from modules_beside_layers(child)


def peft_is_loading() -> bool:
    """Whether PEFT is loading an adapter just now, and not a user making one.

    PEFT creates an adapter before it reads the weights, and does not say for which purpose.
    """
    return call_of(PeftModel.load_adapter, PeftModel.from_pretrained.__func__) is not None


def refuse_another_meaning(adapter_name: str, config: PeftConfig) -> None:
    """`load_adapter` with the name of an adapter that is there already: PEFT loads its weights and keeps the config.

    Raises:
        ValueError: if the saved adapter's own config gives these weights another meaning.
    """
    call = call_of(PeftModel.load_adapter)
    if call is None:
        return
    saved = PeftConfig.from_pretrained(call.f_locals["model_id"], **call.f_locals["hf_hub_download_kwargs"])
    reason = other_meaning(saved, config) if saved.peft_type == config.peft_type else None
    if reason is not None:
        raise ValueError(cannot_replace(adapter_name, reason))


def remove_if_being_loaded(model: nn.Module, adapter_name: str) -> None:
    """Remove an adapter that was only created to be loaded into, so that the model is as before the failed load."""
    layers = [layer for layer in reft_layers(model).values() if adapter_name in layer.reft_interventions]
    if not isinstance(model, PeftModel) or not any(adapter_name in layer.being_loaded for layer in layers):
        return
    if list(model.peft_config) == [adapter_name]:
        model.base_model.unload()
        return
    model.delete_adapter(adapter_name)
    tidy_up(model.get_base_model())


def get_interventions(model: nn.Module, adapter_name: str | None = None) -> dict[str, nn.ModuleList]:
    """The interventions of an adapter.

    Args:
        model: a `PeftModel`, or a model that adapters were injected into.
        adapter_name: None for the active adapter.

    Returns:
        For every edited block, by its module name in the base model, a ModuleList with one intervention per position
        group, in the order of the terms of `positions` (a single one if the weights are shared).

    Raises:
        ValueError: if there is no such adapter, or several are active and none is named.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    base = base.model if isinstance(base, BaseTuner) else base
    layers = reft_layers(base)
    if adapter_name is None:
        active = sorted({name for layer in layers.values() for name in layer.active_adapters})
        if len(active) != 1:
            raise ValueError(f"The active ReFT adapters are {active}; name the one to look at with adapter_name.")
        adapter_name = active[0]
    found = {
        block: layer.reft_interventions[adapter_name]
        for block, layer in layers.items()
        if adapter_name in layer.reft_interventions
    }
    if not found:
        known = sorted({name for layer in layers.values() for name in layer.reft_interventions})
        raise ValueError(f"The model has no ReFT adapter {adapter_name!r}; its ReFT adapters are {known}.")
    return found  # type: ignore[return-value]


def set_strength(model: nn.Module, strength: float, adapter_name: str | None = None) -> None:
    """Scale an adapter's edits: 0 leaves the base model, 1 is as trained; negative and larger values work too.

    Args:
        model: a `PeftModel`, or a model that adapters were injected into.
        strength: the factor of every edit, until it is set again; not saved with the adapter.
        adapter_name: None for the active adapters.

    Raises:
        ValueError: if there is no such adapter, or the strength is no finite number.
    """
    if not isinstance(strength, (int, float)) or not math.isfinite(strength):
        raise ValueError(
            f"strength={strength!r} is not a finite number; 0 is the base model, 1 the adapter as trained."
        )
    layers = reft_layers(model).values()
    known = {name for layer in layers for name in layer.scaling}
    if adapter_name is not None and adapter_name not in known:
        raise ValueError(f"The model has no ReFT adapter {adapter_name!r}; its ReFT adapters are {sorted(known)}.")
    for layer in layers:
        for name in layer.active_adapters if adapter_name is None else [adapter_name]:
            if name in layer.scaling:
                layer.scaling[name] = float(strength)
