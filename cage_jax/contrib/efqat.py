"""EfQAT: only the rows of largest weights are trained."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from cage_jax.contrib.arguments import check_number, check_steps, quantized
from cage_jax.core.rules import Rules, check_rules
from cage_jax.optim.placements import check_params
from cage_jax.quantizers.scales import compute_dtype


class TrainedRowsState(NamedTuple):
    """State of `trained_rows`.

    Attributes:
      trained_rows_count: steps done, int32.
      trained: which rows of each quantized parameter are, bool, by path, with size 1
        in the axes of a row.
    """

    trained_rows_count: jax.Array
    trained: dict[str, jax.Array]


def trained_rows(
    rules: Rules, share: float, *, every: int
) -> optax.GradientTransformationExtraArgs:
    """Zeroes the updates of all but the rows with the largest mean absolute weight.

    It belongs behind the learning rate, last. A row is what lies along the axes that
    share scales: the weights of an output channel with `axis=-2`, all of an array with
    `axis=None`. Rows of all quantized parameters are ranked together, in the first step
    and again after every `every` steps; those as large as the smallest that is trained
    are trained too. Biases, norms and scales that no rule names are always trained.
    What an optimizer keeps of frozen rows goes on. It has the effect of the method, not
    its speed: the backward pass stays whole.

    Args:
      rules: which parameters are quantized, and how.
      share: of the rows to train, in [0, 1]; the paper has a few up to 0.25.
      every: a number of steps, such as some thousands.

    Returns:
      A transformation whose `update` needs `params`.

    Raises:
      TypeError, ValueError: for arguments of the wrong kind or out of range; in
        `update` without `params`.

    Example:
      >>> import cage_jax as cage
      >>> from cage_jax import baselines
      >>> import jax.numpy as jnp
      >>> rules = cage.Rules([(r".*kernel", cage.int4())])
      >>> tx = baselines.trained_rows(rules, 0.5, every=1000)
      >>> params = {"kernel": jnp.array([[1.0, 3.0], [-1.0, 0.0]])}
      >>> updates, _ = tx.update({"kernel": jnp.ones((2, 2))}, tx.init(params), params)
      >>> updates["kernel"].tolist()
      [[0.0, 1.0], [0.0, 1.0]]

    Source: EfQAT, arXiv 2411.11038.
    """
    check_rules(rules)
    check_number(share, "share", "Use 0.25 for a quarter.", most=1, known=True)
    check_steps(every, "every", 1, "Use some thousands.")

    def ranked(params):
        """Which rows are among the largest."""
        sizes = {}
        for path, (quantizer, x) in rules.quantized(params).items():
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

    def init(params):
        quantized(rules, params)
        return TrainedRowsState(jnp.zeros([], jnp.int32), ranked(params))

    def update(updates, state, params=None, **extra_args):
        del extra_args
        check_params(params)
        count = state.trained_rows_count
        trained = lax.cond(
            count % every == 0, lambda: ranked(params), lambda: state.trained
        )

        def mask(path, quantizer, x, update):
            del quantizer, x
            if update is None:
                return None
            return jnp.where(trained[path], update, jnp.zeros_like(update))

        updates = rules.map(mask, params, updates)
        return updates, TrainedRowsState(optax.safe_increment(count), trained)

    return optax.GradientTransformationExtraArgs(init, update)
