"""Training of scales alone."""

from collections.abc import Mapping

import optax

from cage_jax.arrays.names import names_checked


@names_checked
def only_scales(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Trains the grids that `with_grids` put beside the parameters, and nothing else.

    The updates of parameters are zeros, and the optimizer keeps no state for them.

    Args:
      optimizer: what trains the grids, such as `optax.adam(1e-4)`. It should have no
        weight decay, which would pull scales to zero.

    Returns:
      A transformation for `{"params": ..., "grids": ...}`.

    Raises:
      ValueError: by its `init`, for a tree without grids.

    Example:
      >>> import cage_jax as cage
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> rules = cage.Rules([(r".*kernel", cage.lsq(4))])
      >>> variables = cage.with_grids({"kernel": jnp.ones((8, 4))}, rules)
      >>> tx = cage.finetuning.only_scales(optax.sgd(0.1))
      >>> ones = jax.tree.map(jnp.ones_like, variables)
      >>> updates, _ = tx.update(ones, tx.init(variables), variables)
      >>> float(updates["params"]["kernel"].sum())
      0.0
      >>> round(float(updates["grids"]["kernel"].scale[0, 0]), 3)
      -0.1

    Source: EfficientQAT, arXiv 2407.11062, its second phase.
    """
    parts = {"grids": optimizer, "params": optax.set_to_zero()}
    return optax.partition(parts, _labels)


def _labels(variables):
    if not isinstance(variables, Mapping) or set(variables) != {"params", "grids"}:
        raise ValueError(
            f"`variables` must be parameters with grids beside them; got "
            f"{type(variables).__name__}. Use with_grids(params, rules)."
        )
    return {name: name for name in variables}
