"""A model that was loaded from a file."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from cage_jax.core.quantized_array import QuantizedArray, decoded
from cage_jax.llama.config import LlamaConfig


class Model(NamedTuple):
    """The result of `cage_jax.load`.

    Attributes:
      params: the parameters, a nested dict with the paths of `config.shapes()`: codes
        as `QuantizedArray`s, the rest floats.
      config: the model's dimensions; None if the file does not hold a Llama.
      tokenizer: the tokenizer's files by their names in transformers, such as
        "tokenizer.json"; empty if the model has none.

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

    def __repr__(self):
        leaves = jax.tree.leaves(self.params, is_leaf=_is_codes)
        codes, model = sum(map(_is_codes, leaves)), "no Llama"
        if self.config is not None:
            model = f"a Llama of {self.config.layers} layers"
        return (
            f"Model(params: {len(leaves)} arrays, {codes} of them codes; config: "
            f"{model}; tokenizer: {', '.join(self.tokenizer) or 'none'})"
        )

    def __getitem__(self, key):
        if isinstance(key, str):
            raise TypeError(
                f"a Model must be indexed by its parameters; got model[{key!r}]. Use "
                f"model.params[{key!r}] for codes, or model.floats()[{key!r}]."
            )
        return tuple.__getitem__(self, key)

    def floats(self) -> Any:
        """Returns the parameters with all codes dequantized."""
        return jax.tree.map(
            lambda leaf: decoded(leaf) if _is_codes(leaf) else leaf,
            self.params,
            is_leaf=_is_codes,
        )


def _is_codes(leaf):
    return isinstance(leaf, QuantizedArray)
