"""A Llama to train, export and evaluate.

`config` has its dimensions, `model` computes its logits, `tensors` knows its parameters
by the names of files, and `perplexity` evaluates it.
"""

import importlib


def __getattr__(name):
    # Imported on demand: only the model needs Flax, not its dimensions or tensors.
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(importlib.import_module("cage_jax.llama.model"), name)
