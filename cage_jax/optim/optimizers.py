"""Ready-made optimizers with the CAGE correction in the right place."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import optax

from cage_jax.arrays.adamw import AdamW
from cage_jax.arrays.checks import check_choice
from cage_jax.arrays.names import names_checked
from cage_jax.core.rules import Rules, check_rules
from cage_jax.optim.correction import FirstState
from cage_jax.optim.curvature import Curvature
from cage_jax.optim.fused_adamw import FusedAdamW, FusedOptions, with_fused_step
from cage_jax.optim.placements import decoupled, post_step
from cage_jax.optim.recommended import resolve_strength
from cage_jax.optim.schedules import ScalarOrSchedule, check_learning_rate, with_remedy

Placement = Literal["decoupled", "post_step"]


@names_checked
def cage_adamw(
    learning_rate: ScalarOrSchedule,
    rules: Rules,
    *,
    strength: ScalarOrSchedule | None = None,
    total_steps: int | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: Any = None,
    weight_decay: float = 1e-4,
    mask: Any | Callable | None = None,
    nesterov: bool = False,
    placement: Placement = "decoupled",
    curvature: Curvature | None = None,
    freeze_scale: bool = False,
    statistics: bool | int = False,
) -> FusedAdamW:
    """Creates AdamW with the decoupled CAGE correction, the paper's default.

    x <- x - lr * (m / (sqrt(v) + eps) + weight_decay * x + strength * (x - Q(x)))

    With strength 0 it equals `optax.adamw`, to the bit. All arguments after `rules` are
    given by name.

    Args:
      learning_rate: a number or a schedule of the step count.
      rules: which parameters are quantized, and how.
      strength: lambda, a number or a schedule such as the paper's,
        `silence_then_ramp(steps)`; None for the recommended schedule of `total_steps`.
      b1, b2, eps, eps_root, mu_dtype, weight_decay, mask, nesterov: as in
        `optax.adamw`; the paper uses b1=0.9, b2=0.95, weight_decay=0.1. `mask` says
        which parameters decay.
      placement: "decoupled" takes the error at the weights before the step;
        "post_step" follows the order of the authors' PyTorch code. See the functions
        of these names.
      total_steps: length of the training in optimizer updates, in place of `strength`;
        under `optax.MultiSteps` that is batches divided by `every_k_schedule`.
        Strength and curvature are then those of `recommended`.
      curvature, freeze_scale, statistics: as in `coupled`.

    Returns:
      A transformation. Clip gradients before it:
      `optax.chain(optax.clip_by_global_norm(1.0), cage_adamw(...))`. Its `fused_step`
      takes the same step in place, `(gradients, state, params) -> (params, state)`,
      with a kernel for each large parameter where it runs on one TPU.

    Raises:
      TypeError, ValueError: as in `decoupled` and `recommended`; also if neither or
        both of `strength` and `total_steps` are given.

    Example:
      >>> import cage_jax as cage
      >>> rules = cage.Rules([(r".*kernel", cage.int4(group_size=32))])
      >>> tx = cage.cage_adamw(1e-3, rules, total_steps=1000)

      As in the paper:

      >>> strength = cage.silence_then_ramp(total_steps=1000)
      >>> tx = cage.cage_adamw(1e-3, rules, strength=strength, weight_decay=0.1)

    Source: CAGE, arXiv 2510.18784, algorithm 1; AdamW, arXiv 1711.05101.
    """
    check_learning_rate(learning_rate)
    check_rules(rules)
    adamw = optax.adamw(
        with_remedy(learning_rate),
        b1=b1,
        b2=b2,
        eps=eps,
        eps_root=eps_root,
        mu_dtype=mu_dtype,
        weight_decay=weight_decay,
        mask=mask,
        nesterov=nesterov,
    )
    remedy = (
        "Use 'decoupled'; for the coupled form use optax.chain(coupled(rules, "
        "strength=strength), optax.adamw(learning_rate))."
    )
    check_choice("placement", placement, get_args(Placement), remedy)
    strength, curvature = resolve_strength(
        learning_rate, strength, total_steps, curvature
    )
    place = decoupled if placement == "decoupled" else post_step
    transformation = place(
        adamw,
        rules,
        learning_rate=learning_rate,
        strength=strength,
        curvature=curvature,
        freeze_scale=freeze_scale,
        statistics=statistics,
    )
    numbers = b1, b2, eps, eps_root, weight_decay
    known = not nesterov and all(isinstance(n, (int, float)) for n in numbers)
    fused = AdamW(*numbers) if known else None
    return with_fused_step(
        transformation,
        FusedOptions(
            rules,
            strength,
            learning_rate,
            fused,
            mask,
            placement == "post_step",
            curvature,
            FirstState(rules, curvature, freeze_scale, statistics),
        ),
    )


@names_checked
def cage_sgd(
    learning_rate: ScalarOrSchedule,
    rules: Rules,
    *,
    strength: ScalarOrSchedule | None = None,
    total_steps: int | None = None,
    momentum: float | None = None,
    nesterov: bool = False,
    curvature: Curvature | None = None,
    freeze_scale: bool = False,
    statistics: bool | int = False,
) -> optax.GradientTransformationExtraArgs:
    """Creates SGD with the decoupled CAGE correction, which stays out of the momentum.

    x <- x - lr * (momentum of the gradient + strength * (x - Q(x)))

    With strength 0 it equals `optax.sgd`, to the bit. Without momentum it is the
    coupled form, and so oscillation dampening (arXiv 2203.11086) with half its
    strength. All arguments after `rules` are given by name.

    Args:
      learning_rate: a number or a schedule of the step count.
      rules: which parameters are quantized, and how.
      strength: lambda, a number or a schedule such as the paper's,
        `silence_then_ramp(steps)`; None for the recommended schedule of `total_steps`.
      momentum, nesterov: as in `optax.sgd`.
      total_steps: as in `cage_adamw`.
      curvature, freeze_scale, statistics: as in `coupled`.

    Returns:
      A transformation.

    Raises:
      TypeError, ValueError: as in `cage_adamw`.

    Example:
      >>> import cage_jax as cage
      >>> rules = cage.Rules([(r".*kernel", cage.int4())])
      >>> tx = cage.cage_sgd(0.1, rules, momentum=0.9, total_steps=1000)

    Source: CAGE, arXiv 2510.18784.
    """
    check_learning_rate(learning_rate)
    check_rules(rules)
    strength, curvature = resolve_strength(
        learning_rate, strength, total_steps, curvature
    )
    return decoupled(
        optax.sgd(with_remedy(learning_rate), momentum=momentum, nesterov=nesterov),
        rules,
        learning_rate=learning_rate,
        strength=strength,
        curvature=curvature,
        freeze_scale=freeze_scale,
        statistics=statistics,
    )
