"""The recommended strength and curvature."""

from typing import Any

import jax
import jax.numpy as jnp

from cage_jax.arrays.checks import is_traced, warn
from cage_jax.arrays.names import names_checked
from cage_jax.optim.curvature import Curvature, fisher
from cage_jax.optim.schedules import (
    ScalarOrSchedule,
    ramp_to_dose,
    steps,
    sum_of_products,
    value_at,
    values_at,
)

_LARGEST = 3.0
_DOSE = 0.7
# In measurements CAGE did nothing at a dose of 0.01 and gained from about 0.2 on, which
# is a quarter of the recommended one.
_LEAST_SHARE = 0.25
# All measured strengths were below this; the paper's is 10.
_STRONGEST = 15.0


@names_checked
def recommended(
    learning_rate: ScalarOrSchedule,
    total_steps: int,
    dose: float = _DOSE,
    silence: float = 0.5,
    coupled: bool = False,
) -> dict[str, Any]:
    """Returns a strength and a curvature to begin with, with nothing to tune.

    The strength rises with the cube of the steps after the silence. It is set by a dose
    rather than a peak, so that it suits any learning rate and number of steps. The
    pull is strongest where squares of gradients are large, by input and by output of
    each matrix, and at most three times the mean. This needs no further gradients, and
    takes 8 bytes for each input and each output. Gradients are read at every tenth
    step, from 100 steps before the pull begins. No step moves a weight beyond its grid
    point, and no strength is above 15. So the dose is smaller for a handful of steps,
    for a learning rate that ends near 0, and for the small ones of fine-tuning, where
    the full dose would need a pull larger than the steps. Warns if less than a quarter
    of `dose` is left. After `total_steps` the strength keeps its last value.

    Args:
      learning_rate: the optimizer's, a number or a schedule.
      total_steps: length of the training in optimizer updates (see `cage_adamw`).
      dose: as in `ramp_to_dose`, if a strength of 15 at the end is enough to reach it.
      silence: the fraction of training without correction, in [0, 1).
      coupled: whether the pull goes before an optimizer that divides by the root of
        mean squared gradients, such as Adam. It is then multiplied by that root, and
        comes out of the division as strong as behind the optimizer.

    Returns:
      A dict of the arguments `strength` and `curvature` for `cage_adamw`, `cage_sgd`,
      `decoupled` and `post_step`; with `coupled=True`, for `coupled`.

    Raises:
      TypeError, ValueError: as in `ramp_to_dose`.

    Example:
      >>> import cage_jax as cage
      >>> rules = cage.Rules([(r".*kernel", cage.int4(group_size=32))])
      >>> chosen = cage.recommended(1e-3, 10_000)
      >>> tx = cage.cage_adamw(1e-3, rules, **chosen)
      >>> import optax
      >>> tx = cage.decoupled(optax.lion(1e-3), rules, learning_rate=1e-3, **chosen)

    Source: measured, see benchmarks/README.md: better than the paper's setting on
    quadratics and a small language model, as good or better on digits. The paper uses
    `silence_then_ramp(total_steps)` and no curvature.
    """
    # A ramp of the dose, within the limits of a step and of the strength.
    ramp = ramp_to_dose(learning_rate, total_steps, dose, silence)

    def limited(count, rate):
        peak = jnp.maximum(ramp(jnp.int32(total_steps - 1)), 1e-9)
        share = jnp.minimum(1.0, _STRONGEST / peak)
        asked = share * ramp(count)
        # A weight whose curvature is at its bound must not be moved beyond the grid.
        most = 1 / (_LARGEST * jnp.where(rate > 0, rate, jnp.inf))
        return jnp.where(rate > 0, jnp.minimum(asked, most), asked)

    def strength(count):
        return limited(count, value_at(learning_rate, count))

    _warn_of_little(learning_rate, limited, total_steps, dose)
    return {
        "strength": strength,
        "curvature": fisher(factored=True, largest=_LARGEST, times_root=coupled),
    }


def _warn_of_little(learning_rate, limited, total_steps, dose):
    """Warns if the limits of the strength leave little of the dose."""
    counts = steps(total_steps)
    rates = values_at("learning_rate", learning_rate, counts)
    strengths = jax.jit(jax.vmap(limited))(counts, rates)
    if is_traced(strengths):
        return
    total = sum_of_products(rates, strengths)
    if total < _LEAST_SHARE * dose:
        aim = "the default aims at" if dose == _DOSE else "you asked for"
        warn(
            f"the recommended strength, at most {_STRONGEST:g}, comes to a dose of "
            f"{total:.2g} in {total_steps} steps at this learning rate, so CAGE will "
            f"hardly act. The dose is the sum of learning rate times strength; {aim} "
            f"{dose:g}, and gains begin at about 0.2. Train longer, or let the "
            f"learning rate end higher. strength=ramp_to_dose(...) gives the whole "
            f"dose by a stronger pull, which did harm in fine-tuning.",
        )


def resolve_strength(
    learning_rate: ScalarOrSchedule | None,
    strength: ScalarOrSchedule | None,
    total_steps: int | None,
    curvature: Curvature | None,
    *,
    coupled: bool = False,
) -> tuple[ScalarOrSchedule, Curvature | None]:
    """Returns the given strength and curvature, or else the recommended ones."""
    if strength is not None:
        if total_steps is not None:
            raise ValueError(
                f"`total_steps` must not come with a `strength`; got {total_steps} and "
                f"{strength!r}. Leave one of them out."
            )
        return strength, curvature
    if total_steps is None or learning_rate is None:
        raise TypeError(
            "`total_steps` must be given if `strength` is not; got neither. Use the "
            "number of optimizer steps, for the recommended strength."
        )
    if isinstance(learning_rate, jax.Array) or isinstance(total_steps, jax.Array):
        raise TypeError(
            "`total_steps` must be an int, and come with the learning rate of all "
            "steps, a number or a schedule; got an array, which under "
            "optax.inject_hyperparams is the value of one step. Use "
            "**recommended(learning_rate, total_steps) in place of `total_steps`, or "
            "int(total_steps) if only that is an array."
        )
    found = recommended(learning_rate, total_steps, coupled=coupled)
    return found["strength"], curvature or found["curvature"]
