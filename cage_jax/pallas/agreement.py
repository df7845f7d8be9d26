"""Whether a kernel's results are those of the `jax.numpy` form."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

# A difference this small beside the largest number is an order of sums. An element at a
# tie may go to the other level, and with it all that it is rotated with.
_ROUNDING = 2.0**-13
_NEAR = 0.98
# One level more or less in a row changes its norm less than this; a row that a kernel
# left out, or computed from another one, more.
_LINE = 0.3


def disagreement(
    ours: Sequence[jax.Array], theirs: Sequence[jax.Array], *, exact: bool
) -> str:
    """Returns in which way the results of a kernel are wrong, or "".

    Args:
      ours: arrays that the kernel computed.
      theirs: those of the `jax.numpy` form.
      exact: whether both must be equal to the bit.
    """
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        forms = [f"{each.dtype}{[*each.shape]}" for each in (one, other)]
        if forms[0] != forms[1]:
            return f"result {number} is {forms[0]}, and should be {forms[1]}"
        different, near, line = map(float, _distances(one, other))
        if exact and different:
            return f"{different:.0f} of {one.size} numbers of result {number} differ"
        if near < _NEAR:
            return f"{1 - near:.1%} of result {number} differ by more than rounding"
        if not line <= _LINE:
            return f"a line of result {number} differs by {line:.2g} of its norm"
    return ""


@jax.jit
def _distances(one, other):
    """Returns the number of unequal elements, the share of near ones, and an error.

    The error is the largest one of a row or column, relative to its norm.
    """
    one, other = (each.astype(jnp.float32) for each in (one, other))
    both_nan = jnp.isnan(one) & jnp.isnan(other)
    one, other = (jnp.where(both_nan, 0, each) for each in (one, other))
    most = _ROUNDING * jnp.max(jnp.abs(other), initial=0)
    error, lines = jnp.abs(one - other), [jnp.float32(0)]
    for axis in range(one.ndim):
        others = tuple(each for each in range(one.ndim) if each != axis)
        squares = (jnp.sum(each * each, others) for each in (error, other))
        found, norm = map(jnp.sqrt, squares)
        lines.append(jnp.max(jnp.where(found == 0, 0, found / norm), initial=0))
    return jnp.sum(one != other), jnp.mean(error <= most), jnp.max(jnp.stack(lines))
