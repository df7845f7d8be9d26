"""The diagonal of the Fisher information."""

from typing import Unpack

import jax
import jax.numpy as jnp

from cage_jax.arrays.checks import check_int
from cage_jax.optim.curvature.diagonal import DiagonalOptions, diagonal
from cage_jax.optim.curvature.factored import factored as by_factors
from cage_jax.optim.curvature.source import Curvature


class FisherOptions(DiagonalOptions, total=False):
    """The options of `diagonal` and, with `factored`, of that source."""

    times_root: bool
    largest_error: float | jax.Array | None


def fisher(
    examples: int = 1,
    *,
    sampled: bool = False,
    factored: bool = False,
    **options: Unpack[FisherOptions],
) -> Curvature:
    """Weights errors by the diagonal of the Fisher information, from squared gradients.

    Args:
      examples: the number of examples that a gradient is the mean of. As far as
        gradients are noise, the square of the mean is smaller than the mean of squares
        by this factor.
      sampled: False for the empirical Fisher information, from the gradients that the
        optimizer is given. True for gradients at labels drawn from the model's own
        predictions, given to `update` as `sampled_gradients`, a tree like the
        parameters.
      factored: keep only means by input and by output, as `recommended` does. They are
        less noisy, need no rotation, take next to no memory, and are relative.
      **options: as in `diagonal`; with `factored`, `decay`, `period` and `largest`, by
        default 0.9, 10 and 3, and `largest_error`, the root mean square error of a
        matrix, when the state is made, above which it is pulled as if it were this one.

    Example:
      >>> import cage_jax as cage
      >>> from cage_jax import curvature
      >>> rules = cage.Rules([(r".*kernel", cage.int4())])
      >>> source = curvature.fisher(examples=64, relative=True)
      >>> tx = cage.cage_adamw(1e-3, rules, strength=10.0, curvature=source)

    Source: Amari 1998; the empirical one is what Adam's second moment averages.
    """
    check_int("examples", examples, "Use 1.", least=1)

    def gradients_of(step):
        if not sampled:
            return step.gradients
        what = "gradients at labels drawn by the model"
        return step.by_path(step.extra("sampled_gradients", what))

    if factored:
        # Each source takes a part of the options, and answers the others.
        return by_factors(gradients_of, **options)  # type: ignore[misc]

    def estimate(step, key):
        del key
        quantizers = step.quantizers
        return {
            path: examples * jnp.square(quantizers[path].basis(g.shape).rotate(g))
            for path, g in gradients_of(step).items()
        }

    return diagonal(estimate, **options)  # type: ignore[misc]
