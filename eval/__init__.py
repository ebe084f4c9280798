"""Evaluation: metrics are pure functions on tensors, evaluators feed them, results are lines of JSON.

Import from its modules (`from eval.metrics import retrieval_recall`), never `import eval`, which would hide
Python's builtin of that name.
"""
