"""Evaluation: accuracy of the modes on tasks, their distance from the original model, and what that certifies.

`items`, `tasks`, `answers` and `answering` are also read by `benches/original.py`, which runs transformers in an
environment of its own: they import neither JAX nor anything else of this package but its errors, and keep to the syntax
of Python 3.11.
"""
