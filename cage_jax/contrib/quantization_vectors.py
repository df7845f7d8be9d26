"""Weight-space arithmetic: what a training added to one model is added to another."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cage_jax.arrays.checks import check_number
from cage_jax.arrays.exact import compute_dtype, uncontracted
from cage_jax.arrays.names import names_checked
from cage_jax.arrays.paths import flatten_with_paths
from cage_jax.arrays.reprs import brief_repr


@brief_repr
class QuantizationVector(NamedTuple):
    """What quantization-aware training added to the weights of a donor, exactly.

    The sum of both parts is `qat - full`, without rounding.

    Attributes:
      difference: a tree like the parameters, float32 or wider: `qat - full`, rounded.
      remainder: a tree like it: what this rounding took away.
    """

    difference: Any
    remainder: Any


@names_checked
def quantization_vector(qat: Any, full: Any) -> QuantizationVector:
    """Computes the quantization vector of a donor, `qat - full`.

    One array cannot hold the difference of two floats in general: `a + (b - a)` need
    not be `b`. So what rounding takes away is kept beside it.

    Args:
      qat: a tree of parameters after quantization-aware training, in floats.
      full: the same parameters before it. For a receiver with another head, leave the
        head out of both trees.

    Returns:
      A `QuantizationVector`. Parameters that are no floats have zeros.

    Raises:
      ValueError: for trees of different structure or shapes.

    Example:
      >>> from cage_jax import contrib
      >>> import jax.numpy as jnp
      >>> full = {"kernel": jnp.array([0.25, 1e8])}
      >>> qat = {"kernel": jnp.array([0.5, 1.0])}
      >>> vector = contrib.quantization_vector(qat, full)
      >>> (full["kernel"] + vector.difference["kernel"]).tolist()
      [0.5, 0.0]
      >>> contrib.apply_vector(full, vector)["kernel"].tolist()
      [0.5, 1.0]

    Source: Zero-Shot Quantization via Weight-Space Arithmetic, arXiv 2604.03420.
    """
    _check_alike("full", full, "qat", qat)

    def subtract(x, y):
        if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            return jnp.zeros_like(x), jnp.zeros_like(x)
        wide = np.promote_types(compute_dtype(x.dtype), y.dtype)
        return _exact_sum(jnp.asarray(x, wide), -jnp.asarray(y, wide))

    leaves, structure = jax.tree.flatten(qat)
    pairs = [subtract(*both) for both in zip(leaves, jax.tree.leaves(full))]
    difference, remainder = (
        jax.tree.unflatten(structure, [pair[part] for pair in pairs])
        for part in range(2)
    )
    return QuantizationVector(difference, remainder)


@names_checked
def apply_vector(
    params: Any, vector: QuantizationVector, scale: float | jax.Array = 1.0
) -> Any:
    """Adds a quantization vector to the parameters of a receiver.

    The result is `params + scale * (qat - full)`, to be rounded by `quantize` without
    any training. With `scale` 1 it is rounded once, so that a donor gets its own `qat`
    back, to the bit but for the sign of a zero. This holds for finite float32 weights
    that are 0 or at least 2**-103 in size (2**-970 for float64), since processors may
    flush smaller remainders to zero.

    Args:
      params: a tree of parameters of the receiver.
      vector: that of a donor with the same parameters.
      scale: lambda, a number; the paper uses 1. One that is chosen by the receiver's
        test data is an oracle.

    Returns:
      A tree like `params`, in their dtypes. Parameters that are no floats stay.

    Raises:
      TypeError, ValueError: for a vector of other parameters, a `scale` that is no
        number.

    Example:
      >>> from cage_jax import contrib
      >>> import jax.numpy as jnp
      >>> vector = contrib.quantization_vector(jnp.array([0.5]), jnp.array([0.25]))
      >>> contrib.apply_vector(jnp.array([2.0]), vector, 0.5).tolist()
      [2.125]

    Source: Zero-Shot Quantization via Weight-Space Arithmetic, arXiv 2604.03420; the
    remainders are those of Dekker, 1971.
    """
    if not isinstance(vector, QuantizationVector):
        raise TypeError(
            f"`vector` must be a QuantizationVector; got {type(vector).__name__}. Use "
            f"quantization_vector(qat, full)."
        )
    check_number("scale", scale, "The paper uses 1.", or_array=True)
    for part in vector:
        _check_alike("vector", part, "params", params)

    def add(x, difference, remainder):
        if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            return x
        factor = jnp.asarray(scale, difference.dtype)
        move, rest = (uncontracted(factor * each) for each in (difference, remainder))
        total, lost = _exact_sum(jnp.asarray(x, move.dtype), move)
        return (total + (lost + rest)).astype(x.dtype)

    return jax.tree.map(add, params, *vector)


def _exact_sum(a, b):
    """Returns `a + b` rounded, and what that took away: Knuth's sum of two floats."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _check_alike(name, tree, other_name, other):
    """Raises ValueError, with a path, for a tree that is not like the other."""
    (paths, leaves, form), (others, wanted, like) = map(
        flatten_with_paths, (tree, other)
    )
    shapes, needed = dict(zip(paths, leaves)), dict(zip(others, wanted))
    for path in {**needed, **shapes}:
        found, expected = (
            f"shape {jnp.shape(each[path])}" if path in each else "no such parameter"
            for each in (shapes, needed)
        )
        if found != expected:
            raise ValueError(
                f"`{path}`: `{name}` must be a tree like `{other_name}`, which has "
                f"{expected}; got {found}. Leave out of all trees what the models do "
                f"not share, such as a head."
            )
    if form != like:
        raise ValueError(
            f"`{name}` must have the nodes of `{other_name}`, {like}; got {form}. Use "
            f"the same kinds of dicts and lists."
        )
