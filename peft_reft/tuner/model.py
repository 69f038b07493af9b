"""ReftModel: the PEFT tuner, with what PEFT asks of one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from peft_reft.blocks import Layout, ModelBlocks, device_and_dtype, own_name, present_names, refuse_unsound
from peft_reft.context.state import ModelState
from peft_reft.tuner.checkpoint import fitting_tensors
from peft_reft.tuner.combine import check_combination, check_sum, config_of_sum, fill_sum, grow, grown, linear_parts
from peft_reft.tuner.config import ReftConfig, prompt_end_ids
from peft_reft.tuner.fit import check_fit, check_shapes
from peft_reft.tuner.injection import is_causal_lm, reft_layers, remove_adapter, remove_reft, state_of, tidy_up
from peft_reft.tuner.keys import PREFIX, blocks_of, is_intervention, without_adapter, without_child
from peft_reft.tuner.layer import ReftLayer, attach_layer
from peft_reft.tuner.neighbours import ON_INJECTION
from peft_reft.tuner.private import ExcludedModule, maybe_include_all_linear_layers
from peft_reft.tuner.rows import AdaptersOfRows
from peft_reft.tuner.targets import check_adapter_name, choose_targets, rank_of


@dataclass(eq=False)
class Injection:
    """What one call of `inject_adapter` finds out, for the methods that PEFT calls meanwhile.

    Attributes:
        adapter_name: of the adapter.
        named_by_state_dict: names of the modules that a given state dict has interventions for.
        matched, excluded: the modules that the config names, and excludes, by the names that PEFT asks for.
        targets: width, layout and rank of each module to edit, by its own name; empty until all of it is checked.
        prompt_end: the config's marker as token ids.
        shared: the layer whose interventions the others share.
    """

    adapter_name: str
    named_by_state_dict: set[str]
    matched: set[str] = field(default_factory=set)
    excluded: set[str] = field(default_factory=set)
    targets: dict[str, tuple[int, Layout, int]] = field(default_factory=dict)
    prompt_end: Sequence[int] = ()
    shared: ReftLayer | None = None


class ReftModel(BaseTuner):
    """A model with ReFT adapters (https://arxiv.org/abs/2404.03592); made by `get_peft_model(model, ReftConfig(...))`.

    The model stays what it was: every edited block gets a child module `reft`, its forward an entry, and the modules
    around the blocks get an entry that finds each row's prompt. `unload()` removes all of it.
    """

    prefix = PREFIX
    tuner_layer_cls = ReftLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}  # no table of architectures: see blocks/
    peft_config: dict[str, PeftConfig]
    _state: ModelState

    @property
    def _current_state(self) -> ModelState:
        """What the model's adapters share. Another tuner of the model may have taken all off, and put on others."""
        if not self._state.layers:
            self._state = state_of(self.model) or self._state
        return self._state

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        """Entered by `PeftModel` around forward and generate, from which it has taken `adapter_names` out."""
        names: Sequence[str] | None = kwargs.get("adapter_names")
        if names is None:
            self._current_state.running.forget_interrupted_scope()
            return nullcontext()
        if self.training:  # refused by all of PEFT's methods
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        return AdaptersOfRows(self.model, self._current_state, names)

    # Injection: which modules, and what is created there.

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        check_adapter_name(adapter_name)
        self.peft_config = self.peft_config  # which may be the model's: another tuner that is unloaded takes that off
        named: set[str] = set()
        if kwargs.get("state_dict") is not None:
            # PEFT reads a target's name off each key, as what stands before ".reft_"; there is CHILD in between.
            named = {own_name(block) for block in blocks_of(filter(is_intervention, kwargs["state_dict"]))}
            kwargs["state_dict"] = {without_child(key): tensor for key, tensor in kwargs["state_dict"].items()}
        self._state = state = state_of(model) or ModelState(ModelBlocks(model))
        self._injection = injection = Injection(adapter_name, named)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            self.peft_config.pop(adapter_name, None)  # PEFT has entered it by then
            if injection.targets:  # layers may have been made
                remove_adapter(model, adapter_name)
            raise
        finally:
            del self._injection
        state.causal = state.causal or is_causal_lm(model, self.peft_config[adapter_name])
        tidy_up(model)
        for tell in ON_INJECTION:
            tell(model)

    def _prepare_adapter_config(self, peft_config: ReftConfig, model_config: dict) -> ReftConfig:
        return peft_config  # None means the model's own blocks, and is saved as such: it fits models of other depths

    def _prepare_model(self, peft_config: ReftConfig, model: nn.Module) -> None:
        maybe_include_all_linear_layers(peft_config, model)  # PEFT expands "all-linear" after this method only
        found = self._injection
        # A model around the one that has adapters already has names of its own for the same blocks.
        blocks = self._state.blocks_of(model)
        matched, excluded = choose_targets(peft_config, model, blocks)
        present = present_names(model)
        found.matched, found.excluded = ({present[name] for name in names} for names in (matched, excluded))
        # A state dict, if given, says where an adapter goes, whatever the config says.
        names = sorted(matched | (found.named_by_state_dict & present.keys()))
        refuse_unsound(model, names)
        targets = {name: (*blocks.shape_of(name), rank_of(peft_config, name)) for name in names}
        blocks.forget_trace()
        # Before anything is changed.
        check_fit(peft_config, model, {name: (width, r) for name, (width, _, r) in targets.items()})
        model_name = getattr(getattr(model, "config", None), "name_or_path", None)
        found.prompt_end = prompt_end_ids(peft_config, None, model_name)
        found.targets = targets
        for layer in reft_layers(model, found.adapter_name).values():  # `get_peft_model` a second time on this model
            layer.delete_adapter(found.adapter_name)

    def _check_target_module_exists(self, peft_config: ReftConfig, key: str) -> Any:
        return ExcludedModule() if key in self._injection.excluded else key in self._injection.matched

    def _create_and_replace(
        self,
        peft_config: ReftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        found = self._injection
        width, layout, r = found.targets[own_name(current_key)]
        layer = attach_layer(target, width, layout, self._state)
        layer.add_adapter(adapter_name, peft_config, r, found.prompt_end, found.shared)
        if peft_config.share_layers:
            found.shared = layer

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's: the adapters that are active, whose edits are summed.

        Raises:
            ValueError: for a name of none, which PEFT passes over.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        unknown = sorted({*names} - self.peft_config.keys())
        if unknown:
            raise ValueError(f"Adapter {', '.join(unknown)} not found; the adapters are {sorted(self.peft_config)}.")
        super().set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's; a block without an adapter is itself again."""
        super().delete_adapter(adapter_name)
        tidy_up(self.model)

    # Putting together what was learned apart.

    def add_subspace(self, adapter_name: str, name: str, r: int) -> None:
        """Grow a trained adapter by a part of R that can be trained, and switched, for itself.

        Its parameters are new ones: make an optimizer afterwards. The earlier parts keep their values, whatever an
        optimizer does, and the new one is kept at right angles to them. A fresh part changes nothing where the
        equation allows that.

        Args:
            adapter_name: an adapter with `subspaces`.
            name: of the new part.
            r: its rank.

        Raises:
            ValueError: if there is no such adapter, it has no subspaces, or one of that name.
        """
        config = self.peft_config.get(adapter_name)
        layers = reft_layers(self.model, adapter_name)
        if not isinstance(config, ReftConfig) or not layers:
            raise ValueError(f"Adapter {adapter_name} does not exist; the adapters are {sorted(self.peft_config)}.")
        larger = grown(config, name, r)
        check_shapes(larger, {name: (layer.width, larger.r) for name, layer in layers.items()})
        grow(list(layers.values()), adapter_name, larger)
        self.peft_config[adapter_name] = larger
        self._current_state.plans.clear()  # which hold the interventions

    def add_weighted_adapter(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str = "cat"
    ) -> None:
        """Add an adapter that is the weighted sum of others: exactly, as one DiReFT adapter of the sum of their ranks.

        The edits are summed as trained, without what `set_strength` and `set_subspaces` say. The new adapter is not
        active: see `set_adapter`.

        Args:
            adapters: names of adapters with the same positions.
            weights: a factor for each; negative ones subtract.
            adapter_name: the new adapter's name.
            combination_type: "cat", LoRA's name for this exact sum.

        Raises:
            ValueError: if the sum is not one adapter: other positions or prompts, an activation, modules or tokens
                trained beside the edits, interventions of one's own; or if the name is taken, or the combination is
                another one of LoRA's.
        """
        check_adapter_name(adapter_name)
        check_combination(combination_type)
        check_sum(self.peft_config, adapters, weights, adapter_name)
        layers = [reft_layers(self.model, name) for name in adapters]
        for name, own in zip(adapters, layers):  # before anything is changed
            linear_parts(next(iter(own.values())).reft_interventions[name][0], name)  # type: ignore[index]
        self.peft_config[adapter_name] = config_of_sum(self.peft_config, adapters, layers)
        self.inject_adapter(self.model, adapter_name)
        for layer in reft_layers(self.model, adapter_name).values():
            fill_sum(layer, adapters, weights, adapter_name)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Adapters are created in float32 and stay so; without autocast they take the dtype of their block."""
        if autocast_adapter_dtype:
            return super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer in reft_layers(self.model, adapter_name).values():
            layer.reft_interventions[adapter_name].to(device_and_dtype(layer.block)[1])

    # Checkpoints.

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """`...reft_interventions.<adapter>.0.basis` -> `...reft_interventions.0.basis`; names are the base model's."""
        return without_adapter(key, adapter_name)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        # PEFT looks for the names of modules, which are others than in the state dict where FSDP1 has wrapped blocks.
        own = {name: tensor for name, tensor in state_dict.items() if is_intervention(name, adapter_name)}
        if not config.share_layers:
            return own
        first = blocks_of(own)[:1]  # which holds what the others repeat
        return {name: tensor for name, tensor in own.items() if blocks_of([name]) == first}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's remapping of names, after a check that the adapter fits the model as a whole."""
        state_dict = fitting_tensors(state_dict, model, config, adapter_name)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    # Taking it off.

    def _check_merge_allowed(self) -> None:
        raise ValueError(
            "A ReFT adapter cannot be merged: it edits hidden states at some positions of the prompt only, which no "
            "change of the weights can do. Keep it as an adapter (save_pretrained writes a few kilobytes), or call "
            "unload() to get the base model back."
        )

    def unmerge_adapter(self) -> None:
        """Nothing is to be done: nothing can have been merged."""

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        """Not PEFT's, which takes off what every tuner has put on: a LoRA of the same model stays, and works."""
        if merge:
            self._check_merge_allowed()
        for name, module in list(self.model.named_modules()):
            if isinstance(module, AuxiliaryTrainingWrapper):  # of `modules_to_save`, or of trainable tokens
                parent, _, child = name.rpartition(".")
                unwrapped = module.unload_and_optionally_merge_module(False, False, None)
                setattr(self.model.get_submodule(parent), child, unwrapped)
        remove_reft(self.model)
        if not any(isinstance(module, BaseTunerLayer) for module in self.model.modules()):
            self.model.__dict__.pop("peft_config", None)
        return self.model
