"""A model as it comes out of a file."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from cage_jax.llama_config import LlamaConfig


class Model(NamedTuple):
    """What `cage_jax.load` returns.

    Attributes:
      params: the parameters, a nested dict: codes as `QuantizedArray`s, the rest
        floats, with the paths of `config.shapes()`.
      config: the model's dimensions.
      tokenizer: the tokenizer's files by name, as transformers has them, such as
        "tokenizer.json"; empty where the model came without.
    """

    params: Any
    config: LlamaConfig
    tokenizer: Mapping[str, bytes]
