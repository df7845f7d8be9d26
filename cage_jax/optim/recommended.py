"""The settings to begin with."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp

from cage_jax.optim.curvature import Curvature, fisher
from cage_jax.optim.schedules import ScalarOrSchedule, dose, ramp_to_dose, value_at

_LARGEST = 3.0
# At 0.01 CAGE was seen to do nothing, at 0.2 something.
_LEAST_DOSE = 0.05
# What it was measured with is below; the paper's is 10.
_STRONGEST = 15.0


def recommended(
    learning_rate: ScalarOrSchedule,
    total_steps: int,
    dose: float = 0.7,
    silence: float = 0.5,
) -> dict[str, Any]:
    """Strength and curvature to begin with, nothing to tune.

    The strength rises with the cube of the steps after the silence, to a dose rather
    than to a peak, so that it suits any learning rate and number of steps. The pull
    goes where squares of gradients are large, by rows and columns, at most three times
    their mean: 4 bytes a row and a column, no more gradients. No step moves a weight
    beyond its grid point, and no strength is above 15, so that a handful of steps, and
    the small learning rates of fine-tuning, have a smaller dose: there it would be a
    pull that is larger than the steps. Behind `total_steps` the strength stays as it is
    then. For the decoupled placements; the coupled one has no dose under Adam.

    Args:
      learning_rate: that of the optimizer, a number or a schedule.
      total_steps: length of the training in optimizer steps.
      dose: as in `ramp_to_dose`, where a strength of 15 at the end is enough for it.
      silence: the share of the training without correction, in [0, 1).

    Returns:
      The arguments `strength` and `curvature` of `cage_adamw`, `cage_sgd`, `decoupled`
      and `post_step`.

    Raises:
      TypeError, ValueError: as `ramp_to_dose`.

    Example:
      >>> import cage_jax as cage
      >>> rules = cage.Rules([(r".*kernel", cage.int4(group_size=32))])
      >>> chosen = cage.recommended(1e-3, 10_000)
      >>> tx = cage.cage_adamw(1e-3, rules, **chosen)
      >>> import optax
      >>> tx = cage.decoupled(optax.lion(1e-3), rules, learning_rate=1e-3, **chosen)

    Source: measured, see benchmarks/README.md: better than the paper's setting on
    quadratics and a small language model, as good or better on digits. The paper's is
    `silence_then_ramp(total_steps)` and no curvature.
    """
    ramp = ramp_to_dose(learning_rate, total_steps, dose, silence)

    def strength(count):
        peak = jnp.maximum(ramp(jnp.int32(total_steps - 1)), 1e-9)
        share = jnp.minimum(1.0, _STRONGEST / peak)
        rate, asked = value_at(learning_rate, count), share * ramp(count)
        most = 1 / (_LARGEST * jnp.where(rate > 0, rate, jnp.inf))
        return jnp.where(rate > 0, jnp.minimum(asked, most), asked)

    return {
        "strength": strength,
        "curvature": fisher(relative=True, factored=True, largest=_LARGEST),
    }


def chosen(
    learning_rate: ScalarOrSchedule,
    strength: ScalarOrSchedule | None,
    total_steps: int | None,
    curvature: Curvature | None,
) -> tuple[ScalarOrSchedule, Curvature | None]:
    """Strength and curvature: those that are given, else the recommended ones."""
    if strength is not None:
        if total_steps is not None:
            raise ValueError(
                f"`total_steps` must not come with `strength`, which says all; got "
                f"{total_steps} and {strength!r}. Leave one of them out."
            )
        return strength, curvature
    if total_steps is None:
        raise TypeError(
            "`total_steps` must be given, the length of the training in optimizer "
            "steps, for the strength that is recommended; or `strength`."
        )
    if isinstance(learning_rate, jax.Array) or isinstance(total_steps, jax.Array):
        raise TypeError(
            "`total_steps` needs the learning rate of all steps, a number or a "
            "schedule, and an int; got an array, which under optax.inject_hyperparams "
            "is the rate of one step. Give **recommended(learning_rate, total_steps) "
            "in place of `total_steps`: strength and curvature."
        )
    found = recommended(learning_rate, total_steps)
    _warn_of_little(learning_rate, found["strength"], total_steps)
    return found["strength"], curvature or found["curvature"]


def _warn_of_little(learning_rate, strength, total_steps):
    left = dose(learning_rate, strength, total_steps)
    if left < _LEAST_DOSE:
        warnings.warn(
            f"the recommended strength, at most {_STRONGEST:g}, comes to a dose of "
            f"{left:.2g} in {total_steps} steps at this learning rate, and will do "
            f"nothing. Train longer, or leave it out: a pull that is stronger than the "
            f"steps did harm.",
            stacklevel=4,
        )
