"""The largest logits of a teacher, in place of all of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from cage_jax.arrays.checks import check_int, check_number
from cage_jax.arrays.exact import compute_dtype, times
from cage_jax.finetuning.distillation.chunks import by_rows


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("logits", "ids", "rest"),
    meta_fields=("temperature", "vocabulary"),
)
@dataclasses.dataclass(frozen=True)
class TopLogits:
    """The largest logits of each token, and what all others add up to. A pytree.

    The logits are normalized: they are the log-probabilities at the temperature, so
    that they keep their precision in 16 bits, and `rest` depends on the temperature.

    Attributes:
      logits: (..., k), log-probabilities, the largest first.
      ids: (..., k), which entries of the vocabulary they belong to; int32.
      rest: (...), the log-probability of all other entries together; float32.
      temperature: the temperature of the probabilities (static).
      vocabulary: the number of entries of the vocabulary (static).

    Example:
      >>> from cage_jax import finetuning
      >>> import jax.numpy as jnp
      >>> logits = jnp.log(jnp.array([0.1, 0.5, 0.15, 0.25]))
      >>> top = finetuning.TopLogits.of(logits, 2)
      >>> top.ids.tolist(), jnp.exp(top.logits).round(3).tolist()
      ([1, 3], [0.5, 0.25])
      >>> round(float(jnp.exp(top.rest)), 3)
      0.25
    """

    logits: jax.Array
    ids: jax.Array
    rest: jax.Array
    temperature: float
    vocabulary: int

    @classmethod
    def of(
        cls, logits: jax.Array, k: int = 64, *, temperature: float = 1.0
    ) -> "TopLogits":
        """Takes the largest of all logits.

        On one CPU no float32 array like `logits` is made beside it, only parts of one.

        Args:
          logits: (..., vocabulary), floats; they get no gradient.
          k: how many logits of each token.
          temperature: what the logits are divided by before the softmax.

        Returns:
          `TopLogits` in float32, float64 for float64. NaN in a token's logits makes its
          logits and its rest NaN.

        Raises:
          TypeError, ValueError: for logits that are no floats or have no axis, a
            temperature that is not positive, and more logits than there are.
        """
        check_logits("logits", logits)
        check_temperature(temperature)
        vocabulary = logits.shape[-1]
        remedy = f"The vocabulary has {vocabulary} entries."
        check_int("k", k, remedy, least=1, most=vocabulary)
        function = functools.partial(_largest, k=k, temperature=float(temperature))
        rows = lax.stop_gradient(logits).reshape(-1, vocabulary)
        top, ids, rest = by_rows(function, rows)
        lead = logits.shape[:-1]
        top, ids = top.reshape(*lead, k), ids.reshape(*lead, k)
        return cls(top, ids, rest.reshape(lead), float(temperature), vocabulary)


def check_logits(name: str, logits: jax.Array) -> None:
    """Raises TypeError for anything but floats along a vocabulary."""
    dtype = getattr(logits, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating) or not logits.shape:
        got = f"shape {logits.shape}, {dtype}" if dtype is not None else type(logits)
        raise TypeError(
            f"`{name}` must be an array of floats, (..., vocabulary); got {got}. If "
            f"the model returns more than logits, take them out of what it returns."
        )


def check_temperature(temperature: float) -> None:
    """Raises TypeError or ValueError for anything but a positive number."""
    check_number("temperature", temperature, "1 is the usual one.", above=0)


def _largest(logits, beside, whole, *, k, temperature):
    """Finds the largest logits of each row, and the log-sum-exp of its others."""
    x = times(logits.astype(compute_dtype(logits.dtype)), 1 / temperature)
    top, ids = lax.top_k(x, k)
    if not whole:  # for what follows, XLA on a CPU would sort whole rows otherwise
        top, ids = lax.optimization_barrier((top, ids))
    least = top[:, -1:]
    # Of several that are as large as the least, some are among the others.
    left = jnp.sum(x == least, -1) - jnp.sum(top == least, -1)
    below = jnp.sum(jnp.where(x < least, jnp.exp(x - least), 0), -1)
    rest = least[:, 0] + jnp.log(below + left.astype(x.dtype))
    total = jnp.logaddexp(jax.nn.logsumexp(top, -1), rest)
    return top - total[:, None], ids, rest - total
