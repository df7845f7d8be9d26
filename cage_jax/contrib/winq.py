"""WinQ: gradients at noisy weights, and periodic interpolation to the grid."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from cage_jax.arrays.checks import check_int, check_number
from cage_jax.arrays.exact import compute_dtype
from cage_jax.arrays.names import names_checked
from cage_jax.arrays.paths import key_at
from cage_jax.arrays.reprs import brief_repr
from cage_jax.contrib.transformation import transformation
from cage_jax.core.grids import needed_grid
from cage_jax.core.quantize import fake_quant, quantization_error
from cage_jax.core.rules import Rules, check_rules
from cage_jax.quantizers.grid import Grid


@names_checked
def noisy_fake_quant(
    params: Any,
    rules: Rules,
    key: jax.Array,
    *,
    deviation: float = 1e-3,
    grid: Mapping[str, Grid] | None = None,
) -> Any:
    """Adds normal noise to the weights, then applies `fake_quant`: `Q(W + U)`.

    It replaces `fake_quant` in the loss, with the straight-through gradient of
    `fake_quant` at `W + U`. Parameters that no rule names get no noise. The noise is
    drawn in float32 (float64 for float64); the parameters keep their dtype.

    Args:
      params: a tree of parameters.
      rules: which parameters are quantized, and how.
      key: a `jax.random` key, a new one for each step; each parameter draws its own
        numbers from it.
      deviation: standard deviation of the noise, the same for all weights.
      grid: as in `fake_quant`.

    Returns:
      A tree like `params`.

    Raises:
      TypeError, ValueError: as `fake_quant`; also if `deviation` is negative.

    Example:
      >>> import cage_jax as cage
      >>> from cage_jax import contrib
      >>> import jax
      >>> import jax.numpy as jnp
      >>> rules = cage.Rules([(r".*kernel", cage.int4())])
      >>> params = {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}
      >>> noisy = contrib.noisy_fake_quant(params, rules, jax.random.key(0))
      >>> bool((noisy["kernel"] != 1).any()), bool((noisy["bias"] != 1).any())
      (True, False)

    Source: WinQ, arXiv 2605.17471.
    """
    check_rules(rules)
    remedy = "The paper uses 1e-3."
    check_number("deviation", deviation, remedy, least=0, or_array=True)

    def add(path, quantizer, x):
        del quantizer
        wide = compute_dtype(x.dtype)
        noise = jax.random.normal(key_at(key, path), x.shape, wide)
        return (x.astype(wide) + jnp.asarray(deviation, wide) * noise).astype(x.dtype)

    return fake_quant(rules.map(add, params), rules, grid=grid)


@brief_repr
class InterpolationState(NamedTuple):
    """State of `interpolation`: the number of steps done, int32."""

    interpolation_count: jax.Array


@names_checked
def interpolation(
    rules: Rules, share: float = 0.4, *, every: int = 60_000
) -> optax.GradientTransformationExtraArgs:
    """Moves the weights to `(1 - share) * W + share * Q(W)` every `every` steps.

    Put it last, after the learning rate: `W` are the weights after the update. In all
    other steps nothing is quantized and the updates pass bit-identical. With `every` 1
    it equals `cage.post_step` with learning rate times strength of `share`, and
    PV-Tuning's decay of its buffer. Computed in float32; the updates keep their dtype.

    Args:
      rules: which parameters are quantized, and how.
      share: alpha, in [0, 1]; the paper uses 0.1 to 0.6, with the best near 0.4.
      every: K, the number of steps between interpolations.

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
      >>> tx = optax.chain(optax.sgd(1.0), contrib.interpolation(rules, 0.5, every=1))
      >>> params = {"kernel": jnp.array([[0.5], [-3.5], [1.25]])}
      >>> gradients = {"kernel": jnp.zeros((3, 1))}
      >>> updates, _ = tx.update(gradients, tx.init(params), params)
      >>> updates["kernel"].ravel().tolist()
      [-0.0, -0.0, -0.125]

    Source: WinQ, arXiv 2605.17471; PV-Tuning, arXiv 2405.14852.
    """
    remedy = "The paper found 0.4 best."
    check_number("share", share, remedy, least=0, most=1, or_array=True)
    remedy = "Use the number of steps between interpolations."
    check_int("every", every, remedy, least=1, or_array=True)

    def step(before, after, params):
        del before
        due = after.interpolation_count % every == 0

        def pull(path, quantizer, x, update):
            grid = needed_grid(path, quantizer, params)
            wide = jnp.asarray(share, compute_dtype(x.dtype))
            return _pull_if(due, x, update, wide, quantizer, grid)

        return pull

    return transformation(rules, InterpolationState, step)


@functools.partial(jax.jit, static_argnames="quantizer")
def _pull_if(due, x, update, share, quantizer, grid):
    """Subtracts a share of the error at the updated weights if `due`."""

    def pulled():
        reached = (x + update).astype(x.dtype).astype(share.dtype)
        error = quantization_error(reached, quantizer, grid=grid)
        return (update.astype(error.dtype) - share * error).astype(update.dtype)

    return lax.cond(due, pulled, lambda: update)
