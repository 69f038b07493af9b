"""ReFT adapters in vLLM: many adapters in one batch, beside the base model and LoRA adapters.

An adapter travels as vLLM's own LoRA request, so that names, slots, routes and the scheduler are vLLM's. What is added:

    adapters.py   what an adapter's directory says: positions, factors by block, or why it cannot be served
    rule.py       which tokens of a request are edited, by which intervention
    requests.py   what a request says: the prompt's length, the strength
    step.py       the edited tokens of one step of the engine
    slots.py      the tables on the device: factors of the resident adapters, and the running step's places
    operation.py  the edit, as one custom operation per block; kernel.py is its form on GPUs
    probe.py      where a block's returned tensors hold the residual stream, found out when the model is loaded
    worker.py     all of that for one worker of vLLM
    keys.py       what distinguishes cached blocks of edited tokens
    patches.py    every place of vLLM that is patched, with what stands in it: front_end.py, engine_core.py and
                  runner.py, by vLLM's processes, and adapter_of.py for all of them

Only these import vLLM, and only when `register` was called.
"""

from __future__ import annotations


def register() -> None:
    """Make vLLM take ReFT adapters; called by vLLM in each of its processes, and harmless when called again.

    With a version of vLLM that was not tested, ReFT adapters are refused, and all else runs as without the package.
    """
    from peft_reft.integrations.vllm import patches

    patches.apply()


__all__ = ["register"]
