"""The protocol of a source of curvature, and what one is given at a step."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cage_jax.arrays.factors import Factors
from cage_jax.arrays.names import names_checked
from cage_jax.core.rules import Rules
from cage_jax.optim.schedules import ScalarOrSchedule, value_at
from cage_jax.quantizers.quantizer import Quantizer

Arrays = Mapping[str, jax.Array]
Quantized = Mapping[str, tuple[Quantizer, jax.Array]]

# Steps before the pull from which on it is near.
_NEAR = 100


class Step(NamedTuple):
    """The inputs of a source at one step.

    Attributes:
      tree: the tree of gradients that the optimizer is given.
      params: the parameters at which the gradients were taken.
      rules: which parameters are quantized, and how.
      inner_state: the state of the optimizer before the correction, or None.
      extra_args: the other arguments of `update`, such as `obj_fn`.
      is_near: whether the pull is on, or begins within 100 steps, a boolean scalar.
    """

    tree: Any
    params: Any
    rules: Rules
    inner_state: Any
    extra_args: dict[str, Any]
    is_near: jax.Array | bool = True

    @property
    def gradients(self) -> dict[str, jax.Array]:
        """Gradients of the quantized parameters, by path."""
        return self.by_path(self.tree)

    @property
    def quantized(self) -> Quantized:
        """Quantizers and parameters by path, of the quantized parameters."""
        return self.rules.quantized(self.params)

    @property
    def quantizers(self) -> dict[str, Quantizer]:
        """Quantizers of the quantized parameters, by path."""
        return {path: quantizer for path, (quantizer, _) in self.quantized.items()}

    def by_path(self, tree: Any) -> dict[str, jax.Array]:
        """Returns the leaves of `tree` at the paths of the quantized parameters."""
        return {path: leaf for path, (_, leaf) in self.rules.quantized(tree).items()}

    def with_paths(self, arrays: Arrays) -> Any:
        """Returns a tree like the parameters: `arrays` by path, zeros elsewhere."""
        return self.rules.map(
            lambda path, quantizer, x, zero: arrays.get(path, zero).astype(x.dtype),
            self.params,
            jax.tree.map(jnp.zeros_like, self.params),
        )

    def extra(self, name: str, what: str) -> Any:
        """Returns one of the extra arguments.

        Raises:
          ValueError: if it was not given.
        """
        value = self.extra_args.get(name)
        if value is None:
            raise ValueError(
                f"this curvature needs `{name}`, {what}; got None. Use "
                f"tx.update(updates, state, params, {name}=...)."
            )
        return value


class Curvature(NamedTuple):
    """A source of curvature; an Optax optimizer has the first two of its functions.

    Attributes:
      init: maps quantizers and arrays by path to the state of the source.
      update: maps the state and a `Step` to the next state, once a step.
      weigh: maps errors by path, the state and the `Step` to weighted errors, along
        which the weights are pulled. It is computed only while the pull is on.
      is_elementwise: whether `weigh` only multiplies errors by weights that are known.
        It is then computed at every step, in one pass with the optimizer.
      weights: maps the state, quantizers and arrays by path to those weights by path,
        where each is a product of two vectors; otherwise None.
      times_root: whether errors are multiplied by what an optimizer after the
        correction divides by, such as Adam.
    """

    init: Callable[[Quantized], Any]
    update: Callable[[Any, Step], Any]
    weigh: Callable[[dict[str, jax.Array], Any, Step], dict[str, jax.Array]]
    is_elementwise: bool = False
    weights: Callable[[Any, Quantized], dict[str, Factors]] | None = None
    times_root: bool = False


def step_source(
    curvature: Curvature,
    state: Any,
    strength: ScalarOrSchedule,
    count: jax.Array,
    *inputs: Any,
) -> tuple[Step, Any]:
    """Returns the `Step` of these inputs, the first five, and the state after it."""
    step = Step._make([*inputs, _is_near(strength, count)])
    return step, curvature.update(state, step)


def _is_near(strength, count):
    """Returns whether the strength is positive at a step or will be 100 steps later."""
    now, soon = (jnp.asarray(value_at(strength, n)) for n in (count, count + _NEAR))
    # A number is made to depend on the count: compilers would fold a condition.
    return ((now != 0) | (soon != 0)) & (count >= 0)


@names_checked
def stateless_source(
    function: Callable[[Arrays, Step], dict[str, jax.Array]],
) -> Curvature:
    """Creates a source without a state, which weights errors by `function`.

    Args:
      function: maps errors by path, float32 or wider, and a `Step` to weighted errors,
        along which the weights are pulled.

    Example:
      >>> import cage_jax as cage
      >>> from cage_jax import curvature
      >>> rules = cage.Rules([(r".*kernel", cage.int4())])
      >>> double = curvature.stateless_source(
      ...     lambda errors, step: {path: 2 * e for path, e in errors.items()})
      >>> tx = cage.coupled(rules, strength=0.5, curvature=double)
    """
    return Curvature(
        lambda params: (),
        lambda state, step: state,
        lambda errors, state, step: function(errors, step),
    )


@names_checked
def apply_weights(
    weights: jax.Array, error: jax.Array, quantizer: Quantizer
) -> jax.Array:
    """Multiplies an error by weights given in the basis of its quantizer."""
    return quantizer.basis(error.shape).within(lambda e: weights * e, error)


def mean_of_all(arrays: Arrays) -> jax.Array:
    """Returns the mean of all entries of all arrays, float32.

    Inside a `shard_map` it is over the parts on all devices.
    """
    total, entries = jnp.float32(0), 0
    for x in arrays.values():
        axes = tuple(jax.typeof(x).manual_axis_type.varying)
        own = jnp.sum(x, dtype=jnp.float32)
        total += lax.psum(own, axes) if axes else own
        entries += x.size * math.prod(map(lax.axis_size, axes))
    return total / max(entries, 1)
