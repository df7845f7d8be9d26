"""Gradients from the loss at two points: ZeroQAT, and FOGZO to correct the STE."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cage_jax.arrays.checks import check_int, check_number
from cage_jax.arrays.exact import compute_dtype
from cage_jax.arrays.names import names_checked
from cage_jax.arrays.paths import key_at, path_in_errors
from cage_jax.core.grids import needed_grid
from cage_jax.core.rules import Rules, check_rules
from cage_jax.optim.schedules import Schedule
from cage_jax.quantizers.grid import Grid
from cage_jax.quantizers.rounding import rounding

_USUAL = "The paper ends at 1e-3 for a small network."


@names_checked
def two_point_gradient(
    loss: Callable[[Any], jax.Array],
    params: Any,
    key: jax.Array,
    *,
    radius: float = 1e-3,
) -> tuple[jax.Array, Any]:
    """Estimates a gradient from the loss at two points.

    The gradient is `(L(x + radius u) - L(x - radius u)) / (2 radius) * u` with normal
    `u`. It replaces `jax.value_and_grad(loss)(params)` and takes two forward passes and
    no backward pass. It needs no straight-through rule: a wide enough `radius` crosses
    the steps of `fake_quant` in the loss. All floating-point parameters are perturbed,
    including learned grids from `with_grids`; the radius must be smaller than their
    smallest scale. Other parameters get zeros. Points have the dtype of the parameters,
    `u` is float32 or wider.

    Args:
      loss: a function of the parameters, with `fake_quant(params, rules)` inside.
      params: a tree of parameters.
      key: a `jax.random` key, a new one for each step.
      radius: distance of the two points from `params`, in standard deviations of `u`.

    Returns:
      The mean of both losses, and the gradient, a tree like `params`.

    Raises:
      TypeError, ValueError: if the radius is not a positive number.

    Example:
      >>> from cage_jax import contrib
      >>> import jax
      >>> import jax.numpy as jnp
      >>> loss = lambda x: jnp.sum(3 * x)
      >>> x = jnp.zeros(1)
      >>> value, g = contrib.two_point_gradient(loss, x, jax.random.key(0))
      >>> u = jax.random.normal(jax.random.split(jax.random.key(0), 1)[0], 1)
      >>> bool(abs(g - 3 * u**2).max() < 1e-4)
      True

    Source: SPSA, Spall 1992; ZeroQAT, arXiv 2509.00031; the radius is MeZO's, arXiv
    2305.17333.
    """
    check_number("radius", radius, "MeZO uses 1e-3.", above=0, or_array=True)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    directions = [
        jax.random.normal(leaf_key, x.shape, compute_dtype(x.dtype))
        if jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating)
        else None
        for x, leaf_key in zip(leaves, keys)
    ]

    def at(distance):
        moved = [
            x if u is None else (x + (distance * u).astype(x.dtype))
            for x, u in zip(leaves, directions)
        ]
        return loss(jax.tree.unflatten(structure, moved))

    above, below = at(radius), at(-radius)
    slope = (above - below) / (2 * radius)
    gradient = [
        jnp.zeros_like(x) if u is None else (slope.astype(u.dtype) * u).astype(x.dtype)
        for x, u in zip(leaves, directions)
    ]
    return (above + below) / 2, jax.tree.unflatten(structure, gradient)


@names_checked
def fogzo(
    loss: Callable[[Any], jax.Array],
    params: Any,
    rules: Rules,
    key: jax.Array,
    *,
    doubt: float | jax.Array = 1e-3,
    samples: int = 1,
    grid: Mapping[str, Grid] | None = None,
) -> tuple[jax.Array, Any]:
    """Computes the straight-through gradient, corrected by the loss at two points.

    It replaces `jax.value_and_grad(loss)(params)` and takes two more forward passes for
    each sample. Let `epsilon` be the step of each weight's grid over 2 sqrt(3). In
    units of `epsilon`, the gradient of quantized weights is

        (L(x + v) - L(x - v)) / 2 * v,  v = sqrt(1 - doubt) s g / |g| + sqrt(doubt) u

    Here `g` is the straight-through gradient, `|g|` its norm over all quantized
    weights, `s` a random sign, and `u` uniform on sqrt(3) [-1, 1], which smooths
    rounding to the identity. Both parts of `v` are equally long at a doubt of 1 over
    the number of weights. The paper's beta is 1 - doubt, which float32 would round to 1
    in a large model. With a rotation, all of this is in the rotated basis.
    Other parameters keep their gradient.

    Args:
      loss: a function of the parameters, with `fake_quant(params, rules)` inside.
      params: a tree of parameters.
      rules: which parameters are quantized, and how.
      key: a `jax.random` key, a new one for each step.
      doubt: of the straight-through gradient, in [0, 1], by
        `fogzo_doubt(total_steps)(count)` for example.
      samples: number of samples to average.
      grid: as in `fake_quant`.

    Returns:
      The loss, and the gradient, a tree like `params`.

    Raises:
      TypeError, ValueError: for arguments out of range.

    Example:
      >>> import cage_jax as cage
      >>> from cage_jax import contrib
      >>> import jax
      >>> import jax.numpy as jnp
      >>> rules = cage.Rules([(r".*kernel", cage.int4())])
      >>> x = {"kernel": jnp.array([[0.5], [-3.5], [1.25]])}
      >>> loss = lambda x: jnp.sum(cage.fake_quant(x, rules)["kernel"] ** 2)
      >>> value, g = contrib.fogzo(loss, x, rules, jax.random.key(0))
      >>> float(value), g["kernel"].shape
      (13.5, (3, 1))

    Source: FOGZO, arXiv 2510.23926, as summaries of it and another's implementation
    tell; the authors' code was not read. There `epsilon` is one number. Here each
    weight is divided by its own `epsilon`, so grids may have different steps.
    """
    check_rules(rules)
    check_number("doubt", doubt, _USUAL, least=0, most=1, or_array=True)
    check_int("samples", samples, "The paper uses 1.", least=1)
    value, gradient = jax.value_and_grad(loss)(params)
    gradients, units, bases, guides = rules.quantized(gradient), {}, {}, {}
    for path, (quantizer, x) in rules.quantized(params).items():
        with path_in_errors(path):
            given = needed_grid(path, quantizer, params, grid)
        step = rounding(x, quantizer, given).grid.step
        units[path] = quantizer.blocks(x.shape).spread(step) / (2 * math.sqrt(3))
        bases[path] = quantizer.basis(x.shape)
        guides[path] = units[path] * bases[path].rotate(gradients[path][1])
    wide = jnp.result_type(float)
    norm = jnp.sqrt(sum(jnp.sum(g * g).astype(wide) for g in guides.values()))
    norm = jnp.where(norm == 0, 1, norm)
    total = {path: jnp.zeros_like(g) for path, g in guides.items()}

    def loss_at(sign, vectors):
        def move(path, quantizer, x):
            away = sign * bases[path].unrotate(units[path] * vectors[path])
            return (x + away).astype(x.dtype)

        return loss(rules.map(move, params))

    for sample_key in jax.random.split(key, samples):
        vectors = _draw_near(guides, norm, doubt, sample_key)
        slope = (loss_at(1, vectors) - loss_at(-1, vectors)) / 2
        for path, v in vectors.items():
            total[path] += slope.astype(v.dtype) * v / samples

    def corrected(path, quantizer, x, g):
        return bases[path].unrotate(total[path] / units[path]).astype(g.dtype)

    return value, rules.map(corrected, params, gradient)


@names_checked
def fogzo_doubt(total_steps: int, final: float = 1e-3, *, start: int = 0) -> Schedule:
    """Returns FOGZO's doubt of the straight-through gradient, from 0 to `final`.

    It rises linearly from `start` on. At 0 the gradient lies along the straight-through
    one; the smaller learning rates of late steps bear the noise of other directions.
    Before `start`, `jax.value_and_grad` saves two forward passes; the authors do 70 %
    of the steps so where time is short.

    Args:
      total_steps: first step with the value `final`.
      final: the last value, in [0, 1]; the paper's 1e-3 is for a small network on
        MNIST, and it searches a smaller one for larger models.
      start: last step with value 0.

    Returns:
      A schedule from the step count (from 0) to `doubt` of `fogzo`.

    Raises:
      TypeError, ValueError: for arguments out of range.

    Example:
      >>> from cage_jax import contrib
      >>> doubt = contrib.fogzo_doubt(100, 0.1)
      >>> [round(float(doubt(count)), 3) for count in (0, 25, 50, 100, 200)]
      [0.0, 0.025, 0.05, 0.1, 0.1]

    Source: FOGZO, arXiv 2510.23926: its beta falls linearly from 1 over all steps.
    """
    check_int("start", start, "Use the step at which to begin.", least=0)
    check_int("total_steps", total_steps, "Use a step after `start`.", least=start + 1)
    check_number("final", final, _USUAL, least=0, most=1)
    return optax.linear_schedule(0.0, final, total_steps - start, start)


def _draw_near(guides, norm, doubt, key):
    """Draws `v`, by path."""
    sign_key, key = jax.random.split(key)
    sign = jax.random.rademacher(sign_key, (), norm.dtype)
    most, vectors = math.sqrt(3), {}
    for path, g in guides.items():
        drawn = jax.random.uniform(key_at(key, path), g.shape, g.dtype, -most, most)
        share, scale = jnp.asarray(doubt, g.dtype), (sign / norm).astype(g.dtype)
        vectors[path] = jnp.sqrt(1 - share) * scale * g + jnp.sqrt(share) * drawn
    return vectors
