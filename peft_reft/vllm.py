"""The public name of integrations/vllm: `register` is vLLM's entry point, called in each of its processes."""

from peft_reft.integrations.vllm import register

__all__ = ["register"]
