"""The Fisher information as a Kronecker product."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cage_jax.arrays.checks import check_int
from cage_jax.arrays.names import names_checked
from cage_jax.arrays.reprs import brief_repr
from cage_jax.optim.curvature.averages import (
    advance,
    average,
    check_averaging,
    total_weight,
)
from cage_jax.optim.curvature.source import Curvature


@brief_repr
class KroneckerState(NamedTuple):
    """Averages of the two factors of each matrix.

    Attributes:
      steps: the number of steps done, int32.
      estimates: the number of estimates averaged, int32.
      left: the averages of G G^T by path, of shape (..., rows, rows).
      right: the averages of G^T G by path, of shape (..., columns, columns).
    """

    steps: jax.Array
    estimates: jax.Array
    left: dict[str, jax.Array]
    right: dict[str, jax.Array]


@names_checked
def kronecker(examples: int = 1, *, decay: float = 0.99, period: int = 1) -> Curvature:
    """Weights errors by the Fisher information as a Kronecker product.

    Each matrix is pulled along `L e R`, with `L = E[G G^T]` and
    `R = E[G^T G] / E[|G|^2]` for gradients G. In float32 the factors take
    4 (rows^2 + columns^2) bytes for each matrix, the last two axes of a parameter.

    Args:
      examples: as in `fisher`.
      decay: the decay of the exponential averages.
      period: the number of steps from one estimate to the next.

    Raises:
      TypeError, ValueError: for arguments out of range, and in `init` for vectors.

    Source: the factors of Shampoo, arXiv 1802.09568, as an estimate of the Fisher
    information like K-FAC's, arXiv 1503.05671.
    """
    check_averaging(decay, period)
    check_int("examples", examples, "Use 1.", least=1)

    def init(quantized):
        for path, (_, x) in quantized.items():
            if x.ndim < 2:
                raise ValueError(
                    f"`{path}`: a parameter must have two axes or more for Kronecker "
                    f"factors; got shape {x.shape}. Use fisher() for such parameters."
                )
        left, right = (
            {
                path: jnp.zeros((*x.shape[:-2], *[x.shape[axis]] * 2), jnp.float32)
                for path, (_, x) in quantized.items()
            }
            for axis in (-2, -1)
        )
        # Two arrays: a state that is donated must not have one of them twice.
        steps, estimates = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)
        return KroneckerState(steps, estimates, left, right)

    def update(state, step):
        gradients = {
            path: gradient.astype(jnp.float32)
            for path, gradient in step.gradients.items()
        }

        def averaged(factors, product):
            return factors | {
                path: average(decay, factors[path], jnp.einsum(product, g, g))
                for path, g in gradients.items()
            }

        def estimated():
            return (
                state.estimates + 1,
                averaged(state.left, "...ij,...kj->...ik"),
                averaged(state.right, "...ji,...jk->...ik"),
            )

        return advance(state, estimated, period)

    def weigh(errors, state, step):
        del step
        weighted = {}
        for path, e in errors.items():
            left, right = state.left[path], state.right[path]
            norm = jnp.trace(left, axis1=-2, axis2=-1)[..., None, None]
            both = jnp.einsum(
                "...ij,...jk,...kl->...il", left, e.astype(jnp.float32), right
            )
            weight = examples / jnp.where(norm == 0, 1, norm)
            weight = weight / total_weight(decay, state.estimates)
            weighted[path] = (both * weight).astype(e.dtype)
        return weighted

    return Curvature(init, update, weigh)
