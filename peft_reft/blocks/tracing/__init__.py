"""The last resort: what a model's modules return, seen by calling a copy of it that has no weights on a few tokens.

Knows transformers' configs and input names; which answer is taken, and when a model is traced at all, is `find`'s.
"""
