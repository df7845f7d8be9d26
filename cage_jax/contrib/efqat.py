"""EfQAT: training of only the rows with the largest weights."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from cage_jax.arrays.checks import check_int, check_number
from cage_jax.arrays.exact import compute_dtype
from cage_jax.arrays.names import names_checked
from cage_jax.arrays.reprs import brief_repr
from cage_jax.contrib.transformation import transformation
from cage_jax.core.rules import Rules


@brief_repr
class TrainedRowsState(NamedTuple):
    """State of `trained_rows`.

    Attributes:
      trained_rows_count: steps done, int32.
      trained: mask of the trained rows of each quantized parameter by path, bool, with
        size 1 in the axes of a row.
    """

    trained_rows_count: jax.Array
    trained: dict[str, jax.Array]


@names_checked
def trained_rows(
    rules: Rules, share: float, *, every: int
) -> optax.GradientTransformationExtraArgs:
    """Zeroes the updates of all but the rows with the largest mean absolute weight.

    Put it last, after the learning rate. A row runs along the axes that share scales:
    the weights of one output channel with `axis=-2`, the whole array with `axis=None`.
    The rows of all quantized parameters are ranked together in the first step, and
    again every `every` steps. Rows that tie with the smallest trained row are trained
    too. Biases, norms and scales that no rule names are always trained. The optimizer
    state of frozen rows is still updated. This reproduces the effect of the method, not
    its speed: the backward pass is not reduced.

    Args:
      rules: which parameters are quantized, and how.
      share: fraction of the rows to train, in [0, 1]; the paper uses up to 0.25.
      every: number of steps between rankings, such as a few thousand.

    Returns:
      A transformation whose `update` needs `params`.

    Raises:
      TypeError, ValueError: for arguments out of range; in `update` without `params`.

    Example:
      >>> import cage_jax as cage
      >>> from cage_jax import contrib
      >>> import jax.numpy as jnp
      >>> rules = cage.Rules([(r".*kernel", cage.int4())])
      >>> tx = contrib.trained_rows(rules, 0.5, every=1000)
      >>> params = {"kernel": jnp.array([[1.0, 3.0], [-1.0, 0.0]])}
      >>> updates, _ = tx.update({"kernel": jnp.ones((2, 2))}, tx.init(params), params)
      >>> updates["kernel"].tolist()
      [[0.0, 1.0], [0.0, 1.0]]

    Source: EfQAT, arXiv 2411.11038.
    """
    check_number("share", share, "Use 0.25 for a quarter.", least=0, most=1)
    check_int("every", every, "Use a few thousand.", least=1, or_array=True)

    def rank(quantized):
        """Returns a mask of the rows with the largest mean absolute weights."""
        sizes = {}
        for path, (quantizer, x) in quantized.items():
            size = jnp.abs(x.astype(compute_dtype(x.dtype)))
            axes = quantizer.blocks(x.shape).axes
            sizes[path] = jnp.mean(size, axis=axes, keepdims=True)
        wide = jnp.result_type(float)
        rows = [size.ravel().astype(wide) for size in sizes.values()]
        ascending = jnp.sort(jnp.concatenate(rows)) if rows else jnp.zeros(0)
        frozen = ascending.size - math.ceil(share * ascending.size)
        if frozen == ascending.size:
            return {path: size < 0 for path, size in sizes.items()}
        least = ascending[frozen]
        return {path: size.astype(wide) >= least for path, size in sizes.items()}

    def step(before, after, params):
        trained = lax.cond(
            before.trained_rows_count % every == 0,
            lambda: rank(rules.quantized(params)),
            lambda: before.trained,
        )
        after.trained.update(trained)
        return lambda path, quantizer, x, update: jnp.where(
            trained[path], update, jnp.zeros_like(update)
        )

    return transformation(
        rules, TrainedRowsState, step, lambda quantized, params: (rank(quantized),)
    )
