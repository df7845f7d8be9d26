"""LOTION: the expected loss under random rounding, to second order."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from cage_jax.arrays.checks import check_number
from cage_jax.arrays.exact import clamp, compute_dtype
from cage_jax.arrays.names import names_checked
from cage_jax.arrays.paths import path_in_errors
from cage_jax.arrays.reprs import brief_repr
from cage_jax.contrib.transformation import transformation
from cage_jax.core.grids import needed_grid
from cage_jax.core.rules import Rules
from cage_jax.optim.schedules import ScalarOrSchedule, check_strength, value_at
from cage_jax.quantizers.quantizer import check_has_codes
from cage_jax.quantizers.rounding import rounding


@brief_repr
class LotionState(NamedTuple):
    """State of `lotion`.

    Attributes:
      lotion_count: steps done, int32.
      fisher: running average of squared gradients by path, in the basis in which the
        parameter is quantized.
    """

    lotion_count: jax.Array
    fisher: dict[str, jax.Array]


@names_checked
def lotion(
    rules: Rules, *, strength: ScalarOrSchedule = 1.0, decay: float = 0.999
) -> optax.GradientTransformationExtraArgs:
    """Adds the gradient of `strength / 2 * sum(fisher * variance)` to the updates.

    The variance is that of unbiased random rounding. It is `(x - below) * (above - x)`
    on any grid; on a uniform grid with step `s` this is `s**2 * D * (1 - D)`, where the
    weight lies `D` steps above the level below it. `fisher` is the running average of
    the squared incoming updates, starting at 0. Scales and `fisher` are treated as
    constants, so the gradient is `strength / 2 * fisher * (below + above - 2 * x)`. It
    is 0 at a level, where the variance has its minimum and a kink, and beyond the grid.
    With a rotation, all of this is in the rotated basis.

    Put it before any optimizer. Take the gradients at the unquantized weights, without
    `fake_quant` in the loss: the added term replaces it. Computed in float32; the
    updates keep their dtype.

    Args:
      rules: which parameters are quantized, and how.
      strength: a number, or a schedule of the step count.
      decay: decay of the running average.

    Returns:
      A transformation whose `update` needs `params`.

    Raises:
      TypeError, ValueError: for arguments out of range; in `update` without `params`.

    Example:
      >>> import cage_jax as cage
      >>> from cage_jax import contrib
      >>> import jax.numpy as jnp
      >>> import optax
      >>> rules = cage.Rules([(r".*kernel", cage.int4())])
      >>> tx = contrib.lotion(rules, decay=0.5)
      >>> params = {"kernel": jnp.array([[0.5], [-3.5], [1.125]])}
      >>> gradients = {"kernel": jnp.full((3, 1), 2.0)}
      >>> updates, _ = tx.update(gradients, tx.init(params), params)
      >>> updates["kernel"].ravel().tolist()
      [2.0, 2.0, 2.25]

    Source: LOTION, arXiv 2510.08757.
    """
    check_strength(strength)
    remedy = "The paper uses 0.999."
    check_number("decay", decay, remedy, least=0, most=1, or_array=True)

    def init(quantized, params):
        for path, (quantizer, _) in quantized.items():
            with path_in_errors(path):
                check_has_codes(quantizer, "lotion")
        return (
            {
                path: jnp.zeros_like(x, compute_dtype(x.dtype))
                for path, (_, x) in quantized.items()
            },
        )

    def step(before, after, params):
        half = value_at(strength, before.lotion_count) / 2

        def add(path, quantizer, x, update):
            x = lax.stop_gradient(x.astype(compute_dtype(x.dtype)))
            gradient, basis = update.astype(x.dtype), quantizer.basis(x.shape)
            fisher, share = before.fisher[path], jnp.asarray(1 - decay, x.dtype)
            fisher = fisher + share * (jnp.square(basis.rotate(gradient)) - fisher)
            after.fisher[path] = fisher
            slope = _variance_slope(x, quantizer, needed_grid(path, quantizer, params))
            pull = jnp.asarray(half, x.dtype) * fisher * slope
            return (gradient + basis.unrotate(pull)).astype(update.dtype)

        return add

    return transformation(rules, LotionState, step, init)


def _variance_slope(x, quantizer, grid):
    """Computes the derivative of the rounding variance for each rotated weight."""
    rounded, format = rounding(x, quantizer, grid), quantizer.format
    position = clamp(rounded.position(), format.low, format.high)
    below, above = format.neighbours(position)
    slope = jnp.where(position == below, 0.0, below + above - 2 * position)
    return slope * quantizer.blocks(x.shape).spread(rounded.grid.step)
