"""The tuner: config, layer, model, targets, injection, checkpoints and registration. PEFT's contract and nothing else.

What a call edits is worked out in context/; who else wants to know of an adapter registers in neighbours.py.
"""
