"""A gradient that is scaled by the distance of a weight to its rounded value."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from cage_jax.quantizers.quantizer import Quantizer
from cage_jax.quantizers.rounding import rounding


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def with_scaled_gradient(added: Callable, quantizer: Quantizer, x, grid, number):
    """Returns `x`; adds to its gradient.

    Args:
      added: maps the `Rounding` of `x`, its gradient in the basis of the quantizer, and
        `number` to what is added, in that basis. A function of a module, since programs
        are kept by it.
      quantizer: the quantizer.
      x: the weight.
      grid: its grid, or None.
      number: how strongly, a traced scalar in the dtype of computation.
    """
    return x


def _forward(added, quantizer, x, grid, number):
    return x, (x, grid, number)


def _backward(added, quantizer, saved, cotangent):
    x, grid, number = saved
    basis = quantizer.basis(x.shape)
    found = added(rounding(x, quantizer, grid), basis.rotate(cotangent), number)
    extra = basis.unrotate(found)
    gradient = (cotangent.astype(extra.dtype) + extra).astype(cotangent.dtype)
    return gradient, *jax.tree.map(jnp.zeros_like, (grid, number))


with_scaled_gradient.defvjp(_forward, _backward)
