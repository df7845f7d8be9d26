"""A Llama to train, export and measure: its dimensions, the model, its tensors."""

import importlib


def __getattr__(name):
    # The model needs Flax, its dimensions and tensors do not.
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(importlib.import_module("cage_jax.llama.model"), name)
