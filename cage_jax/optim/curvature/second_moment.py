"""The second moment that Adam keeps."""

import jax.numpy as jnp
import optax

from cage_jax.arrays.names import names_checked
from cage_jax.arrays.paths import nodes_of_type
from cage_jax.optim.curvature.source import Curvature, mean_of_all, stateless_source


@names_checked
def second_moment(b2: float = 0.999, *, relative: bool = False) -> Curvature:
    """Weights errors by the root of Adam's second moment.

    The moment is one that the optimizer keeps anyway. It is read from the state of the
    inner optimizer of `decoupled`, `post_step` or `cage_adamw`. Nothing else is kept,
    and nothing is rotated.

    Args:
      b2: the optimizer's decay of the moment, to debias it.
      relative: as in `diagonal`.

    Raises:
      ValueError: in `update`, if the optimizer has no second moment.
    """

    def weigh(errors, step):
        states = nodes_of_type(step.inner_state, optax.ScaleByAdamState)
        if len(states) != 1:
            raise ValueError(
                f"`curvature` second_moment() needs exactly one Adam state in the "
                f"inner optimizer; got {len(states)}. Use it in cage_adamw(...), or "
                f"in decoupled(optax.adamw(lr), ...)."
            )
        (adam,) = states
        weights = {
            path: jnp.sqrt(v / (1 - b2 ** adam.count.astype(v.dtype)))
            for path, v in step.by_path(adam.nu).items()
        }
        unit = mean_of_all(weights) if relative else 1
        weighted = {}
        for path, error in errors.items():
            h = weights[path] / unit
            h = jnp.where(jnp.isfinite(h), h, 1).astype(error.dtype)
            weighted[path] = h * error
        return weighted

    return stateless_source(weigh)
