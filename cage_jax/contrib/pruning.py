"""Prune Once for All: weights are pruned while they train, then stay zero in QAT."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from cage_jax.arrays.checks import check_int, check_number
from cage_jax.arrays.exact import compute_dtype
from cage_jax.arrays.names import names_checked
from cage_jax.arrays.paths import path_in_errors
from cage_jax.arrays.reprs import brief_repr
from cage_jax.contrib.transformation import transformation
from cage_jax.core.rules import Rules
from cage_jax.optim.schedules import Schedule
from cage_jax.quantizers.quantizer import Quantizer


@names_checked
def cubic_sparsity(total_steps: int, final: float = 0.9) -> Schedule:
    """Returns the sparsity `final * (1 - (1 - count / total_steps)**3)`.

    Args:
      total_steps: first step with the final sparsity.
      final: share of the weights that are zero in the end, in [0, 1].

    Returns:
      A schedule from the step count (from 0) to the sparsity.

    Raises:
      TypeError, ValueError: for arguments out of range.

    Example:
      >>> from cage_jax import contrib
      >>> sparsity = contrib.cubic_sparsity(100, 0.8)
      >>> [round(float(sparsity(count)), 3) for count in (0, 50, 100, 150)]
      [0.0, 0.7, 0.8, 0.8]

    Source: Zhu and Gupta, arXiv 1710.01878, equation 1; Prune Once for All, arXiv
    2111.05754, uses 0.9 and 50,000 steps.
    """
    check_int("total_steps", total_steps, "Use the length of the pruning.", least=1)
    check_number("final", final, "The paper uses 0.9.", least=0, most=1)

    def schedule(count):
        done = jnp.asarray(count).astype(jnp.result_type(float)) / total_steps
        return final * (1 - (1 - jnp.clip(done, 0.0, 1.0)) ** 3)

    return schedule


@brief_repr
class GradualPruningState(NamedTuple):
    """State of `gradual_pruning`: the number of steps done, int32."""

    gradual_pruning_count: jax.Array


@names_checked
def gradual_pruning(
    rules: Rules, sparsity: float | Schedule, *, every: int = 1000
) -> optax.GradientTransformationExtraArgs:
    """Sets the smallest weights to zero, more of them every `every` steps.

    Put it last, after the learning rate. In step 0, and every `every` steps, the
    `round(sparsity * size)` smallest weights of each parameter that rules name become
    zero, and those that tie with them. In all other steps, weights that are zero stay
    zero, also those that were before. How a parameter is quantized makes no difference.

    Args:
      rules: which parameters are pruned.
      sparsity: share of the weights of each parameter, in [0, 1], or a schedule such as
        `cubic_sparsity(steps)`.
      every: number of steps between prunings.

    Returns:
      A transformation whose `update` needs `params`.

    Raises:
      TypeError, ValueError: for arguments out of range; in `update` without `params`.

    Example:
      >>> import cage_jax as cage
      >>> from cage_jax import contrib
      >>> import jax.numpy as jnp
      >>> import optax
      >>> rules = cage.Rules([(r"kernel", cage.int8())])
      >>> tx = optax.chain(optax.sgd(1.0), contrib.gradual_pruning(rules, 0.5))
      >>> params = {"kernel": jnp.array([[4.0, -1.0], [-3.0, 2.0]])}
      >>> gradients = {"kernel": jnp.ones((2, 2))}
      >>> updates, _ = tx.update(gradients, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["kernel"].tolist()
      [[3.0, 0.0], [-4.0, 0.0]]

    Source: Prune Once for All, arXiv 2111.05754, section 3.1.
    """
    if not callable(sparsity):
        remedy = "Use cubic_sparsity(steps), or 0.9."
        check_number("sparsity", sparsity, remedy, least=0, most=1, or_array=True)
    check_int("every", every, "The paper uses 1000.", least=1, or_array=True)

    def step(before, after, params):
        del after, params
        count = before.gradual_pruning_count
        share = sparsity(count) if callable(sparsity) else sparsity

        def prune(path, quantizer, x, update):
            del path, quantizer
            kept = _keep_zeros(x, update)
            return lax.cond(
                count % every == 0,
                lambda: jnp.where(_is_small(x + kept, share), -x, kept).astype(
                    update.dtype
                ),
                lambda: kept,
            )

        return prune

    return transformation(rules, GradualPruningState, step)


@brief_repr
class LockedZerosState(NamedTuple):
    """State of `locked_zeros`: the number of steps done, int32."""

    locked_zeros_count: jax.Array


@names_checked
def locked_zeros(rules: Rules) -> optax.GradientTransformationExtraArgs:
    """Keeps weights that are zero at zero: the pattern of a pruned model is locked.

    Put it last, after the learning rate, and before `averaging`. The update of a weight
    that is zero becomes zero, so that weight decay, momentum and CAGE leave it where it
    is; all others pass unchanged. Codes of zeros are zeros too, as the grid must have a
    zero.

    Args:
      rules: which parameters are locked, and how they are quantized.

    Returns:
      A transformation whose `update` needs `params`.

    Raises:
      TypeError: for anything but `Rules`.
      ValueError: in `init` and `update`, for a quantizer whose grid has no zero or that
        rotates weights; in `update` without `params`.

    Example:
      >>> import cage_jax as cage
      >>> from cage_jax import contrib
      >>> import jax.numpy as jnp
      >>> import optax
      >>> rules = cage.Rules([(r"kernel", cage.int8())])
      >>> tx = optax.chain(optax.sgd(1.0), contrib.locked_zeros(rules))
      >>> params = {"kernel": jnp.array([[0.0, 1.0]])}
      >>> gradients = {"kernel": jnp.ones((1, 2))}
      >>> tx.update(gradients, tx.init(params), params)[0]["kernel"].tolist()
      [[0.0, -1.0]]

    Source: Prune Once for All, arXiv 2111.05754, section 3.2. There the pattern is
    fixed once; here a weight that becomes exactly zero later is locked too.
    """

    def init(quantized, params):
        del params
        for path, (quantizer, _) in quantized.items():
            with path_in_errors(path):
                _check_has_zero(quantizer)
        return ()

    def step(before, after, params):
        del before, after, params
        return lambda path, quantizer, x, update: _keep_zeros(x, update)

    return transformation(rules, LockedZerosState, step, init)


def _keep_zeros(x, update):
    return jnp.where(x == 0, jnp.zeros_like(update), update)


def _is_small(x, share):
    """Returns the mask of the smallest magnitudes, `share` of all."""
    size = jnp.abs(x).ravel().astype(compute_dtype(x.dtype))
    count = jnp.round(jnp.asarray(share, size.dtype) * size.size).astype(jnp.int32)
    largest = jnp.sort(size)[jnp.maximum(count - 1, 0)]
    return (size <= jnp.where(count > 0, largest, -1)).reshape(x.shape)


def _check_has_zero(quantizer: Quantizer) -> None:
    has_zero = quantizer.asymmetric or (
        quantizer.has_codes and quantizer.format.has_zero
    )
    if not has_zero or quantizer.scale.has_offset or quantizer.hadamard is not None:
        raise ValueError(
            f"`rules` must quantize locked zeros on a grid that has a zero, without a "
            f"rotation; got {quantizer}. Use int8(), or another preset of integers."
        )
