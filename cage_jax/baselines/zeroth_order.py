"""ZeroQAT: a gradient from the loss at two points, without a backward pass."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cage_jax.baselines.arguments import check_number
from cage_jax.scales import compute_dtype


def two_point_gradient(
    loss: Callable[[Any], jax.Array],
    params: Any,
    key: jax.Array,
    *,
    radius: float = 1e-3,
) -> tuple[jax.Array, Any]:
    """`(L(x + radius u) - L(x - radius u)) / (2 radius) * u`, with normal `u`.

    It takes the place of `jax.value_and_grad(loss)(params)`: two forward passes and no
    backward pass. Through the staircase of `fake_quant` in the loss it sees what
    `radius` is wide enough to see, without a straight-through rule. All parameters of
    real floats take part, learned grids beside them too (`with_grids`), of which the
    radius must be below the smallest scale; others get zeros. Points are in the dtype
    of the parameters, `u` in float32 or wider.

    Args:
      loss: a function of the parameters, with `fake_quant(params, rules)` inside.
      params: a tree of parameters.
      key: of `jax.random`, a new one for each step.
      radius: how far away the two points are, in deviations of `u`.

    Returns:
      The mean of both losses, and a tree like `params`.

    Raises:
      TypeError, ValueError: for a radius that is not positive.

    Example:
      >>> from cage_jax import baselines
      >>> import jax
      >>> import jax.numpy as jnp
      >>> loss = lambda x: jnp.sum(3 * x)
      >>> x = jnp.zeros(1)
      >>> value, g = baselines.two_point_gradient(loss, x, jax.random.key(0))
      >>> u = jax.random.normal(jax.random.split(jax.random.key(0), 1)[0], 1)
      >>> bool(abs(g - 3 * u**2).max() < 1e-4)
      True

    Source: SPSA, Spall 1992; ZeroQAT, arXiv 2509.00031; the radius is MeZO's, arXiv
    2305.17333.
    """
    check_number(radius, "radius", "MeZO uses 1e-3.")
    if not isinstance(radius, jax.Array) and radius == 0:
        raise ValueError("`radius` must be positive; got 0. MeZO uses 1e-3.")
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    directions = [_direction(x, own) for x, own in zip(leaves, keys)]

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


def _direction(x, key):
    if not jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating):
        return None
    return jax.random.normal(key, x.shape, compute_dtype(x.dtype))
