"""AdamW for one parameter, as a function of arrays."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class StepNumbers(NamedTuple):
    """The numbers that change from one step of AdamW to the next; float32 scalars.

    Attributes:
      rate: the learning rate.
      pull: factor of the quantization error in the update, 0 while CAGE is silent.
      first_correction: 1 - b1**t.
      second_correction: 1 - b2**t.
    """

    rate: jax.Array
    pull: jax.Array
    first_correction: jax.Array
    second_correction: jax.Array

    def rounded(self, dtypes: "Dtypes") -> "StepNumbers":
        """Rounds the numbers to the dtypes of the arrays that Optax takes them to."""
        return StepNumbers(
            _rounded(self.rate, dtypes.update),
            self.pull,
            _rounded(self.first_correction, dtypes.update),
            _rounded(self.second_correction, dtypes.x),
        )


class Dtypes(NamedTuple):
    """The dtypes of the arrays of a parameter, each float32 or bfloat16.

    Attributes:
      x: that of the parameter, its gradient and the second moment.
      first: that of the first moment.
    """

    x: jnp.dtype
    first: jnp.dtype

    @property
    def update(self) -> jnp.dtype:
        """The dtype of the update."""
        return jnp.promote_types(self.x, self.first)


@dataclasses.dataclass(frozen=True)
class AdamW:
    """The hyperparameters of AdamW, and its step.

    The arithmetic is that of `optax.adamw`, operation by operation, as a compiler for
    TPU does it: numbers are rounded to the dtypes of arrays, and results once they are
    stored, but what is between is float32.
    """

    b1: float
    b2: float
    eps: float
    eps_root: float
    weight_decay: float

    def step(
        self,
        gradient: jax.Array,
        first: jax.Array,
        second: jax.Array,
        x: jax.Array,
        numbers: StepNumbers,
        dtypes: Dtypes,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Computes the update of one step and the moments after it.

        Args:
          gradient: the gradient, float32 or bfloat16 like all arrays here.
          first: the first moment.
          second: the second moment.
          x: the parameter.
          numbers: the numbers of this step, rounded.
          dtypes: the dtypes of the arrays, which may have been cast to float32.

        Returns:
          The first moment, the second moment and the update, float32.
        """
        gradient, first, second, x = (
            array.astype(jnp.float32) for array in (gradient, first, second, x)
        )

        def rounded(number, dtype=dtypes.x):
            return float(dtype.type(number))

        b1, b2 = rounded(self.b1, dtypes.first), rounded(self.b2)
        eps, eps_root = rounded(self.eps), rounded(self.eps_root)
        new_first = rounded(1 - self.b1) * gradient + b1 * first
        new_second = rounded(1 - self.b2) * (gradient * gradient) + b2 * second
        size = lax.sqrt(new_second / numbers.second_correction + eps_root)
        direction = (new_first / numbers.first_correction) / (size + eps)
        decay = rounded(self.weight_decay) * x
        return new_first, new_second, -numbers.rate * (direction + decay)


def _rounded(number, dtype):
    if number.dtype == dtype:
        return number
    limits = jnp.finfo(dtype)
    return lax.reduce_precision(number, limits.nexp, limits.nmant)
