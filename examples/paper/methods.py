"""Base models and adapters of a recipe: what is loaded, what is trained, how many parameters that is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from recipe import RecipeError
from torch import nn

_CLASSES = {
    "causal": (transformers.AutoModelForCausalLM, "CAUSAL_LM"),
    "glue": (transformers.AutoModelForSequenceClassification, "SEQ_CLS"),
}


def adapter_config(settings: Mapping[str, Any]) -> PeftConfig | None:
    """The PEFT config of a recipe's `adapter`; None where all weights are trained."""
    adapter = settings["adapter"]
    if adapter is None:
        return None
    fields = {key: value for key, value in adapter.items() if key != "peft_type"}
    return PEFT_TYPE_TO_CONFIG_MAPPING[adapter["peft_type"]](task_type=_CLASSES[settings["kind"]][1], **fields)


def load_model(settings: Mapping[str, Any], **changes: Any) -> transformers.PreTrainedModel:
    """The base model with pretrained weights.

    Args:
        changes: of the model's config, such as num_labels.
    """
    dtype = getattr(torch, settings.get("dtype", "float32")) if torch.cuda.is_available() else torch.float32
    model = _from_hub(_CLASSES[settings["kind"]][0], settings["model"], dtype=dtype, **changes)
    if settings["kind"] == "causal":
        # What a model brings along, such as Qwen's repetition penalty, would fill in where the recipe is silent.
        model.generation_config = transformers.GenerationConfig()
    return model


def load_tokenizer(settings: Mapping[str, Any]) -> transformers.PreTrainedTokenizerBase:
    """The base model's tokenizer. One without a padding token pads with the unknown token, or with the last."""
    tokenizer = _from_hub(transformers.AutoTokenizer, settings["model"])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def _from_hub(of_class: Any, name: str, **options: Any) -> Any:
    try:
        return of_class.from_pretrained(name, **options)
    except OSError as error:
        reason = str(error).strip().partition("\n")[0]
        raise RecipeError(f"The model {name!r} cannot be loaded ({reason}). Give another with --model.") from error


def trainer_arguments(settings: Mapping[str, Any], folder: Path, seed: int) -> dict[str, Any]:
    """The recipe's `training` as arguments of a trainer's config, with what depends on the machine."""
    gpu = torch.cuda.is_available()
    machine = {"use_cpu": not gpu, "bf16": gpu, "dataloader_pin_memory": gpu}
    return {**machine, "output_dir": str(folder / "trainer"), "seed": seed, **settings["training"]}


def trained(trainer: transformers.Trainer) -> dict[str, Any]:
    """Train; returns `seconds`, `steps`, the mean `loss` and the logged `losses`."""
    output = trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    seconds = output.metrics["train_runtime"]
    return {"seconds": seconds, "steps": output.global_step, "loss": output.training_loss, "losses": losses}


def size(model: nn.Module, trainable: bool = False) -> int:
    """The number of (trainable) parameters. A classification head does not count (caption of the paper's table 13)."""
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if not {"classifier", "score"} & set(name.split(".")) and (parameter.requires_grad or not trainable)
    )


def parameters(model: nn.Module, base: int) -> dict[str, float]:
    """`trainable` numbers of a model, those of its `base`, and their ratio in `percent`, as in the paper's tables."""
    trainable = size(model, trainable=True)
    return {"trainable": trainable, "base": base, "percent": 100 * trainable / base}


def count(settings: Mapping[str, Any], config: transformers.PretrainedConfig) -> dict[str, float]:
    """`parameters` of a recipe on a model of any size, without memory for its weights."""
    with torch.device("meta"):
        model = _CLASSES[settings["kind"]][0].from_config(config)
    base, adapter = size(model), adapter_config(settings)
    return parameters(model if adapter is None else get_peft_model(model, adapter, low_cpu_mem_usage=True), base)
