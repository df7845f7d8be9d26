"""The diagonal of the Fisher information of a trained model, from squared gradients."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from cage_jax.arrays.checks import check_callable
from cage_jax.arrays.exact import compute_dtype
from cage_jax.arrays.names import names_checked
from cage_jax.core.quantized_array import check_no_codes
from cage_jax.finetuning.batches import checked_batches
from cage_jax.program.tracing import split_grids


@names_checked
def fisher(loss: Callable, params: Any, batches: Iterable[tuple]) -> Any:
    """Computes the mean of squared gradients over batches.

    With batches of one example this is the diagonal of the empirical Fisher
    information. With b examples it is smaller, by b if gradients are noise; that
    changes the increase that `choose_bits` estimates, and not what it chooses.

    Args:
      loss: maps the parameters and the arguments of a batch to a scalar, the mean over
        its examples. The divergence of the model from itself has no gradient: use the
        cross-entropy of labels, or of labels drawn from the model's predictions.
      params: the parameters, in which the loss is differentiated. From what
        `with_grids` returns, they are taken out.
      batches: the arguments of `loss` after the parameters, a tuple for each batch.

    Returns:
      A tree like `params`, float32 (float64 for float64), with zeros for what is not
      real floating.

    Raises:
      TypeError: for batches that are no tuples, and for codes.
      ValueError: without batches.

    Example:
      >>> import cage_jax as cage
      >>> import jax.numpy as jnp
      >>> def loss(params, x):
      ...     return jnp.mean(x @ params["w"])
      >>> batches = [(jnp.eye(2)[:1],), (jnp.eye(2)[1:],)]
      >>> cage.finetuning.fisher(loss, {"w": jnp.ones(2)}, batches)["w"].tolist()
      [0.5, 0.5]

    Source: Kirkpatrick et al., arXiv 1612.00796.
    """
    check_callable("loss", loss, "The order is loss, params, batches.")
    check_no_codes(params=params)
    params, _ = split_grids(params)

    @jax.jit
    def add(total, params, batch):
        gradients = jax.grad(loss, allow_int=True)(params, *batch)
        return jax.tree.map(_plus_square, total, gradients)

    total = jax.tree.map(lambda x: jnp.zeros(jnp.shape(x), _dtype(x)), params)
    count = 0
    for batch in checked_batches(batches):
        total = add(total, params, batch)
        count += 1
    return jax.tree.map(lambda x: x / count, total)


def _dtype(x):
    dtype = jnp.result_type(x)
    return compute_dtype(dtype) if jnp.issubdtype(dtype, jnp.floating) else jnp.float32


def _plus_square(total, gradient):
    if gradient.dtype == jax.dtypes.float0:  # of an integer
        return total
    return total + jnp.square(gradient.astype(total.dtype))
