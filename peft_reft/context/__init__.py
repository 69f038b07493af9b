"""What one call of a model edits: its arguments become prompts, prompts become places, places and weights become edits.

A `ForwardContext` is opened when a call enters the model and closed however the call ends; blocks ask it what to edit.
Adapters, configs and PEFT are known to tuner/, which creates the layers that a context reads.
"""
