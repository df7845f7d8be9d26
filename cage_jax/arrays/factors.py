"""An array as the product of two smaller ones."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("inputs", "outputs"),
    meta_fields=("largest",),
)
@dataclasses.dataclass(frozen=True)
class Factors:
    """Two arrays whose product has the shape of a parameter.

    The inputs of a matrix are the axes that share a scale, such as -2 of a Dense
    kernel, and its outputs are its other axes. Each matrix of a stack has its own.

    Attributes:
      inputs: one number for each input, with a size of 1 along the outputs.
      outputs: one number for each output, with a size of 1 along the inputs.
      largest: the upper bound of an entry of the product.
    """

    inputs: jax.Array
    outputs: jax.Array
    largest: float = jnp.inf

    def product(self) -> jax.Array:
        """Multiplies the two."""
        return _product(self)


@jax.jit
def _product(factors):
    return jnp.minimum(factors.inputs * factors.outputs, factors.largest)
