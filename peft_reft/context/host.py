"""The hooks on the modules around the blocks: they find the prompts when a call enters, and clean up when it ends.

model(...)  ->  Host.enter: Frame  ->  blocks ask frame.sites(spec)  ->  Host.leave
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peft_reft.context.arguments import (
    check_locations,
    past_length,
    token_device,
    token_shape,
    valid_columns,
    window_of,
)
from peft_reft.context.frame import Call, Frame, current_frame, frame_of_block, innermost_generation, state
from peft_reft.context.notices import note_forward
from peft_reft.context.root import BASE, Root
from peft_reft.integrations.continuous_batching import paged_prompts
from peft_reft.positions.notation import PositionSpec
from peft_reft.positions.prompts import Prompts, Tokens, align_shift_labels, document_starts

OWN_ARGUMENTS = ("intervention_locations", "adapter_names")  # taken out of the call: the model does not know them
CHECKPOINT = "_gradient_checkpointing_func"  # transformers' name for it
UNLABELLED_TRAINING = (
    "A training forward of a ReFT model got neither `labels` nor `intervention_locations`, so the whole row counts as "
    "the prompt and the last prompt token is the end of the answer. That is right for a bare forward, but wrong for a "
    "trainer that took the labels away (label smoothing, compute_loss_func): wrap its collator, "
    "data_collator=peft_reft.ReftDataCollator(collator, config), and the positions travel with the batch."
)
MARKER_MISSING = (
    "A row without the marker prompt_end={} was given to a ReFT model, without labels or intervention_locations: the "
    "whole row counts as its prompt."
)


class Host:
    """The hooks on a module that takes tokens and has blocks below it.

    Args:
        module: the module; its forward's parameter names are read once.
        root: shared by all hosts of a model.
        role: "encoder" or "decoder" in an encoder-decoder model, "router" for the module above both, else "".
        depth: how many modules it lies in: a call of a module at the same or a smaller depth is another call.
    """

    def __init__(self, module: nn.Module, root: Root, role: str = "", depth: int = 0):
        parameters = inspect.signature(type(module).forward).parameters.values()
        self.names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
        self.root = root
        self.role = role
        self.depth = depth

    def attach(self, module: nn.Module) -> None:
        module.register_forward_pre_hook(self.enter, prepend=True, with_kwargs=True)
        module.register_forward_hook(self.leave, always_call=True)

    @classmethod
    def of(cls, module: nn.Module) -> Host | None:
        """The host attached to a module, if any."""
        for hook in module._forward_pre_hooks.values():
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, cls):
                return owner
        return None

    @classmethod
    def detach(cls, module: nn.Module) -> None:
        """Take the hooks off again, and give the module its checkpoint function back."""
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), cls):
                    del hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
                    module._forward_hooks_always_called.pop(key, None)
        checkpoint = module.__dict__.get(CHECKPOINT)
        if isinstance(checkpoint, WithFrame):
            module.__dict__[CHECKPOINT] = checkpoint.checkpoint

    def enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Forward pre-hook: find the prompts of this call's tokens."""
        own = {name: kwargs[name] for name in OWN_ARGUMENTS if kwargs.get(name) is not None}
        kwargs = {name: value for name, value in kwargs.items() if name not in OWN_ARGUMENTS}
        arguments = {**dict(zip(self.names, args)), **kwargs}
        outer = current_frame()
        if outer is not None and (outer.host.root is not self.root or outer.host.depth >= self.depth):
            outer = None  # another model's, another call of this one, or left over from an interrupted one
        frame = self._frame(module, outer, arguments, own)
        names = frame.call.adapter_names
        if frame.call.factors is None and frame.edits and self.role != "router":
            frame.call.factors = self.root.factors(
                self._layers(module), names and [name for name in dict.fromkeys(names) if name != BASE]
            )
        state.frames.append(frame)
        return args, kwargs

    def leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Forward hook, called even if the forward failed (or never began, when `enter` itself raised)."""
        if state.frames and state.frames[-1].host is self:
            frame = state.frames.pop()
            call = frame.call
            if call.generation is not None:
                if call.host is self:
                    call.generation.forward_ended()
            elif self.root.steps_without_edit is not None and module.training and not torch.compiler.is_compiling():
                call.edited = call.edited or frame.edits_something()
                if call.host is self and torch.is_grad_enabled() and output is not None:
                    self.root.note_training_forward(call.edited)

    def _layers(self, module: nn.Module) -> list[Any]:
        if getattr(module, "_is_replica", False):  # nn.DataParallel: replicas have layers of their own
            kinds = tuple({type(layer) for layer in self.root.layers})
            return [part for part in module.modules() if isinstance(part, kinds)]
        return self.root.layers

    def _frame(self, module: nn.Module, outer: Frame | None, arguments: dict[str, Any], own: dict[str, Any]) -> Frame:
        shape = token_shape(arguments, self.root.survey.ids_per_row)
        if outer is not None and outer.host.role == self.role and shape in (None, (outer.rows, outer.columns)):
            # The same tokens one level further in, where labels and masks may be gone or have changed their form.
            return replace(outer, host=self)
        call = outer.call if outer is not None else self._call(module, arguments, own, shape)
        if self.role == "router" or shape is None:
            return Frame(self, call, locations=call.locations)
        rows, columns = shape
        if arguments.get("cache") is not None and arguments.get("logits_indices") is not None:
            return self._paged_frame(call, arguments, rows, columns)
        if self.role == "encoder" or call.generation is None:
            return self._plain_frame(call, arguments, rows, columns)
        return call.generation.frame(self, call, arguments, rows, columns)

    def _call(
        self, module: nn.Module, arguments: dict[str, Any], own: dict[str, Any], shape: tuple[int, int] | None
    ) -> Call:
        generation = innermost_generation(self.root)
        locations = own.get("intervention_locations")
        if locations is None and generation is not None and self.role != "decoder":
            locations = generation.locations
        elif locations is not None:
            locations = check_locations(locations, shape, past_length(arguments, shape[1] if shape else 0, 0))
        names = own.get("adapter_names")
        if names is not None:
            names = self.root.check_adapter_names(names)
        elif generation is not None and generation.adapter_names is not None:
            names = generation.adapter_names
        else:
            names = next((names for root, names in reversed(state.adapter_names) if root is self.root), None)
        labels = arguments.get("labels")
        if labels is None:
            labels = self._remembered_labels(module, arguments)
        ids = arguments.get("input_ids")
        state.labelled = None
        if isinstance(labels, Tensor) and isinstance(ids, Tensor) and not torch.compiler.is_compiling():
            state.labelled = (self.root, weakref.ref(ids), labels)
        labelled = any(arguments.get(name) is not None for name in ("labels", "shift_labels"))
        unlabelled = self.root.causal and generation is None and locations is None and not labelled
        in_training = module.training and torch.is_grad_enabled()
        if unlabelled and in_training:
            self.root.warn_once(UNLABELLED_TRAINING)
        if not torch.compiler.is_compiling():
            note_forward(module, unlabelled and not in_training)
        return Call(self, labels, arguments.get("shift_labels"), locations, names, generation, torch.is_grad_enabled())

    def _remembered_labels(self, module: nn.Module, arguments: dict[str, Any]) -> Tensor | None:
        """Labels of the forward just before, if a trainer runs the very same batch once more to get its logits.

        TRL's evaluation with metrics does: first for the loss, with labels, then without them and with use_cache=False.
        """
        if (
            module.training
            or torch.is_grad_enabled()
            or arguments.get("use_cache") is not False
            or state.labelled is None
        ):
            return None
        root, ids, labels = state.labelled
        return labels if root is self.root and ids() is arguments.get("input_ids") is not None else None

    def _plain_frame(self, call: Call, arguments: dict[str, Any], rows: int, columns: int) -> Frame:
        """The frame of a forward outside `generate` (or of an encoder, which `generate` runs like any other)."""
        past: int | Tensor = 0 if self.role == "encoder" else past_length(arguments, columns, 0)
        locations = None if self.role == "decoder" else call.locations
        if locations is not None:
            return Frame(self, call, rows, columns, locations=window_of(locations, past, columns))
        if not isinstance(past, Tensor) and past > 0:
            return Frame(self, call, rows, columns, edits=False)
        valid = valid_columns(arguments.get("attention_mask"), rows, columns, token_device(arguments))
        if isinstance(past, Tensor):  # a static cache's length, which to read would mean to wait for the device
            valid = valid & (past == 0)
        starts, num_documents = None, None
        if self.role == "":
            starts, num_documents = document_starts(
                valid, arguments.get("position_ids"), arguments.get("seq_idx"), arguments.get("cu_seq_lens_q")
            )
        ids = arguments.get("input_ids") if arguments.get("inputs_embeds") is None else None
        tokens = Tokens(valid, self._labels(call, rows, columns), starts, num_documents, ids)
        return Frame(self, call, rows, columns, find=lambda spec: self._prompts(tokens, spec))

    def _paged_frame(self, call: Call, arguments: dict[str, Any], rows: int, columns: int) -> Frame:
        """The frame of a forward of transformers' continuous batching."""
        requests = None if self.root.batching is None else self.root.batching()
        if requests is None:
            raise ValueError(
                "A ReFT model was run by a continuous batching manager that it does not know, so the prompts of the "
                "requests cannot be told. Start it with model.generate_batch or model.init_continuous_batching."
            )
        answers_only = all(past >= prompt for _, past, prompt in requests)
        if not answers_only and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "A CUDA graph of a forward with prompt tokens would edit the same places in every replay. Pass "
                "ContinuousBatchingConfig(use_cuda_graph=False)."
            )
        if answers_only and not self.root.edits_answers():
            return Frame(self, call, rows, columns, edits=False)
        device = token_device(arguments)
        prompts = paged_prompts(requests, columns, device)
        return Frame(self, call, rows, columns, find=lambda spec: prompts, answers_only=answers_only)

    def _prompts(self, tokens: Tokens, spec: PositionSpec) -> Prompts:
        if spec.prompt_end and tokens.labels is None and not torch.compiler.is_compiling():
            unmarked = MARKER_MISSING.format(list(spec.prompt_end))
            if unmarked not in self.root.warned and (
                tokens.ids is None or not tokens.marked(spec.prompt_end).any(1).all()
            ):
                self.root.warn_once(unmarked)
        if self.role == "decoder" and tokens.labels is not None:  # which never cover more than the start token
            return tokens.prompts(spec.turns)
        return tokens.prompts(spec.turns, spec.prompt_end)

    def _labels(self, call: Call, rows: int, columns: int) -> Tensor | None:
        """The call's labels, aligned with the tokens, where they tell the end of a prompt."""
        labels, shift_labels = call.labels, call.shift_labels
        if self.role == "decoder":  # decoder inputs are the labels moved by one
            labels, shift_labels = shift_labels, labels
        elif self.role == "encoder" or not self.root.causal:
            return None
        if isinstance(labels, Tensor) and labels.shape == (rows, columns):
            return labels
        if isinstance(shift_labels, Tensor) and shift_labels.shape == (rows, columns):
            return align_shift_labels(shift_labels)
        return None


class Stage(Host):
    """The hooks on a module between a host and its blocks, around which a checkpoint may be.

    The blocks are then run once more in the backward pass, when the host's call has ended, and on tensors that are
    new. transformers keeps a module's hooks out of its checkpoint, so what it calls to make one is stood in for; where
    a checkpoint holds the hooks, as torch's CheckpointWrapper does, the module's own input tells the call's frame.
    """

    def enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Forward pre-hook: see to it that the frame of this call is there when the blocks are run once more."""
        if torch.compiler.is_compiling():
            return args, kwargs
        frame = frame_of_block((*args, *kwargs.values()))
        if frame is not None and torch._C._current_graph_task_id() != -1:
            state.frames.append(replace(frame, host=self))
        checkpoint = module.__dict__.get(CHECKPOINT)
        if checkpoint is not None and not isinstance(checkpoint, WithFrame):
            module.__dict__[CHECKPOINT] = WithFrame(checkpoint)
        return args, kwargs

    def leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Forward hook, called even if the forward was ended early, as checkpoints do."""
        if state.frames and state.frames[-1].host is self:
            state.frames.pop()


class WithFrame:
    """Stands in for the function by which a module of transformers checkpoints its forward."""

    def __init__(self, checkpoint: Callable[..., Any]):
        self.checkpoint = checkpoint

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        frame = current_frame()
        if frame is None or torch.compiler.is_compiling():
            return self.checkpoint(run, *args, **kwargs)
        recorded: bool | None = None

        def run_with_frame(*args: Any, **kwargs: Any) -> Any:
            nonlocal recorded
            if recorded is None:  # in the forward pass
                recorded = torch.is_grad_enabled()
                return run(*args, **kwargs)
            depth = len(state.frames)
            state.frames.append(frame if recorded else frame.without_factors())
            try:
                return run(*args, **kwargs)
            finally:
                del state.frames[depth:]

        return self.checkpoint(run_with_frame, *args, **kwargs)
