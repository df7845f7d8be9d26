"""The recommended strength and curvature."""

import math
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
_DOSE, _SILENCE = 0.7, 0.5
# The most that a matrix is pulled at the end, as a root mean square and in learning
# rates, of which Adam moves a weight by at most about one. On pretrained models a tenth
# to a half were best, and three did harm.
_MOST = 0.5
# A root mean square error of matrices of pretrained models at 2 to 4 bits, of which a
# dose is estimated where no parameters are known.
_USUAL_ERROR = 1 / 30
# In measurements CAGE did nothing at a dose of 0.01 and gained from 0.05 on.
LEAST_DOSE = 0.05


@names_checked
def recommended(
    learning_rate: ScalarOrSchedule,
    total_steps: int,
    dose: float = _DOSE,
    silence: float = _SILENCE,
    coupled: bool = False,
) -> dict[str, Any]:
    """Returns a strength and a curvature to begin with, with nothing to tune.

    The strength rises with the cube of the steps after the silence. It is set by a dose
    rather than a peak, so that it suits any learning rate and number of steps. The
    pull is strongest where squares of gradients are large, by input and by output of
    each matrix, and at most three times the mean. This needs no further gradients, and
    takes 8 bytes for each input and each output. Gradients are read at every tenth
    step, from 100 steps before the pull begins. No step moves a weight beyond its grid
    point.

    No matrix is pulled by more than half of the learning rate at the end, root mean
    square, with the error that it has when the state is made. With Adam that is half of
    what the optimizer moves a weight at most; a stronger pull decides where weights go
    in its place. So the dose is smaller for the small learning rates of fine-tuning,
    for few steps, and for a learning rate that ends near 0. Warns if CAGE will hardly
    act. After `total_steps` the strength keeps its last value.

    Args:
      learning_rate: the optimizer's, a number or a schedule.
      total_steps: length of the training in optimizer updates (see `cage_adamw`).
      dose: as in `ramp_to_dose`, for matrices whose pull stays within the bound.
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
    `silence_then_ramp(total_steps)` and no curvature. The bound of the pull is that of
    benchmarks/quality/README.md.
    """
    limited, peak = _ramp(learning_rate, total_steps, dose, silence)
    _warn_of_little(learning_rate, total_steps, dose, silence)
    source = fisher(
        factored=True,
        largest=_LARGEST,
        times_root=coupled,
        largest_error=_MOST / peak,
    )

    def strength(count):
        return limited(count, value_at(learning_rate, count))

    return {"strength": strength, "curvature": source}


def likely_dose(
    learning_rate: ScalarOrSchedule,
    total_steps: int,
    dose: float = _DOSE,
    silence: float = _SILENCE,
) -> float:
    """Returns the dose of the recommended pull where errors are of the usual size.

    It is NaN if the learning rate is traced.
    """
    limited, peak = _ramp(learning_rate, total_steps, dose, silence)
    counts = steps(total_steps)
    rates = values_at("learning_rate", learning_rate, counts)
    strengths = jax.jit(jax.vmap(limited))(counts, rates)
    if is_traced(strengths):
        return math.nan
    share = min(1.0, float(_MOST / peak) / _USUAL_ERROR)
    return share * sum_of_products(rates, strengths)


def _ramp(learning_rate, total_steps, dose, silence):
    """Returns the strength, of a count and its learning rate, and its last value."""
    ramp = ramp_to_dose(learning_rate, total_steps, dose, silence)

    def limited(count, rate):
        # A weight whose curvature is at its bound must not be moved beyond the grid.
        most = 1 / (_LARGEST * jnp.where(rate > 0, rate, jnp.inf))
        return jnp.where(rate > 0, jnp.minimum(ramp(count), most), ramp(count))

    peak = jnp.maximum(ramp(jnp.int32(total_steps - 1)), 1e-9)
    return limited, peak if is_traced(peak) else float(peak)


def _warn_of_little(learning_rate, total_steps, dose, silence):
    """Warns if the bound of the pull leaves little of the dose."""
    likely = likely_dose(learning_rate, total_steps, dose, silence)
    if likely < min(dose, LEAST_DOSE):  # not if it is NaN
        warn(
            f"the recommended pull, at most half of a learning rate, comes to a dose "
            f"of about {likely:.2g} in {total_steps} steps at this learning rate, so "
            f"CAGE will hardly act. The dose is the sum of learning rate times "
            f"strength, and gains were seen from about {LEAST_DOSE:g} on. Train "
            f"longer, or let the learning rate end higher. strength=ramp_to_dose(...) "
            f"gives the whole dose by a stronger pull, which did harm in fine-tuning."
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
