"""Dampening and freezing of weights that oscillate between two levels."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from cage_jax.arrays.checks import check_number
from cage_jax.arrays.exact import compute_dtype, select
from cage_jax.arrays.names import names_checked
from cage_jax.arrays.paths import path_in_errors
from cage_jax.arrays.reprs import brief_repr
from cage_jax.contrib.transformation import transformation
from cage_jax.core.grids import needed_grid
from cage_jax.core.quantize import quantization_error
from cage_jax.core.rules import Rules
from cage_jax.optim.schedules import (
    ScalarOrSchedule,
    Schedule,
    check_strength,
    check_total_steps,
    value_at,
)
from cage_jax.quantizers.quantizer import check_has_codes
from cage_jax.quantizers.rounding import dequantized, rounding


@brief_repr
class DampeningState(NamedTuple):
    """State of `dampening`: the number of steps done, int32."""

    dampening_count: jax.Array


@names_checked
def dampening(
    rules: Rules, *, strength: ScalarOrSchedule
) -> optax.GradientTransformationExtraArgs:
    """Adds the gradient of `strength * sum((Q(w) - clip(w)) ** 2)` to the updates.

    Put it before any optimizer, like a regularizer of the loss. `clip` clips to the
    ends of the grid. `Q(w)` and these ends are treated as constants, so the gradient is
    `2 * strength * (w - Q(w))` within the grid and 0 beyond it (in the rotated basis if
    there is a rotation). If nothing is clipped, this equals `cage.coupled` with twice
    the strength. Computed in float32; the updates keep their dtype.

    Args:
      rules: which parameters are quantized, and how.
      strength: a number, or a schedule of the step count such as `cosine_ramp`.

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
      >>> tx = optax.chain(contrib.dampening(rules, strength=0.25), optax.sgd(1.0))
      >>> params = {"kernel": jnp.array([[0.5], [-3.5], [1.25]])}
      >>> gradients = {"kernel": jnp.zeros((3, 1))}
      >>> updates, _ = tx.update(gradients, tx.init(params), params)
      >>> updates["kernel"].ravel().tolist()
      [-0.0, -0.0, -0.125]

    Source: Nagel et al., arXiv 2203.11086.
    """
    check_strength(strength)

    def step(before, after, params):
        del after
        factor = 2 * value_at(strength, before.dampening_count)

        def add(path, quantizer, x, update):
            x = x.astype(compute_dtype(x.dtype))
            grid = needed_grid(path, quantizer, params)
            inside = rounding(x, quantizer, grid).is_inside(0.0)
            error = quantization_error(x, quantizer, grid=grid)
            basis = quantizer.basis(x.shape)
            error = basis.within(lambda e: select(inside, e, 0), error)
            pull = jnp.asarray(factor, x.dtype) * error
            return (update.astype(x.dtype) + pull).astype(update.dtype)

        return add

    return transformation(rules, DampeningState, step)


@names_checked
def cosine_ramp(total_steps: int, peak: float = 0.1) -> Schedule:
    """Returns a schedule that rises from 0 to `peak` by half a cosine and stays there.

    Args:
      total_steps: length of the training in optimizer steps.
      peak: the final value.

    Returns:
      A schedule from the step count (from 0) to
      `peak * (1 - cos(pi * count / total_steps)) / 2`.

    Raises:
      TypeError, ValueError: for arguments out of range.

    Example:
      >>> from cage_jax import contrib
      >>> strength = contrib.cosine_ramp(10, peak=1.0)
      >>> [round(float(strength(count)), 3) for count in (0, 5, 10, 20)]
      [0.0, 0.5, 1.0, 1.0]

    Source: Nagel et al., arXiv 2203.11086, for the strength of dampening.
    """
    check_total_steps(total_steps, or_array=True)
    check_number("peak", peak, "The paper uses 0.1.", least=0, or_array=True)

    def schedule(count):
        elapsed = jnp.asarray(count).astype(jnp.result_type(float)) / total_steps
        return peak * (1 - jnp.cos(jnp.pi * jnp.minimum(elapsed, 1.0))) / 2

    return schedule


@brief_repr
class FreezingState(NamedTuple):
    """State of `freezing`; all but the count are dicts by path of parameter shapes.

    Attributes:
      freezing_count: steps done, int32.
      previous_values: the previous quantized weights, in units of their grid.
      direction: direction of their last change: -1, 1, or 0 before the first; int8.
      frequency: running average of oscillations; 1 means one in every step.
      value_average: running average of the values; it stops when a weight is frozen.
      frozen: mask of the frozen weights, bool.
    """

    freezing_count: jax.Array
    previous_values: dict[str, jax.Array]
    direction: dict[str, jax.Array]
    frequency: dict[str, jax.Array]
    value_average: dict[str, jax.Array]
    frozen: dict[str, jax.Array]


@names_checked
def freezing(
    rules: Rules, threshold: ScalarOrSchedule, *, momentum: float = 0.01
) -> optax.GradientTransformationExtraArgs:
    """Pins weights that oscillate too often to the rounded average of their codes.

    Put it last, after the learning rate. A weight oscillates in a step if its code
    changes in the direction opposite to its last change. If the running average of
    oscillations exceeds the threshold, the weight is frozen for good: every later
    update moves it to the value of its rounded average code, on the grid of that step.
    The optimizer state of frozen weights, such as momentum, is still updated. Averages
    are float32 (float64 for float64); the updates keep their dtype.

    Args:
      rules: which parameters are quantized, and how; without rotation.
      threshold: a number, or a schedule of the step count such as the paper's, from
        0.1 to 0.01: `optax.cosine_decay_schedule(0.1, total_steps, alpha=0.1)`. One
        oscillation raises the average by `momentum`, so with a lower threshold the
        first one freezes the weight.
      momentum: rate of both running averages.

    Returns:
      A transformation whose `update` needs `params`. The state's `frozen` is the mask
      of frozen weights; read it by `optax.tree_utils.tree_get(state, "frozen")`.

    Raises:
      TypeError, ValueError: for arguments out of range; in `init` if a quantizer has a
        rotation; in `update` without `params`.

    Example:
      >>> import cage_jax as cage
      >>> from cage_jax import contrib
      >>> import jax.numpy as jnp
      >>> import optax
      >>> rules = cage.Rules([(r".*kernel", cage.int4())])
      >>> threshold = optax.cosine_decay_schedule(0.1, 1000, alpha=0.1)
      >>> tx = optax.chain(optax.sgd(0.1), contrib.freezing(rules, threshold))
      >>> state = tx.init({"kernel": jnp.ones((8, 4))})
      >>> int(optax.tree_utils.tree_get(state, "frozen")["kernel"].sum())
      0

    Source: Nagel et al., arXiv 2203.11086.
    """
    check_strength(threshold, "threshold")
    remedy = "The paper uses 0.01."
    check_number("momentum", momentum, remedy, least=0, most=1, or_array=True)

    def values_of(path, quantizer, x, params):
        x = x.astype(compute_dtype(x.dtype))
        grid = needed_grid(path, quantizer, params)
        rounded = rounding(jax.lax.stop_gradient(x), quantizer, grid)
        return rounded.code_values(), rounded.grid

    def init(quantized, params):
        values = {}
        for path, (quantizer, x) in quantized.items():
            with path_in_errors(path):
                check_has_codes(quantizer, "freezing")
                if quantizer.hadamard is not None:
                    raise ValueError(
                        f"`rules` must not rotate weights for `freezing`, which "
                        f"needs one code per weight; got {quantizer}. Use "
                        f"hadamard=None."
                    )
                values[path], _ = values_of(path, quantizer, x, params)
        zeros = jax.tree.map(jnp.zeros_like, values)
        return (
            values,
            jax.tree.map(lambda x: x.astype(jnp.int8), zeros),
            zeros,
            jax.tree.map(jnp.copy, values),  # both can be donated
            jax.tree.map(lambda x: x.astype(bool), zeros),
        )

    def step(before, after, params):
        most = value_at(threshold, before.freezing_count)

        def freeze(path, quantizer, x, update):
            reached = (x + update).astype(x.dtype)
            values, grid = values_of(path, quantizer, reached, params)
            dtype = values.dtype
            average, frozen = before.value_average[path], before.frozen[path]
            values = jnp.where(frozen, quantizer.format.round(average), values)

            direction = before.direction[path]
            change = jnp.sign(values - before.previous_values[path]).astype(jnp.int8)
            back = change * direction == -1
            rate = jnp.asarray(momentum, dtype)
            frequency = before.frequency[path]
            frequency += rate * (back.astype(dtype) - frequency)
            frozen |= frequency > jnp.asarray(most, dtype)
            average = jnp.where(frozen, average, average + rate * (values - average))
            pinned = jnp.where(frozen, quantizer.format.round(average), values)

            after.previous_values[path] = pinned
            after.direction[path] = jnp.where(change != 0, change, direction)
            after.frequency[path] = frequency
            after.value_average[path] = average
            after.frozen[path] = frozen
            moved = dequantized(pinned, quantizer, grid, reached) - x
            return jnp.where(frozen, moved.astype(update.dtype), update)

        return freeze

    return transformation(rules, FreezingState, step, init)
