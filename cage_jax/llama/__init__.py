"""A Llama to train, export and evaluate: its dimensions, the model, its tensors."""

import importlib


def __getattr__(name):
    # Imported on demand: only the model needs Flax, not its dimensions or tensors.
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(importlib.import_module("cage_jax.llama.model"), name)
