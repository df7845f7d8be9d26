"""Products of Flax's layers that quantize their first factor."""

import dataclasses
import inspect

import jax
from jax import lax

from cage_jax.core.inputs import quantize_input
from cage_jax.program.products import Product, sums_of_convolution
from cage_jax.quantizers.quantizer import Quantizer


@dataclasses.dataclass(frozen=True)
class _QuantizedProduct:
    """A product that quantizes its first factor; hashable, so that it can be static."""

    inputs: Quantizer

    def __post_init__(self):
        if not isinstance(self.inputs, Quantizer):
            raise TypeError(
                f"`inputs` must be a Quantizer; got {self.inputs!r}. Use int8(axis=-1)."
            )
        if self.inputs.scale.needs_grid:
            raise ValueError(
                f"`inputs` must have a scale that is computed from each input; got "
                f"{self.inputs}. Use calibrate(model, rules, ...) for calibrated or "
                f"learned scales."
            )


@dataclasses.dataclass(frozen=True)
class dot_general(_QuantizedProduct):  # noqa: N801, the name of Flax's argument
    """A `jax.lax.dot_general` that quantizes its first argument.

    Pass it as `dot_general` to `nn.Dense`, `nnx.Linear` and others, or as
    `_dot_general` to `jnp.einsum`.

    Args:
      inputs: the quantizer, along axis -1, 0 or None of the matrix of (tokens,
        features).

    Raises:
      TypeError: if `inputs` is not a `Quantizer`.
      ValueError: if the quantizer needs a grid.

    Example:
      >>> import cage_jax as cage
      >>> import cage_jax.flax
      >>> from flax import linen as nn
      >>> product = cage.flax.dot_general(cage.int8(axis=-1))
      >>> layer = nn.Dense(16, dot_general=product)
    """

    def __call__(self, lhs, rhs, dimension_numbers, *args, **kwargs) -> jax.Array:
        """Computes `jax.lax.dot_general` with `lhs` quantized."""
        features = tuple(sorted(a % lhs.ndim for a in dimension_numbers[0][0]))
        lhs = quantize_input(lhs, features, self.inputs, None)
        return lax.dot_general(lhs, rhs, dimension_numbers, *args, **kwargs)


@dataclasses.dataclass(frozen=True)
class conv_general_dilated(_QuantizedProduct):  # noqa: N801, the name of Flax's argument
    """A `jax.lax.conv_general_dilated` that quantizes its first argument.

    Pass it as `conv_general_dilated` to `nn.Conv` and `nnx.Conv`. The features are the
    channels, so `axis=-1` gives one scale per pixel; without an axis there is one for
    each example, or per pixel if the kernel has one place.

    Args:
      inputs: the quantizer, along axis -1, 0 or None.

    Raises:
      TypeError: if `inputs` is not a `Quantizer`.
      ValueError: if the quantizer needs a grid.

    Example:
      >>> import cage_jax as cage
      >>> import cage_jax.flax
      >>> from flax import linen as nn
      >>> product = cage.flax.conv_general_dilated(cage.int8(axis=None))
      >>> layer = nn.Conv(16, (3, 3), conv_general_dilated=product)
    """

    def __call__(self, lhs, rhs, *args, **kwargs) -> jax.Array:
        """Computes `jax.lax.conv_general_dilated` with `lhs` quantized."""
        bound = inspect.signature(lax.conv_general_dilated).bind(
            lhs, rhs, *args, **kwargs
        )
        numbers = lax.conv_dimension_numbers(
            lhs.shape, rhs.shape, bound.arguments.get("dimension_numbers")
        )
        features = (numbers.lhs_spec[1],)
        _, summed = sums_of_convolution(numbers, rhs.shape)
        product = Product((), "", features=features, summed=summed)
        lhs = quantize_input(lhs, product.axes_for(self.inputs), self.inputs, None)
        return lax.conv_general_dilated(lhs, rhs, *args, **kwargs)
