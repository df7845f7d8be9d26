"""ProxQuant: weights drawn to the grid by a proximal step after each update."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from cage_jax.arrays.exact import compute_dtype
from cage_jax.arrays.names import names_checked
from cage_jax.arrays.reprs import brief_repr
from cage_jax.contrib.transformation import transformation
from cage_jax.core.grids import needed_grid
from cage_jax.core.quantize import quantization_error
from cage_jax.core.rules import Rules
from cage_jax.optim.schedules import ScalarOrSchedule, check_strength, value_at


@brief_repr
class ProxQuantState(NamedTuple):
    """State of `prox_quant`: the number of steps done, int32."""

    prox_quant_count: jax.Array


@names_checked
def prox_quant(
    rules: Rules, *, strength: ScalarOrSchedule
) -> optax.GradientTransformationExtraArgs:
    """Moves each weight towards the grid by at most `strength`, after the update.

    Put it last, after the learning rate, and take the gradient at the weights as they
    are, without `fake_quant`. It is the proximal step of `strength * sum(|w - Q(w)|)`:
    with the error `e = w - Q(w)` of the updated weights, they become
    `Q(w) + sign(e) * max(|e| - strength, 0)`. The square in place of the size of the
    error is `interpolation` with `every=1`. With a rotation, the errors are those in
    the rotated basis. Computed in float32; the updates keep their dtype.

    Args:
      rules: which parameters are quantized, and how.
      strength: learning rate times lambda, in units of the weights, or a schedule of
        the step count; the authors let lambda rise linearly from 0.

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
      >>> tx = optax.chain(optax.sgd(1.0), contrib.prox_quant(rules, strength=0.125))
      >>> params = {"kernel": jnp.array([[0.5], [-7.0], [1.25], [2.0625]])}
      >>> gradients = {"kernel": jnp.zeros((4, 1))}
      >>> updates, _ = tx.update(gradients, tx.init(params), params)
      >>> updates["kernel"].ravel().tolist()
      [-0.125, -0.0, -0.125, -0.0625]

    Source: ProxQuant, arXiv 1810.00861, with the distance to the nearest level.
    """
    check_strength(strength)

    def step(before, after, params):
        del after
        most = value_at(strength, before.prox_quant_count)

        def draw(path, quantizer, x, update):
            wide = compute_dtype(x.dtype)
            reached = (x + update).astype(x.dtype).astype(wide)
            grid = needed_grid(path, quantizer, params)
            error = quantization_error(reached, quantizer, grid=grid)
            limit, basis = jnp.asarray(most, wide), quantizer.basis(x.shape)
            pull = basis.unrotate(jnp.clip(basis.rotate(error), -limit, limit))
            return (update.astype(wide) - pull).astype(update.dtype)

        return draw

    return transformation(rules, ProxQuantState, step)
