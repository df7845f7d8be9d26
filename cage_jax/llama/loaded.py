"""A model as it comes out of a file."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from cage_jax.core.quantized_array import QuantizedArray, decoded
from cage_jax.llama.config import LlamaConfig


class Model(NamedTuple):
    """What `cage_jax.load` returns.

    Attributes:
      params: the parameters, a nested dict: codes as `QuantizedArray`s, the rest
        floats, with the paths of `config.shapes()`.
      config: the model's dimensions; None where the file is not of a Llama.
      tokenizer: the tokenizer's files by name, as transformers has them, such as
        "tokenizer.json"; empty where the model came without.

    Example:
      >>> import cage_jax as cage
      >>> import jax.numpy as jnp
      >>> from cage_jax.llama.loaded import Model
      >>> codes = {"kernel": cage.quantize(jnp.ones((32, 2)), cage.int4())}
      >>> Model(codes, None, {}).floats()["kernel"].shape
      (32, 2)
    """

    params: Any
    config: LlamaConfig | None
    tokenizer: Mapping[str, bytes]

    def floats(self) -> Any:
        """The parameters, with the values of codes in their place."""
        return jax.tree.map(
            lambda leaf: decoded(leaf) if _is_codes(leaf) else leaf,
            self.params,
            is_leaf=_is_codes,
        )


def _is_codes(leaf):
    return isinstance(leaf, QuantizedArray)
