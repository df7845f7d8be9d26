"""AdamW for one parameter, as a function of arrays."""

import dataclasses
from typing import NamedTuple

import jax
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


@dataclasses.dataclass(frozen=True)
class AdamW:
    """The hyperparameters of AdamW, and its step.

    The arithmetic is that of `optax.adamw`, operation by operation.
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
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Computes the update of one step and the moments after it.

        Args:
          gradient: the gradient, float32 like all arrays here except `first`.
          first: the first moment, float32 or bfloat16.
          second: the second moment.
          x: the parameter.
          numbers: the numbers of this step.

        Returns:
          The first moment, the second moment and the update.
        """
        # Compilers do the same to Optax's code: b1 is rounded to the dtype of the
        # moment, but the product is not.
        decay = float(first.dtype.type(self.b1))
        new_first = (1 - self.b1) * gradient + decay * first.astype(x.dtype)
        new_second = (1 - self.b2) * (gradient * gradient) + self.b2 * second
        size = lax.sqrt(new_second / numbers.second_correction + self.eps_root)
        direction = (new_first / numbers.first_correction) / (size + self.eps)
        update = -numbers.rate * (direction + self.weight_decay * x)
        return new_first.astype(first.dtype), new_second, update
